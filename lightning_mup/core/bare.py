"""Bare parameters, whose module says nothing about their axes: what a role word says of them, and what to suggest."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mup.core.layout import Layout
from lightning_mup.core.spec import Role

Shape = tuple[int, ...]
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Bare:
    """A parameter that nobody can read.

    Args:
        name: its name.
        shape: its global shape.
        base: its shape in the base.
        line: the value that would settle it, as source.
        why: what is in the way.
    """

    name: str
    shape: Shape
    base: Shape
    line: str
    why: str


def grown_axes(shape: Shape, base: Shape) -> tuple[int, ...]:
    """Return the axes that differ from the base.

    Examples:
        >>> grown_axes((8, 64), (8, 16))
        (1,)
    """
    return tuple(axis for axis, (size, small) in enumerate(zip(shape, base, strict=True)) if size != small)


def is_elementwise(shape: Shape) -> bool:
    """Whether a bare parameter's shape is that of a bias, gain or token: one axis, or one among three and more.

    A bare matrix of one row or column may as well be a readout, so it does not pass.

    Examples:
        >>> is_elementwise((64,)), is_elementwise((1, 1, 64)), is_elementwise((1, 64)), is_elementwise((1, 1))
        (True, True, False, True)
    """
    wide = sum(size > 1 for size in shape)
    return wide == 0 or (wide == 1 and len(shape) != 2)


def read_word(name: str, role: Role, shape: Shape, grown: Sequence[int]) -> Layout:
    """Return the axes that a role word means for a bare parameter.

    An input writes the one axis that grows and a readout sums over it; a hidden matrix is torch's ``(out, in)``, with
    further axes in front taken for stacked matrices. Where nothing grows, the last axis is the stream's.

    Raises:
        ValueError: the axes that grow do not fit the word.

    Examples:
        >>> read_word("pos", Role.INPUT, (1, 16, 64), [2]).fan_out
        (2,)
    """
    last = len(shape) - 1
    if role in (Role.VECTOR, Role.SCALAR) or not shape:
        return Layout(role, fan_in=())
    stream = grown[-1] if grown else last
    rest = tuple(axis for axis in range(len(shape)) if axis != stream)
    if role is Role.INPUT and (len(grown) <= 1 or stream == last):
        return Layout(role, fan_out=(stream,), fan_in=rest, lookup=True)
    if role is Role.OUTPUT and len(grown) <= 1:
        return Layout(role, fan_out=rest, fan_in=(stream,))
    if role is Role.HIDDEN and last >= 1 and (not grown or tuple(grown) == (last - 1, last)):
        return Layout(role, fan_out=(last - 1,), fan_in=(last,), stack=tuple(range(last - 1)))
    axes = f"fan_out=(0,), fan_in=({', '.join(map(str, range(1, last + 1)))},)"
    raise ValueError(
        f"roles: {role.value!r} does not tell the axes of {name!r}, of shape {shape}, in which axes {list(grown)} grow"
        f"; allowed: input and output with one growing axis, hidden with the last two; else say what is summed "
        f'over, as in roles={{"{name}": Layout("{role.value}", {axes})}}'
    )


def suggested(name: str, shape: Shape, base: Shape) -> str:
    """Return the likeliest role of a bare parameter, as source: what its growth and its name make of it.

    Examples:
        >>> suggested("pos", (1, 16, 64), (1, 16, 32)), suggested("gate.weight", (4, 64), (4, 32))
        ('"input"', '"output"')
    """
    grown, last = grown_axes(shape, base), len(shape) - 1
    weight = name.rpartition(".")[2] == "weight" and last == 1
    if grown in ((last - 1, last), ()):
        return '"hidden"' if grown or weight or shape[0] > 1 else '"input"'
    if grown == (last,):
        return '"output"' if weight else '"input"'
    if grown == (0,) and last == 1:
        return '"output"' if shape[1] == 1 else '"input"'
    return "Layout(fan_out=(0,))"


def unread_message(bares: Sequence[Bare], names: Sequence[str]) -> str:
    """Return the message for parameters that nobody can read, with the line that settles them.

    Args:
        bares: the parameters.
        names: names of all parameters, so that no pattern takes others along.

    Examples:
        >>> print(unread_message([Bare("pos", (9, 64), (9, 32), '"input"', "a bare parameter")], ["pos"]))
        cannot tell what 1 parameter does:
          pos: a bare parameter of shape (9, 64), base (9, 32)
        allowed: input (looked up, or added to the stream), hidden, output (a readout), vector, scalar, or a Layout ...
          roles={"pos": "input"}
    """
    shown = "\n  ".join(f"{b.name}: {b.why} of shape {b.shape}, base {b.base}" for b in bares[:_SHOWN])
    more = f"\n  ... and {len(bares) - _SHOWN} more" if len(bares) > _SHOWN else ""
    count = "1 parameter does" if len(bares) == 1 else f"{len(bares)} parameters do"
    pairs = ", ".join(f'"{pattern}": {line}' for pattern, line in _patterns(bares, names).items())
    return (
        f"cannot tell what {count}:\n  {shown}{more}\nallowed: input (looked up, or added to the stream), hidden, "
        f"output (a readout), vector, scalar, or a Layout that names the axes; if these are what they look like, give\n"
        f"  roles={{{pairs}}}"
    )


def _patterns(bares: Sequence[Bare], names: Sequence[str]) -> dict[str, str]:
    """Return one pattern for what is alike in all blocks, where it matches nothing else."""
    alike: dict[tuple[str, str], list[str]] = {}
    for bare in bares:
        starred = ".".join("*" if part.isdigit() else part for part in bare.name.split("."))
        alike.setdefault((starred, bare.line), []).append(bare.name)
    found: dict[str, str] = {}
    for (starred, line), group in alike.items():
        fits = len(group) > 1 and set(fnmatch.filter(names, starred)) == set(group)
        found |= dict.fromkeys([starred] if fits else group, line)
    return found
