"""Grafting onto whatever configure_optimizers builds: norms, directions, schedules, resuming, and plans."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import Optimizer

import lightning_mup as mup
from lightning_mup.callbacks.grafting import Grafting
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.grafted import Grafted
from tests.lightning.helpers import BASE, Net, Rated, same, trainer, values
from tests.lightning.test_resume import Trained

Make = Callable[[list[torch.nn.Parameter]], Optimizer]
STEPS = 12


def adamw(params: list[torch.nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


class Watch(Callback):
    """Recomputes, at every step, both parts' steps on copies, and compares them with what was done."""

    def __init__(self, direction: Make, magnitude: Make) -> None:
        self.makes, self.parts, self.seen = (direction, magnitude), [], []

    def on_before_optimizer_step(self, ran: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        matrices = [p for p in module.parameters() if p.ndim == 2]
        if not self.parts:
            copies = [[torch.nn.Parameter(p.detach().clone()) for p in matrices] for _ in self.makes]
            self.parts = [(c, make(c)) for c, make in zip(copies, self.makes, strict=True)]
            for _, part in self.parts:
                part.param_groups[0]["weight_decay"] = 0.0
        self.steps = []
        for copies, part in self.parts:
            for c, p in zip(copies, matrices, strict=True):
                c.data.zero_()  # so that float32 keeps the digits of a step
                c.grad = p.grad.clone()
            part.step()
            self.steps.append([c.detach().clone() for c in copies])
        self.before = [p.detach().clone() for p in matrices]

    def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        after = [p.detach() for p in module.parameters() if p.ndim == 2]
        for a, b, d, m in zip(after, self.before, *self.steps, strict=True):
            moved = (a - b).double()
            cosine = (moved * d).sum() / moved.norm() / d.double().norm()
            self.seen.append((float(moved.norm() / m.double().norm()), float(cosine)))


DIRECTIONS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "muon": lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.02, weight_decay=0.0),
    "soap": lambda params: mup.SOAP(params, lr=0.01),
}


class Double(Net):
    """In float64, so that the difference of weights is the step."""

    def __init__(self, make: Callable[[Net], Any]) -> None:
        super().__init__(make=make)
        self.double()


@pytest.mark.parametrize("leader", ["direction", "magnitude"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_adamws_norm_onto_anothers_direction(name: str, leader: str) -> None:
    make = DIRECTIONS[name]
    watch = Watch(make, adamw)
    plain: Make = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)  # noqa: E731
    own, grafting = (make, Grafting(magnitude=adamw)) if leader == "direction" else (plain, Grafting(direction=make))
    trainer(grafting, watch, steps=6).fit(Double(lambda m: own(list(m.parameters()))))
    assert len(watch.seen) == 6 * 3
    for norm, cosine in watch.seen:
        assert norm == pytest.approx(1, abs=1e-6)
        assert cosine > 0.999999


def scheduled(module: Net) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [4])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": "step"}}


@pytest.mark.parametrize("parametrized", [False, True])
def test_schedulers_drive_both(parametrized: bool, tmp_path: Path) -> None:
    def fitted(*callbacks: Callback) -> tuple[L.Trainer, Rated]:
        rated, plan = Rated(), [mup.Parametrize(BASE)] if parametrized else []
        logger = CSVLogger(tmp_path)
        ran = trainer(*plan, *callbacks, rated, LearningRateMonitor(), steps=STEPS, logger=logger)
        ran.fit(Net(make=scheduled))
        return ran, rated

    (ran, rated), (_, plain) = fitted(Grafting(magnitude=adamw)), fitted()
    assert rated.rates == plain.rates
    grafted = ran.optimizers[0]
    for group in grafted.magnitude.param_groups:
        at = rated.rates[-1][0] / grafted.param_groups[0].get("lr_mult", 1.0) / 0.1
        assert group["lr"] == pytest.approx(1e-3 * at * group.get("lr_mult", 1.0))
        assert group["weight_decay"] == 0.0


def test_steps_of_the_plan_are_the_magnitudes() -> None:
    for grafting in (Grafting(magnitude=adamw), Grafting(direction=DIRECTIONS["sgd"])):
        own = "sgd" if grafting._own == "direction" else "adamw"
        make = {"sgd": DIRECTIONS["sgd"], "adamw": adamw}[own]
        for order in (0, 1):
            callbacks = [mup.Parametrize(BASE), copy.copy(grafting)]
            ran = trainer(*(callbacks if order else callbacks[::-1]))
            ran.fit(Net(make=lambda m, make=make: make(list(m.parameters()))))
            grafted = ran.optimizers[0]
            assert {row.method for row in callbacks[0].plan.params} == {"adamw"}
            hidden = ran.lightning_module.net[2].weight
            groups = [g for g in grafted.magnitude.param_groups if any(p is hidden for p in g["params"])]
            assert groups[0]["lr_mult"] == callbacks[0].plan["net.2.weight"].lr == 0.25
            assert groups[0]["lr"] == pytest.approx(1e-3 * 0.25)
            assert groups[0]["eps"] == pytest.approx(1e-8 * callbacks[0].plan["net.2.weight"].eps["eps"])


