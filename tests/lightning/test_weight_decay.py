"""Independent weight decay: what is removed, when, from what, and what cannot stand beside it."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from lightning_mup import AdamW, Parametrize, Role, all_methods
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.coupling import coupled_weight_decay, independent_weight_decay
from lightning_mup.core.decay import all_decays, find_decay
from lightning_mup.core.decay_schedules import SCHEDULES
from tests.lightning.helpers import BASE, Net, same, trainer, values
from tests.lightning.test_resume import STEPS, Trained

LR, FRACTION, WIDTH = 0.01, 4e-3, 32
RATIO = WIDTH / BASE["width"]
FACTORS = [0.5, 1.0, 0.25]  # of the learning-rate schedule
CLASSES = sorted(
    {cls for m in all_methods().values() for cls in m.optimizers}, key=lambda c: (c.__module__, c.__name__)
)
POLICIES = [*sorted(all_decays()), -0.75]
EXPONENTS: dict[Any, float] = {"width": -1, "constant": 0, "sqrt": -0.5, "timescale": 0, -0.75: -0.75}
VECTORS = {"net.0.bias", "net.2.bias"}
READOUT = {"net.4.bias"}  # its width does not grow


class Still(Net):
    """Every gradient is zero, so that decay alone moves the weights."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return sum((0.0 * p.sum() for p in self.parameters() if p.requires_grad), torch.zeros((), requires_grad=True))


def made(cls: type[torch.optim.Optimizer], lr: float = LR, **kwargs: Any) -> Callable[[L.LightningModule], Any]:
    matrices_only = cls is torch.optim.Muon

    def make(module: L.LightningModule) -> Any:
        params = [p for p in module.parameters() if p.dim() > 1 or not matrices_only]
        optimizer = cls(params, lr=lr, **kwargs)
        schedule = LambdaLR(optimizer, lambda step: FACTORS[step % 3])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return make


def decaying(policy: Any = "width", **kwargs: Any) -> WeightDecay:
    amount = {"timescale": 1 / (FRACTION * len(FACTORS))} if policy == "timescale" else {"weight_decay": FRACTION}
    return WeightDecay(**{**amount, **kwargs}, policy=policy)


def fitted(module: L.LightningModule, *callbacks: Callback, steps: int = 3, **kwargs: Any) -> dict[str, Tensor]:
    """Return the weights after training over those at its start."""

    class Start(Callback):
        def on_train_start(self, ran: L.Trainer, pl_module: L.LightningModule) -> None:
            start.update(values(pl_module))

    start: dict[str, Tensor] = {}
    trainer(*callbacks, Start(), steps=steps, **kwargs).fit(module)
    return {name: p.detach() / start[name] for name, p in module.named_parameters()}


def told(*callbacks: Callback, base: object = BASE) -> list[Callback]:
    return [*callbacks, Parametrize(base)]


def assert_removed(left: dict[str, Tensor], rates: dict[str, float], factors: list[float]) -> None:
    for name, ratio in left.items():
        wanted = math.prod(1 - rates[name] * factor for factor in factors)
        torch.testing.assert_close(ratio, torch.full_like(ratio, wanted), rtol=1e-6, atol=0, msg=name)


# -- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__.split('.')[0]}-{cls.__name__}")
@pytest.mark.parametrize("policy", POLICIES)
def test_weights_fall_as_the_policy_says(policy: Any, cls: type[torch.optim.Optimizer]) -> None:
    decay = decaying(policy)
    left = fitted(Still(WIDTH, made(cls, weight_decay=0.0)), *told(decay))
    wanted = FRACTION * RATIO ** EXPONENTS[policy]
    assert decay.rates["net.2.weight"] == pytest.approx(wanted)
    if policy == "sqrt":
        assert {name for name, rate in decay.rates.items() if rate} == {"net.2.weight"}
    else:
        assert decay.rates == {n: pytest.approx(FRACTION if n in READOUT else wanted) for n in decay.rates}
    held = {n for n in decay.rates if n.endswith("weight") or cls is not torch.optim.Muon}
    assert_removed(left, {n: rate if n in held else 0.0 for n, rate in decay.rates.items()}, FACTORS)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_has_a_source_and_a_power_for_each_role(policy: Any) -> None:
    found = find_decay(policy)
    assert found.reference
    assert set(found.powers) == set(Role)


