"""Sharded parameters: what each rank steps of them, and how whole gradients reach owners and updates come back.

Under elementwise methods every rank steps its own part, and keeps that part's state. Every other matrix has one owner
among all ranks, which is sent the whole gradient, keeps the whole state (momentum, factors, roots), computes the
update, and sends each rank the part that it applies to its part of the weights. No rank ever has a whole weight.

Bytes that a rank sends per step, and as many that it receives, for P bytes of such matrices over R ranks in shards over
S of them: gradients P / R, each owner's from its own replica, and updates P / S; so 2 P / R under FSDP2 (S = R), and
P / R + P / S under HSDP; beside what FSDP2 itself sends, 3 P (S - 1) / S, and HSDP's mean over replicas, 2 P / S.
Elementwise methods send nothing. Updates travel in float32, or as wide as the weights are.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mup.core.ownership import Load, Ownership, Turn
from lightning_mup.core.parts import local
from lightning_mup.core.shards import Pending, Piece, Shards, pieces_of
from lightning_mup.core.stack import STEP
from lightning_mup.core.transform import Rate, move

_STACK = TypeVar("_STACK")


class _Gradients(NamedTuple):
    """What is on its way to owners: None where no parameter of a turn has a gradient."""

    params: list[Tensor]
    coming: Pending[list[Tensor | None]] | None


class _Updates(NamedTuple):
    """What is on its way to all parts, with the index of each parameter's group."""

    params: list[Tensor]
    groups: list[int]
    coming: Pending[list[Tensor]]