def test_grafted_of_the_modules_own_is_planned() -> None:
    def make(module: Net) -> Grafted:
        params = list(module.parameters())
        return Grafted(magnitude=adamw(params), direction=DIRECTIONS["sgd"](params))  # the direction is built last

    parametrize = mup.Parametrize(BASE)
    ran = trainer(parametrize, steps=3)
    ran.fit(Net(make=make))
    assert {row.method for row in parametrize.plan.params} == {"adamw"}
    assert all(g["lr"] == g["lr_at_base"] * g["lr_mult"] for g in ran.optimizers[0].param_groups)


def test_decay_of_the_module_stays() -> None:
    class Still(Net):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return 0.0 * super().loss(batch)

    module = Still(make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.01))
    before = values(module)
    trainer(Grafting(magnitude=adamw), steps=1).fit(module)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 1e-3))


def test_weight_decay_callback_decays_grafts() -> None:
    class Still(Net):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return 0.0 * super().loss(batch)

    module = Still(make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    before = values(module)
    decay = WeightDecay(0.005, policy="constant", base="self")
    trainer(Grafting(magnitude=adamw), decay, steps=1).fit(module)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.005))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("parametrized", [False, True])
def test_resume_is_bit_identical(parametrized: bool, tmp_path: Path) -> None:
    def fit(resume: str | None = None) -> Net:
        torch.manual_seed(0)
        module = Trained(make=scheduled)
        plan = [mup.Parametrize(lambda: Trained(16))] if parametrized else []
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
        ran = trainer(*plan, Grafting(magnitude=adamw), saving, steps=STEPS, enable_checkpointing=True)
        ran.fit(module, ckpt_path=resume)
        return module

    whole = fit()
    checkpoint = str(tmp_path / "step=5.ckpt")
    torch.load(checkpoint, weights_only=True)
    assert same(whole, fit(checkpoint))


def test_module_is_given_back_and_copies_and_pickles() -> None:
    module, grafting = Net(), Grafting(magnitude=adamw)
    ran = trainer(grafting)
    ran.fit(module)
    assert "configure_optimizers" not in module.__dict__
    run = copy.deepcopy(ran.optimizers[0]), pickle.loads(pickle.dumps(ran.optimizers[0]))  # noqa: S301
    assert [type(o.direction).__name__ for o in run] == ["Adam", "Adam"]
    ran.fit_loop.epoch_loop.max_steps = 4
    ran.fit(module)
    assert ran.global_step == 4


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_trainer_settings(settings: dict[str, Any]) -> None:
    module = Net(make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    before = values(module)
    trainer(Grafting(magnitude=adamw), steps=2, **settings).fit(module)
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_manual_optimization() -> None:
    class Manual(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module = Manual(make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), automatic=False)
    before = values(module)
    trainer(Grafting(magnitude=adamw)).fit(module)
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


def two(module: Net) -> Any:
    params = list(module.parameters())
    return [torch.optim.SGD(params[:2], lr=0.1), torch.optim.SGD(params[2:], lr=0.1)]


@pytest.mark.parametrize(
    ("build", "make", "error", "message"),
    [
        (lambda: [Grafting()], None, ValueError, r"one of direction and magnitude.*got direction=None, magnitude=None"),
        (lambda: [Grafting(direction=adamw, magnitude=adamw)], None, ValueError, r"one of direction and magnitude"),
        (lambda: [Grafting(magnitude=adamw, per="row")], None, ValueError, r"per must be one of .*, got 'row'"),
        (lambda: [Grafting(magnitude=adamw)] * 2, None, ValueError, r"2 Grafting callbacks; .* keep one"),
        (lambda: [Grafting(magnitude=adamw)], two, ValueError, r"one optimizer .* of Net, got 2 .*return Grafted"),
        (lambda: [Grafting(magnitude=len)], None, TypeError, r"factory of Grafting must return .*Optimizer, got 6"),
        (
            lambda: [Grafting(magnitude=adamw), mup.Parametrize(BASE, method="sgd", lr=0.1)],
            None,
            ValueError,
            r"Parametrize supplies that of Net; leave Grafting out and give options=",
        ),
    ],
)
def test_errors_say_what_to_do(
    build: Callable[[], list[Callback]], make: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer(*build()).fit(Net() if make is None else Net(make=make, automatic=False))


def test_callback_pickles_after_a_run() -> None:
    grafting = Grafting(magnitude=torch.optim.AdamW)
    trainer(grafting).fit(Net())
    again = pickle.loads(pickle.dumps(grafting))  # noqa: S301
    assert (again.per, again.grafted) == ("matrix", None)