def test_width_is_what_the_paper_wants_of_every_role() -> None:
    """The same as the plan's own column."""
    decay, parametrize = decaying(), Parametrize(BASE)
    fitted(Still(WIDTH, made(torch.optim.SGD)), decay, parametrize)
    assert decay.rates == {p.spec.name: FRACTION * p.weight_decay for p in parametrize.plan.params}


def test_twice_the_rate_changes_nothing() -> None:
    ended = [Still(WIDTH, made(torch.optim.AdamW, lr)) for lr in (LR, 2 * LR)]
    for module in ended:
        torch.manual_seed(0)
        module.net = module.build(WIDTH)
        fitted(module, *told(decaying(), base=lambda: Still(16)))
    assert same(*ended)


@pytest.mark.parametrize("policy", POLICIES)
def test_twice_the_width_multiplies_by_the_policys_power(policy: Any) -> None:
    rates = []
    for width in (32, 64):
        decay = decaying(policy)
        fitted(Still(width, made(torch.optim.AdamW)), decay, Parametrize(BASE))
        rates.append(decay.rates["net.2.weight"])
    assert rates[1] == pytest.approx(rates[0] * 2 ** EXPONENTS[policy])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"weight_decay": 1e-3}, 1e-3),
        ({"half_life_steps": 10}, 1 - 0.5**0.1),
        ({"half_life_tokens": 1000, "tokens_per_step": 100}, 1 - 0.5**0.1),
        ({"decay_times_width": 0.016}, 1e-3),
        ({"timescale": 50, "policy": "timescale"}, 1 / 150),
        ({"timescale_tokens": 5000, "tokens_per_step": 10, "policy": "timescale"}, 0.002),
    ],
)
def test_amounts(given: dict[str, Any], wanted: float) -> None:
    decay = WeightDecay(**given)
    fitted(Still(16, made(torch.optim.SGD)), decay, Parametrize("self", roles=ROLES))
    assert decay.rates["net.2.weight"] == pytest.approx(wanted)


ROLES = {"net.0.weight": "input", "net.2.weight": "hidden", "net.4.weight": "output"}


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda step, total: 0.1 * step / total])
def test_schedules_by_step(schedule: Any) -> None:
    function = SCHEDULES.get(schedule, schedule)
    decay = decaying(schedule=schedule)
    left = fitted(Still(WIDTH, made(torch.optim.AdamW)), decay, base_run(), steps=8)
    assert_removed(left, decay.rates, [function(step, 8) for step in range(8)])


def base_run() -> Parametrize:
    return Parametrize(lambda: Still(16))


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (lambda o: OneCycleLR(o, 0.1, 20), 1 / 25),
        (lambda o: CyclicLR(o, 0.1, 0.4, step_size_up=2, cycle_momentum=False), 1 / 4),
        (lambda o: None, 1.0),
    ],
)
@pytest.mark.parametrize("planned", [True, False])
def test_lr_schedule_is_over_the_peak(schedule: Any, first: float, planned: bool) -> None:
    def make(module: L.LightningModule) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        if (scheduler := schedule(optimizer)) is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    decay = decaying() if planned else decaying(base=BASE)
    left = fitted(Still(WIDTH, make), *(told(decay) if planned else [decay]), steps=1)
    assert_removed(left, decay.rates, [first])


@pytest.mark.parametrize("place", [0, 1])
def test_either_order_of_callbacks(place: int) -> None:
    decay = decaying()
    callbacks: list[Callback] = [base_run()]
    callbacks.insert(place, decay)
    assert_removed(fitted(Still(WIDTH, made(torch.optim.AdamW)), *callbacks), decay.rates, FACTORS)


def test_alone_it_reads_the_base_itself() -> None:
    for base in (BASE, lambda: Still(16), Still(16)):
        decay = decaying(base=base)
        left = fitted(Still(WIDTH, made(torch.optim.AdamW)), decay)
        assert decay.rates["net.2.weight"] == FRACTION / 2
        assert_removed(left, decay.rates, FACTORS)


