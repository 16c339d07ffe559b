"""How long something lasts: a closed set of types, in steps, in tokens or as a fraction of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

_ROUNDING = 1e-9
"""Relative: 0.07 x 100 is 7.000000000000001 in floating point, and means 7 steps."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A number of optimizer steps.

    Args:
        n: whole number of steps (>= 0).

    Raises:
        ValueError: ``n`` is negative or not whole.
        TypeError: ``n`` is not a number.

    Examples:
        >>> as_steps(Steps(100))
        100.0
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _whole("Steps", self.n))


@dataclass(frozen=True, slots=True)
class Tokens:
    """A number of tokens (or samples), ``n / tokens_per_step`` steps.

    Args:
        n: whole number of tokens (>= 0).

    Raises:
        ValueError: ``n`` is negative or not whole.
        TypeError: ``n`` is not a number.

    Examples:
        >>> as_steps(Tokens(10**6), tokens_per_step=4000)
        250.0
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _whole("Tokens", self.n))


@dataclass(frozen=True, slots=True)
class Fraction:
    """A fraction of the run: of ``total`` where a warm-up is meant, of what follows the warm-up where a decay is.

    Args:
        x: fraction, in [0, 1].

    Raises:
        ValueError: ``x`` is out of range.
        TypeError: ``x`` is not a number.

    Examples:
        >>> as_steps(Fraction(0.07), whole=100)
        7.0
    """

    x: float

    def __post_init__(self) -> None:
        if not 0 <= _number("Fraction", self.x) <= 1:
            raise ValueError(f"Fraction must be in [0, 1], got {self.x!r}; for a number of steps write Steps(n)")


Duration: TypeAlias = int | Steps | Tokens | Fraction
"""How long something lasts; a bare int means steps."""


def as_steps(
    duration: Duration, *, name: str = "duration", tokens_per_step: int | None = None, whole: float | None = None
) -> float:
    """Return a duration as a number of steps, ``n``, ``n / tokens_per_step`` or ``x whole``; it need not be whole.

    Args:
        duration: the duration; an int means steps.
        name: what it is called in errors.
        tokens_per_step: tokens of one optimizer step over all devices and accumulated batches (>= 1), for ``Tokens``.
        whole: number of steps of which a ``Fraction`` is one.

    Raises:
        ValueError: what the duration needs is missing or out of range.
        TypeError: it is none of the kinds of durations.

    Examples:
        >>> as_steps(10), as_steps(Tokens(10), tokens_per_step=4), as_steps(Fraction(0.25), whole=50)
        (10.0, 2.5, 12.5)
    """
    if isinstance(duration, Tokens):
        steps = duration.n / _per_step(f"{name}={duration}", tokens_per_step)
    elif isinstance(duration, Fraction):
        if whole is None:
            raise ValueError(f"{name}={duration} is a fraction of a total that is not known; give total, or Steps(n)")
        steps = duration.x * whole
    elif isinstance(duration, Steps):
        steps = float(duration.n)
    elif isinstance(duration, int) and not isinstance(duration, bool):
        steps = float(Steps(duration).n)
    else:
        hint = f"; did you mean Fraction({duration})?" if isinstance(duration, float) and 0 <= duration <= 1 else ""
        raise TypeError(f"{name} must be Steps(n), Tokens(n), Fraction(x) or a number of steps, got {duration!r}{hint}")
    nearest = round(steps)
    return float(nearest) if math.isclose(steps, nearest, rel_tol=_ROUNDING) else steps


def _per_step(what: str, tokens_per_step: int | None) -> int:
    if tokens_per_step is None or not tokens_per_step >= 1:
        raise ValueError(
            f"{what} needs tokens_per_step >= 1, got {tokens_per_step!r}; it is batch size x sequence length x devices "
            f"x accumulated batches"
        )
    return tokens_per_step


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} takes a number, got {value!r}; write {name}(1), say")
    return value


def _whole(name: str, value: float) -> int:
    if not (_number(name, value) >= 0 and float(value).is_integer()):  # 1e9 is how configurations write it
        raise ValueError(f"{name} takes a whole number >= 0, got {value!r}; for a part of the run write Fraction(x)")
    return int(value)
