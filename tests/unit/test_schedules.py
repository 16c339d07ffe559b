"""Schedules at the base's rates, without a Trainer; the table of torch's schedules is in tests/lightning."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from lightning_mup.core.schedules import multiply, per_given_group, rates_at_base, schedule_at_base


def optimizer_of(*mults: float, lr: float | torch.Tensor = 0.1) -> Optimizer:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in mults], lr=lr)
    for group, mult in zip(optimizer.param_groups, mults, strict=True):
        group |= {"lr_mult": mult, "lr": copy.copy(group["lr"])}
    return optimizer


def started(scheduler: LRScheduler) -> LRScheduler:
    multiply(scheduler.optimizer.param_groups)
    schedule_at_base(scheduler)
    return scheduler


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_rates_nest() -> None:
    optimizer = optimizer_of(0.5, 2.0)
    multiply(optimizer.param_groups)
    with rates_at_base(optimizer), rates_at_base(optimizer):
        assert rates(optimizer) == [0.1, 0.1]
    assert rates(optimizer) == [0.05, 0.2]


def test_rates_come_back_after_an_error() -> None:
    optimizer = optimizer_of(0.5)
    multiply(optimizer.param_groups)
    with pytest.raises(KeyError), rates_at_base(optimizer):
        raise KeyError(0)
    with rates_at_base(optimizer):
        assert rates(optimizer) == [0.1]
    assert rates(optimizer) == [0.05]


def test_tensors_are_changed_in_place() -> None:
    optimizer = optimizer_of(0.5, lr=torch.tensor(0.1))
    (group,) = optimizer.param_groups
    held = group["lr"]
    scheduler = started(LinearLR(optimizer, 0.5, 1.0, 2))
    optimizer.step()
    scheduler.step()
    assert group["lr"] is held
    assert float(held) == pytest.approx(0.5 * 0.075)


def test_milestones_of_a_sequence() -> None:
    """SequentialLR sets the first rate of each part by another method than step."""
    plain = optimizer_of(1.0)
    want = SequentialLR(plain, [LinearLR(plain, 0.5, 0.5, 3), CosineAnnealingLR(plain, 4)], [2])
    optimizer = optimizer_of(0.5)
    inner = [LinearLR(optimizer, 0.5, 0.5, 3), CosineAnnealingLR(optimizer, 4)]
    got = SequentialLR(optimizer, inner, [2])
    multiply(optimizer.param_groups)
    for scheduler in inner:
        schedule_at_base(scheduler)
    for _ in range(5):
        for one in (plain, optimizer):
            one.step()
        want.step()
        got.step()
        assert rates(optimizer) == pytest.approx([0.5 * rates(plain)[0]], rel=1e-12)
        assert got.get_last_lr() == rates(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])  # noqa: S301
@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")  # so with any scheduler's copy
def test_schedulers_can_be_copied(copied: object) -> None:
    scheduler = started(CosineAnnealingLR(optimizer_of(0.5), 4, eta_min=0.01))
    other = copied(scheduler)  # type: ignore[operator]
    for each in (scheduler, other):
        each.optimizer.step()
        each.step()
    assert isinstance(other, CosineAnnealingLR)
    assert rates(other.optimizer) == rates(scheduler.optimizer)
    assert type(scheduler).__name__ == "CosineAnnealingLR"


def test_lists_for_optimizers_that_were_not_split_stay_as_they_are() -> None:
    scheduler = object.__new__(LambdaLR)
    per_given_group(LambdaLR.__init__, ["lr_lambda"])(scheduler, optimizer_of(1.0, 1.0), [lambda s: 1.0, lambda s: 0.5])
    assert scheduler.get_last_lr() == [0.1, 0.05]
