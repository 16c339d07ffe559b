"""Monomials in size ratios: the unit in which every scaling rule is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction

RATIOS = ("fan_in", "fan_out", "depth", "blocks_in", "blocks_out", "batch")


@dataclass(frozen=True, slots=True)
class Power:
    """A monomial in size ratios, ``fan_in^a fan_out^b depth^c blocks_in^d blocks_out^e batch^f``.

    A ratio is target size over base size, so at the base every monomial is exactly 1. Monomials form a group:
    they multiply, divide and take powers, and nothing else is ever needed to say how a quantity scales.

    Args:
        fan_in: exponent of the fan-in ratio, any rational number (integers, fractions, or floats such as ``-0.5``).
        fan_out: exponent of the fan-out ratio.
        depth: exponent of the ratio of residual-block counts.
        blocks_in: exponent of the ratio of preconditioner blocks along the input side.
        blocks_out: exponent of the ratio of preconditioner blocks along the output side.
        batch: exponent of the batch-size ratio.

    Raises:
        TypeError: an exponent is not a number.

    Examples:
        >>> spectral = Power(fan_in=-1 / 2, fan_out=1 / 2)
        >>> adam = Power(fan_in=1 / 2, fan_out=1 / 2)
        >>> print(spectral / adam)
        fan_in^-1
        >>> (spectral / adam).evaluate(fan_in=8.0, fan_out=8.0)
        0.125

    Reference:
        Qiu et al. 2025 (arXiv:2512.05620), Table 1: every rule there is such a monomial.
    """

    fan_in: Fraction | float = Fraction(0)
    fan_out: Fraction | float = Fraction(0)
    depth: Fraction | float = Fraction(0)
    blocks_in: Fraction | float = Fraction(0)
    blocks_out: Fraction | float = Fraction(0)
    batch: Fraction | float = Fraction(0)

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _fraction(field.name, getattr(self, field.name)))

    def __mul__(self, other: Power) -> Power:
        """Add the exponents."""
        return Power(*(a + b for a, b in zip(self.exponents, other.exponents, strict=True)))

    def __truediv__(self, other: Power) -> Power:
        """Subtract the exponents."""
        return Power(*(a - b for a, b in zip(self.exponents, other.exponents, strict=True)))

    def __pow__(self, exponent: Fraction | float) -> Power:
        """Multiply all exponents by one number."""
        factor = _fraction("exponent", exponent)
        return Power(*(a * factor for a in self.exponents))

    @property
    def exponents(self) -> tuple[Fraction, ...]:
        """The six exponents in the order of ``RATIOS``, exact."""
        return tuple(Fraction(getattr(self, name)) for name in RATIOS)

    def evaluate(
        self,
        *,
        fan_in: float = 1.0,
        fan_out: float = 1.0,
        depth: float = 1.0,
        blocks_in: float = 1.0,
        blocks_out: float = 1.0,
        batch: float = 1.0,
    ) -> float:
        """Return the value of the monomial at the given ratios (target over base, each > 0).

        Raises:
            ValueError: a ratio is not positive and finite.

        Examples:
            >>> Power(fan_out=1, depth=-1).evaluate(fan_out=8.0, depth=4.0)
            2.0
        """
        ratios = (fan_in, fan_out, depth, blocks_in, blocks_out, batch)
        for name, ratio in zip(RATIOS, ratios, strict=True):
            if not (ratio > 0 and math.isfinite(ratio)):
                raise ValueError(
                    f"ratio {name} must be positive and finite, got {ratio}; it is target size / base size"
                )
        return math.prod(_raise(ratio, exponent) for ratio, exponent in zip(ratios, self.exponents, strict=True))

    def __str__(self) -> str:
        """Print only the exponents that are not zero; the constant monomial prints as ``1``."""
        return " ".join(_factors(zip(RATIOS, self.exponents, strict=True))) or "1"


def _fraction(name: str, value: Fraction | float) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        raise TypeError(f"exponent {name} must be a number, got {value!r}; write Power({name}=-0.5), say")
    return Fraction(value).limit_denominator(1000)


def _raise(ratio: float, exponent: Fraction) -> float:
    # sqrt is correctly rounded on every machine, pow is not: keeps plans identical across platforms.
    if exponent.denominator == 2:
        return math.sqrt(ratio) ** exponent.numerator
    return float(ratio ** (exponent.numerator if exponent.denominator == 1 else float(exponent)))


def _factors(pairs: Iterable[tuple[str, Fraction]]) -> list[str]:
    return [name if exponent == 1 else f"{name}^{exponent}" for name, exponent in pairs if exponent]


SPECTRAL = Power(fan_in=Fraction(-1, 2), fan_out=Fraction(1, 2))
"""Wanted spectral norm of an update, (fan_out/fan_in)^(1/2): arXiv:2310.17813; arXiv:2512.05620, App. B.7."""
