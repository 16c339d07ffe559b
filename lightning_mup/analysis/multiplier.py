"""How much compute a method saves: what the baseline needs for the same loss, over what the method took.

Logs are natural. Shapes: B costs of the baseline, M costs of the method, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_mup.analysis.frontier import (
    ENDLESS,
    LINE,
    Array,
    Points,
    Trial,
    frontier_of,
    gather,
    log_cost,
    parabola_log_cost,
)
from lightning_mup.analysis.optimum import CONFIDENCE
from lightning_mup.analysis.runs import listed
from lightning_mup.core.plan import aligned

__all__ = ["AtCost", "Multiplier", "Trend", "Trial", "compute_multiplier"]

Source = Literal["stated", "repeats", "scatter"]
Verdict = Literal["stands", "falls", "rises", "unclear"]
TOLERANCE = 0.05
"""Largest slope that stands: the multiplier changes by 12% over ten times the cost."""
_DRAWS = 4000
_SURE = ENDLESS / 2  # logs beyond it say that there is no end
_RARE = 1 - CONFIDENCE  # scatter that noise makes less often than this is more than noise
_TAILS = (_RARE / 2, 1 - _RARE / 2)
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class AtCost:
    """The multiplier at one cost of the method.

    Args:
        cost: of each run.
        loss: geometric mean over the repeats; inf where one of them diverged.
        runs: number of repeats.
        baseline_cost: what the baseline needs to reach this loss; nan where the method diverged.
        multiplier: ``baseline_cost / cost``; nan where the method diverged.
        low: lower end of its 95% interval.
        high: upper end; where the method diverged, the bound that it did not reach the baseline's highest loss.
        octaves: log2 of how far ``baseline_cost`` is beyond the baseline's last cost, < 0 for before its first, 0 for
            between them.
        bend: log of the multiplier that a parabola through the three nearest baseline points gives, over this one; nan
            for fewer points. It is what the straight line may be off by; the interval does not include it.
        note: what is unusual, ``""`` where nothing is.
    """

    cost: float
    loss: float
    runs: int
    baseline_cost: float
    multiplier: float
    low: float
    high: float
    octaves: float = 0.0
    bend: float = math.nan
    note: str = ""

    @property
    def extrapolated(self) -> bool:
        """Whether the baseline was not run at costs on both sides."""
        return self.octaves != 0

    @property
    def diverged(self) -> bool:
        """Whether there is a bound instead of a multiplier."""
        return math.isnan(self.multiplier)


@dataclass(frozen=True, slots=True)
class Trend:
    """How the multiplier moves with scale: the slope of its log against log cost.

    Args:
        slope: the multiplier goes as ``cost^slope``; nan for fewer than two costs.
        low: lower end of its 95% interval.
        high: upper end.
        verdict: ``"stands"``: the whole interval is within the tolerance; ``"falls"``, ``"rises"``: it is not, and
            excludes 0; ``"unclear"``: the runs do not tell.
    """

    slope: float
    low: float
    high: float
    verdict: Verdict

    def __str__(self) -> str:
        """Print the slope with its interval, and the verdict."""
        if math.isnan(self.slope):
            return self.verdict
        return f"{self.slope:+.3f} [{self.low:+.3f}, {self.high:+.3f}] {self.verdict}"


@dataclass(frozen=True, slots=True)
class Multiplier:
    """The compute multiplier of a method over a baseline.

    Args:
        rows: one per cost of the method, cheapest first.
        value: geometric mean over the rows that did not diverge; nan without any.
        low: lower end of its 95% interval.
        high: upper end.
        trend: how it moves with scale.
        noise: standard deviation of one run's log loss that the intervals come from.
        source: whence that is: ``"stated"``; ``"repeats"``: the spread of repeats, on both sides together, and what was
            stated; ``"scatter"``: the rows scatter about their trend by more than either explains.
        frontier: cost and mean loss of the baseline's points that were interpolated between.
        notes: what was left out, and why.
    """

    rows: tuple[AtCost, ...]
    value: float
    low: float
    high: float
    trend: Trend
    noise: float
    source: Source
    frontier: tuple[tuple[float, float], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Print the mean with its interval, and the trend."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], slope with cost {self.trend}"

    def table(self) -> str:
        """Return an aligned table, one line per cost."""
        header = ["cost", "loss", "baseline's cost", "multiplier [95%]", "runs", "note"]
        return "\n".join(aligned([header, *(_cells(row) for row in self.rows)]))


@dataclass(frozen=True, slots=True)
class _Noise:
    """Standard deviation of one run's log loss, the degrees of freedom it is known with, and whence."""

    deviation: float
    freedom: float
    source: Source


