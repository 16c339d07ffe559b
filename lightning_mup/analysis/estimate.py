"""A number with its interval."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval.

    Args:
        value: the number; nan where the runs do not tell it, inf where it has no bound.
        low: lower end of the interval.
        high: upper end.

    Examples:
        >>> print(Estimate(0.1, 0.0, 0.2))
        0.1 [0, 0.2]
    """

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Return whether a value is within the interval."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """Print the number with its interval."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"
