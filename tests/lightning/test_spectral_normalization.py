"""Spectral normalization of any optimizer's steps, compared with exact singular values and with the native one."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_mup as mup
from lightning_mup.callbacks.grafting import Grafting
from lightning_mup.callbacks.spectral_normalization import SpectralNormalization
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.normalize import SpectralNormalize
from lightning_mup.core.renormalize import Matrix, Renormalized
from lightning_mup.core.stack import Arrangement
from lightning_mup.core.step_normalizer import StepNormalizer
from tests.lightning.helpers import BASE, Net, Tied, rms, same, trainer, values
from tests.lightning.test_resume import Trained
from tests.models import Lion

LR = 0.002


def exact(**settings: Any) -> SpectralNormalization:
    """So many iterations that the norm is what it should be at every step."""
    return SpectralNormalization(iterations=300, warmup_steps=0, **{"readout": "spectral", **settings})


def all_met(seen: list[dict[str, float]]) -> bool:
    return all(0.98 < ratio < 1.02 for found in seen for ratio in found.values())


class Matrices(Net):
    """No biases, which torch's Muon does not take."""

    def build(self, width: int) -> nn.Module:
        layers = (nn.Linear(a, b, bias=False) for a, b in ((8, width), (width, width), (width, width), (width, 4)))
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


MAKES: dict[str, Callable[[Net], Any]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.1),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9),
    "muon": lambda m: torch.optim.Muon(m.parameters(), lr=LR, weight_decay=0.1),
    "lion": lambda m: Lion(m.parameters(), lr=LR),
}


class Steps(Callback):
    """Notes by how much each matrix moved, over what it should have, without decay."""

    def __init__(self, decay: float = 0.0, order: int | str = 2) -> None:
        self.decay, self.order, self.seen = decay, order, []

    def on_train_batch_start(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.before = values(module)

    def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        rates = {p: g.get("lr_at_base", g["lr"]) for o in ran.optimizers for g in o.param_groups for p in g["params"]}
        found = {}
        for name, p in module.named_parameters():
            if p.ndim == 2:
                moved = (self.before[name] * (1 - self.decay) - p.detach()).double()
                found[name] = float(torch.linalg.matrix_norm(moved, ord=2)) / rates[p] / math.sqrt(len(p) / p.shape[1])
        self.seen.append(found)


class Smooth(Matrices):
    """All data in one batch, so that steps change slowly, which one iteration a step can follow."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(super().train_dataloader().dataset, batch_size=64)


def errors(name: str, **settings: Any) -> list[float]:
    """Return by how much norms exceed the wanted one after the warm-up, sorted."""
    torch.manual_seed(0)
    steps = Steps(decay=0.1 * LR if name in ("adamw", "muon") else 0.0)
    trainer(SpectralNormalization(**settings), steps, steps=100).fit(Smooth(make=MAKES[name]))
    return sorted(ratio - 1 for found in steps.seen[50:] for ratio in found.values())


@pytest.mark.parametrize("name", MAKES)
def test_norm_is_within_two_percent_of_the_exact_one(name: str) -> None:
    found = errors(name)
    assert found[0] > -0.002
    assert found[-1] < 0.02


@pytest.mark.parametrize("name", ["muon", "lion"])
def test_one_vector_falls_behind(name: str) -> None:
    """The paper's estimate, where singular values are nearly alike or steps change by jumps."""
    assert errors(name, vectors=1)[-1] > 0.04


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_norm_is_within_two_percent_of_the_exact_one_on_noisy_batches(name: str) -> None:
    steps = Steps(decay=0.1 * LR if name == "adamw" else 0.0)
    torch.manual_seed(0)
    trainer(SpectralNormalization(), steps, steps=80).fit(Matrices(make=MAKES[name]))
    found = sorted(ratio for seen in steps.seen[50:] for ratio in seen.values())
    assert 0.998 < found[0] <= found[-1] < 1.02


def test_a_matrix_without_a_gradient_stays_and_so_do_its_vectors() -> None:
    """Of two alike, which are one stack: the other one moves as if it were alone in it."""
    moved, kept = (nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(i))) for i in range(2))
    start, arrangement = kept.detach().clone(), Arrangement((6, 4), (0,), (1,))
    alone = nn.Parameter(moved.detach().clone())
    pair, single = (
        Renormalized([Matrix(name, p, arrangement) for name, p in named], SpectralNormalize(vectors=2))
        for named in ((("kept", kept), ("moved", moved)), (("moved", alone),))
    )
    for step in range(1, 4):
        for p in (moved, alone):
            p.grad = torch.full((6, 4), float(step)).tril()
        for params, stack in (([kept, moved], pair), ([alone], single)):
            stepped = StepNormalizer(torch.optim.SGD(params, lr=0.1, weight_decay=0.0), [(0, stack)], ["coupled"])
            stepped._optimizer.step()
            stepped.remove()
    assert torch.equal(kept, start)
    torch.testing.assert_close(moved, alone)
    state, other = pair.state_dict(), single.state_dict()
    assert (int(state["kept"]["step"]), int(state["moved"]["step"])) == (0, 3)
    torch.testing.assert_close(state["moved"]["v"], other["moved"]["v"])
    assert torch.equal(state["kept"]["v"], SpectralNormalize(vectors=2).init(kept.detach()[None])["v"])