def compute_multiplier(
    baseline: Sequence[Trial],
    runs: Sequence[Trial],
    *,
    noise: float = 0.002,
    trust: float = 2.0,
    tolerance: float = TOLERANCE,
) -> Multiplier:
    """Return ``C_baseline(loss) / C_method``: how many times the method's cost the baseline needs for its loss.

    The baseline's frontier is linear between its points in log cost and log loss; beyond them the two closest points
    go on. A baseline run whose loss is no lower than that of a cheaper one is not on the frontier. Trials of equal cost
    are repeats, whose log losses are averaged: give the tuned runs, not a sweep. Where one of them diverged, the whole
    cost has: for the baseline it is off the frontier, for the method it is a bound.

    Intervals are percentiles of draws: each mean log loss, of both sides, is moved by the noise over the root of its
    number of repeats, and the frontier is made again. The spread of repeats is pooled, since two or three seeds
    resampled at each cost alone would have half to two thirds of the variance.

    Measured (2 to 5 sizes, 4 times the cost each, noise of 0.2% to 1%, 1 to 3 seeds, a loss that falls as
    ``cost^-0.05`` with or without an irreducible part): intervals of mean, rows and slope cover what was planted in 93%
    to 96% of trials; in 85% to 88% where one seed has 2.5 times the noise that was stated. Where a loss of 3.2 has an
    irreducible part of 1.7, the line between two sizes gives 1% too much and the one beyond the last 2% too little,
    which lowers the slope by 0.01 at three sizes; ``bend`` says so. The intervals are of noise alone.

    Args:
        baseline: its runs, at two or more costs.
        runs: the method's runs, in the same unit of cost, on the same data.
        noise: standard deviation between seeds to expect, as a fraction of the loss (> 0).
        trust: how many runs' worth that expectation counts, where there are repeats (> 0).
        tolerance: largest slope of the trend, up or down, that stands (> 0).

    Raises:
        ValueError: a list is empty, an option is out of range, or the baseline's loss does not fall over two costs.

    Examples:
        >>> adam = [Trial(cost, 3 * cost**-0.05) for cost in (1, 4, 16)]
        >>> muon = [Trial(cost, 3 * (1.4 * cost) ** -0.05) for cost in (1, 4)]
        >>> saved = compute_multiplier(adam, muon)
        >>> round(saved.value, 3), saved.source
        (1.4, 'stated')

    Reference:
        arXiv:2512.05620, Section 4 and Figure 6.
    """
    if not (noise > 0 and trust > 0 and tolerance > 0):
        got = f"{noise!r}, {trust!r} and {tolerance!r}"
        raise ValueError(f"noise, trust and tolerance must be positive, got {got}; 0.002, 2 and {TOLERANCE} are usual")
    base, mine = gather(baseline, "baseline"), gather(runs, "runs")
    on = frontier_of(base)
    spread = _noise(base, mine, noise, trust)
    logs, logs_DM = _logs(base, mine, spread)
    if wider := _scatter(mine.x, logs, logs_DM, spread):
        spread = wider
        logs, logs_DM = _logs(base, mine, spread)
    finite = tuple(_row(base, on, mine, logs, logs_DM, place) for place in range(len(mine.x)))
    lost = tuple(_bound(cost, count, base.cost[0]) for cost, count in mine.diverged)
    value, low, high = _interval(logs.mean(), logs_DM.mean(axis=1)) if finite else (math.nan, 0.0, math.inf)
    trend = _trend(mine.x, logs, logs_DM, tolerance)
    return Multiplier(
        rows=tuple(sorted((*finite, *lost), key=lambda row: row.cost)),
        value=value,
        low=low,
        high=high,
        trend=_doubted(trend) if lost else trend,
        noise=spread.deviation,
        source=spread.source,
        frontier=tuple((base.cost[i], math.exp(base.y[i])) for i in on),
        notes=tuple(_notes(base, on, mine, spread)),
    )


def _noise(base: Points, mine: Points, noise: float, trust: float) -> _Noise:
    freedom = base.freedom + mine.freedom
    if not freedom:
        return _Noise(noise, math.inf, "stated")
    variance = (base.within + mine.within + trust * noise**2) / (freedom + trust)
    return _Noise(math.sqrt(variance), freedom + trust, "repeats")


def _logs(base: Points, mine: Points, noise: _Noise) -> tuple[Array, Array]:
    """Return the log multipliers ``[M]``, and draws of them ``[D, M]``."""
    random = np.random.default_rng(0)  # always the same draws
    known = math.isinf(noise.freedom)
    chi_D1 = np.ones((_DRAWS, 1)) if known else random.chisquare(noise.freedom, (_DRAWS, 1)) / noise.freedom
    scale_D1 = noise.deviation / np.sqrt(chi_D1)
    y_DB = base.y + scale_D1 * random.standard_normal((_DRAWS, len(base.y))) / np.sqrt(base.count)
    y_DM = mine.y + scale_D1 * random.standard_normal((_DRAWS, len(mine.y))) / np.sqrt(mine.count)
    return log_cost(base.x, base.y[None], mine.y[None])[0] - mine.x, log_cost(base.x, y_DB, y_DM) - mine.x


