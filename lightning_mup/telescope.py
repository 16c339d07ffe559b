"""A telescoping sweep: tune at widths that double, over grids that narrow, for a stated share of the target's run.

The optimum ``x`` (log2 of a learning rate, at the base) moves with width ``n`` as ``x(n) = x(inf) + a / n`` where a
parametrization transfers. What can remain of that drift halves with each doubling, and so does the range of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mup.analysis.optimum import Optimum, find_optimum
from lightning_mup.core.plan import aligned
from lightning_mup.sweep_grid import Grid, Line

FEWEST = 3
"""Runs that a level needs: a minimum needs a value on either side."""
_LOCATED = 0.25  # of the spacing, to which a fit finds the optimum
_FINEST = 4  # finest spacing, in parts of the base's: below, noise decides and not the value
_PLACES = 8  # centres stand on parts of the spacing, so that values have short names
_SUREST = 0.02  # octaves; half the spacing of the centres that a fit tries
_Z = 1.959964  # standard normal, 97.5%

Flops = Callable[[int], float] | Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Level:
    """The runs at one width.

    Args:
        width: width of the model.
        radius: values on either side of the centre (>= 1).
        step: octaves between neighbours (> 0).
        flops: floating-point operations of one run (> 0).
        target_flops: those of the target's run (> 0).

    Examples:
        >>> level = Level(64, radius=1, step=0.5, flops=1e12, target_flops=1e14)
        >>> level.runs, level.cost, level.share, level.values(-6.0)
        (3, 3000000000000.0, 0.03, (-6.5, -6.0, -5.5))
    """

    width: int
    radius: int
    step: float
    flops: float
    target_flops: float

    @property
    def runs(self) -> int:
        """Number of values, hence of runs."""
        return 2 * self.radius + 1

    @property
    def cost(self) -> float:
        """Floating-point operations of all runs."""
        return self.runs * self.flops

    @property
    def share(self) -> float:
        """Cost as a share of the target's run."""
        return self.cost / self.target_flops

    def values(self, centre: float) -> tuple[float, ...]:
        """Return log2 of the values around log2 of a centre."""
        return tuple(centre + self.step * k for k in range(-self.radius, self.radius + 1))

    def grid(self, key: str, centre: float) -> Grid:
        """Return the level's grid around log2 of a centre, which is moved by a sixteenth of the spacing at most."""
        middle = round(centre / self.step * _PLACES) / _PLACES * self.step
        offset = middle - math.floor(middle / self.step) * self.step
        return Grid(key, centre=2.0**middle, radius=self.radius, step=self.step, offset=offset)