def ours(spectral_norm: bool, kind: Any = mup.Muon, **settings: Any) -> Callable[[Net], Any]:
    return lambda m: kind(m.parameters(), lr=LR, spectral_norm=spectral_norm, **settings)


class Deep(Net):
    """A looked-up table, whose layout is its module's, two alike matrices, a readout, biases."""

    def build(self, width: int) -> nn.Module:
        hidden = [part for _ in range(2) for part in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(nn.Embedding(4, width), *hidden, nn.Linear(width, 4))

    def loss(self, batch: list[Tensor]) -> Tensor:
        y = batch[1]
        return nn.functional.cross_entropy(self.net(y), y.roll(1))


@pytest.mark.parametrize("kind", [mup.Muon, mup.AdamW, mup.SOAP])
@pytest.mark.parametrize("rules", ["mup", "complete_p", "mean_field", "sp"])
def test_native_normalization_is_the_same(kind: Any, rules: str) -> None:
    settings: dict[str, Any] = {"weight_decay": 1e-3}
    if kind is mup.SOAP:  # whose basis is arbitrary, to the last digits, where the gradient has none
        settings["eps"] = 1e-2
    trained = []
    for callbacks, native in (([SpectralNormalization(vectors=1, readout="spectral")], False), ([], True)):
        torch.manual_seed(0)
        module = Deep(make=ours(native, kind, **settings)).double()
        plan = mup.Parametrize(lambda: Deep(16).double(), rules=rules, lr_multipliers={"readout": 0.5})
        trainer(plan, *callbacks, steps=8).fit(module)
        trained.append(module)
    for one, other in zip(*(m.parameters() for m in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_native_normalization_is_the_same_without_a_plan_in_float32() -> None:
    trained = []
    for callbacks, native in (([SpectralNormalization(vectors=1, readout="spectral")], False), ([], True)):
        torch.manual_seed(0)
        trained.append(Net(make=ours(native, weight_decay=1e-3)))
        trainer(*callbacks, steps=8).fit(trained[-1])
    for one, other in zip(*(m.parameters() for m in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [MAKES["adamw"], MAKES["sgd"]])
def test_base_rate_counts_under_a_plan(make: Callable[[Net], Any]) -> None:
    steps = Steps(decay=0.1 * LR if make is MAKES["adamw"] else 0.0)
    ran = trainer(mup.Parametrize(BASE), exact(), steps, steps=8)
    ran.fit(Net(make=make))
    rates = {g["lr_at_base"] for g in ran.optimizers[0].param_groups}
    assert rates == {LR}
    assert len({g["lr"] for g in ran.optimizers[0].param_groups}) > 1
    if make is MAKES["sgd"]:  # each role has a decay of its own under AdamW
        assert all_met(steps.seen)


def test_decay_is_that_of_the_plan() -> None:
    """Both without gradients: what is left of a step is decay."""

    class Still(Net):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return 0.0 * super().loss(batch)

    found = []
    for callbacks in ([], [SpectralNormalization()]):
        torch.manual_seed(0)
        found.append(Still(make=MAKES["adamw"]))
        trainer(mup.Parametrize(BASE), *callbacks).fit(found[-1])
    for one, other in zip(*(m.parameters() for m in found), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("first", [True, False])
def test_weight_decay_callback_stays_out_of_the_norm(first: bool) -> None:
    decay, spectral = WeightDecay(0.005, policy="constant", base="self"), exact()
    steps = Steps(decay=0.005)
    trainer(*([decay, spectral] if first else [spectral, decay]), steps, steps=8).fit(Net(make=MAKES["sgd"]))
    assert all_met(steps.seen)


@pytest.mark.parametrize("readout", ["spectral", "rms", "keep"])
def test_readout_by_choice_and_tables_by_rms(readout: Any) -> None:
    torch.manual_seed(0)
    module = Deep(make=lambda m: torch.optim.SGD(m.parameters(), lr=LR))
    plain = copy.deepcopy(module)
    before = values(module)
    spectral = exact(readout=readout, roles={"net.5.weight": "output"})
    trainer(spectral, steps=1).fit(module)
    trainer(steps=1).fit(plain)
    moved = {name: before[name] - p.detach() for name, p in module.named_parameters()}
    assert rms(moved["net.0.weight"]) == pytest.approx(LR, rel=1e-4)
    head = moved["net.5.weight"]
    if readout == "rms":
        assert rms(head) == pytest.approx(LR / 8, rel=1e-4)
    elif readout == "keep":
        torch.testing.assert_close(module.net[5].weight, plain.net[5].weight)
    else:
        assert float(torch.linalg.matrix_norm(head, ord=2)) == pytest.approx(LR * (4 / 64) ** 0.5, rel=0.02)
    assert not torch.equal(module.net[1].weight, plain.net[1].weight)
    torch.testing.assert_close(module.net[1].bias, plain.net[1].bias)


def test_tied_tables_are_moved_once() -> None:
    module = Tied(make=lambda m: torch.optim.SGD(m.parameters(), lr=LR))
    before = values(module)
    trainer(SpectralNormalization(), steps=1).fit(module)
    name = "net.embedding.weight"
    assert rms(before[name] - module.net["embedding"].weight) == pytest.approx(LR, rel=1e-4)


def two_groups(module: Net) -> Any:
    matrices = [p for p in module.parameters() if p.ndim == 2]
    groups = [{"params": matrices[:2], "lr": 2 * LR}, {"params": [*matrices[2:], module.net[0].bias]}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class BeforeScheduler(Steps):
    """The rates of a step are those before its scheduler moves on."""

    def on_before_zero_grad(self, ran: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}

    def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        for name, p in module.named_parameters():
            if p.ndim == 2:
                moved = (self.before[name] - p.detach()).double()
                wanted = self.rates[p] * math.sqrt(len(p) / p.shape[1])
                self.seen.append({name: float(torch.linalg.matrix_norm(moved, ord=2)) / wanted})


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.01}])
def test_two_groups_under_a_schedule(settings: dict[str, Any]) -> None:
    steps = BeforeScheduler()
    trainer(exact(), steps, steps=8, **settings).fit(Net(make=two_groups))
    assert all_met(steps.seen)


def test_accumulated_batches_are_one_step() -> None:
    spectral, steps = SpectralNormalization(), Steps()
    trainer(spectral, steps, steps=20, accumulate_grad_batches=2).fit(Net(make=MAKES["sgd"]))
    assert {int(state["step"]) for state in spectral.state().values()} == {20}
    assert all(ratio == 0 for found in steps.seen[::2] for ratio in found.values())
    assert all(ratio > 0.5 for found in steps.seen[1::2] for ratio in found.values())


def test_bfloat16() -> None:
    steps = Steps()
    module = Matrices(make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    trainer(exact(), steps, steps=8, precision="bf16-true").fit(module)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(0.95 < ratio < 1.05 for found in steps.seen for ratio in found.values())


def test_manual_optimization_with_and_without_closure() -> None:
    class Manual(Net):
        closure = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> None:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))

            if self.closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    trained = []
    for closure in (False, True):
        torch.manual_seed(0)
        module, steps = Manual(make=MAKES["sgd"], automatic=False), Steps()
        module.closure = closure
        trainer(exact(), steps, steps=8).fit(module)
        assert all_met(steps.seen)
        trained.append(module)
    assert same(*trained)


class Overflow(Callback):
    def __init__(self, at: int) -> None:
        self.at, self.seen = at, []

    def on_after_backward(self, ran: L.Trainer, module: L.LightningModule) -> None:
        if len(self.seen) == self.at:
            module.net[0].weight.grad[0, 0] = float("inf")

    def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        spectral = next(c for c in ran.callbacks if isinstance(c, SpectralNormalization))
        state = {f"{n}/{k}": v for n, s in spectral.state().items() for k, v in s.items()}
        self.seen.append({**values(module), **state})


def test_step_that_a_gradient_scaler_skips_changes_nothing() -> None:
    overflow = Overflow(2)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer(SpectralNormalization(), overflow, steps=5, plugins=[plugin]).fit(Net(make=MAKES["adamw"]))
    assert_only_the_third_step_was_skipped(overflow)


def test_step_that_the_optimizer_skips_changes_nothing() -> None:
    overflow = Overflow(2)
    make = ours(False, weight_decay=1e-3, nonfinite="skip")
    trainer(SpectralNormalization(), overflow, steps=5).fit(Net(make=make))
    assert_only_the_third_step_was_skipped(overflow)


def assert_only_the_third_step_was_skipped(overflow: Overflow) -> None:
    alike = [
        all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(overflow.seen, overflow.seen[1:], strict=False)
    ]
    assert alike == [False, True, False, False]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("make", [MAKES["adamw"], ours(False, weight_decay=1e-3)])
def test_resume_is_bit_identical(make: Callable[[Net], Any], tmp_path: Path) -> None:
    def fit(resume: str | None = None) -> Net:
        torch.manual_seed(0)
        module = Trained(make=make)
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
        spectral = SpectralNormalization(warmup_steps=3)
        trainer(spectral, saving, steps=12, enable_checkpointing=True).fit(module, ckpt_path=resume)
        return module

    whole = fit()
    checkpoint = tmp_path / "step=5.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["SpectralNormalization"]
    assert sorted(state) == ["net.0.0.weight", "net.0.2.weight", "net.0.4.weight"]
    assert {tuple(s["v"].shape) for s in state.values()} == {(1, 4, 64), (1, 4, 4)}
    assert {int(s["step"]) for s in state.values()} == {5}
    assert same(whole, fit(str(checkpoint)))


def test_vectors_matter_to_resuming(tmp_path: Path) -> None:
    """The comparison above can fail."""

    class Forgetful(SpectralNormalization):
        state_key = "SpectralNormalization"

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    def fit(spectral: SpectralNormalization, resume: str | None = None) -> Net:
        torch.manual_seed(0)
        module = Trained(make=MAKES["sgd"])
        saving = ModelCheckpoint(
            tmp_path, "{step}", save_top_k=-1, every_n_train_steps=6, save_on_train_epoch_end=False
        )
        trainer(spectral, saving, steps=8, enable_checkpointing=True).fit(module, ckpt_path=resume)
        return module

    whole = fit(SpectralNormalization(warmup_steps=0))
    with pytest.warns(UserWarning, match="Checkpoint directory"):
        other = fit(Forgetful(warmup_steps=0), str(tmp_path / "step=6.ckpt"))
    assert not same(whole, other)


def test_failed_step_gives_the_decay_back_and_callbacks_pickle() -> None:
    spectral, overflow = SpectralNormalization(), Overflow(1)
    ran = trainer(spectral, overflow, steps=5)
    with pytest.raises(ValueError, match="not finite"):
        ran.fit(Net(make=ours(False, weight_decay=1e-3)))
    assert {g["weight_decay"] for g in ran.optimizers[0].param_groups} == {1e-3}
    assert not ran.optimizers[0]._optimizer_step_pre_hooks
    assert overflow.seen
    again = pickle.loads(pickle.dumps(spectral))  # noqa: S301
    assert again.state().keys() == spectral.state().keys() != set()


class Stray(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.ones(2, 2))], lr=0.1)


