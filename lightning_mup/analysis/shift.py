"""Where an optimum is at a large size, from the two points that a published table gives, and what a variant repairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_mup.analysis.drift import TOLERANCE

Direction = Literal["falls", "rises", "stands"]


@dataclass(frozen=True, slots=True)
class Shift:
    """Where the optimum is at a large size, seen from the base's: two points of a table, hence without interval.

    Args:
        base: size at which the value was tuned (> 0).
        size: the larger one.
        multiplier: best value there over the base's (> 0).
        loss: loss there at the base's value; inf where it diverges.
        best_loss: loss there at the best value.
        tolerance: largest slope, up or down, that stands (> 0).

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> print(Shift(base=128, size=4096, multiplier=4.0, loss=1.1943, best_loss=1.1727))
        rises, slope +0.40; the base's value loses 0.0216 at 4096

    Reference:
        arXiv:2512.05620, Figures 2 to 5: losses at the transferred learning rate, and the best multiplier.
    """

    base: int
    size: int
    multiplier: float
    loss: float
    best_loss: float
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not 0 < self.base < self.size:
            raise ValueError(f"size must be above base > 0, got base={self.base} and size={self.size}")
        if not (0 < self.multiplier < math.inf and self.tolerance > 0):
            raise ValueError(
                f"multiplier and tolerance must be positive, got {self.multiplier!r} and {self.tolerance!r}; "
                f"1 is the base's own value, {TOLERANCE} usual"
            )
        if not 0 < self.best_loss <= self.loss:
            raise ValueError(
                f"best_loss must be positive and at most loss, got {self.best_loss!r} and {self.loss!r}; "
                f"the best value loses nothing"
            )

    @property
    def slope(self) -> float:
        """``log2 multiplier / log2(size / base)``."""
        return math.log2(self.multiplier) / math.log2(self.size / self.base)

    @property
    def direction(self) -> Direction:
        """Where the optimum goes with size: ``"stands"`` where its slope is within the tolerance."""
        if abs(self.slope) <= self.tolerance:
            return "stands"
        return "rises" if self.slope > 0 else "falls"

    @property
    def lost(self) -> float:
        """Loss lost by the base's value, in nats."""
        return self.loss - self.best_loss

    def __str__(self) -> str:
        """Print direction, slope and loss lost."""
        return f"{self.direction}, slope {self.slope:+.2f}; the base's value loses {self.lost:.4f} at {self.size}"


@dataclass(frozen=True, slots=True)
class Repair:
    """What a variant of a method changes about its transfer.

    Args:
        before: the method.
        after: its variant, between the same sizes.

    Raises:
        ValueError: the two are of different sizes.

    Examples:
        >>> plain = Shift(base=128, size=4096, multiplier=0.35, loss=1.1621, best_loss=1.1537)
        >>> blocked = Shift(base=128, size=4096, multiplier=1.41, loss=1.2204, best_loss=1.2185)
        >>> print(Repair(plain, blocked))
        falls -> stands: repairs the drift; loses 0.0084 -> 0.0019; at the base's value +0.0583 in loss, tuned +0.0648
    """

    before: Shift
    after: Shift

    def __post_init__(self) -> None:
        pairs = [(part.base, part.size) for part in (self.before, self.after)]
        if pairs[0] != pairs[1]:
            raise ValueError(f"a variant must be compared between the same sizes, got {pairs[0]} and {pairs[1]}")

    @property
    def repairs(self) -> bool:
        """Whether the optimum moves before and stands after."""
        return self.before.direction != "stands" and self.after.direction == "stands"

    @property
    def cost(self) -> float:
        """Loss that the variant adds at the larger size with the base's value, in nats; negative where it gains."""
        return self.after.loss - self.before.loss

    @property
    def tuned_cost(self) -> float:
        """Loss that it adds where each is tuned at the larger size."""
        return self.after.best_loss - self.before.best_loss

    def __str__(self) -> str:
        """Print what it changes."""
        before, after = self.before, self.after
        what = "repairs the drift" if self.repairs else "does not repair the drift"
        what = "nothing to repair" if before.direction == "stands" else what
        return (
            f"{before.direction} -> {after.direction}: {what}; loses {before.lost:.4f} -> {after.lost:.4f}; "
            f"at the base's value {self.cost:+.4f} in loss, tuned {self.tuned_cost:+.4f}"
        )
