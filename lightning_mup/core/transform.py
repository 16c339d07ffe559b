"""The Transform protocol: stacks of same-shape matrices in, stacks out; and how transforms are chained.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns), as torch lays out a Linear weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

State = dict[str, torch.Tensor]
SMALL = 1e15
"""Norm below which no square, and no sum of squares over a matrix, overflows in float32."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a transform may know beside its input and state.

    Args:
        step: number of the update, from 1.
        huge: whether entries are so large that their squares overflow.

    Examples:
        >>> Context(step=1, huge=True).bounded(torch.tensor([1.0, -1e30]))
        tensor([ 1.0000e+00, -1.0000e+15])
    """

    step: int
    huge: bool = False

    def bounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor whose squares, summed over a matrix, are finite numbers."""
        bound = SMALL if x.dtype == torch.float32 else SMALL**10
        return x.clamp(-bound, bound) if self.huge else x


class Transform(Protocol):
    """One step of an optimizer on a stack of matrices.

    What every transform promises: it writes only into the tensors that it made in ``init``; a stack of three gives
    what three stacks of one give; the same input and state give the same output.
    """

    @property
    def name(self) -> str:
        """Key of the state."""
        ...

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return the state for a stack; every tensor has the leading axis N."""
        ...

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the transformed stack, which the caller may overwrite, and advance the state in place."""
        ...


@dataclass(frozen=True, slots=True)
class Rate:
    """What becomes of an update: ``W <- W - lr (U + decay W)``, with ``l2 W`` added to the gradient before.

    Args:
        lr: learning rate.
        decay: removed per unit of learning rate.
        l2: factor of the term in the gradient.
    """

    lr: float | torch.Tensor
    decay: float
    l2: float


def move(params: list[torch.Tensor], updates: list[torch.Tensor], rate: Rate) -> None:
    """Step some parameters, ``W <- W - lr (U + decay W)``; the updates are overwritten.

    Examples:
        >>> w = torch.ones(2)
        >>> move([w], [torch.tensor([1.0, 0.0])], Rate(lr=0.5, decay=0.1, l2=0.0))
        >>> w
        tensor([0.4500, 0.9500])
    """
    if rate.decay:
        torch._foreach_add_(updates, params, alpha=rate.decay)
    if isinstance(rate.lr, torch.Tensor):
        torch._foreach_mul_(updates, rate.lr)
        torch._foreach_sub_(params, updates)
    else:
        torch._foreach_add_(params, updates, alpha=-rate.lr)


Members = list[tuple[torch.Tensor, torch.Tensor, State]]
"""Parameters, each with its gradient and its part of a transform's state."""


@runtime_checkable
class Direct(Protocol):
    """A transform that torch has as one fused step, in which parameters move without an update in between."""

    @property
    def moves(self) -> bool:
        """Whether it does under its settings."""
        ...

    def move(self, members: Members, ctx: Context, rate: Rate) -> None:
        """Move contiguous parameters, all of one dtype."""
        ...


ELEMENTWISE = 16.0
"""Operations per entry that count for a pass over a few tensors, which waits for memory rather than for arithmetic."""
EIGH, QR = 16.0, 8.0  # operations per side cubed that take as long: float32, sides 128 to 512, one core of a CPU


@runtime_checkable
class Priced(Protocol):
    """A transform that says how much it computes, by which matrices are divided over ranks."""

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix, rare ones on average."""
        ...


def work_of(transform: Transform, rows: int, columns: int) -> float:
    """Return a transform's operations per step for one matrix; one that does not say is taken for Newton-Schulz.

    Examples:
        >>> from lightning_mup.transforms.momentum import Momentum
        >>> work_of(Momentum(), 4, 2)
        128.0
    """
    if isinstance(transform, Priced):
        return transform.work(rows, columns)
    return 5 * product_work(rows, columns)


def product_work(rows: int, columns: int) -> float:
    """Return the operations of one Newton-Schulz step: ``X X^T``, its square, and one product with X.

    Examples:
        >>> product_work(4, 2)
        80.0
    """
    side, other = sorted((rows, columns))
    return 4.0 * side**2 * other + 2.0 * side**3


def is_elementwise(transform: Transform) -> bool:
    """Whether each entry's update depends on that entry's gradients alone, so that any part can be stepped alone.

    Transforms say so by a true ``elementwise``; those that say nothing need whole matrices.

    Examples:
        >>> from lightning_mup.transforms.momentum import Momentum
        >>> from lightning_mup.transforms.orthogonalize import Orthogonalize
        >>> is_elementwise(Momentum()), is_elementwise(chain(Momentum(), Orthogonalize()))
        (True, False)
    """
    parts = transform.transforms if isinstance(transform, Chain) else (transform,)
    return all(getattr(part, "elementwise", False) for part in parts)


@dataclass(frozen=True, slots=True)
class Chain:
    """Transforms one after the other; each one's state is found under its own name."""

    transforms: tuple[Transform, ...]
    name: str = "chain"

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return all transforms' states, keyed ``transform/key``."""
        return {f"{t.name}/{key}": value for t in self.transforms for key, value in t.init(param_NOI).items()}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Apply the transforms in order."""
        for transform in self.transforms:
            u_NOI = transform.update(u_NOI, part(state, transform.name), ctx)
        return u_NOI

    def work(self, rows: int, columns: int) -> float:
        """Return the transforms' operations together."""
        return sum(work_of(t, rows, columns) for t in self.transforms)


def chain(*transforms: Transform) -> Chain:
    """Return the transforms one after the other.

    Raises:
        ValueError: two have one name, so that their states would collide.

    Examples:
        >>> from lightning_mup.transforms.momentum import Momentum
        >>> from lightning_mup.transforms.orthogonalize import Orthogonalize
        >>> muon = chain(Momentum(0.95, nesterov=True), Orthogonalize())
        >>> sorted(muon.init(torch.zeros(3, 4, 2)))
        ['momentum/ema']
    """
    names = [t.name for t in transforms]
    if len(set(names)) != len(names):
        raise ValueError(f"transforms of a chain need different names, got {names}; give one of them name=...")
    return Chain(tuple(transforms))


def part(state: State, name: str) -> State:
    """Return the entries of a state that belong to one transform, without its name in front.

    Examples:
        >>> part({"momentum/ema": torch.zeros(1), "adam/v": torch.zeros(1)}, "momentum")
        {'ema': tensor([0.])}
    """
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}/")}
