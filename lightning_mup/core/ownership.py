"""Which rank owns which parameters: it alone keeps their state, and takes their steps; then all get their weights.

Everything here follows from shapes, settings and order, hence is the same on every rank without being sent. Parameters
that are sharded, too, are :mod:`lightning_mup.core.sharding`'s.

Bytes per step and rank, for P bytes of matrices over R ranks under DDP, beside the 2 P (R - 1) / R of the gradients'
all-reduce: weights P (R - 1) / R received, one all-gather per turn; state P_state / R kept. So replicated training
moves 2 bytes per byte of parameter, divided training 3, whatever the method: neither momentum nor factors nor roots
ever travel but into checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mup.core.packing import bytes_of, pack, row_size, row_views
from lightning_mup.core.registry import near
from lightning_mup.core.transform import ELEMENTWISE, Rate, move

Elementwise = Literal["divide", "replicate"]
"""What to do about matrices whose steps are cheaper than to send them: keep less state, or send less."""
_CHEAP = 4 * ELEMENTWISE  # operations per entry, of up to four elementwise passes
_PADDING = 1.25  # an all-gather sends as much for each rank; beyond this factor, broadcasts send less
_STACK = TypeVar("_STACK")
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)


class Load(NamedTuple):
    """What one parameter costs.

    Args:
        param: the parameter.
        work: operations per step.
        state_bytes: size of its state.
        elementwise: whether any part of it can be stepped alone.
    """

    param: Tensor
    work: float
    state_bytes: int
    elementwise: bool = False

    @property
    def is_cheap(self) -> bool:
        """Whether the step is a few passes over the parameter."""
        return self.work <= _CHEAP * self.param.numel()


class Portion(NamedTuple):
    """Parameters that one rank steps together.

    Args:
        method: name of the method that moves them.
        owner: the rank, or None where every rank steps them.
        params: the parameters, their matrices all of one shape.
    """

    method: str
    owner: int | None
    params: list[Tensor]


@dataclass(frozen=True, slots=True)
class Turn(Generic[_STACK]):
    """What this rank steps, and what all ranks send each other after it, while the next turn is being computed.

    Args:
        work: stacks by index of their group.
        params: by rank, what it sends.
        groups: by rank, the indices of their groups.
    """

    work: dict[int, list[_STACK]]
    params: list[list[Tensor]]
    groups: list[list[int]]


@dataclass(slots=True)
class Traffic:
    """What a divided optimizer has sent.

    Args:
        steps: number of steps.
        bytes: received from other ranks.
        seconds: in which this rank's processor packed, waited and unpacked, in all.
    """

    steps: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """Return the volume and the time of one step."""
        steps = max(self.steps, 1)
        return f"{self.bytes / steps / 1e6:.3g} MB received and {self.seconds / steps * 1e3:.3g} ms per step"


class _Flight(NamedTuple):
    """An exchange under way: what to wait for, and by other rank what arrives where."""

    handles: list[dist.Work]
    arriving: list[tuple[list[Tensor], Tensor]]


def assign(items: Sequence[Load], totals: list[tuple[float, int]]) -> list[int]:
    """Return the rank of each item: the costliest first, each to the rank that has least so far.

    What computes is divided by operations, of which the busiest rank gets at most 4/3 of the least possible; then what
    is elementwise or frozen by bytes of state.

    Args:
        items: what there is to divide.
        totals: (operations, bytes of state) of each rank so far; they are updated.

    Examples:
        >>> items = [Load(torch.ones(1, 1), work, 1) for work in (300.0, 500.0, 400.0, 200.0, 2.0)]
        >>> totals = [(0.0, 0), (0.0, 0)]
        >>> assign(items, totals), totals
        ([1, 0, 1, 0, 0], [(702.0, 3), (700.0, 2)])

    Reference:
        Graham 1969, Bounds on multiprocessing timing anomalies: longest processing time first.
    """
    owners = dict[int, int]()
    for cheap in (False, True):
        chosen = [i for i, item in enumerate(items) if item.is_cheap == cheap]
        key = (lambda pair: (pair[1], pair[0])) if cheap else (lambda pair: pair)
        costs = {i: key((items[i].work, items[i].state_bytes)) for i in chosen}
        for i in sorted(chosen, key=lambda i: (*(-cost for cost in costs[i]), i)):
            owners[i] = min(range(len(totals)), key=lambda rank: (*key(totals[rank]), rank))
            work, size = totals[owners[i]]
            totals[owners[i]] = (work + items[i].work, size + items[i].state_bytes)
    return [owners[i] for i in range(len(items))]


@contextlib.contextmanager
def deferred_state() -> Iterator[None]:
    """Let optimizers that are built inside make no state, since each rank's part of it is not known before ``divide``.

    Examples:
        >>> with deferred_state():
        ...     defers_state()
        True
    """
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def defers_state() -> bool:
    """Whether optimizers are to wait with their state until they are divided.

    Examples:
        >>> defers_state()
        False
    """
    return _DEFERRED.get()


def is_shared(load: Load, elementwise: Elementwise) -> bool:
    """Whether all ranks step a parameter: its step is cheaper than to send it, and there is little state to save.

    So it is with vectors under elementwise methods, and with whatever has no state, such as SGD without momentum; under
    ``"replicate"`` with every elementwise method.

    Examples:
        >>> vector, matrix = (Load(torch.ones(shape), 16 * 8.0, 64) for shape in (8, (4, 2)))
        >>> is_shared(vector, "divide"), is_shared(matrix, "divide"), is_shared(matrix, "replicate")
        (True, False, True)
    """
    return load.is_cheap and (load.param.dim() < 2 or not load.state_bytes or elementwise == "replicate")


class Ownership:
    """A division of one optimizer's parameters over the ranks of a process group.

    Args:
        group: the process group; None for all ranks.
        elementwise: ``"divide"`` or ``"replicate"`` matrices under elementwise methods (Adam).
        bucket_bytes: about what all ranks together exchange at once (> 0): less overlaps better, more steps faster.
        beside: the division of another optimizer of the same ranks, whose loads count too.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> Ownership(elementwise="divided")
        Traceback (most recent call last):
        ValueError: elementwise must be 'divide' or 'replicate', got 'divided'; did you mean 'divide'?
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        elementwise: Elementwise = "divide",
        bucket_bytes: int = 2**27,
        beside: Ownership | None = None,
    ) -> None:
        if elementwise not in ("divide", "replicate"):
            said = near(str(elementwise), ("divide", "replicate"))
            raise ValueError(f"elementwise must be 'divide' or 'replicate', got {elementwise!r}{said}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be 1 or more, got {bucket_bytes}; 2**27 is usual")
        self._group, self._elementwise = group, elementwise
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.portion_bytes = max(1, bucket_bytes // self.ranks)
        self.loads: list[tuple[float, int]] = [(0.0, 0)] * self.ranks if beside is None else beside.loads
        self.traffic: Traffic = Traffic() if beside is None else beside.traffic
        self._owners: dict[Tensor, int] = {}
        self._flight: _Flight | None = None
        self._device = torch.device("cpu")

    # -- who owns what --------------------------------------------------------------------------------------------

    def assign(self, loads: Sequence[Load]) -> None:
        """Give parameters to ranks, beside what these have."""
        divided = [load for load in loads if self._divides(load)]
        owners = assign(divided, self.loads)
        self._owners |= {load.param: owner for load, owner in zip(divided, owners, strict=True)}
        if loads:
            self._device = loads[0].param.device

    def _divides(self, load: Load) -> bool:
        return not is_shared(load, self._elementwise)

    def owner(self, param: Tensor) -> int | None:
        """Return the rank that steps a parameter; None where all do."""
        return self._owners.get(param)

    def holds(self, param: Tensor) -> bool:
        """Whether this rank steps a parameter."""
        return self._owners.get(param, self.rank) == self.rank

    def looks_at(self, param: Tensor) -> bool:
        """Whether this rank is to see that a parameter's gradient is finite."""
        return self.holds(param)

    def held(self, param: Tensor) -> Tensor:
        """Return what this rank has in a parameter's place where it steps it."""
        return param

    def turns(self, cut: Sequence[tuple[int, Portion]], stacks: Sequence[_STACK]) -> list[Turn[_STACK]]:
        """Return what is stepped and sent turn by turn; what all ranks step comes last, while the last part travels.

        Args:
            cut: all ranks' portions, each with the index of its group.
            stacks: this rank's, in the order of the portions that it steps.
        """
        own = iter(stacks)
        stepped = [next(own) if portion.owner in (None, self.rank) else None for _, portion in cut]
        ranked = [[i for i, (_, portion) in enumerate(cut) if portion.owner == rank] for rank in range(self.ranks)]
        queues = [self._queue([(i, row_size(cut[i][1].params)[1]) for i in mine]) for mine in ranked]
        found: list[Turn[_STACK]] = []
        for k in range(max(map(len, queues))):
            parts = [queue[k] if k < len(queue) else [] for queue in queues]
            params = [[p for i in part for p in cut[i][1].params] for part in parts]
            groups = [[cut[i][0] for i in part for _ in cut[i][1].params] for part in parts]
            found.append(Turn(_by_group(cut, parts[self.rank], stepped), params, groups))
        shared = [i for i, (_, portion) in enumerate(cut) if portion.owner is None]
        return [*found, Turn(_by_group(cut, shared, stepped), [], [])]

    def _queue(self, portions: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Cut one rank's portions, (index, bytes) each, into turns; the largest first, as on every rank."""
        turns: list[list[int]] = []
        room = 0
        for i, size in sorted(portions, key=lambda pair: -pair[1]):
            if not turns or size > room:
                turns, room = [*turns, []], self.portion_bytes
            turns[-1].append(i)
            room -= size
        return turns

    # -- what is sent ---------------------------------------------------------------------------------------------

    def all_say(self, *facts: bool) -> list[bool]:
        """Return which of some statements are true on every rank."""
        said = torch.tensor(facts, dtype=torch.int32, device=self._device)
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self._group)
        return [bool(fact) for fact in said.tolist()]

    def brought(self, turns: Sequence[Turn[_STACK]], rates: Sequence[Rate]) -> Iterator[Turn[_STACK]]:
        """Return each turn when the gradients that this rank needs for it are there: here, at once."""
        yield from turns

    def move(self, params: list[Tensor], updates: list[Tensor], rate: Rate) -> None:
        """Step what this rank has in the parameters' places."""
        move(params, updates, rate)

    def send(self, turn: Turn[_STACK]) -> None:
        """Start to exchange what each rank has stepped, after what was sent before has arrived."""
        self._arrive()
        start, params = time.perf_counter(), turn.params
        sizes = [row_size(own)[1] for own in params]
        if any(sizes):
            even = max(sizes) * self.ranks <= _PADDING * sum(sizes)
            self._flight = (self._gather if even else self._broadcast)(params, sizes)
            self.traffic.bytes += sum(sizes) - sizes[self.rank]
        self.traffic.seconds += time.perf_counter() - start

    def receive(self) -> None:
        """End a step: everything that was sent is there."""
        self._arrive()
        self.traffic.steps += 1

    def _arrive(self) -> None:
        if self._flight is None:
            return
        start, flight, self._flight = time.perf_counter(), self._flight, None
        for handle in flight.handles:
            handle.wait()
        for params, buffer in flight.arriving:
            torch._foreach_copy_(list(params), row_views(buffer, params))
        self.traffic.seconds += time.perf_counter() - start

    def _gather(self, params: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> _Flight:
        most = max(sizes)
        buffer = torch.empty(self.ranks, most, dtype=torch.uint8, device=self._device)
        pack(buffer[self.rank], params[self.rank])
        handle = _all_gather(buffer.view(-1), buffer[self.rank], group=self._group, async_op=True)
        others = [(list(own), buffer[r]) for r, own in enumerate(params) if r != self.rank and own]
        return _Flight([handle], others)

    def _broadcast(self, params: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> _Flight:
        handles, arriving = [], []
        for rank, own in enumerate(params):
            if not own:
                continue
            buffer = bytes_of(own)
            if buffer is None:
                buffer = torch.empty(sizes[rank], dtype=torch.uint8, device=self._device)
                if rank == self.rank:
                    pack(buffer, own)
                else:
                    arriving.append((list(own), buffer))
            handles.append(dist.broadcast(buffer, group_src=rank, group=self._group, async_op=True))
        return _Flight([handle for handle in handles if handle is not None], arriving)

    def collect(
        self, param: Tensor, like: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """Return, on the first rank, the state that another one has of a parameter, on the CPU; None otherwise.

        Args:
            param: the parameter; all ranks ask for it.
            like: tensors of the state's names, shapes and dtypes, on any device.
            state: what this rank has.
        """
        owner = self.owner(param)
        if not owner or self.rank not in (0, owner):
            return None
        empty = [torch.empty(value.shape, dtype=value.dtype, device="meta") for value in like.values()]
        buffer = torch.empty(row_size(empty)[1], dtype=torch.uint8, device=self._device)
        if self.rank == owner:
            assert state is not None
            pack(buffer, [state[key] for key in like])
            dist.send(buffer, group_dst=0, group=self._group)
            return None
        dist.recv(buffer, group_src=owner, group=self._group)
        return {key: view.clone() for key, view in zip(like, row_views(buffer.cpu(), empty), strict=True)}

    def outward(self, param: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a parameter's state as others are to see it."""
        return state

    def inward(self, param: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return of a parameter's state, saved here or by any number of ranks, what this rank has."""
        return state


def _by_group(
    cut: Sequence[tuple[int, Portion]], chosen: Sequence[int], stepped: Sequence[_STACK | None]
) -> dict[int, list[_STACK]]:
    found: dict[int, list[_STACK]] = {}
    for i in sorted(chosen):
        if (stack := stepped[i]) is not None:
            found.setdefault(cut[i][0], []).append(stack)
    return found
