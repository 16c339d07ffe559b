"""A grid of powers of two for one hyperparameter, which grows until the best value lies inside it. No Hydra here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

State = Literal["interior", "open", "edge", "failed"]
"""Of a line: its best value has worse ones on both sides, more points are needed, no more are allowed, a job failed."""


@dataclass(frozen=True)
class Grid:
    """Values ``2^(offset + step k)`` of one hyperparameter, with whole ``k`` around a centre.

    The values do not depend on the centre, so that grids around different centres share their points.

    Args:
        key: dotted key of the hyperparameter.
        centre: value in the middle (> 0); that of the configuration if not given.
        radius: points on either side of the centre in the first round (>= 1).
        step: exponent of two between neighbours (> 0).
        max_extend: points that one line may get beyond those of the first round (>= 0).
        margin: points wanted on either side of the best one, unless a run diverged there (>= 1).
        offset: exponent of two at ``k = 0``.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> grid = Grid("method.lr", radius=1)
        >>> [grid.value(k) for k in grid.first(centre=0.06)], [grid.label(k) for k in grid.first(centre=0.06)]
        ([0.03125, 0.0625, 0.125], ['2^-5', '2^-4', '2^-3'])
    """

    key: str
    centre: float | None = None
    radius: int = 2
    step: float = 1.0
    max_extend: int = 6
    margin: int = 1
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.centre is not None:
            _check_centre(self.key, self.centre)
        if not (self.radius >= 1 and self.step > 0 and self.max_extend >= 0 and self.margin >= 1):
            raise ValueError(
                "grid takes radius >= 1, step > 0, max_extend >= 0 and margin >= 1, "
                f"got {self.radius!r}, {self.step!r}, {self.max_extend!r} and {self.margin!r}"
            )

    def first(self, *, centre: float) -> tuple[int, ...]:
        """Return the points ``k`` of the first round.

        Args:
            centre: the configured value, used where the grid has none of its own.

        Raises:
            ValueError: the centre is not positive and finite.
        """
        centre = self.centre if self.centre is not None else centre
        _check_centre(self.key, centre)
        middle = round((math.log2(centre) - self.offset) / self.step)
        return tuple(range(middle - self.radius, middle + self.radius + 1))

    def log2(self, k: int) -> float:
        """Return ``offset + step k``."""
        return self.offset + self.step * k

    def value(self, k: int) -> float:
        """Return ``2^(offset + step k)``."""
        return float(2.0 ** self.log2(k))

    def label(self, k: int) -> str:
        """Return the value as people and file systems read it, such as ``2^-4``."""
        return f"2^{self.log2(k):g}"


def _check_centre(key: str, centre: object) -> None:
    if not (isinstance(centre, (int, float)) and 0 < centre < math.inf):
        raise ValueError(
            f"a grid of powers of two needs a positive centre, but {key}={centre!r}; "
            f"give {key}=NUMBER or hydra.sweeper.grid.centre=NUMBER"
        )


@dataclass
class Line:
    """The losses along the grid for one combination of the outer axes.

    Args:
        first: points of the first round, in ascending order.
        max_extend: points that it may get on top.
        margin: points wanted on either side of the best one, unless a run diverged there.

    Examples:
        >>> line = Line(first=(-1, 0, 1), max_extend=2)
        >>> line.missing()
        (-1, 0, 1)
        >>> line.losses |= {-1: 3.0, 0: 2.0, 1: 1.0}
        >>> line.state, line.missing()
        ('open', (2,))
        >>> line.losses[2] = float("inf")  # diverged: a wall
        >>> line.state, line.best
        ('interior', 1)
    """

    first: tuple[int, ...]
    max_extend: int
    margin: int = 1
    losses: dict[int, float] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    @property
    def best(self) -> int | None:
        """The point of the least loss, the smallest of several; none while nothing has a finite loss."""
        lowest = min(self.losses.values(), default=math.inf)
        return None if math.isinf(lowest) else min(k for k, loss in self.losses.items() if loss == lowest)

    @property
    def state(self) -> State:
        """Whether the best value is known to lie inside the grid."""
        if self.failed:
            return "failed"
        if not self._sides():
            return "interior"
        return "open" if self.missing() else "edge"

    def missing(self) -> tuple[int, ...]:
        """Return the points to evaluate next: the first round, then those that the best one's margin lacks."""
        if self.failed:
            return ()
        if not self.losses:
            return self.first
        left = self.max_extend - (len(self.losses) - len(self.first))
        return self._sides()[:left]

    def _sides(self) -> tuple[int, ...]:
        """Return the points beyond the edges that the best values' margin reaches, the nearest first.

        A run that diverged at an edge is a wall, beyond which nothing is wanted. Where everything did, it goes down.
        """
        low, high = min(self.losses, default=0), max(self.losses, default=0)
        lowest = min(self.losses.values(), default=math.inf)
        if math.isinf(lowest):
            return (low - 1,)
        best = [k for k, loss in self.losses.items() if loss == lowest]
        below = range(low - 1, min(best) - self.margin - 1, -1) if math.isfinite(self.losses[low]) else ()
        above = range(high + 1, max(best) + self.margin + 1) if math.isfinite(self.losses[high]) else ()
        return tuple(sorted((*below, *above), key=lambda k: max(low - k, k - high)))