@pytest.mark.parametrize(
    ("build", "module", "message"),
    [
        (
            lambda: [SpectralNormalization(readout="spectal")],
            Net,
            r"readout must be one of .*; did you mean 'spectral'",
        ),
        (lambda: [SpectralNormalization(decay="independent")], Net, r"decay must be one of \(None, 'coupled', 'l2'\)"),
        (lambda: [SpectralNormalization(iterations=0)], Net, r"iterations must be >= 1, warmup_steps >= 0, got 0, 50"),
        (lambda: [SpectralNormalization(vectors=0)], Net, r"vectors must be >= 1, got 0; 1 is the paper's"),
        (lambda: [SpectralNormalization(readout="rms")], Net, r"readout='rms' does.*name them: roles=\{.net.0.weight"),
        (
            lambda: [mup.Parametrize(BASE), SpectralNormalization(roles={"net.4.weight": "output"})],
            Net,
            r"Parametrize has the roles; give roles=.* there",
        ),
        (lambda: [SpectralNormalization()], lambda: Net(make=ours(True)), r"Muon normalizes its groups .* on its own"),
        (
            lambda: [SpectralNormalization(), Grafting(magnitude=torch.optim.SGD)],
            Net,
            r"Grafted gives steps a length, which SpectralNormalization replaces; leave out one",
        ),
        (
            lambda: [SpectralNormalization()],
            lambda: Net(make=lambda m: Lion(m.parameters(), lr=LR, weight_decay=0.1)),
            r"Lion has weight_decay=0.1, and nobody declared.*give decay='coupled' or 'l2'",
        ),
        (lambda: [SpectralNormalization()], Stray, r"SGD holds a parameter of shape \(2, 2\) that is not in the"),
    ],
)
def test_errors_say_what_to_do(build: Callable[[], list[Callback]], module: Callable[[], Net], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(*build()).fit(module())


def test_undeclared_decay_may_be_said() -> None:
    steps = Steps(decay=0.1 * LR)
    make = lambda m: Lion(m.parameters(), lr=LR, weight_decay=0.1)  # noqa: E731
    trainer(exact(decay="coupled"), steps, steps=8).fit(Matrices(make=make))
    assert all_met(steps.seen)