def test_decay_is_of_the_weights_before_the_update_and_the_gradient_of_those_before_decay() -> None:
    def make(module: L.LightningModule) -> Any:
        return torch.optim.SGD(module.parameters(), lr=LR)

    torch.manual_seed(0)
    module = Net(16, make)
    twin = copy.deepcopy(module)
    twin.loss(next(iter(twin.train_dataloader()))).backward()
    trainer(decaying(base="self", policy="constant", roles=ROLES), steps=1).fit(module)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (1 - FRACTION) * q.detach() - LR * q.grad)


def test_once_per_optimizer_step_when_gradients_are_accumulated() -> None:
    decay = decaying()
    left = fitted(Still(WIDTH, made(torch.optim.AdamW)), *told(decay), steps=3, accumulate_grad_batches=2)
    assert_removed(left, decay.rates, FACTORS)


def test_lbfgs_evaluates_often_and_decays_once() -> None:
    def make(module: L.LightningModule) -> Any:
        return torch.optim.LBFGS(module.parameters(), lr=LR, tolerance_grad=-1.0, tolerance_change=-1.0, max_iter=3)

    decay = decaying(base=BASE)
    assert_removed(fitted(Still(WIDTH, make), decay), decay.rates, [1.0] * 3)


class Between(Callback):
    """Steps with zero gradients outside of a batch, as a distributed checkpoint does to create an optimizer's state."""

    def on_train_epoch_end(self, ran: L.Trainer, module: L.LightningModule) -> None:
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        ran.strategy.optimizers[0].step(closure=None)


def test_steps_that_are_not_the_runs_own_do_not_decay() -> None:
    decay = decaying(schedule="constant", base=BASE)
    left = fitted(Still(WIDTH, made(torch.optim.SGD)), decay, Between(), steps=-1, max_epochs=1, limit_train_batches=3)
    assert_removed(left, decay.rates, [1.0] * 3)


class Overflowing(Still):
    """The second batch's gradients are infinite."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (float("inf") if batch_idx == 1 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_decay(fused: bool) -> None:
    def make(module: L.LightningModule) -> Any:
        return torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0, fused=fused)

    decay = decaying()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    left = fitted(Overflowing(WIDTH, make), decay, base_run(), plugins=[plugin])
    assert_removed(left, decay.rates, [1.0, 1.0])


def test_a_step_that_our_optimizer_skips_does_not_decay() -> None:
    decay = decaying()
    left = fitted(Overflowing(WIDTH, lambda m: AdamW(m.parameters(), lr=LR, nonfinite="skip")), decay, base_run())
    assert_removed(left, decay.rates, [1.0, 1.0])


def test_an_error_about_a_gradient_leaves_the_weights() -> None:
    module = Overflowing(WIDTH, lambda m: AdamW(m.parameters(), lr=LR))
    seen: list[dict[str, Tensor]] = []

    class Seen(Callback):
        def on_before_optimizer_step(self, ran: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(values(pl_module))

    with pytest.raises(ValueError, match=r"not finite.*nothing was changed"):
        trainer(decaying(), base_run(), Seen()).fit(module)
    assert all(torch.equal(p, seen[1][name]) for name, p in module.named_parameters())


def count(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    calls: list[tuple[int, float]] = []
    original = torch._foreach_mul_

    def counted(tensors: list[Tensor], factor: Any) -> None:
        calls.append((len(tensors), factor))
        original(tensors, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", counted)
    return calls


def test_one_call_per_factor_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch)
    fitted(Still(WIDTH, made(torch.optim.SGD)), decaying("constant"), base_run())
    assert calls == [(6, 1 - FRACTION * factor) for factor in FACTORS]
    calls.clear()
    fitted(Still(WIDTH, made(torch.optim.SGD)), decaying(), base_run(), steps=1)
    assert calls == [(5, 1 - FRACTION / 2 * 0.5), (1, 1 - FRACTION * 0.5)]


# -- of what ---------------------------------------------------------------------------------------------------------


class Partly(Still):
    """One layer is frozen, one is in no optimizer, and one gets no gradient on the second batch."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width, lambda m: torch.optim.AdamW([*m.net[0].parameters(), *m.net[2].parameters()], LR))
        self.net[0].bias.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0.0 * self.net[2 if batch_idx == 1 else 0].weight.sum()


