"""Learning-rate schedules that go on computing at the base's rates, whatever multiples the groups stand at."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR

Group = dict[str, Any]
LR_AT_BASE = "lr_at_base"
LR_MULT = "lr_mult"
LR_GIVEN = "lr_given"
"""Key of a parameter group that holds the rate that the user gave, at the base, before any schedule."""
GIVEN = "given_group"
"""Key of a parameter group that holds the number of the user's group that it was split off."""

PER_GROUP: dict[type, tuple[str, ...]] = {
    LambdaLR: ("lr_lambda",),
    MultiplicativeLR: ("lr_lambda",),
    OneCycleLR: ("max_lr", "base_momentum", "max_momentum"),
    CyclicLR: ("base_lr", "max_lr", "base_momentum", "max_momentum"),
    SWALR: ("swa_lr",),
    ReduceLROnPlateau: ("min_lr",),
}
"""Arguments of torch's schedulers that may be a list with one entry for each of the user's groups."""

_at_base: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@contextlib.contextmanager
def rates_at_base(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the groups carry the learning rates at the base; afterwards each is multiplied again.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> optimizer.param_groups[0].update(lr_mult=0.5, lr_at_base=0.1, lr=0.05)
        >>> with rates_at_base(optimizer):
        ...     optimizer.param_groups[0]["lr"] *= 2
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    if optimizer in _at_base:  # a scheduler of schedulers
        yield
        return
    for group in optimizer.param_groups:
        _set_rate(group, group[LR_AT_BASE])
    _at_base.add(optimizer)
    try:
        yield
    finally:
        _at_base.discard(optimizer)
        multiply(optimizer.param_groups)


def multiply(groups: Iterable[Group]) -> None:
    """Take the groups' rates for those at the base, remember them, and multiply.

    Examples:
        >>> group = {"lr": 0.1, "lr_mult": 0.5}
        >>> multiply([group])
        >>> group["lr"], group["lr_at_base"]
        (0.05, 0.1)
    """
    for group in groups:
        group[LR_AT_BASE] = _copy(group["lr"])
        _set_rate(group, group["lr"] * group[LR_MULT])


def schedule_at_base(scheduler: LRScheduler) -> None:
    """Make a scheduler compute at the base's rates; its groups must have been multiplied.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scheduler = CyclicLR(optimizer, base_lr=0.1, max_lr=0.2, step_size_up=1)
        >>> optimizer.param_groups[0]["lr_mult"] = 0.5
        >>> multiply(optimizer.param_groups)
        >>> schedule_at_base(scheduler)
        >>> _ = optimizer.step(lambda: 0.0), scheduler.step()
        >>> scheduler.get_last_lr()
        [0.1]
    """
    cls = type(scheduler)
    if not issubclass(cls, _AtBase):
        scheduler.__class__ = type(cls.__name__, (_AtBase, cls), {"__module__": cls.__module__})
    _note_rates(scheduler)


def per_given_group(original: Callable[..., None], keys: Iterable[str]) -> Callable[..., None]:
    """Let a scheduler's constructor take lists with one entry for each of the user's groups, though those were split.

    Examples:
        >>> groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "given_group": i} for i in (0, 0, 1)]
        >>> scheduler, rates = object.__new__(SWALR), [0.1, 0.2]
        >>> per_given_group(SWALR.__init__, ["swa_lr"])(scheduler, torch.optim.SGD(groups), rates)
        >>> [group["swa_lr"] for group in scheduler.optimizer.param_groups]
        [0.1, 0.1, 0.2]
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(*args: object, **kwargs: object) -> None:
        given = signature.bind(*args, **kwargs)
        indices = [group.get(GIVEN) for group in given.arguments["optimizer"].param_groups]
        for key in keys:
            value = given.arguments.get(key)
            if isinstance(value, (list, tuple)) and None not in indices and len(value) == max(indices) + 1:
                given.arguments[key] = [value[index] for index in indices]
        original(*given.args, **given.kwargs)

    return init


class _AtBase:
    """Mixed into a scheduler's class, so that every schedule, additive ones too, runs at the base's rates."""

    optimizer: Optimizer

    def step(self, *args: object, **kwargs: object) -> None:
        with rates_at_base(self.optimizer):
            super().step(*args, **kwargs)  # type: ignore[misc]
        _note_rates(self)

    def _update_lr(self, *args: object) -> None:  # SequentialLR calls it directly at its milestones
        with rates_at_base(self.optimizer):
            super()._update_lr(*args)  # type: ignore[misc]
        _note_rates(self)

    def __reduce_ex__(self, protocol: int) -> Any:  # type: ignore[override]  # noqa: ANN401 - pickle's own format
        # The mixed class cannot be found by name: it is made anew.
        return _restored, (type(self).__mro__[2],), self.__dict__


def _restored(cls: type[LRScheduler]) -> LRScheduler:
    return object.__new__(type(cls.__name__, (_AtBase, cls), {"__module__": cls.__module__}))


def _note_rates(scheduler: Any) -> None:  # noqa: ANN401 - a scheduler with the mixin
    scheduler._last_lr = [_copy(group["lr"]) for group in scheduler.optimizer.param_groups]


def _set_rate(group: Group, rate: Any) -> None:  # noqa: ANN401 - a number or a tensor
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(torch.as_tensor(rate))  # compiled and captured steps hold this very tensor
    else:
        group["lr"] = rate


def _copy(rate: Any) -> Any:  # noqa: ANN401
    return rate.clone() if isinstance(rate, torch.Tensor) else rate
