"""How modules lay out their parameters: which axes are outputs, which are summed over, which are stacked."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lightning_mup.core.registry import near
from lightning_mup.core.spec import Role


@dataclass(frozen=True, slots=True)
class Layout:
    """Meaning of a parameter's axes; what is left out is as the module's type has it, else torch's ``(out, in)``.

    Args:
        role: the role, as a :class:`Role` or its name; None lets the growing dimensions tell.
        fan_out: axes that index outputs, counted from 0; where only ``fan_in`` is given, every other axis.
        fan_in: axes that are summed over; None means every axis that is neither output nor stack.
        stack: axes that index independent matrices (experts).
        split: number of equal row blocks that are matrices of their own (fused query-key-value: 3).
        lookup: whether a table is indexed rather than multiplied (embeddings), so that nothing is summed over.
        why: the reason to print.

    Raises:
        ValueError: the role is unknown, an axis is given twice or negative, or ``split`` is not a positive integer.

    Examples:
        >>> Layout(role="hidden", stack=(0,), fan_out=(2,), fan_in=(1,)).role  # experts as [experts, in, out]
        <Role.HIDDEN: 'hidden'>
        >>> Layout(fan_out=(-1,))
        Traceback (most recent call last):
        ValueError: Layout axes are counted from 0 and given once, got fan_out=(-1,) fan_in=None stack=(); ...
    """

    role: Role | str | None = None
    fan_out: tuple[int, ...] | None = None
    fan_in: tuple[int, ...] | None = None
    stack: tuple[int, ...] = ()
    split: int = 1
    lookup: bool = False
    why: str = ""

    def __post_init__(self) -> None:
        if self.role is not None:
            object.__setattr__(self, "role", as_role(self.role))
        for key in ("fan_out", "fan_in", "stack"):
            if isinstance(axes := getattr(self, key), (int, list)):  # one axis, or as YAML has it
                object.__setattr__(self, key, (axes,) if isinstance(axes, int) else tuple(axes))
        axes = (*(self.fan_out or ()), *(self.fan_in or ()), *self.stack)
        if len(set(axes)) != len(axes) or any(axis < 0 for axis in axes):
            raise ValueError(
                f"Layout axes are counted from 0 and given once, got fan_out={self.fan_out} fan_in={self.fan_in} "
                f"stack={self.stack}; for [experts, in, out] write Layout(stack=(0,), fan_in=(1,), fan_out=(2,))"
            )
        if self.split < 1:
            raise ValueError(f"Layout split must be a positive number of row blocks, got {self.split!r}; use split=1")

    @property
    def says_axes(self) -> bool:
        """Whether any axis is given."""
        return bool(self.stack) or self.fan_out is not None or self.fan_in is not None

    def axes_out(self, ndim: int) -> tuple[int, ...]:
        """Return the axes that index outputs, for a parameter of ``ndim`` axes.

        Examples:
            >>> Layout().axes_out(2), Layout(fan_in=()).axes_out(2), Layout(stack=(0,)).axes_out(3)
            ((0,), (0, 1), (1,))
        """
        if self.fan_out is not None:
            return self.fan_out
        free = tuple(axis for axis in range(ndim) if axis not in (*(self.fan_in or ()), *self.stack))
        return free[:1] if self.fan_in is None else free

    def axes_in(self, ndim: int) -> tuple[int, ...]:
        """Return the axes that are summed over, for a parameter of ``ndim`` axes.

        Examples:
            >>> Layout().axes_in(4)
            (1, 2, 3)
        """
        if self.fan_in is not None:
            return self.fan_in
        return tuple(axis for axis in range(ndim) if axis not in (*self.axes_out(ndim), *self.stack))

    def size(self, shape: tuple[int, ...], side: Literal["out", "in"]) -> int:
        """Return the number of outputs, or of inputs that each output sums over.

        Examples:
            >>> Layout().size((8, 4, 3, 3), "in")
            36
        """
        axes = self.axes_out(len(shape)) if side == "out" else self.axes_in(len(shape))
        return math.prod(shape[axis] for axis in axes)

    def onto(self, known: Layout) -> Layout:
        """Return this layout with what it leaves out filled in from the module's own.

        Examples:
            >>> Layout(split=3).onto(Layout(fan_out=(1,), fan_in=(0,))).fan_out
            (1,)
        """
        if self.says_axes:
            return self
        split = self.split if self.split != 1 else known.split
        return replace(known, role=self.role, split=split, lookup=self.lookup or known.lookup, why=self.why)


def as_role(value: Role | str) -> Role:
    """Return a role from its name.

    Raises:
        ValueError: there is no such role.

    Examples:
        >>> as_role("input")
        <Role.INPUT: 'input'>
        >>> as_role("hiden")
        Traceback (most recent call last):
        ValueError: unknown role 'hiden'; allowed: input (or embedding), ..., vector, scalar; did you mean 'hidden'?
    """
    try:
        return Role(value)
    except ValueError:
        allowed = "input (or embedding), hidden, output (or readout), vector, scalar"
        close = near(str(value), [role.value for role in Role])
        raise ValueError(f"unknown role {value!r}; allowed: {allowed}{close}") from None


_ELEMENTWISE = {"weight": Layout(fan_in=()), "bias": Layout(fan_in=())}
_FUSED = {"in_proj_weight": Layout(split=3), "*_proj_weight": Layout()}


def _gates(count: int) -> dict[str, Layout]:
    return {"weight_ih*": Layout(split=count), "weight_hh*": Layout(split=count), "weight_hr*": Layout()}


# Module class (by name, so that no library need be imported) -> parameter pattern -> layout. Subclasses inherit.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "torch.nn.modules.linear.Linear": {"weight": Layout()},
    "torch.nn.modules.linear.Bilinear": {"weight": Layout()},
    "torch.nn.modules.normalization.LayerNorm": _ELEMENTWISE,
    "torch.nn.modules.normalization.RMSNorm": _ELEMENTWISE,
    "torch.nn.modules.normalization.GroupNorm": _ELEMENTWISE,
    "torch.nn.modules.batchnorm._NormBase": _ELEMENTWISE,
    "torch.nn.modules.sparse.Embedding": {"weight": Layout(fan_out=(1,), lookup=True)},
    "torch.nn.modules.sparse.EmbeddingBag": {"weight": Layout(fan_out=(1,), lookup=True)},
    "torch.nn.modules.conv._ConvNd": {"weight": Layout()},
    "torch.nn.modules.conv._ConvTransposeNd": {"weight": Layout(fan_out=(1,))},
    "torch.nn.modules.activation.MultiheadAttention": _FUSED,
    "torch.nn.modules.rnn.LSTM": _gates(4),
    "torch.nn.modules.rnn.GRU": _gates(3),
    "torch.nn.modules.rnn.RNNBase": _gates(1),
    "torch.nn.modules.rnn.LSTMCell": _gates(4),
    "torch.nn.modules.rnn.GRUCell": _gates(3),
    "torch.nn.modules.rnn.RNNCellBase": _gates(1),
    "transformers.pytorch_utils.Conv1D": {"weight": Layout(fan_out=(1,), fan_in=(0,))},
}


def layout_of(module: nn.Module, attribute: str) -> Layout | None:
    """Return the layout of a module's own parameter, from its class or the nearest known base class; None if unknown.

    Examples:
        >>> layout_of(nn.LSTM(4, 8), "weight_hh_l0").split
        4
        >>> layout_of(nn.PReLU(), "weight") is None
        True
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
        return None  # the shape does not tell how many groups the base has
    for cls in type(module).__mro__:
        for pattern, layout in LAYOUTS.get(f"{cls.__module__}.{cls.__qualname__}", {}).items():
            if fnmatch.fnmatchcase(attribute, pattern):
                return layout
    return None
