"""What strategies that divide optimizers have in common: which parts are divided, and whole states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_mup.core.grafted import Grafted
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.ownership import Ownership, Traffic


def stacked_in(optimizer: Optimizer) -> list[StackedOptimizer]:
    """Return the optimizers of this package in one: itself, or parts of a graft.

    Examples:
        >>> import torch
        >>> stacked_in(torch.optim.SGD([torch.ones(1)], lr=0.1))
        []
    """
    parts = [optimizer.direction, optimizer.magnitude] if isinstance(optimizer, Grafted) else [optimizer]
    return [part for part in parts if isinstance(part, StackedOptimizer)]


def divide(name: str, optimizers: Sequence[Optimizer], make: Callable[[Ownership | None], Ownership]) -> Traffic | None:
    """Divide this package's optimizers among some over all ranks, say how much each has, and return what will be sent.

    Args:
        name: of the strategy, for what is said.
        optimizers: those of the Trainer.
        make: makes a division, given the one before.
    """
    ownership: Ownership | None = None
    for optimizer in [part for whole in optimizers for part in stacked_in(whole)]:
        ownership = make(ownership)
        optimizer.divide(ownership)
    if ownership is None:
        kinds = [type(optimizer).__name__ for optimizer in optimizers]
        rank_zero_info(f"{name} divides this package's optimizers; {kinds} run as they are.")
        return None
    rank_zero_info(f"{name} divides {_shares(ownership)}")
    return ownership.traffic


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state of all ranks on the first, as one process has it, {} elsewhere; all ranks call it.

    Examples:
        >>> import torch
        >>> sorted(whole_state(torch.optim.SGD([torch.ones(1)], lr=0.1)))
        ['param_groups', 'state']
    """
    if isinstance(optimizer, Grafted):
        sides = {"direction": optimizer.direction, "magnitude": optimizer.magnitude}
        return {**optimizer.state_dict(), **{side: whole_state(part) for side, part in sides.items()}}
    return optimizer.whole_state_dict() if isinstance(optimizer, StackedOptimizer) else optimizer.state_dict()


def _shares(ownership: Ownership) -> str:
    work, size = (sum(values) for values in zip(*ownership.loads, strict=True))
    most_work, most_size = (max(values) for values in zip(*ownership.loads, strict=True))
    share = most_work / work if work else 0.0
    return (
        f"{size / 1e6:.3g} MB of optimizer state over {ownership.ranks} ranks: at most {most_size / 1e6:.3g} MB and "
        f"{share:.0%} of the work on one."
    )
