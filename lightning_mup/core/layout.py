"""How modules lay out their parameters: which axes are outputs, which are summed over, which are stacked."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import nn

from lightning_mup.core.spec import Role


@dataclass(frozen=True, slots=True)
class Layout:
    """Meaning of a parameter's axes; torch's ``(out, in)`` unless said otherwise.

    Args:
        role: the role, as a :class:`Role` or its name; None lets the growing dimensions tell.
        fan_out: axes that index outputs.
        fan_in: axes that are summed over; None means every axis that is neither output nor stack.
        stack: axes that index independent matrices (experts).
        split: number of equal row blocks that are matrices of their own (fused query-key-value: 3).
        lookup: whether a table is indexed rather than multiplied (embeddings), so that nothing is summed over.
        why: the reason to print.

    Raises:
        ValueError: the role is unknown.

    Examples:
        >>> Layout(role="hidden", stack=(0,), fan_out=(2,), fan_in=(1,)).role  # experts as [experts, in, out]
        <Role.HIDDEN: 'hidden'>
    """

    role: Role | str | None = None
    fan_out: tuple[int, ...] = (0,)
    fan_in: tuple[int, ...] | None = None
    stack: tuple[int, ...] = ()
    split: int = 1
    lookup: bool = False
    why: str = ""

    def __post_init__(self) -> None:
        if self.role is not None:
            object.__setattr__(self, "role", as_role(self.role))

    def axes_in(self, ndim: int) -> tuple[int, ...]:
        """Return the axes that are summed over, for a parameter of ``ndim`` axes.

        Examples:
            >>> Layout().axes_in(4)
            (1, 2, 3)
        """
        if self.fan_in is not None:
            return self.fan_in
        return tuple(axis for axis in range(ndim) if axis not in (*self.fan_out, *self.stack))


def as_role(value: Role | str) -> Role:
    """Return a role from its name.

    Raises:
        ValueError: there is no such role.

    Examples:
        >>> as_role("input")
        <Role.INPUT: 'input'>
        >>> as_role("hiden")
        Traceback (most recent call last):
        ValueError: unknown role 'hiden'; allowed: input (or embedding), hidden, output (or readout), vector, scalar
    """
    try:
        return Role(value)
    except ValueError:
        allowed = "input (or embedding), hidden, output (or readout), vector, scalar"
        raise ValueError(f"unknown role {value!r}; allowed: {allowed}") from None


_FUSED = {"in_proj_weight": Layout(split=3), "*_proj_weight": Layout()}


def _gates(count: int) -> dict[str, Layout]:
    return {"weight_ih*": Layout(split=count), "weight_hh*": Layout(split=count), "weight_hr*": Layout()}


# Module class (by name, so that no library need be imported) -> parameter pattern -> layout. Subclasses inherit.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "torch.nn.modules.linear.Linear": {"weight": Layout()},
    "torch.nn.modules.linear.Bilinear": {"weight": Layout()},
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
