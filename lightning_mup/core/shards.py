"""Whole matrices from shards and back: one all-to-all brings each owner what all ranks hold parts of, and back.

Beside :mod:`lightning_mup.core.ownership` the one module of core that knows ranks. Bytes that a rank sends per step,
for P bytes of matrices over S shards, in each of R / S replicas: gradients to owners P / S x (1 - 1 / R) in the mean of
one replica's ranks, updates from owners P / S x (1 - 1 / S) times the number of replicas over that of owners; hence
about 2 P / S for FSDP2 (S = R), beside what FSDP2 itself sends, 3 P (R - 1) / R.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_mup.core.packing import pack, row_size, row_views

_RESULT = TypeVar("_RESULT")


class Piece(NamedTuple):
    """The part of a parameter that a rank holds.

    Args:
        offset: where it starts, along each axis.
        shape: how long it is, along each axis.

    Examples:
        >>> Piece((2, 0), (1, 3)).of(torch.arange(9).view(3, 3))
        tensor([[6, 7, 8]])
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def local(cls, param: DTensor) -> Piece:
        """Return this rank's part of a sharded parameter.

        Raises:
            ValueError: the placement is neither sharded nor replicated.
        """
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(f"parts must be of the values, got {param.placements}; reduce the tensor first")
        shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        return cls(tuple(offset), tuple(shape))

    def of(self, whole: Tensor) -> Tensor:
        """Return the part as a view of the whole."""
        for axis, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            whole = whole.narrow(axis, start if length else 0, length)
        return whole


def pieces_of(params: Sequence[DTensor], group: dist.ProcessGroup | None = None) -> list[list[Piece]]:
    """Return what every rank of a group holds of each parameter; all of them call this together.

    Args:
        params: the parameters, in one order on all ranks.
        group: the ranks; None for all.
    """
    found: list[list[Piece]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, [Piece.local(p) for p in params], group=group)
    return [list(pieces) for pieces in zip(*found, strict=True)]


class Pending(Generic[_RESULT]):
    """What is on its way.

    Args:
        handle: what to wait for.
        result: makes the result of what has arrived.
    """

    def __init__(self, handle: dist.Work | None, result: Callable[[], _RESULT]) -> None:
        self._handle, self._result = handle, result

    def wait(self) -> _RESULT:
        """Return what was asked for."""
        if self._handle is not None:
            self._handle.wait()
        return self._result()


class Shards:
    """How the parts of some sharded tensors reach their owners, and how results come back to all parts.

    Any mesh will do: one axis, replicas of shards (HSDP), shards along several axes (with tensor parallelism), uneven
    and empty parts. Of replicas, an owner asks the one among whose ranks it is itself.

    Args:
        pieces: of each parameter, what every rank of the group holds; see :func:`pieces_of`.
        shapes: of the whole parameters.
        owners: rank within the group that is to have each whole one.
        device: where parts and wholes are.
        group: ranks among which parts lie; None for all.

    Raises:
        ValueError: parts do not make up a whole.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[Piece]],
        shapes: Sequence[Sequence[int]],
        owners: Sequence[int],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group, self._rank = group, dist.get_rank(group)
        self._device, self._owners, self._shapes = device, list(owners), [tuple(shape) for shape in shapes]
        self._pieces = [list(held) for held in pieces]
        self.received = 0  # bytes that the last exchange brings from other ranks
        ranks = range(dist.get_world_size(group))
        self._of: list[list[int]] = [[] for _ in ranks]  # by owner, what it owns
        self._asked: list[list[int]] = [[] for _ in ranks]  # by owner, what it has from here
        self._asking: list[list[int]] = [[] for _ in ranks]  # by rank, what this owner has from there
        for i, (held, owner, shape) in enumerate(zip(self._pieces, self._owners, self._shapes, strict=True)):
            self._of[owner].append(i)
            for source in _sources(held, owner, shape):
                if source == self._rank:
                    self._asked[owner].append(i)
                if owner == self._rank:
                    self._asking[source].append(i)

    def gather(self, parts: Sequence[Tensor]) -> Pending[list[Tensor | None]]:
        """Bring the parts of tensors of the parameters' shapes together: whole at each owner, None elsewhere.

        Args:
            parts: this rank's part of each.
        """
        sent = [[parts[i] for i in asked] for asked in self._asked]
        wanted = [
            [_like(parts[i].dtype, self._pieces[i][source].shape) for i in asking]
            for source, asking in enumerate(self._asking)
        ]

        def whole(arrived: list[list[Tensor]]) -> list[Tensor | None]:
            made = {i: parts[i].new_empty(self._shapes[i]) for i in self._of[self._rank]}
            for source, views in enumerate(arrived):
                for i, view in zip(self._asking[source], views, strict=True):
                    self._pieces[i][source].of(made[i]).copy_(view)
            return [made.get(i) for i in range(len(parts))]

        return self._exchange(sent, wanted, whole)

    def scatter(self, wholes: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> Pending[list[Tensor]]:
        """Bring each part of whole tensors to every rank that holds it.

        Args:
            wholes: the whole tensors that this rank owns, None for the others.
            dtypes: of each, on all ranks.
        """
        own = [(i, whole) for i, whole in enumerate(wholes) if whole is not None]
        sent = [[self._pieces[i][to].of(whole) for i, whole in own] for to in range(len(self._of))]
        wanted = [[_like(dtypes[i], self._pieces[i][self._rank].shape) for i in owned] for owned in self._of]

        def parts(arrived: list[list[Tensor]]) -> list[Tensor]:
            found = dict(zip(itertools.chain(*self._of), itertools.chain(*arrived), strict=True))
            return [found[i] for i in range(len(dtypes))]

        return self._exchange(sent, wanted, parts)

    def _exchange(
        self,
        sent: Sequence[Sequence[Tensor]],
        wanted: Sequence[Sequence[Tensor]],
        result: Callable[[list[list[Tensor]]], _RESULT],
    ) -> Pending[_RESULT]:
        """Send rows of tensors by rank, and make a result of those that arrive by rank."""
        out, into = ([row_size(row)[1] for row in rows] for rows in (sent, wanted))
        self.received = sum(into) - into[self._rank]
        leaving, arriving = (torch.empty(sum(sizes), dtype=torch.uint8, device=self._device) for sizes in (out, into))
        for buffer, row in zip(torch.split(leaving, out), sent, strict=True):
            pack(buffer, row)
        handle = dist.all_to_all_single(arriving, leaving, into, out, group=self._group, async_op=True)
        return Pending(
            handle,
            lambda: result(
                [row_views(buffer, row) for buffer, row in zip(torch.split(arriving, into), wanted, strict=True)]
            ),
        )


def _like(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sources(pieces: Sequence[Piece], owner: int, shape: tuple[int, ...]) -> set[int]:
    """Return one rank for each part; of several that hold it, one from the owner's replica."""
    holding = [rank for rank, piece in enumerate(pieces) if 0 not in piece.shape]
    first = {pieces[rank]: rank for rank in reversed(holding)}
    size = len(pieces) // max(1, len(holding) // max(1, len(first)))  # of a replica, whose ranks follow each other
    held = sum(int(torch.Size(piece.shape).numel()) for piece in first)
    if held != torch.Size(shape).numel():
        raise ValueError(
            f"parts {list(first)} are {held} entries, but a whole of shape {shape} has others; check the mesh"
        )
    near = {pieces[rank]: rank for rank in reversed(holding) if rank // size == owner // size}
    return set({**first, **near}.values())
