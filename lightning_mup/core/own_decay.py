"""What an optimizer's own weight decay removes, so that it can be taken out of a step and applied beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_mup.core.method import Decay, Method, all_methods
from lightning_mup.core.schedules import Group
from lightning_mup.core.settings import decay_per_lr


def decay_of(optimizer: Optimizer, group: Group, declare: Mapping[type, Method] | None = None) -> Decay | None:
    """Return what a group's ``weight_decay`` means; None where nobody declared it.

    Args:
        optimizer: the optimizer.
        group: one of its groups; a ``decay`` of its own goes first.
        declare: declarations beyond the known ones, by class.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> adamw, adam = torch.optim.AdamW([weight]), torch.optim.Adam([weight])
        >>> decay_of(adamw, adamw.param_groups[0]), decay_of(adam, adam.param_groups[0])
        ('coupled', 'l2')
    """
    if group.get("decoupled_weight_decay"):
        return "coupled"
    declared = {cls: method for method in all_methods().values() for cls in method.optimizers} | dict(declare or {})
    found = next((declared[cls] for cls in type(optimizer).__mro__ if cls in declared), None)
    own: Decay | None = group.get("decay")
    return own or (found.decay if found else None)


def fraction_of(group: Group, decay: Decay | None) -> float:
    """Return the fraction of a weight that one step of a group removes, at its rate as it is now.

    Examples:
        >>> fraction_of({"lr": 0.5, "weight_decay": 0.1}, "coupled"), fraction_of({"lr": 0.5}, "coupled")
        (0.05, 0.0)
    """
    if not group.get("weight_decay") or decay == "l2":
        return 0.0
    rate = float(group["lr"])
    return rate * (decay_per_lr(group) if decay == "independent" else float(group["weight_decay"]))


@contextlib.contextmanager
def without_decay(groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Inside, the groups' weight decay is 0.

    Examples:
        >>> group = {"weight_decay": 0.1}
        >>> with without_decay([group]):
        ...     group["weight_decay"]
        0.0
        >>> group["weight_decay"]
        0.1
    """
    kept = [(group, group["weight_decay"]) for group in groups if group.get("weight_decay")]
    for group, _ in kept:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, value in kept:
            group["weight_decay"] = value
