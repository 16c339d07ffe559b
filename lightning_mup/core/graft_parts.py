"""The parts of a graft: two optimizers' steps from the same weights, taken within the parameters themselves.

Of sharded parameters, each rank works on its part; only norms are those of all parts together.

Shapes: N matrices of a parameter, A x B blocks of each; L rows and C columns of this rank's part, in as many matrices.
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
from lightning_mup.core.parts import local, norms_of_wholes, piece_of
from lightning_mup.core.schedules import Group
from lightning_mup.core.shards import Piece
from lightning_mup.core.stack import Arrangement


class Blocks:
    """How this rank's part of a parameter is cut into what has one length.

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
        whole, piece = Arrangement.of(param, group), piece_of(param)
        blocking = Blocking(whole.rows, whole.columns, block_size)
        (p, q), (a, b) = blocking.block, blocking.count
        low = torch.promote_types(param.dtype, torch.float32) != param.dtype
        self.plain = not low and whole.count == 1 and (a, b) == (1, 1)
        self._part = Arrangement(piece.shape, whole.out, whole.summed)
        # The row and the column of blocks that each of the part's own is in; rows of all matrices follow each other.
        row_L = _indices(piece, whole.shape, (*whole.stacked, *whole.out))
        block_L = row_L // whole.rows * a + row_L % whole.rows // p
        block_C = _indices(piece, whole.shape, whole.summed) // q
        self._size, self._widths = (whole.count * a, b), torch.bincount(block_C, minlength=b).tolist()
        self._block_L, self._block_C = block_L.to(param.device), block_C.to(param.device)

    def norms(self, x: Tensor) -> Tensor:
        """Return the norms [N A, B] of a step's part, 0 where it has nothing of a block."""
        x_LC = widened(self._flat(x))
        cut = torch.split(x_LC, self._widths, dim=1)
        norm_LB = torch.stack([torch.linalg.vector_norm(x_LQ, dim=1) for x_LQ in cut], dim=1)
        # In float64, which Apple's GPUs lack, squares do not vanish, and in any order have the same sum.
        square_LB = norm_LB.to(torch.float32 if x.device.type == "mps" else torch.float64).square()
        return square_LB.new_zeros(self._size).index_add_(0, self._block_L, square_LB).sqrt().to(x_LC.dtype)

    def scaled(self, x: Tensor, factor_AB: Tensor) -> Tensor:
        """Return a step's part with its blocks multiplied by [N A, B]."""
        return self._part.give(widened(self._flat(x)) * factor_AB[self._block_L][:, self._block_C])

    def _flat(self, x: Tensor) -> Tensor:
        return self._part.take(x).flatten(0, 1)


class Place(NamedTuple):
    """Where this rank's part of a parameter was, and how it is cut.

    Args:
        before: a copy of the part.
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
    blind, parts = _is_blind(type(optimizer)), [local(p) for p in own]
    if blind:
        torch._foreach_zero_(parts)
    else:
        put_back(own, places)
    with without_decay(optimizer.param_groups):
        optimizer.step()
    if not blind:
        torch._foreach_sub_(parts, [places[p].before for p in own])
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
        torch._foreach_copy_([local(p) for p in params], [places[p].before for p in params])


def norms_of(params: Sequence[Tensor], places: Places) -> dict[Tensor, Tensor]:
    """Return the norms [N A, B] of what parameters hold, on all ranks together.

    Examples:
        >>> step = torch.tensor([3.0, 4.0])
        >>> norms_of([step], {step: Place(step, Blocks(step, {}, None))})[step].flatten()
        tensor([5.])
    """
    plain = [p for p in params if places[p].blocks.plain]
    found = dict(zip(plain, torch._foreach_norm([local(p) for p in plain]) if plain else [], strict=True))
    parts = {p: found[p].view(1, 1) if p in found else places[p].blocks.norms(local(p)) for p in params}
    return norms_of_wholes(parts)


def combine(params: Sequence[Tensor], places: Places, factors: Mapping[Tensor, Tensor], *, kept: float) -> None:
    """Set ``W <- kept x before + factor x step``, where the parameters hold the step.

    Args:
        params: the parameters.
        places: copies of them.
        factors: [N A, B] by parameter; without one, it is 1.
        kept: what decay leaves of the weights, in [0, 1].

    Examples:
        >>> step = torch.tensor([3.0])
        >>> combine([step], {step: Place(torch.ones(1), Blocks(step, {}, None))}, {}, kept=0.5)
        >>> step
        tensor([3.5000])
    """
    cut = [p for p in params if p in factors and not places[p].blocks.plain]
    for p in cut:
        local(p).copy_(places[p].blocks.scaled(local(p), factors[p]).add_(places[p].before, alpha=kept))
    if whole := [p for p in params if p in factors and places[p].blocks.plain]:
        torch._foreach_mul_([local(p) for p in whole], [factors[p].view(()) for p in whole])
    done = set(cut)
    if added := [p for p in params if p not in done]:
        torch._foreach_add_([local(p) for p in added], [places[p].before for p in added], alpha=kept)


def _indices(piece: Piece, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Return the positions of a part's entries along some axes of the whole, taken as one axis."""
    found = torch.zeros(1, dtype=torch.int64)
    for axis in axes:
        along = piece.offset[axis] + torch.arange(piece.shape[axis])
        found = (found[:, None] * shape[axis] + along).flatten()
    return found


def _is_blind(kind: type[Optimizer]) -> bool:
    """Whether the update is known not to depend on the weights; a subclass may look at them."""
    return any(kind in method.optimizers and not method.weight_degree for method in all_methods().values())