class ShardedOwnership(Ownership):
    """A division of one optimizer's sharded parameters over the ranks of a process group.

    Parameters that are not sharded are stepped by every rank.

    Args:
        group: the process group, all ranks of the parameters' meshes; None for all ranks.
        bucket_bytes: about what all ranks together exchange at once (> 0): less overlaps better, more steps faster.
        beside: the division of another optimizer of the same ranks, whose loads count too.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        bucket_bytes: int = 2**27,
        beside: Ownership | None = None,
    ) -> None:
        super().__init__(group, bucket_bytes=bucket_bytes, beside=beside)
        self._pieces: dict[Tensor, list[Piece]] = {}
        self._parts: dict[Tensor, Tensor] = {}  # of what is elementwise, this rank's
        self._wholes: dict[Tensor, Tensor] = {}  # of what has an owner, what stands for it
        self._made: dict[Tensor, Tensor | None] = {}  # by what stands for an owned parameter, its update
        self._known: dict[tuple[Tensor, ...], Shards] = {}
        self._rates: Sequence[Rate] = ()
        self._updates: _Updates | None = None

    # -- who owns what --------------------------------------------------------------------------------------------

    def assign(self, loads: Sequence[Load]) -> None:
        """Give parameters to ranks, beside what these have; all ranks call it together."""
        super().assign(loads)
        divided = [load.param for load in loads if isinstance(load.param, DTensor) and self._divides(load)]
        self._pieces |= dict(zip(divided, pieces_of(divided, self._group), strict=True))

    def _divides(self, load: Load) -> bool:
        return isinstance(load.param, DTensor) and not load.elementwise

    def looks_at(self, param: Tensor) -> bool:
        """Whether this rank is to see that a gradient is finite: its part of every one."""
        return True

    def held(self, param: Tensor) -> Tensor:
        """Return this rank's part of what every rank steps, and something of the whole's shape for what has an owner.

        The latter is zeros without memory: an owner has the gradient whole, but only its part of the weights.
        """
        if not isinstance(param, DTensor):
            return param
        here = local(param).detach()
        if param in self._owners:
            known = self._wholes.get(param)
            if known is None or known.device != here.device or known.dtype != here.dtype:
                known = self._wholes[param] = here.new_zeros(()).expand(param.shape)
                self._made[known] = None
            return known
        known = self._parts.get(param)
        if known is None or known.data_ptr() != here.data_ptr() or known.dtype != here.dtype:
            known = self._parts[param] = here
        return known

    # -- what is sent ---------------------------------------------------------------------------------------------

    def brought(self, turns: Sequence[Turn[_STACK]], rates: Sequence[Rate]) -> Iterator[Turn[_STACK]]:
        """Return each turn when its owners have their gradients; those of the next one are on their way by then."""
        self._rates = rates
        for param, part in self._parts.items():
            part.grad = None if param.grad is None else local(param.grad)
        asked = self._ask(turns[0])
        for turn, later in zip(turns, [*turns[1:], None], strict=True):
            arriving, asked = asked, self._ask(later) if later else _Gradients([], None)
            self._take(arriving)
            yield turn

    def _ask(self, turn: Turn[_STACK]) -> _Gradients:
        """Start to bring a turn's gradients to their owners, together with what L2 adds to them."""
        params, groups = _present(turn)
        if not params:
            return _Gradients([], None)
        start = time.perf_counter()
        parts = [_gradient(p, self._rates[i].l2) for p, i in zip(params, groups, strict=True)]
        shards = self._shards(params)
        coming = shards.gather(parts)
        self.traffic.bytes += shards.received
        self.traffic.seconds += time.perf_counter() - start
        return _Gradients(params, coming)

    def _take(self, arriving: _Gradients) -> None:
        if arriving.coming is None:
            return
        start = time.perf_counter()
        for param, whole in zip(arriving.params, arriving.coming.wait(), strict=True):
            if whole is not None:
                self._wholes[param].grad = whole
        self.traffic.seconds += time.perf_counter() - start

    def move(self, params: list[Tensor], updates: list[Tensor], rate: Rate) -> None:
        """Step this rank's parts; keep the updates of what it owns until they are sent."""
        if params[0] in self._made:
            self._made |= dict(zip(params, updates, strict=True))
        else:
            move(params, updates, rate)

    def send(self, turn: Turn[_STACK]) -> None:
        """Start to send each rank its parts of a turn's updates, after those of the turn before are applied."""
        self._arrive()
        params, groups = _present(turn)
        if not params:
            return
        start = time.perf_counter()
        places = [self._wholes[p] for p in params]
        shards = self._shards(params)
        updates = [self._made[place] for place in places]
        coming = shards.scatter(updates, [torch.promote_types(p.dtype, torch.float32) for p in params])
        self._made |= dict.fromkeys(places)
        for place in places:
            place.grad = None
        self._updates = _Updates(params, groups, coming)
        self.traffic.bytes += shards.received
        self.traffic.seconds += time.perf_counter() - start

    def receive(self) -> None:
        """End a step: everything that was sent is applied."""
        super().receive()
        for part in self._parts.values():
            part.grad = None

    def _arrive(self) -> None:
        """Apply the updates that are on their way."""
        if self._updates is None:
            return
        start, (params, groups, coming), self._updates = time.perf_counter(), self._updates, None
        parts = coming.wait()
        for group in dict.fromkeys(groups):
            mine = [i for i, other in enumerate(groups) if other == group]
            move([local(params[i]) for i in mine], [parts[i] for i in mine], self._rates[group])
        self.traffic.seconds += time.perf_counter() - start

    def _shards(self, params: Sequence[Tensor]) -> Shards:
        key = tuple(params)  # those of a turn that have a gradient, which are mostly the same
        if key not in self._known:
            owners, pieces = [self._owners[p] for p in params], [self._pieces[p] for p in params]
            self._known[key] = Shards(pieces, [p.shape for p in params], owners, self._device, self._group)
        return self._known[key]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def outward(self, param: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a parameter's state with its parts as DTensors, placed as the parameter is; they share memory."""
        if not isinstance(param, DTensor) or param in self._owners:
            return state
        return {key: value if key == STEP else _placed_like(param, value) for key, value in state.items()}

    def inward(self, param: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return of a parameter's state, whole or placed in any way, what this rank has."""
        if not isinstance(param, DTensor) or param in self._owners:
            return state
        return {key: value if key == STEP else _part_like(param, value) for key, value in state.items()}

    def collect(
        self, param: Tensor, like: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """Return, on the first rank, the whole state that others have, wholly or in parts, on the CPU; None otherwise.

        Args:
            param: the parameter; all ranks ask for it.
            like: tensors of the state's names, shapes and dtypes, on any device.
            state: what this rank has.
        """
        if not isinstance(param, DTensor) or param in self._owners:
            return super().collect(param, like, state)
        assert state is not None
        wholes = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in self.outward(param, state).items()}
        return {key: value.cpu() for key, value in wholes.items()} if self.rank == 0 else None


def _present(turn: Turn[_STACK]) -> tuple[list[Tensor], list[int]]:
    """Return the parameters of a turn, all ranks' in one order, that have a gradient; and their groups' indices."""
    pairs = zip(itertools.chain(*turn.params), itertools.chain(*turn.groups), strict=True)
    present = [(p, group) for p, group in pairs if p.grad is not None]
    return [p for p, _ in present], [group for _, group in present]


def _gradient(param: Tensor, l2: float) -> Tensor:
    """Return this rank's part of a gradient, with the term of an L2 decay."""
    assert param.grad is not None
    part = local(param.grad)
    return part.to(torch.promote_types(param.dtype, torch.float32)).add(local(param), alpha=l2) if l2 else part


def _placed_like(param: DTensor, part: Tensor) -> DTensor:
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _part_like(param: DTensor, value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        return value.redistribute(param.device_mesh, param.placements).to_local()
    return Piece.local(param).of(value).contiguous()
