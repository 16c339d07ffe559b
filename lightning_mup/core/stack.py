"""Stacks: how parameters become matrices, and how the state of many is one tensor.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mup.core.transform import Chain, Context, Direct, Members, State, Transform, part, work_of

STEP = "step"
_STACK_ENTRIES = {"cpu": 2**18, "accelerator": 2**26}  # at 4 bytes each, 1 MB and 256 MB


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How one parameter is a number of matrices [O, I], and back.

    Args:
        shape: the parameter's shape.
        out: axes that index outputs.
        summed: axes that are summed over; the axes that are neither are stacked.
        split: number of equal row blocks that are matrices of their own.

    Examples:
        >>> conv = Arrangement((8, 4, 3, 3), (0,), (1, 2, 3))
        >>> conv.count, conv.rows, conv.columns
        (1, 8, 36)
    """

    shape: tuple[int, ...]
    out: tuple[int, ...]
    summed: tuple[int, ...]
    split: int = 1

    @classmethod
    def of(cls, param: Tensor, settings: Mapping[str, Any]) -> Arrangement:
        """Return the arrangement of a parameter under a group's ``axes`` and ``split``.

        Raises:
            ValueError: the axes do not fit the shape, or the rows do not split.
        """
        shape = tuple(param.shape)
        if len(shape) < 2:
            return cls.flat(shape)
        axes, split = settings.get("axes"), int(settings.get("split") or 1)
        out, summed = ((0,), tuple(range(1, len(shape)))) if axes is None else (tuple(axes[0]), tuple(axes[1]))
        used = (*out, *summed)
        rows = math.prod(shape[a] for a in out) if all(0 <= a < len(shape) for a in used) else 0
        if len(set(used)) != len(used) or split < 1 or not rows or rows % split:
            raise ValueError(
                f"axes={(out, summed)} (outputs, summed over), split={split} do not fit a parameter of shape {shape}; "
                f"axes are counted from 0 and given once, and the rows must divide by split"
            )
        return cls(shape, out, summed, split)

    @classmethod
    def flat(cls, shape: Sequence[int]) -> Arrangement:
        """Return the arrangement of a part of a parameter, whose entries belong to no matrix that is here."""
        return cls(tuple(shape), tuple(range(len(shape))), ())

    @property
    def stacked(self) -> tuple[int, ...]:
        """Axes that index independent matrices."""
        return tuple(a for a in range(len(self.shape)) if a not in (*self.out, *self.summed))

    @property
    def in_order(self) -> bool:
        """Whether the matrices lie in memory as the parameter does."""
        return (*self.stacked, *self.out, *self.summed) == tuple(range(len(self.shape)))

    @property
    def rows(self) -> int:
        """Number of rows of each matrix."""
        return math.prod(self.shape[a] for a in self.out) // self.split

    @property
    def columns(self) -> int:
        """Number of columns of each matrix."""
        return math.prod(self.shape[a] for a in self.summed)

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.split * math.prod(self.shape[a] for a in self.stacked)

    def take(self, x: Tensor) -> Tensor:
        """Return the matrices [count, O, I] of a tensor of the parameter's shape; a view where that can be."""
        return x.permute((*self.stacked, *self.out, *self.summed)).reshape(self.count, self.rows, self.columns)

    def give(self, x_NOI: Tensor) -> Tensor:
        """Return the tensor of the parameter's shape whose matrices these are."""
        order = (*self.stacked, *self.out, *self.summed)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return x_NOI.reshape([self.shape[a] for a in order]).permute(inverse)