@pytest.mark.parametrize("planned", [True, False])
def test_what_the_optimizer_leaves_alone_does_not_decay(planned: bool, caplog: pytest.LogCaptureFixture) -> None:
    decay = decaying("constant", base=None if planned else lambda: Partly(16))
    with caplog.at_level("INFO"):
        left = fitted(Partly(), decay, *([Parametrize(lambda: Partly(16))] if planned else []), steps=3)
    steps = {"net.0.weight": [1.0, 1.0], "net.2.weight": [1.0]}
    for name, ratio in left.items():
        assert_removed({name: ratio}, {name: FRACTION}, steps.get(name, []))
    assert (
        sum("2 are in no optimizer and do not decay: ['net.4.weight', 'net.4.bias']" in r for r in lines(caplog)) == 1
    )


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        (["vector"], {"net.0.bias", "net.2.bias", "net.4.bias"}),
        (["net.4.*", "embedding"], {"net.4.weight", "net.4.bias", "net.0.weight"}),
    ],
)
def test_exclude(exclude: list[str], kept: set[str], caplog: pytest.LogCaptureFixture) -> None:
    decay = decaying(exclude=exclude)
    with caplog.at_level("INFO"):
        left = fitted(Still(WIDTH, made(torch.optim.AdamW)), *told(decay))
    assert {name for name, rate in decay.rates.items() if not rate} == kept
    assert any("3 do not decay" in line for line in lines(caplog))
    assert_removed(left, decay.rates, FACTORS)


# -- beside what -----------------------------------------------------------------------------------------------------


def test_it_takes_over_in_one_line_and_gives_back(caplog: pytest.LogCaptureFixture) -> None:
    module = Still(WIDTH, made(torch.optim.AdamW, weight_decay=0.1))
    seen: list[float] = []

    class Seen(Callback):
        def on_before_optimizer_step(self, ran: Any, pl_module: Any, optimizer: Any) -> None:
            seen.extend(group["weight_decay"] for group in optimizer.param_groups)

    decay = decaying(base=BASE)
    with caplog.at_level("INFO"):
        left = fitted(module, decay, Seen())
    assert_removed(left, decay.rates, FACTORS)
    assert set(seen) == {0.0}
    assert [line for line in lines(caplog) if "takes over" in line] == [
        "WeightDecay takes over from AdamW: its weight_decay was 0.1 and is 0 now."
    ]
    optimizer = module.trainer.optimizers[0].optimizer if hasattr(module.trainer.optimizers[0], "optimizer") else None
    assert (optimizer or module.trainer.optimizers[0]).param_groups[0]["weight_decay"] == 0.1
    assert not module.trainer.optimizers[0]._optimizer_step_pre_hooks


def fit_of(*callbacks: Callback, module: Net | None = None, **kwargs: Any) -> Callable[[], None]:
    return lambda: trainer(*callbacks, **kwargs).fit(module or Still(WIDTH, made(torch.optim.AdamW)))