@dataclass(frozen=True, slots=True)
class Telescope:
    """The levels of a telescoping sweep, narrowest width first.

    Args:
        target: width of the target.
        target_flops: floating-point operations of its run.
        share: share of the target's run that may be spent.
        centre: log2 of the value in the middle of the base's grid.
        drift: octaves by which the optimum may move between the base and infinite width.
        levels: runs at each width.
    """

    target: int
    target_flops: float
    share: float
    centre: float
    drift: float
    levels: tuple[Level, ...]

    @property
    def runs(self) -> int:
        """Number of runs of all levels."""
        return sum(level.runs for level in self.levels)

    @property
    def cost(self) -> float:
        """Floating-point operations of all levels."""
        return sum(level.cost for level in self.levels)

    def spare(self, index: int, spent: float) -> int:
        """Return how many runs beyond the plan a level may get, so that the whole stays within the share.

        Args:
            index: of the level.
            spent: floating-point operations of the levels before it, their extra runs included.
        """
        planned = sum(level.cost for level in self.levels[index:])
        left = self.share * self.target_flops * (1 + 1e-9) - spent - planned
        return max(0, int(left // self.levels[index].flops))

    def rows(self) -> list[list[str]]:
        """Return a heading and one row per level, then one for the sum, as text."""
        heading = ["width", "values (log2)", "runs", "FLOPs of one", "FLOPs", "of the target's run"]
        body = [
            [
                str(level.width),
                _range(level, self.centre if index == 0 else None),
                str(level.runs),
                f"{level.flops:.3g}",
                f"{level.cost:.3g}",
                f"{level.share:.2%}",
            ]
            for index, level in enumerate(self.levels)
        ]
        share = f"{self.cost / self.target_flops:.2%} (at most {self.share:.2%})"
        return [heading, *body, ["all", "", str(self.runs), "", f"{self.cost:.3g}", share]]

    def table(self) -> str:
        """Return the levels as aligned lines."""
        return "\n".join(aligned(self.rows()))

    def at_target(self, optima: Sequence[Optimum]) -> Optimum:
        """Return the optimum at the target's width, with a 95% interval, from those that were found at the levels.

        ``x(n) = x + a / n`` is fitted by least squares, each level weighted by how sure its optimum is, with
        ``a / base`` normal around 0 with half the stated drift as its deviation. With one level this is the base's own
        optimum, give or take the drift. A level whose optimum lies beyond its grid counts as little as that tells.

        Args:
            optima: of the first levels, in their order; those without a fitted valley do not count.

        Returns:
            The optimum without a loss; where no level's is bracketed, the last one's with an infinite interval.

        Raises:
            ValueError: there are no optima, or more than levels.
        """
        if not 0 < len(optima) <= len(self.levels):
            raise ValueError(f"give the optima of 1 to {len(self.levels)} levels, got {len(optima)}")
        known = [(n, best.valley.centre) for n, best in zip(self.levels, optima, strict=False) if best.valley]
        runs = sum(best.runs for best in optima)
        if not any(best.bracketed for best in optima):
            last, note = optima[-1].log2_value, "no level's grid encloses its optimum"
            return Optimum(last, -math.inf, math.inf, math.nan, False, runs=runs, note=note)
        base = self.levels[0].width
        design = np.array([[1.0, base / level.width] for level, _ in known])
        weight = np.array([max(float(draws.std()), _SUREST) ** -2.0 for _, draws in known])
        precision = design.T @ (weight[:, None] * design) + np.diag([0.0, (self.drift / 2) ** -2.0])
        line = np.linalg.solve(precision, design.T @ (weight * np.array([draws.mean() for _, draws in known])))
        at = np.array([1.0, base / self.target])
        deviation = math.sqrt(float(at @ np.linalg.solve(precision, at)))
        middle = float(at @ line)
        return Optimum(middle, middle - _Z * deviation, middle + _Z * deviation, math.nan, True, runs=runs)


def telescope(
    base: int,
    target: int,
    flops: Flops,
    *,
    centre: float,
    radius: float = 2.0,
    step: float = 1.0,
    share: float = 0.2,
    drift: float | None = None,
) -> Telescope:
    """Plan a telescoping sweep: widths base, 2 base, 4 base, ... up to the target's at most.

    The base's grid is the given one. Beyond it, level ``l`` reaches ``drift 2^-l + spacing/4`` to either side of the
    optimum that the level before found: the drift that can remain, and how well that one was located. What the share
    leaves after the base is divided equally among the levels, so that each costs about the same: as runs get dearer,
    there are fewer. None has more values than the base, or a spacing finer than a quarter of the base's; what a cheap
    level does not need goes to those after it. There are as many levels as can have three runs each.

    Args:
        base: smallest width, at which the grid is given (>= 1).
        target: width that the tuning is for (>= base).
        flops: floating-point operations of one run (> 0) by width, a function or a mapping.
        centre: log2 of the value in the middle of the base's grid.
        radius: octaves from there to either end (>= step).
        step: octaves between neighbours (> 0).
        share: share of the target's run that may be spent (> 0).
        drift: octaves by which the optimum may move between the base and infinite width (> 0); half the radius if None.

    Raises:
        ValueError: a number is out of range, the base's grid costs more than the share, or a cost is not positive.

    Examples:
        >>> made = telescope(64, 1024, lambda width: 1e9 * width**2, centre=-6, radius=2, step=0.5, share=0.2)
        >>> print(made.table())
        width  values (log2)          runs  FLOPs of one  FLOPs     of the target's run
        64     -8 to -4, step 0.5     9     4.1e+12       3.69e+13  3.52%
        128    best ±0.75, step 0.25  7     1.64e+13      1.15e+14  10.94%
        all                           16                  1.52e+14  14.45% (at most 20.00%)
        >>> telescope(64, 128, lambda width: 1e9 * width**2, centre=-6)
        Traceback (most recent call last):
        ...
        ValueError: 5 runs at width 64 cost 125.0% of the target's run, and 20.0% may be spent; give share=1.25, ...

    Reference:
        arXiv:2505.02222, the telescoping algorithm: O(C log N) for a final run of cost C at width N.
    """
    drift = radius / 2 if drift is None else drift
    _check(base, target, centre=centre, radius=radius, step=step, share=share, drift=drift)
    widths = [base * 2**level for level in range(int(math.log2(target / base) + 1e-9) + 1)]
    costs = {width: _cost(flops, width) for width in (*widths, target)}
    first = Level(base, math.floor(radius / step + 1e-9), step, costs[base], costs[target])
    left = share * costs[target] * (1 + 1e-9) - first.cost
    if left < 0:
        raise ValueError(
            f"{first.runs} runs at width {base} cost {first.share:.1%} of the target's run, and {share:.1%} may be "
            f"spent; give share={first.share:.3g}, a smaller base than {base}, or a grid of fewer values"
        )
    tried = (_levels(first, widths[1:count], costs, left=left, drift=drift) for count in range(len(widths), 0, -1))
    return Telescope(target, costs[target], share, float(centre), drift, next(filter(None, tried)))


def follow(made: Telescope, loss: Callable[[int, float], float], *, max_extend: int = 2) -> tuple[Optimum, ...]:
    """Carry a telescoping sweep out on a function: each level around the optimum of the one before.

    A grid whose best value lies at its edge grows, as far as the share pays for it.

    Args:
        made: from :func:`telescope`.
        loss: of a width and log2 of a value (> 0); inf where it diverges.
        max_extend: runs that a level may get beyond its plan (>= 0).

    Returns:
        The optimum of each level; fewer where a whole level diverged.

    Examples:
        >>> made = telescope(64, 1024, lambda width: width**2, centre=-6, radius=2, step=0.5)
        >>> found = follow(made, lambda width, x: 3 + 0.1 * (x + 7 - 32 / width) ** 2)
        >>> [round(best.log2_value, 1) for best in found], round(made.at_target(found).log2_value, 1)
        ([-6.5, -6.8], -6.9)
    """
    found: list[Optimum] = []
    centre, spent = made.centre, 0.0
    for index, level in enumerate(made.levels):
        grid = level.grid("value", centre)
        line = Line(grid.first(centre=2.0**centre), min(max_extend, made.spare(index, spent)))
        while points := line.missing():
            line.losses |= {k: loss(level.width, grid.log2(k)) for k in points}
        spent += len(line.losses) * level.flops
        best = located(grid, line)
        found.append(best)
        if math.isnan(best.log2_value):
            break
        centre = best.log2_value
    return tuple(found)


def located(grid: Grid, line: Line) -> Optimum:
    """Return the optimum along a line of a grid.

    Raises:
        ValueError: a loss is not positive, or there is none.

    Examples:
        >>> grid = Grid("lr")
        >>> print(located(grid, Line((-1, 0, 1), 0, losses={-1: 3.1, 0: 3.0, 1: 3.1})))
        +0.00 [-0.32, +0.32]
    """
    return find_optimum([grid.log2(k) for k in line.losses], list(line.losses.values()))


def _levels(
    first: Level, widths: Sequence[int], costs: Mapping[int, float], *, left: float, drift: float
) -> tuple[Level, ...]:
    """Return the levels, the first included, or none where one of them could not have three runs."""
    levels = [first]
    finest = first.step / _FINEST
    for index, width in enumerate(widths):
        most = int(left / (len(widths) - index) // costs[width])
        if most < FEWEST:
            return ()
        radius = min((most - 1) // 2, first.radius)
        reach = drift / 2 ** len(levels) + _LOCATED * levels[-1].step
        step = max(1, math.ceil(reach / radius / finest - 1e-9)) * finest
        level = Level(width, math.ceil(reach / step - 1e-9), step, costs[width], first.target_flops)
        levels.append(level)
        left -= level.cost
    return tuple(levels)


def _cost(flops: Flops, width: int) -> float:
    if isinstance(flops, Mapping):
        if width not in flops:
            raise ValueError(f"flops has no cost of width {width}; it has {', '.join(map(str, flops)) or 'none'}")
        cost = flops[width]
    else:
        cost = flops(width)
    if not (isinstance(cost, int | float) and 0 < cost < math.inf):
        raise ValueError(f"flops of one run at width {width} must be positive and finite, got {cost!r}")
    return float(cost)


def _check(base: int, target: int, *, centre: float, radius: float, step: float, share: float, drift: float) -> None:
    if not 1 <= base <= target:
        raise ValueError(f"base must be a width from 1 to the target's, got base {base!r} and target {target!r}")
    if not math.isfinite(centre):
        raise ValueError(f"centre must be log2 of a positive value, got {centre!r}; -6 stands for 2^-6")
    if not 0 < step <= radius < math.inf:
        raise ValueError(f"the grid takes 0 < step <= radius octaves, got step {step!r} and radius {radius!r}")
    if not (0 < share < math.inf and 0 < drift < math.inf):
        raise ValueError(
            f"share and drift must be positive and finite, got {share!r} and {drift!r}; 0.2 and 1 are usual"
        )


def _range(level: Level, centre: float | None) -> str:
    half = level.radius * level.step
    if centre is None:
        return f"best ±{half:g}, step {level.step:g}"
    return f"{centre - half:g} to {centre + half:g}, step {level.step:g}"