class Stack:
    """Parameters whose matrices have one shape, and their state in one tensor per name.

    Args:
        params: what is stepped.
        arrangements: how each is matrices; all of one shape.
        method: name of the method that moves them.
        transform: makes the state.
        device: where the state is, if not with the parameters.
        keys: the parameters as the optimizer knows them, if not those that are stepped.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        arrangements: Sequence[Arrangement],
        method: str,
        transform: Transform,
        device: str | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        self.params, self.arrangements, self.method = list(params), list(arrangements), method
        self.keys = list(keys or params)
        self.device, self.dtype = torch.device(device or params[0].device), params[0].dtype
        self._work = torch.promote_types(self.dtype, torch.float32)
        ends = torch.tensor([a.count for a in arrangements]).cumsum(0).tolist()
        self._spans = [slice(end - a.count, end) for end, a in zip(ends, arrangements, strict=True)]
        like_NOI = torch.zeros((), dtype=self._work, device=self.device).expand(
            ends[-1], arrangements[0].rows, arrangements[0].columns
        )
        self.state: State = {key: value.contiguous() for key, value in transform.init(like_NOI).items()}
        self._steps = torch.zeros(len(params))
        self._views = [self._view(i) for i in range(len(params))]

    @property
    def moved(self) -> bool:
        """Whether the parameters went to another device or dtype after the stack was made."""
        return any(p.device != self.device or p.dtype != self.dtype for p in self.params)

    def adopt(self, state: MutableMapping[Any, Any]) -> None:
        """Make ``state[parameter]`` views of the stack's tensors, after taking over what stands there otherwise.

        Raises:
            ValueError: other names or shapes stand there: the state is another method's.
        """
        for p, views in zip(self.keys, self._views, strict=True):
            found = state.get(p)
            if found and all(found.get(key) is view for key, view in views.items()):
                continue
            if found:
                _take_over(found, views, self.method)
            state[p] = dict(views)

    def check(self, state: Mapping[Any, Any]) -> None:
        """Check that a state has this stack's names and shapes.

        Raises:
            ValueError: it has others: it is another method's.
        """
        for p, views in zip(self.keys, self._views, strict=True):
            if found := state.get(p):
                _check(found, views, self.method)

    def view(self, i: int) -> Mapping[str, Tensor]:
        """Return one parameter's part of the state."""
        return self._views[i]

    def work_of(self, i: int, transform: Transform) -> float:
        """Return a transform's operations per step for one parameter."""
        arrangement = self.arrangements[i]
        return arrangement.count * work_of(transform, arrangement.rows, arrangement.columns)

    def parts(self) -> Iterator[tuple[list[int], int]]:
        """Return the parameters that have a gradient, by the number of the step that they are about to take."""
        steps = [int(step) + 1 for step in self._steps.tolist()]
        present = [i for i, p in enumerate(self.params) if p.grad is not None]
        for step in dict.fromkeys(steps[i] for i in present):
            yield [i for i in present if steps[i] == step], step

    def run(self, transform: Transform, members: list[int], ctx: Context, l2: float) -> Tensor:
        """Return the update [N, O, I] of some members, and advance their state."""
        u_NOI = self._gradients(members, l2)
        if len(members) == len(self.params):
            self._steps += 1
            return transform.update(u_NOI, self.state, ctx)
        rows = torch.cat([torch.arange(self._spans[i].start, self._spans[i].stop) for i in members]).to(self.device)
        state = {key: value[rows] for key, value in self.state.items()}
        out_NOI = transform.update(u_NOI, state, ctx)
        for key, value in state.items():
            self.state[key].index_copy_(0, rows, value)
        self._steps[members] += 1
        return out_NOI

    def to_move(self, transform: Transform, members: list[int], ctx: Context) -> tuple[Direct, Members] | None:
        """Return the transform that may move some members itself, and what it needs of them; None if none may.

        What is returned must be moved, since the members' steps are counted here.
        """
        only = transform.transforms[0] if isinstance(transform, Chain) and len(transform.transforms) == 1 else None
        params, grads = ([getattr(self.params[i], key) for i in members] for key in ("data", "grad"))
        if ctx.huge or not isinstance(only, Direct) or not only.moves or not self._plain(params, grads):
            return None
        self._steps[members] += 1
        return only, list(zip(params, grads, [part(self._views[i], only.name) for i in members], strict=True))

    def _plain(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether all are contiguous and of the state's dtype, as the state's views are where axes are in order."""
        in_order = all(a.in_order for a in self.arrangements)
        return in_order and all(x.dtype == self._work and x.is_contiguous() for x in (*params, *grads))

    def split(self, u_NOI: Tensor, members: list[int]) -> list[Tensor]:
        """Return the members' updates in the shapes of their parameters."""
        parts = torch.split(u_NOI, [self.arrangements[i].count for i in members])
        return [self.arrangements[i].give(part) for i, part in zip(members, parts, strict=True)]

    def _gradients(self, members: list[int], l2: float) -> Tensor:
        found = []
        for i in members:
            p, take = self.params[i], self.arrangements[i].take
            assert p.grad is not None
            grad = p.grad.to(self._work)
            found.append(take(grad.add(p, alpha=l2) if l2 else grad))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _view(self, i: int) -> dict[str, Tensor]:
        arrangement = self.arrangements[i]
        views = {STEP: self._steps[i]}
        for key, value in self.state.items():
            part = value[self._spans[i]]
            # One matrix needs no leading axis; what has a matrix' shape has its parameter's.
            like_matrix = part.shape[1:] == (arrangement.rows, arrangement.columns)
            views[key] = _in_place(arrangement, part) if like_matrix else part.squeeze(0) if len(part) == 1 else part
        return views


def portions(params: Sequence[Tensor], most_bytes: int | None = None) -> Iterator[list[Tensor]]:
    """Cut parameters of one shape into stacks of a size that a CPU's cache, or spare memory elsewhere, can hold."""
    entries = _STACK_ENTRIES["cpu" if params[0].device.type == "cpu" else "accelerator"]
    if most_bytes is not None:
        entries = min(entries, most_bytes // params[0].element_size())
    most = max(1, entries // params[0].numel())
    for start in range(0, len(params), most):
        yield list(params[start : start + most])


def is_vector(param: Tensor) -> bool:
    """Whether a parameter has no matrix shape."""
    return param.dim() < 2


def _in_place(arrangement: Arrangement, part: Tensor) -> Tensor:
    order = (*arrangement.stacked, *arrangement.out, *arrangement.summed)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return part.view([arrangement.shape[a] for a in order]).permute(inverse)


def _take_over(found: Mapping[str, Any], views: Mapping[str, Tensor], method: str) -> None:
    _check(found, views, method)
    for key, view in views.items():
        view.copy_(torch.as_tensor(found[key]))


def _check(found: Mapping[str, Any], views: Mapping[str, Tensor], method: str) -> None:
    if found.keys() != views.keys():
        raise ValueError(
            f"the state holds {sorted(found)}, but method {method!r} under its settings has {sorted(views)}; load it "
            f"into the optimizer, with the settings, that it was saved from"
        )
    for key, view in views.items():
        if (shape := torch.as_tensor(found[key]).shape) != view.shape:
            raise ValueError(
                f"the state {key!r} has shape {tuple(shape)}, but {tuple(view.shape)} is needed; load it into an "
                f"optimizer with the same blocks and parameters"
            )
