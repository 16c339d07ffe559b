"""All callbacks of the package on one Trainer: whatever their order, the same numbers, and the same refusals."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_mup as mup
from lightning_mup.analysis.coordinate import CoordinateReport, fit_slopes
from lightning_mup.callbacks.quantities import Quantity
from tests.lightning.helpers import Net, same, trainer, values
from tests.lightning.test_resume import Resumable
from tests.models import MLP, generator

WIDTH, STEPS, SAVED_AT = 32, 5, 3
ROLES = {"net.0.weight": "input", "net.2.weight": "hidden", "net.4.weight": "output"}
RATES, FRACTION, BETAS = (0.02, 0.01), 4e-3, (0.9, 0.999)
SETTINGS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
PROBE = [torch.randn(8, 8, generator=generator(5)), torch.arange(8) % 4]
BF16 = "bf16-mixed"
PRECISIONS = ["32-true", BF16]


def two_groups(module: L.LightningModule, **settings: Any) -> dict[str, Any]:
    """Return AdamW with a rate and a decay per group, under a schedule."""
    hidden = [p for name, p in module.named_parameters() if name.startswith("net.2")]
    others = [p for name, p in module.named_parameters() if not name.startswith("net.2")]
    groups = [{"params": hidden, "lr": RATES[0], "weight_decay": 0.2}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=RATES[1], weight_decay=0.1, betas=BETAS, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Tiny(Net):
    """Draws random numbers in training, which a probe must not use up, and goes on in the middle of an epoch."""

    def __init__(self, width: int = WIDTH, make: Callable[[L.LightningModule], Any] = two_groups) -> None:
        super().__init__(width, make)

    def build(self, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Dropout(0.1), nn.Linear(width, 4)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(64, 8, generator=generator(0))
        return Resumable(TensorDataset(x, x.argmax(-1) % 4))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


BUILD: dict[str, Callable[[], Callback]] = {
    "parametrize": lambda: mup.Parametrize(lambda: Tiny(16)),
    "decay": lambda: mup.WeightDecay(FRACTION),
    "spectral": lambda: mup.SpectralNormalization(readout="spectral", warmup_steps=2),
    "grafting": lambda: mup.Grafting(direction=sgd),
    "watch": lambda: mup.WatchUpdates(2, quantities=get_args(Quantity), per="matrix"),
    "watch on a given batch": lambda: mup.WatchUpdates(2, quantities=get_args(Quantity), per="matrix", probe=PROBE),
}
SETS = {
    "spectral": ("parametrize", "decay", "spectral", "watch"),
    "grafting": ("parametrize", "decay", "grafting", "watch"),
}


class Seen(Callback):
    """Notes what the Trainer holds after each watched step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        found = {key: float(value) for key, value in ran.callback_metrics.items() if "/" in key}
        if found and (not self.metrics or found != self.metrics[-1]):
            self.metrics.append(found)


def fitted(
    order: Sequence[str], *others: Callback, dropout: float = 0.1, resume: str | None = None, **settings: Any
) -> tuple[Tiny, Seen]:
    torch.manual_seed(0)
    module, seen = Tiny(), Seen()
    module.net[3].p = dropout
    callbacks = [*(BUILD[name]() for name in order), *others, seen]
    ran = trainer(*callbacks, steps=STEPS, **{**SETTINGS, **settings})
    ran.fit(module, ckpt_path=resume)
    assert ran.global_step == STEPS
    return module, seen


