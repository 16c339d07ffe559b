"""The parts of a graft: two optimizers' steps from the same weights, taken within the parameters themselves.

Shapes: N matrices of a parameter, B blocks of each, of P rows and Q columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mup.core.blocking import Blocking
from lightning_mup.core.linalg import widened
from lightning_mup.core.method import all_methods
from lightning_mup.core.own_decay import without_decay
from lightning_mup.core.schedules import Group
from lightning_mup.core.stack import Arrangement


class Blocks:
    """How a parameter is cut into what has one length.

    Args:
        param: the parameter.
        group: its group, for ``axes`` and ``split``.
        block_size: largest side of a block (>= 1); None cuts nothing.

    Examples:
        >>> blocks = Blocks(torch.zeros(2, 2), {}, 1)
        >>> blocks.plain, blocks.norms(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).flatten()
        (False, tensor([3., 0., 0., 4.]))
    """

    def __init__(self, param: Tensor, group: Group, block_size: int | None) -> None:
        self._arrangement = Arrangement.of(param, group)
        self._blocking = Blocking(self._arrangement.rows, self._arrangement.columns, block_size)
        low = torch.promote_types(param.dtype, torch.float32) != param.dtype
        self.plain = not low and self._arrangement.count == 1 and self._blocking.count == (1, 1)

    def norms(self, x: Tensor) -> Tensor:
        """Return the norms [N, B, 1, 1] of a step."""
        x_NBPQ = self._blocking.cut(self._arrangement.take(widened(x)))
        norm_NB11: Tensor = torch.linalg.vector_norm(x_NBPQ, dim=(2, 3), keepdim=True)
        return norm_NB11

    def scaled(self, x: Tensor, factor_NB11: Tensor) -> Tensor:
        """Return a step with its blocks multiplied."""
        x_NBPQ = self._blocking.cut(self._arrangement.take(widened(x)))
        return self._arrangement.give(self._blocking.merge(x_NBPQ * factor_NB11))


class Place(NamedTuple):
    """Where a parameter was, and how it is cut.

    Args:
        before: a copy of the parameter.
        blocks: its blocks.
    """

    before: Tensor
    blocks: Blocks


Places = Mapping[Tensor, Place]


def move(optimizer: Optimizer, params: Sequence[Tensor], places: Places) -> list[Tensor]:
    """Set those of the parameters that an optimizer holds to the step that it takes, without decay, and return them.

    An update that is known not to depend on the weights is taken from zero, where a small step loses no digits, and one
    of bfloat16 not all of them.

    Args:
        optimizer: the optimizer.
        params: the parameters, whatever they hold.
        places: where they were.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.full((2,), 1e-9)
        >>> place = Place(torch.ones(2), Blocks(weight, {}, None))
        >>> with torch.no_grad():
        ...     move(torch.optim.SGD([weight], lr=1.0), [weight], {weight: place})[0].data
        tensor([-1.0000e-09, -1.0000e-09])
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    own = [p for p in params if p in held]
    if not own:
        return []
    blind = _is_blind(type(optimizer))
    if blind:
        torch._foreach_zero_(own)
    else:
        put_back(own, places)
    with without_decay(optimizer.param_groups):
        optimizer.step()
    if not blind:
        torch._foreach_sub_(own, [places[p].before for p in own])
    return own


def put_back(params: Sequence[Tensor], places: Places) -> None:
    """Set parameters to what they were before.

    Examples:
        >>> weight = torch.zeros(1)
        >>> put_back([weight], {weight: Place(torch.ones(1), Blocks(weight, {}, None))})
        >>> weight
        tensor([1.])
    """
    if params:
        torch._foreach_copy_(list(params), [places[p].before for p in params])


def norms_of(params: Sequence[Tensor], places: Places) -> dict[Tensor, Tensor]:
    """Return the norms [N, B, 1, 1] of what parameters hold.

    Examples:
        >>> step = torch.tensor([3.0, 4.0])
        >>> norms_of([step], {step: Place(step, Blocks(step, {}, None))})[step].flatten()
        tensor([5.])
    """
    plain = [p for p in params if places[p].blocks.plain]
    found = dict(zip(plain, torch._foreach_norm(plain) if plain else [], strict=True))
    return {p: found[p].view(1, 1, 1, 1) if p in found else places[p].blocks.norms(p) for p in params}


def combine(params: Sequence[Tensor], places: Places, factors: Mapping[Tensor, Tensor], *, kept: float) -> None:
    """Set ``W <- kept x before + factor x step``, where the parameters hold the step.

    Args:
        params: the parameters.
        places: copies of them.
        factors: [N, B, 1, 1] by parameter; without one, it is 1.
        kept: what decay leaves of the weights, in [0, 1].

    Examples:
        >>> step = torch.tensor([3.0])
        >>> combine([step], {step: Place(torch.ones(1), Blocks(step, {}, None))}, {}, kept=0.5)
        >>> step
        tensor([3.5000])
    """
    cut = [p for p in params if p in factors and not places[p].blocks.plain]
    for p in cut:
        p.copy_(places[p].blocks.scaled(p, factors[p]).add_(places[p].before, alpha=kept))
    if whole := [p for p in params if p in factors and places[p].blocks.plain]:
        torch._foreach_mul_(whole, [factors[p].view(()) for p in whole])
    done = set(cut)
    if added := [p for p in params if p not in done]:
        torch._foreach_add_(added, [places[p].before for p in added], alpha=kept)


def _is_blind(kind: type[Optimizer]) -> bool:
    """Whether the update is known not to depend on the weights; a subclass may look at them."""
    return any(kind in method.optimizers and not method.weight_degree for method in all_methods().values())