class Later(Callback):
    """Does something to the optimizer in the middle of training."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        self.act = act

    def on_train_batch_start(self, ran: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.act(ran.optimizers[0])


def gan(module: L.LightningModule) -> list[Any]:
    return [torch.optim.SGD(module.net[i].parameters(), lr=LR) for i in (0, 2)]


WRONG: dict[str, tuple[Callable[[], object], list[str]]] = {
    "nothing": (WeightDecay, ["takes one of weight_decay, half_life_steps", "got none"]),
    "two amounts": (lambda: WeightDecay(1e-3, half_life_steps=9), ["got weight_decay=0.001, half_life_steps=9"]),
    "all of it": (lambda: WeightDecay(1.0), ["fraction removed per step", r"\[0, 1\)", "got 1.0"]),
    "negative": (lambda: WeightDecay(-0.1), ["positive", "-0.1"]),
    "no half-life": (lambda: WeightDecay(half_life_steps=0), ["half_life_steps must be positive", "0.0"]),
    "tokens": (lambda: WeightDecay(half_life_tokens=1e6), ["needs tokens_per_step > 0", "None"]),
    "tokens without use": (lambda: WeightDecay(1e-3, tokens_per_step=9), ["tokens_per_step=9", "leave it out"]),
    "time scale of width": (lambda: WeightDecay(timescale=0.5), ["'width'", "timescale=0.5", "policy='timescale'"]),
    "width of time scale": (lambda: WeightDecay(1e-3, policy="timescale"), ["'timescale' takes one of timescale"]),
    "policy": (lambda: WeightDecay(1e-3, policy="widht"), ["'widht'", "available: constant", "did you mean 'width'"]),
    "schedule": (lambda: WeightDecay(1e-3, schedule="cosin"), ["'cosin'", "available: lr", "did you mean 'cosine'"]),
    "takeover": (lambda: WeightDecay(1e-3, takeover="zeros"), ["'zero', 'refuse'", "did you mean 'zero'"]),
    "roles": (lambda: WeightDecay(1e-3, roles={"a": "input"}), ["belong to base"]),
    "exclude": (fit_of(WeightDecay(1e-3, exclude=["net.9.bias"]), base_run()), ["'net.9.bias'", "did you mean 'net."]),
    "role": (fit_of(WeightDecay(1e-3, exclude=["vektor"]), base_run()), ["'vektor'", "did you mean 'vector'"]),
    "no base": (fit_of(decaying()), ["'width' must know the base's sizes", "Parametrize"]),
    "two bases": (fit_of(decaying(base=BASE), base_run()), ["Parametrize has the base", "leave out"]),
    "two of them": (fit_of(decaying(base=BASE), decaying("sqrt", base=BASE)), ["2 WeightDecay callbacks", "keep one"]),
    "two decays": (
        fit_of(decaying(), Parametrize(BASE, method="adamw", lr=LR, weight_decay=1e-3)),
        [r"Parametrize\(weight_decay=0.001\)", "leave weight_decay out"],
    ),
    "refused": (
        fit_of(decaying(base=BASE, takeover="refuse")),
        ["AdamW decays on its own", "weight_decay=0.01", "takeover='zero'"],
    ),
    "set later": (
        fit_of(decaying(base=BASE), Later(lambda o: o.param_groups[0].update(weight_decay=0.5))),
        [r"weight_decay of AdamW was set to \[0.5\]"],
    ),
    "group later": (
        fit_of(decaying(base=BASE), Later(lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}))),
        ["had 1 parameter groups", "has 2 now", "configure_optimizers"],
    ),
    "stranger": (
        fit_of(decaying(base=BASE), module=Still(WIDTH, lambda m: torch.optim.SGD([torch.ones(2).requires_grad_()]))),
        ["not in the LightningModule", "attribute"],
    ),
    "endless": (fit_of(decaying(base=BASE, schedule="linear"), steps=-1, max_epochs=-1), ["got inf", "max_steps"]),
    "manual": (
        fit_of(decaying(base=BASE, schedule="linear"), module=Still(WIDTH, gan, automatic=False)),
        ["manual optimization", "schedule='lr'"],
    ),
    "much": (fit_of(decaying(base=BASE, schedule=lambda step, total: 1e3)), ["gave 1000.0", "at most all"]),
    "no peak": (
        fit_of(decaying(base=BASE), module=Still(WIDTH, lambda m: torch.optim.SGD(m.parameters(), lr=0.0))),
        ["over its peak, which is 0.0", "schedule='constant'"],
    ),
    "narrow": (
        fit_of(WeightDecay(0.009, base=lambda: Still(4096)), module=Still(16, made(torch.optim.SGD))),
        ["more than there is", "'net.2.weight'"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    run, words = WRONG[case]
    with pytest.raises(ValueError, match=words[0]) as caught:
        run()
    assert not [word for word in words if not re.search(word, str(caught.value))], str(caught.value)


def test_types() -> None:
    for wrong in ({"exclude": "vector"}, {"policy": None}, {"schedule": 3}):
        with pytest.raises(TypeError, match=r"got (None|3|'vector')"):
            WeightDecay(1e-3, **wrong)


def test_torchs_number_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 removes 10% .*weight_decay x lr") as caught:
        WeightDecay(0.1)
    assert caught[0].filename == __file__


def test_hand_written_steps_of_several_optimizers() -> None:
    class Gan(Still):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                if batch_idx % (index + 1) == 0:  # the second optimizer steps every second batch
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

    decay = decaying("constant", base=lambda: Gan(16, gan, automatic=False))
    left = fitted(Gan(WIDTH, gan, automatic=False), decay, steps=6)  # counts the steps of both
    for name, steps in (("net.0.weight", 4), ("net.2.weight", 2), ("net.4.weight", 0)):
        assert_removed({name: left[name]}, decay.rates, [1.0] * steps)


def test_copies_and_pickles_run_again() -> None:
    decay = decaying(base=lambda: Still(16))
    fitted(Still(WIDTH, made(torch.optim.AdamW)), decay)
    for other in (decay, copy.deepcopy(decay), pickle.loads(pickle.dumps(decay))):  # noqa: S301 - our own
        assert_removed(fitted(Still(WIDTH, made(torch.optim.AdamW)), other), decay.rates, FACTORS)


class During(Callback):
    """Copies callback and optimizer in the middle of a step."""

    def __init__(self, decay: WeightDecay) -> None:
        self.decay = decay

    def on_before_optimizer_step(self, ran: Any, module: Any, optimizer: Any) -> None:
        assert copy.deepcopy(self.decay)._steps == []
        copied = copy.deepcopy(ran.optimizers[0].param_groups[0]["params"][0])
        clone = pickle.loads(pickle.dumps(ran.strategy.optimizers[0]))  # noqa: S301 - our own
        clone.step()
        assert torch.equal(copied, ran.optimizers[0].param_groups[0]["params"][0])


def test_copies_in_the_middle_of_a_run_hold_no_hooks() -> None:
    decay = decaying(base=BASE)

    def make(module: L.LightningModule) -> Any:
        return torch.optim.SGD(module.parameters(), lr=LR)

    assert_removed(fitted(Still(WIDTH, make), decay, During(decay)), decay.rates, [1.0] * 3)


# -- resuming --------------------------------------------------------------------------------------------------------


def one_cycle(module: L.LightningModule) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": OneCycleLR(optimizer, LR, STEPS), "interval": "step"}}


def plain(module: L.LightningModule) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=LR)


class ByHand(Callback):
    """Lowers the rate from one step to the next, as no scheduler does."""

    def on_train_batch_start(self, ran: Any, module: Any, batch: Any, batch_idx: int) -> None:
        for group in ran.optimizers[0].param_groups:
            group["lr"] *= 0.9


class DiesError(Exception):
    pass


class Dies(Callback):
    def on_before_optimizer_step(self, ran: L.Trainer, module: Any, optimizer: Any) -> None:
        if ran.global_step == 14:
            raise DiesError


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("schedule", ["lr", "cosine"])
@pytest.mark.parametrize(
    ("make", "others", "planned"),
    [(one_cycle, [], True), (one_cycle, [], False), (plain, [ByHand], False)],  # Parametrize warns of rates set by hand
)
def test_killed_and_resumed_is_bit_identical(
    schedule: Any, make: Any, others: list[type[Callback]], planned: bool, tmp_path: Path
) -> None:
    def run(*more: Callback, resume: str | None = None, folder: str = "killed") -> Trained:
        torch.manual_seed(0)
        module = Trained(make=make)
        saving = ModelCheckpoint(tmp_path / folder, "last", every_n_train_steps=6)
        base = None if planned else lambda: Trained(16)
        decay = decaying(schedule=schedule, base=base)
        callbacks = [decay, *([Parametrize(lambda: Trained(16))] if planned else []), *(c() for c in others)]
        ran = trainer(*callbacks, saving, *more, steps=STEPS, enable_checkpointing=True)
        ran.fit(module, ckpt_path=resume)
        return module

    with pytest.raises(DiesError):
        run(Dies())
    resumed = run(resume=str(tmp_path / "killed" / "last.ckpt"))
    whole = run(folder="whole")
    assert whole.trainer.global_step == resumed.trainer.global_step == STEPS
    assert same(whole, resumed)
    states = [module.trainer.optimizers[0].state_dict() for module in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    saved = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert {peak for peaks in saved["lightning_mup.peak_learning_rates"] for peak in peaks} == {LR}


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_of_a_run_that_decayed_by_itself_is_taken_over(tmp_path: Path) -> None:
    module = Still(WIDTH, made(torch.optim.AdamW, weight_decay=0.1))
    first = trainer(steps=1)
    first.fit(module)
    first.save_checkpoint(tmp_path / "own.ckpt")
    start, decay = values(module), decaying(base=BASE)
    other = Still(WIDTH, made(torch.optim.AdamW, weight_decay=0.1))
    trainer(decay, steps=3).fit(other, ckpt_path=tmp_path / "own.ckpt")
    assert_removed({n: p.detach() / start[n] for n, p in other.named_parameters()}, decay.rates, FACTORS[1:])


# -- coupled values ----------------------------------------------------------------------------------------------------

SIZES = {"fan_in": (256, 64), "fan_out": (512, 64)}
COUPLED = [name for name, method in all_methods().items() if method.decay != "l2"]


@pytest.mark.parametrize("method", COUPLED)
@pytest.mark.parametrize("role", ["input", "hidden", "output"])
def test_coupled_and_back(method: str, role: str) -> None:
    coupled = coupled_weight_decay(1e-4, lr=LR, method=method, role=role, **SIZES)
    assert independent_weight_decay(coupled, lr=LR, method=method, role=role, **SIZES) == pytest.approx(1e-4)


@pytest.mark.parametrize(("method", "exponent"), [("adamw", 0), ("muon", -1), ("soap", -1), ("sgd", -1)])
def test_decay_over_width_is_coupled_with_each_methods_own_exponent(method: str, exponent: float) -> None:
    """arXiv:2512.05620, section 4: constant under Adam, 1/width under Muon."""
    wide = coupled_weight_decay(1e-4 / 4, lr=LR, method=method, fan_in=(64, 16), fan_out=(64, 16))
    assert wide / coupled_weight_decay(1e-4, lr=LR, method=method) == pytest.approx(4**exponent)


def test_coupled_is_what_torchs_adamw_does_in_a_step() -> None:
    """At the plan's rate, torch's own decay with the coupled value removes what the callback removes."""
    coupled = coupled_weight_decay(FRACTION / 4, lr=LR, fan_in=(64, 16), fan_out=(64, 16))
    weight = nn.Parameter(torch.randn(64, 64))
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=LR / 4, weight_decay=coupled)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), start * (1 - FRACTION / 4))


def test_training_is_that_of_adamws_own_decay_carried_over_by_the_plan() -> None:
    """The plan turns AdamW's coupled value into lambda ~ 1/width: the same run, but for the order of rounding."""
    torch.manual_seed(0)
    module = Net(64, lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.0))
    twin = copy.deepcopy(module)
    twin.make = lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=FRACTION / LR)
    trainer(decaying(), Parametrize(BASE), steps=5).fit(module)
    trainer(Parametrize(BASE), steps=5).fit(twin)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "adam"}, "adam adds weight_decay x W .*use method='adamw'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"method": "adamww"}, "did you mean 'adamw'"),
    ],
)
def test_coupling_errors(arguments: dict[str, Any], words: str) -> None:
    for convert in (coupled_weight_decay, independent_weight_decay):
        with pytest.raises(ValueError, match=words):
            convert(1e-4, **{"lr": LR, **arguments})
        with pytest.raises(ValueError, match="must be >= 0, got -1"):
            convert(-1.0, lr=LR)


def test_the_policies_differ() -> None:
    """The comparisons above can fail."""
    for one, other in itertools.combinations(("width", "constant", "sqrt", -0.75), 2):
        assert find_decay(one).powers != find_decay(other).powers