def _row(base: Points, on: list[int], mine: Points, logs: Array, logs_DM: Array, place: int) -> AtCost:
    value, low, high = _interval(logs[place], logs_DM[:, place])
    at = float(mine.x[place] + logs[place])
    bend = parabola_log_cost(base.x[on], base.y[on], float(mine.y[place])) - at
    past = max(at - base.x[on[-1]], 0.0) + min(at - base.x[0], 0.0)
    octaves = float(past) / math.log(2) if abs(past) > _ROUNDING else 0.0
    side = "beyond the baseline's last cost" if octaves > 0 else "before the baseline's first cost"
    told = [f"extrapolated by {abs(octaves):.2g} octaves {side}"] if octaves else []
    if high == math.inf or low == 0:
        told.append("the baseline's losses differ by no more than noise: run it at costs farther apart, or more seeds")
    elif abs(bend) > math.log(high / low) / 2:
        told.append(f"the frontier curves: a parabola gives {_ratio(logs[place] + bend):.3g}")
    loss, runs, note = math.exp(mine.y[place]), int(mine.count[place]), "; ".join(told)
    return AtCost(mine.cost[place], loss, runs, _ratio(at), value, low, high, octaves, bend, note)


def _bound(cost: float, count: int, first: float) -> AtCost:
    note = "diverged; the bound says that it did not reach the baseline's highest loss"
    return AtCost(cost, math.inf, count, math.nan, math.nan, 0.0, first / cost, note=note)


def _interval(log: float, log_D: Array) -> tuple[float, float, float]:
    low, high = np.quantile(log_D, _TAILS)
    return _ratio(log), _ratio(low), _ratio(high)


def _ratio(log: float) -> float:
    return 0.0 if log < -_SURE else math.inf if log > _SURE else math.exp(log)


def _slopes(x: Array, log_DM: Array) -> tuple[Array, Array]:
    """Return each draw's slope, and the sum of squares that a line leaves."""
    middle = x - x.mean()
    slope_D = log_DM @ middle / (middle @ middle)
    rest_DM = log_DM - log_DM.mean(axis=1, keepdims=True) - slope_D[:, None] * middle
    return slope_D, np.square(rest_DM).sum(axis=1)


def _trend(x: Array, logs: Array, logs_DM: Array, tolerance: float) -> Trend:
    if len(x) < LINE:
        return Trend(math.nan, -math.inf, math.inf, "unclear")
    slope = float(_slopes(x, logs[None])[0][0])
    ends = np.quantile(_slopes(x, logs_DM)[0], _TAILS).tolist()
    low, high = (end if abs(end) < _SURE / np.ptp(x) else math.copysign(math.inf, end) for end in ends)
    if -tolerance <= low and high <= tolerance:
        return Trend(slope, low, high, "stands")
    return Trend(slope, low, high, "rises" if low > 0 else "falls" if high < 0 else "unclear")


def _scatter(x: Array, logs: Array, logs_DM: Array, noise: _Noise) -> _Noise | None:
    """Return the noise that explains how the rows scatter about their trend, where the given one does not."""
    freedom = len(x) - LINE
    if freedom < 1:
        return None
    found = float(_slopes(x, logs[None])[1][0])
    usual_D = _slopes(x, logs_DM - logs)[1]
    if (usual_D >= found).mean() >= _RARE:
        return None
    return _Noise(noise.deviation * math.sqrt(found / float(np.median(usual_D))), freedom, "scatter")


def _doubted(trend: Trend) -> Trend:
    """Return the trend of a method that diverged at some cost: only its fall is left standing."""
    return trend if trend.verdict == "falls" else replace(trend, verdict="unclear")


def _notes(base: Points, on: list[int], mine: Points, noise: _Noise) -> list[str]:
    off = [name for place, name in enumerate(base.names) if place not in on]
    lists = {
        "off the frontier, because the baseline diverged": [f"{cost:.4g}" for cost, _ in base.diverged],
        "off the frontier, because a cheaper baseline's loss is as low": off,
        "no part of mean and trend, because the method diverged": [f"{cost:.4g}" for cost, _ in mine.diverged],
    }
    told = [f"{why}: {listed(names)}" for why, names in lists.items() if names]
    if repeated := base.repeated + mine.repeated:
        told.append(f"counted once, because cost, loss, seed and label are the same: {repeated} trials")
    if noise.source == "scatter":
        told.append(
            f"the rows scatter about their trend as if noise were {noise.deviation:.2g}, so it was taken for that"
        )
    return told


def _cells(row: AtCost) -> list[str]:
    found = f"below {row.high:.3g}" if row.diverged else f"{row.multiplier:.3f} [{row.low:.3f}, {row.high:.3f}]"
    reached = "-" if row.diverged else f"{row.baseline_cost:.4g}"
    loss = "diverged" if row.loss == math.inf else f"{row.loss:.4f}"
    return [f"{row.cost:.4g}", loss, reached, found, str(row.runs), row.note]
