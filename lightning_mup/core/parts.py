"""This rank's parts of tensors, and what all ranks' parts make together: norms of wholes, and statements true of all.

Nothing here does anything to a tensor that is not sharded: it is its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_mup.core.shards import Piece


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor; the two share memory.

    Examples:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return x.to_local() if isinstance(x, DTensor) else x


def piece_of(x: Tensor) -> Piece:
    """Return where this rank's part of a tensor lies.

    Examples:
        >>> piece_of(torch.ones(2, 3))
        Piece(offset=(0, 0), shape=(2, 3))
    """
    return Piece.local(x) if isinstance(x, DTensor) else Piece((0,) * x.dim(), tuple(x.shape))


def norms_of_wholes(norms: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return the norms of whole tensors, given those of this rank's parts: the same bits on all ranks of a mesh.

    All norms go in one all-reduce per axis of a mesh, as squares in float64. Of replicas, the first counts.

    Args:
        norms: by tensor, the norms of its part, in any number and shape; all ranks have the same tensors in one order.

    Examples:
        >>> norms_of_wholes({torch.ones(4): torch.tensor([2.0])})
        {tensor([1., 1., 1., 1.]): tensor([2.])}
    """
    found = dict(norms)
    for mesh in _meshes(norms):
        on = [p for p in norms if isinstance(p, DTensor) and p.device_mesh == mesh]
        parts = [norms[p].double().square().flatten() * _is_first(p) for p in on]
        squares = torch.cat(parts).to(mesh.device_type)  # where parameters may rest on the CPU
        _reduce(squares, dist.ReduceOp.SUM, mesh)
        for p, whole in zip(on, torch.split(squares.sqrt(), [part.numel() for part in parts]), strict=True):
            found[p] = whole.view_as(norms[p]).to(norms[p])
    return found


def holds_on_all(fact: bool, tensors: Iterable[Tensor]) -> bool:
    """Return whether a statement about parts of tensors is true on every rank that has a part.

    Examples:
        >>> holds_on_all(True, [torch.ones(1)])
        True
    """
    for mesh in _meshes(tensors):
        said = torch.tensor(fact, dtype=torch.int32, device=mesh.device_type)
        _reduce(said, dist.ReduceOp.MIN, mesh)
        fact = bool(said)
    return fact


def _meshes(tensors: Iterable[Tensor]) -> Iterator[DeviceMesh]:
    yield from dict.fromkeys(x.device_mesh for x in tensors if isinstance(x, DTensor))


def _is_first(x: DTensor) -> bool:
    """Whether this rank's part is of the first replica."""
    placed = zip(x.device_mesh.get_coordinate() or (), x.placements, strict=True)
    return all(at == 0 for at, placement in placed if placement.is_replicate())


def _reduce(values: Tensor, by: dist.ReduceOp.RedOpType, mesh: DeviceMesh) -> None:
    for axis in range(mesh.ndim):
        dist.all_reduce(values, by, group=mesh.get_group(axis))