def states_equal(one: Any, other: Any) -> bool:
    """Whether two states of an optimizer are the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(states_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(states_equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_same_run(one: tuple[Tiny, Seen], other: tuple[Tiny, Seen], what: object) -> None:
    assert same(one[0], other[0]), what
    assert one[1].metrics[-1] == other[1].metrics[-1], what
    states = [module.trainer.optimizers[0].state_dict() for module, _ in (one, other)]
    assert states_equal(*states), what


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_every_order_gives_the_same_bits(kinds: tuple[str, ...], precision: str) -> None:
    first = fitted(kinds, precision=precision)
    assert len(first[1].metrics) == STEPS // 2
    assert all(map(math.isfinite, first[1].metrics[-1].values()))
    assert all(any(key.startswith(name) for key in first[1].metrics[-1]) for name in get_args(Quantity))
    for order in itertools.permutations(kinds):
        found = fitted(order, precision=precision)
        assert_same_run(first, found, order)
        assert first[1].metrics == found[1].metrics, order


@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_each_of_them_but_the_watch_changes_the_run(kinds: tuple[str, ...]) -> None:
    """The comparison above can fail."""
    whole, _ = fitted(kinds)
    for left_out in kinds[1:]:
        found, _ = fitted([name for name in kinds if name != left_out])
        assert same(whole, found) == (left_out == "watch"), left_out


@pytest.mark.parametrize("change", [{"accumulate_grad_batches": 1}, {"gradient_clip_val": None}, {"precision": BF16}])
@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_each_setting_of_the_trainer_changes_the_run(kinds: tuple[str, ...], change: dict[str, Any]) -> None:
    """Or the orders would have been compared without it."""
    assert not same(fitted(kinds)[0], fitted(kinds, **change)[0])


def test_watches_of_several_periods_stand_together() -> None:
    """They log side by side and train nothing."""
    often = mup.WatchUpdates(1, quantities=["update/spectral_norm"])
    seldom = mup.WatchUpdates(4, quantities=["weight/stable_rank"])
    plain, _ = fitted(("parametrize", "decay", "spectral"))
    for pair in ((often, seldom), (seldom, often)):
        found, seen = fitted(("parametrize", "decay", "spectral"), *map(copy.copy, pair))
        assert same(plain, found)
        assert len(seen.metrics) == STEPS
        assert {key.split("/")[1] for key in seen.metrics[0]} == {"spectral_norm"}
        assert {key.split("/")[1] for key in seen.metrics[-1]} == {"spectral_norm", "stable_rank"}


# -- the documented order --------------------------------------------------------------------------------------------


class Double(Tiny):
    """In float64, without chance."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.double()

    def build(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


class Recorder(Callback):
    """Notes the weights at the start and the batches as they come."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.batches: list[list[Tensor]] = []

    def on_train_start(self, ran: L.Trainer, module: L.LightningModule) -> None:
        self.start = values(module)

    def on_train_batch_start(self, ran: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)


def by_hand(start: dict[str, Tensor], batches: list[list[Tensor]]) -> dict[str, Tensor]:
    """Return the weights after all steps: AdamW's direction, normalized, times the rate, plus decay.

    Twice as wide as the base, muP divides Adam's epsilon by 2 wherever the outputs grow, and independent decay by 2
    everywhere but in the readout's bias; a vector's rate stays, and matrices get theirs from the normalization.
    """
    module = Double()
    module.load_state_dict(start)
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = copy.deepcopy(first)
    for step in range(STEPS):
        module.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (module.loss(batch) / 2).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        shrunk = min(1.0, SETTINGS["gradient_clip_val"] / (total + 1e-6))
        schedule = (1 + math.cos(math.pi * step / (2 * STEPS))) / 2
        for name, p in module.named_parameters():
            g = grads[name] * shrunk
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g.square()
            m, v = (
                moment / (1 - beta ** (step + 1))
                for moment, beta in zip((first[name], second[name]), BETAS, strict=True)
            )
            eps = 1e-8 / (1 if name.startswith("net.4") else WIDTH / 16)
            direction = m / (v.sqrt() + eps)
            if p.ndim == 2:
                direction *= math.sqrt(p.shape[0] / p.shape[1]) / torch.linalg.matrix_norm(direction, ord=2)
            rate = RATES[0 if name.startswith("net.2") else 1]
            fraction = FRACTION / (1 if name == "net.4.bias" else WIDTH / 16)
            p.data.copy_(p.data - schedule * (rate * direction + fraction * p.data))
    return values(module)


def test_the_step_is_direction_normalized_times_rate_plus_decay() -> None:
    """In float64, to the digits to which hundreds of power iterations find a singular value."""
    recorder, module = Recorder(), Double()
    exact = mup.SpectralNormalization(readout="spectral", iterations=500, warmup_steps=0)
    plan, decay = mup.Parametrize(lambda: Double(16)), mup.WeightDecay(FRACTION)
    watch = mup.WatchUpdates(1, quantities=get_args(Quantity))
    trainer(exact, watch, decay, plan, recorder, steps=STEPS, precision="64-true", **SETTINGS).fit(module)
    assert len(recorder.batches) == 2 * STEPS
    wanted = by_hand(recorder.start, recorder.batches)
    for name, p in module.named_parameters():
        assert not torch.equal(recorder.start[name], p.detach())
        torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_stopped_and_resumed_is_bit_identical(kinds: tuple[str, ...], precision: str, tmp_path: Path) -> None:
    """Even where the run goes on with its callbacks in another order."""
    # Left to itself, the watch of a run that goes on takes the first batch that it sees for its passes.
    kinds = (*kinds[:-1], "watch on a given batch")

    class StopsError(Exception):
        pass

    class Stops(Callback):
        def on_train_batch_start(self, ran: L.Trainer, *args: Any) -> None:
            if ran.global_step == SAVED_AT + 1:
                raise StopsError

    def run(order: Sequence[str], *others: Callback, resume: str | None = None) -> tuple[Tiny, Seen]:
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=SAVED_AT)
        settings = {"precision": precision, "enable_checkpointing": True}
        return fitted(order, saving, *others, dropout=0.0, resume=resume, **settings)  # nobody saves random states

    with pytest.raises(StopsError):
        run(kinds, Stops())
    checkpoint = tmp_path / f"step={SAVED_AT}.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == SAVED_AT
    checkpoint = checkpoint.rename(tmp_path / "stopped.ckpt")
    whole = run(kinds)
    for order in (kinds, kinds[::-1], kinds[2:] + kinds[:2]):
        resumed = run(order, resume=str(checkpoint))
        assert_same_run(whole, resumed, order)
        assert resumed[1].metrics == whole[1].metrics[1:], order


# -- what cannot be --------------------------------------------------------------------------------------------------


def assert_refused_in_every_order(build: Callable[[], list[Callback]], message: str) -> None:
    """Whatever the order, the same error, and nothing of ours stays on the module."""
    for order in itertools.permutations(range(len(build()))):
        callbacks, module = build(), Tiny()
        with pytest.raises(ValueError, match=message):
            trainer(*(callbacks[i] for i in order), **SETTINGS).fit(module)
        assert not {"setup", "configure_optimizers"} & module.__dict__.keys(), order
        assert not any(part._forward_hooks for part in module.modules()), order


def built(*names: str) -> Callable[[], list[Callback]]:
    return lambda: [BUILD[name]() for name in names]


WRONG: dict[str, tuple[Callable[[], list[Callback]], str]] = {
    "two lengths": (
        built("parametrize", "decay", "spectral", "grafting"),
        r"Grafted gives steps a length, which SpectralNormalization replaces; leave out one of the two",
    ),
    "two lengths, without a plan": (
        built("spectral", "grafting", "watch"),
        r"Grafted gives steps a length, which SpectralNormalization replaces; leave out one of the two",
    ),
    "two decays": (
        built("parametrize", "decay", "decay", "spectral"),
        r"there are 2 WeightDecay callbacks; weights decay once a step, keep one",
    ),
    "two plans": (
        built("parametrize", "parametrize", "decay", "spectral"),
        r"there are 2 Parametrize callbacks; a module has one plan, keep one",
    ),
    "two normalizations": (
        built("parametrize", "spectral", "spectral", "decay"),
        r"there are 2 SpectralNormalization callbacks; a step has one size, keep one",
    ),
    "two grafts": (
        built("parametrize", "grafting", "grafting", "decay"),
        r"there are 2 Grafting callbacks; .*keep one",
    ),
    "a supplied optimizer that decays": (
        lambda: [
            mup.Parametrize(lambda: Tiny(16), method="adamw", lr=0.01, weight_decay=1e-3),
            *built("decay", "spectral", "watch")(),
        ],
        r"Parametrize\(weight_decay=0.001\) and WeightDecay would decay the same weights; leave weight_decay out",
    ),
    "a supplied optimizer, grafted": (
        lambda: [mup.Parametrize(lambda: Tiny(16), method="sgd", lr=0.1), *built("decay", "grafting", "watch")()],
        r"Grafting found no optimizer, since Parametrize supplies that of Tiny; leave Grafting out and give options=",
    ),
    "two bases": (
        lambda: [mup.WeightDecay(FRACTION, base=lambda: Tiny(16)), *built("parametrize", "spectral", "watch")()],
        r"Parametrize has the base; leave out base=.* of WeightDecay",
    ),
    "no base": (
        built("decay", "spectral", "watch"),
        r"WeightDecay .* must know the base's sizes; give base=.*Parametrize",
    ),
    "roles beside a plan": (
        lambda: [mup.SpectralNormalization(roles=ROLES), *built("parametrize", "decay", "watch")()],
        r"Parametrize has the roles; give roles=.* there",
    ),
    "watched roles beside a plan": (
        lambda: [mup.WatchUpdates(roles=ROLES), *built("parametrize", "decay", "spectral")()],
        r"roles=.* are those of the plan; give them to Parametrize\(roles=...\) alone",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_in_every_order(case: str) -> None:
    assert_refused_in_every_order(*WRONG[case])


def test_a_module_trains_after_a_refusal() -> None:
    """As one that was never refused."""
    trained = []
    for refused in (False, True):
        torch.manual_seed(0)
        trained.append(Tiny())
        if refused:
            with pytest.raises(ValueError, match="leave out one of the two"):
                trainer(mup.SpectralNormalization(), mup.Grafting(direction=sgd)).fit(trained[-1])
        torch.manual_seed(1)
        trainer(*(BUILD[name]() for name in SETS["spectral"]), steps=2).fit(trained[-1])
    assert same(*trained)


# -- steps that are skipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["spectral", "grafting"])
def test_a_step_that_the_optimizer_skips_does_not_decay(other: str) -> None:
    def make(module: L.LightningModule) -> torch.optim.Optimizer:
        return mup.AdamW(module.parameters(), lr=RATES[1], nonfinite="skip")

    class Overflow(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_after_backward(self, ran: L.Trainer, module: L.LightningModule) -> None:
            if ran.global_step == 1:
                module.net[0].weight.grad[0, 0] = float("inf")

        def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
            self.seen.append(values(module))

    graft = mup.Grafting(direction=lambda params: mup.SGD(params, lr=0.1, nonfinite="skip"))
    overflow, callback = Overflow(), graft if other == "grafting" else BUILD[other]()
    trainer(BUILD["parametrize"](), BUILD["decay"](), callback, overflow, steps=3).fit(Tiny(make=make))
    alike = [
        all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(overflow.seen, overflow.seen[1:], strict=False)
    ]
    assert alike == [True, False]


# -- width -----------------------------------------------------------------------------------------------------------


def slopes(rules: str, *others: Callable[[], Callback]) -> CoordinateReport:
    """Train AdamW at three widths; slopes at step 10."""
    records = []
    for width in (64, 128, 256):
        torch.manual_seed(0)
        roles = ROLES if width == 64 else {}  # nothing grows at the base
        base = "self" if width == 64 else {"width": 64}
        check = mup.CoordinateCheck(10, size=width)
        plan = mup.Parametrize(base, rules=rules, roles=roles)
        module = MLP(width, depth=2, lr=3e-3, optimizer="adamw")
        trainer(*(build() for build in others), plan, check, steps=10, max_epochs=-1).fit(module)
        records += [record for record in check.records if record.step == 10]
    return fit_slopes(records, tolerance=0.15)


def test_changes_stay_flat_over_width_with_normalized_steps() -> None:
    report = slopes("mup", mup.SpectralNormalization)
    assert report.passed, report.table()
    updates = [abs(s.slope) for s in report.slopes if s.kind == "update" and s.layer.endswith("weight")]
    assert max(updates) < 0.02  # the norm is what it is told to be
    assert not slopes("sp").passed, "the check can fail"
