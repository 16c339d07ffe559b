"""Under every torch schedule each group's rate is its multiplier times the rate that an untouched optimizer gets."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_mup import Parametrize
from tests.lightning.helpers import BASE, Net, Rated, Rates, trainer

STEPS, MIDDLE = 20, 8  # an epoch has 8 steps
Schedule = Callable[[Optimizer], Any]


def sequential(optimizer: Optimizer) -> lr_scheduler.SequentialLR:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
        lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=1e-3),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4, 11])


def chained(optimizer: Optimizer) -> lr_scheduler.ChainedScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.StepLR(optimizer, 4, 0.7)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULES: dict[str, Schedule] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR per group": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.9**step]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "MultiplicativeLR per group": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda s: 0.95, lambda s: 0.8]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=1e-3),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2, factor=0.5, min_lr=5e-3),
    "ReduceLROnPlateau per group": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[5e-3, 2e-2]),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 4, mode="triangular2", cycle_momentum=False),
    "CyclicLR per group": lambda o: lr_scheduler.CyclicLR(o, [1e-3, 1e-2], [0.1, 0.2], 4, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=1e-3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS + 1),
    "OneCycleLR per group": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.3], total_steps=STEPS + 1),
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=8),
    "SWALR per group": lambda o: SWALR(o, [0.02, 0.3], anneal_epochs=8, anneal_strategy="linear"),
}


def two_groups(matrices: Any, rest: Any) -> Optimizer:
    return torch.optim.SGD([{"params": matrices}, {"params": rest, "lr": 0.05}], lr=0.1, momentum=0.9)


def untouched(schedule: Schedule) -> Rates:
    optimizer = two_groups([nn.Parameter(torch.ones(1))], [nn.Parameter(torch.ones(1))])
    scheduler = schedule(optimizer)
    rates: Rates = []
    for _ in range(STEPS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    return [*rates, [group["lr"] for group in optimizer.param_groups]]


def scheduled(schedule: Schedule) -> Net:
    def make(module: Net) -> dict[str, Any]:
        parameters = list(module.parameters())
        optimizer = two_groups([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1])
        scheduler = {"scheduler": schedule(optimizer), "interval": "step", "monitor": "flat"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return Net(make=make)


def multiplied(optimizer: Optimizer, rates: Rates) -> Rates:
    groups = [(group["given_group"], group["lr_mult"]) for group in optimizer.param_groups]
    assert len(groups) == 5
    assert len({mult for _, mult in groups}) > 2
    return [[at_base[given] * mult for given, mult in groups] for at_base in rates]


def test_every_torch_schedule_is_tried() -> None:
    every = {n for n in lr_scheduler.__all__ if n != "LRScheduler"} | {"SWALR"}
    assert {name.split()[0] for name in SCHEDULES} == every


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_multiples_before_and_after_a_resume(name: str, tmp_path: Path) -> None:
    schedule, rated, path = SCHEDULES[name], Rated(), tmp_path / "middle.ckpt"
    first = trainer(Parametrize(BASE), rated, steps=MIDDLE)
    first.fit(scheduled(schedule))
    first.save_checkpoint(path)
    second = trainer(Parametrize(BASE), rated, steps=STEPS)
    second.fit(scheduled(schedule), ckpt_path=path)
    optimizer = second.optimizers[0]
    want = multiplied(optimizer, untouched(schedule))
    assert rated.rates == [pytest.approx(rates, rel=1e-12) for rates in want[:-1]]
    assert second.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx(want[-1], rel=1e-12)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(want[-1], rel=1e-12)


def test_lr_may_be_a_tensor() -> None:
    def make(module: Net) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1))
        return [optimizer], [{"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 4, 0.01), "interval": "step"}]

    fitted = trainer(Parametrize(BASE), steps=4)
    fitted.fit(Net(make=make))
    groups = fitted.optimizers[0].param_groups
    assert [float(g["lr"] / g["lr_mult"]) for g in groups] == pytest.approx([0.01] * len(groups))
    assert len({id(g["lr"]) for g in groups}) == len(groups)


def test_schedulers_may_be_stepped_by_hand() -> None:
    class Manual(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
            self.lr_schedulers().step()

    def make(module: Net) -> Any:
        optimizer = two_groups(list(module.net[:2].parameters()), list(module.net[2:].parameters()))
        return [optimizer], [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)]

    fitted = trainer(Parametrize(BASE), steps=6)
    fitted.fit(Manual(make=make, automatic=False))
    want = untouched(SCHEDULES["LinearLR"])[6]
    groups = fitted.optimizers[0].param_groups
    assert [g["lr"] / g["lr_mult"] for g in groups] == pytest.approx(
        [want[g["given_group"]] for g in groups], rel=1e-12
    )


def test_a_list_of_the_wrong_length_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="3"):
        trainer(Parametrize(BASE)).fit(scheduled(lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1.0] * 3)))


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR"])
def test_supplied_optimizer_takes_a_schedule(name: str) -> None:
    rated = Rated()
    parametrize = Parametrize(BASE, method="sgd", lr=0.1, options={"momentum": 0.9}, schedule=SCHEDULES[name])
    fitted = trainer(parametrize, rated, steps=STEPS)
    fitted.fit(Net())
    at_base = [rates[0] for rates in untouched(SCHEDULES[name])][:-1]
    mults = [group["lr_mult"] for group in fitted.optimizers[0].param_groups]
    assert rated.rates == [pytest.approx([rate * mult for mult in mults], rel=1e-12) for rate in at_base]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.1, total_steps=STEPS + 1, base_momentum=[0.8, 0.7], max_momentum=[0.9, 0.95]
        ),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, base_momentum=[0.8, 0.7], max_momentum=[0.9, 0.95]),
    ],
)
def test_momenta_may_be_given_per_group(schedule: Schedule) -> None:
    """A list holds one entry for each of the user's groups, however many these were split into."""
    fitted = trainer(Parametrize(BASE), steps=3)
    fitted.fit(scheduled(schedule))
    plain = two_groups([nn.Parameter(torch.ones(1))], [nn.Parameter(torch.ones(1))])
    scheduler = schedule(plain)
    for _ in range(3):
        plain.step()
        scheduler.step()
    want = [group["momentum"] for group in plain.param_groups]
    groups = fitted.optimizers[0].param_groups
    assert want[0] != want[1]
    assert [g["momentum"] for g in groups] == pytest.approx([want[g["given_group"]] for g in groups])
