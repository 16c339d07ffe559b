"""Where the best learning rate lies, how sure that is, and what another one would cost.

Shapes: P points (learning rates), C centres and S skews of the grid of valleys, D draws.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

Array = npt.NDArray[np.float64]
CONFIDENCE = 0.95
_REACH = 2.0  # octaves to either side of the best run that are fitted, or two neighbours where these are farther
_FAR = (
    0.3  # a run whose log loss is this far above the best one's is no part of the valley but a bound, as in divergence
)
_BEYOND = 2.0  # octaves beyond the outermost runs in which an optimum is looked for
GRID = 0.04  # octaves between centres
SKEWS = np.linspace(-2, 2, 21)
SKEW_SPREAD = 0.8  # 1 is 1.95 times as steep on the right, one octave off; Fig. 5 of the reference shows about 0.7
_MISFIT = 0.15  # a point that is e above the valley's floor is off the fitted shape by 0.15 e or so
_PASSES = 3  # of weights and noise in turn
_NEAR_ZERO = 1e-3
_TINY = 1e-300  # keeps logarithms finite
_DRAWS = 2000
_FLAT = 2.0  # octaves; an interval longer than this is called flat
_ENOUGH = 3  # points that a fit needs


@dataclass(frozen=True, eq=False)
class Valley:
    """Valleys that the runs allow, as draws: ``log loss = floor + curvature f(x - centre)``.

    ``f(u) = 2 (exp(s u) - s u - 1) / s^2`` is ``u^2`` for skew s = 0, steeper on the right for s > 0.

    Args:
        centre: ``[D]``, log2 of the optimum.
        floor: ``[D]``, log loss there.
        curvature: ``[D]``, > 0.
        skew: ``[D]``.
        noise: estimated standard deviation of one run's log loss.
        evidence: ``[S]``, how likely each of :data:`SKEWS` makes the runs, up to a factor.
        centre_given: ``[S]``, mean of the centre at each skew.
        variance_given: ``[S]``, its variance.
    """

    centre: Array
    floor: Array
    curvature: Array
    skew: Array
    noise: float
    evidence: Array
    centre_given: Array
    variance_given: Array

    def log_loss(self, log2_value: float) -> Array:
        """Return the log loss at one value, for each draw."""
        return self.floor + self.excess(log2_value)

    def loss(self, log2_value: float) -> float:
        """Return the loss at one value, the geometric mean over the draws."""
        return math.exp(float(self.log_loss(log2_value).mean()))

    def excess(self, log2_value: float) -> Array:
        """Return how far the log loss is above the floor, for each draw."""
        return self.curvature * _shape(log2_value - self.centre, self.skew)


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best value of a hyperparameter, with a 95% interval.

    Args:
        log2_value: log2 of the best value; the best run's where no valley could be fitted; nan without finite losses.
        low: log2 of the interval's lower end, -inf where the runs do not reach low enough to tell.
        high: log2 of its upper end, inf where they do not reach high enough.
        loss: fitted loss at the best value, in the losses' unit.
        bracketed: whether the runs enclose the interval.
        add: log2 of the values to run next so that they do; empty where they do.
        used: log2 of the values whose runs were fitted.
        diverged: log2 of the values at which a run diverged; no optimum lies beyond the lowest above the best run.
        runs: number of runs, all included.
        note: what is unusual, ``""`` where nothing is.
        valley: the fitted valleys; None where there are fewer than three points to fit.
    """

    log2_value: float
    low: float
    high: float
    loss: float
    bracketed: bool
    add: tuple[float, ...] = ()
    used: tuple[float, ...] = ()
    diverged: tuple[float, ...] = ()
    runs: int = 0
    note: str = ""
    valley: Valley | None = field(default=None, repr=False, compare=False)

    @property
    def value(self) -> float:
        """The best value itself."""
        return float(2.0**self.log2_value)

    @property
    def deviation(self) -> float:
        """Standard deviation of the best value in octaves; inf where it is not known from both sides."""
        if self.valley is None or not self.bracketed:
            return math.inf
        return max(float(self.valley.centre.std()), GRID / 2)

    def __str__(self) -> str:
        """Print log2 of the value with its interval."""
        return f"{self.log2_value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]{'' if self.bracketed else ' not bracketed'}"


@dataclass(frozen=True, slots=True)
class _Points:
    """Runs by value: mean log loss and number of runs; what diverged; the spread of repeats."""

    x: Array
    y: Array
    count: Array
    diverged: tuple[float, ...]
    within: float
    freedom: int

    @property
    def tested(self) -> list[float]:
        return sorted([*self.x.tolist(), *self.diverged])

    @property
    def spacing(self) -> float:
        gaps = np.diff(self.tested)
        return float(np.median(gaps)) if len(gaps) else 1.0


def find_optimum(
    log2_values: Sequence[float], losses: Sequence[float], *, noise: float = 0.002, trust: float = 4.0
) -> Optimum:
    """Find the best learning rate (or other positive hyperparameter) from the losses of runs.

    Valleys ``log loss = floor + curvature f(x - centre; skew)`` (:class:`Valley`) are fitted to the runs within two
    octaves of the best one. Each centre and skew on a grid is weighted by how well its best floor and curvature explain
    the losses (Student's t, so the noise is estimated too) and by how usual the skew is; the 95% interval is that of
    the centres' weights. Noise is told from repeats, from the misfit, and from what is stated. A point high up the
    valley counts less, since no valley has exactly this shape. A diverged run, and one that is 35% above the best, is a
    bound: the optimum is not beyond it.

    Measured on planted valleys (symmetric, and up to 3 times as steep on the right; grids of 1/2 and 1 octave; 1 and 3
    seeds; noise of 0.1% to 0.3%): the interval covers the optimum in 92% to 100% of trials. Where the two sides'
    curvature jumps at the optimum itself it covers less (81% at worst).

    Args:
        log2_values: log2 of each run's learning rate; equal ones are repeats.
        losses: each run's loss (> 0); inf or nan where it diverged.
        noise: standard deviation between seeds to expect, as a fraction of the loss (> 0).
        trust: how many runs' worth that expectation counts (> 0).

    Raises:
        ValueError: the lists differ in length or are empty, or a number is out of range.

    Examples:
        >>> losses = [3.2, 3.05, 3.0, 3.05, math.inf]
        >>> best = find_optimum([-9, -8, -7, -6, -5], losses)
        >>> round(best.log2_value), best.bracketed, best.add
        (-7, True, ())
        >>> find_optimum([-9, -8, -7], [3.2, 3.1, 3.0]).add
        (-6.0, -5.0)

    Reference:
        arXiv:2512.05620, Figures 2 to 5, for valleys of this kind.
    """
    points, runs = _points(log2_values, losses, noise, trust), len(losses)
    if not len(points.x):
        low = points.diverged[0]
        below = (low - 2 * points.spacing, low - points.spacing)
        return Optimum(math.nan, -math.inf, low, math.inf, False, below, (), points.diverged, runs, "all diverged")
    best = int(points.y.argmin())
    floor, ceiling = _bounds(points, best)
    used = _window(points, best, floor, ceiling)
    early = [x for x in points.diverged if x < points.x[best]]
    note = f"a run diverged at 2^{early[-1]:g} though none did at 2^{points.x[best]:g}" if early else ""
    if used.sum() < _ENOUGH:
        return _unfitted(points, best, note=note, runs=runs)
    x, grid = points.x[used], _centres(points.x[used], floor, ceiling)
    valley, (low, middle, high) = _fit(points, used, grid, noise, trust)
    open_left, open_right = floor is None and low < points.x[0], ceiling is None and high > points.x[-1]
    at = min(max(middle, points.tested[0]), points.tested[-1])
    add = _next(points, open_left, open_right)
    if not add and high - low > _FLAT:
        note = "; ".join(filter(None, [note, "flat for this noise: run more seeds"]))
    return Optimum(
        log2_value=at,
        low=-math.inf if open_left else low,
        high=math.inf if open_right else high,
        loss=valley.loss(at),
        bracketed=not add,
        add=add,
        used=tuple(x.tolist()),
        diverged=points.diverged,
        runs=runs,
        note=note,
        valley=valley,
    )


def repeat_variance(log2_values: Sequence[float], losses: Sequence[float]) -> tuple[float, int]:
    """Return the sum of squares of log losses within repeats, and its degrees of freedom.

    Examples:
        >>> total, freedom = repeat_variance([-7, -7, -6], [3.0, 3.03, 3.1])
        >>> f"{total:.2g}", freedom
        ('5e-05', 1)
    """
    points = _points(log2_values, losses, 1.0, 1.0)
    return points.within, points.freedom


def _points(log2_values: Sequence[float], losses: Sequence[float], noise: float, trust: float) -> _Points:
    if len(log2_values) != len(losses) or len(losses) == 0:
        raise ValueError(f"give one loss for each value, got {len(log2_values)} values and {len(losses)} losses")
    if not (noise > 0 and trust > 0):
        raise ValueError(f"noise and trust must be positive, got {noise!r} and {trust!r}; 0.002 and 4 are usual")
    if bad := [loss for loss in losses if loss <= 0] + [x for x in log2_values if not math.isfinite(x)]:
        raise ValueError(f"losses must be positive and log2 values finite, got {bad[0]!r}; leave that run out")
    groups: dict[float, list[float]] = defaultdict(list)
    for x, loss in zip(log2_values, losses, strict=True):
        groups[round(float(x), 6)].append(math.log(loss) if math.isfinite(loss) else math.inf)
    finite = {x: np.array(ys) for x, ys in sorted(groups.items()) if math.isfinite(max(ys))}
    return _Points(
        x=np.array(list(finite)),
        y=np.array([ys.mean() for ys in finite.values()]),
        count=np.array([float(len(ys)) for ys in finite.values()]),
        diverged=tuple(sorted(groups.keys() - finite.keys())),
        within=sum(float(np.square(ys - ys.mean()).sum()) for ys in finite.values()),
        freedom=sum(len(ys) - 1 for ys in finite.values()),
    )


def _bounds(points: _Points, best: int) -> tuple[float | None, float | None]:
    """Return the values between which the optimum must be: the nearest that diverged or are far above the best run."""
    far = points.x[points.y > points.y[best] + _FAR].tolist()
    below = [x for x in far if x < points.x[best]]
    above = [x for x in [*far, *points.diverged] if x > points.x[best]]
    return max(below, default=None), min(above, default=None)


def _window(points: _Points, best: int, floor: float | None, ceiling: float | None) -> npt.NDArray[np.bool_]:
    order = np.abs(np.arange(len(points.x)) - best)
    near = (np.abs(points.x - points.x[best]) <= _REACH + GRID) | (order <= 2)
    above = points.x > (-math.inf if floor is None else floor)
    below = points.x < (math.inf if ceiling is None else ceiling)
    return np.asarray(near & above & below)


def _centres(x: Array, floor: float | None, ceiling: float | None) -> Array:
    low = x[0] - _BEYOND if floor is None else max(floor, x[0] - _BEYOND)
    high = x[-1] + _BEYOND if ceiling is None else min(ceiling, x[-1] + _BEYOND)
    return np.linspace(low, high, round((high - low) / GRID) + 2)


def _fit(
    points: _Points, used: npt.NDArray[np.bool_], grid: Array, noise: float, trust: float
) -> tuple[Valley, tuple[float, float, float]]:
    x, y, count = points.x[used], points.y[used], points.count[used]
    shapes_CSP = _shape(x - grid[:, None, None], SKEWS[:, None])
    stated, freedom = points.within + trust * noise**2, len(x) + points.freedom - 2 + trust
    variance = stated / (points.freedom + trust)
    for _ in range(_PASSES):  # weights need the noise, and the noise needs weights
        weight = count / (1 + count * np.square(_MISFIT * (y - y.min())) / variance)
        share = weight / weight.sum()
        mean_CS, mean = shapes_CSP @ share, share @ y
        centred_CSP = shapes_CSP - mean_CS[..., None]
        square_CS = np.square(centred_CSP) @ weight
        slope_CS = centred_CSP @ (weight * (y - mean)) / square_CS
        rest_CS = np.maximum(weight @ np.square(y - mean) - slope_CS**2 * square_CS, 0) + stated
        variance = float(rest_CS[slope_CS > 0].min()) / freedom if (slope_CS > 0).any() else variance
    error_CS = np.sqrt(rest_CS / freedom / square_CS)
    opens_up = np.log(np.maximum(stdtr(freedom, slope_CS / error_CS), _TINY))  # probability that curvature > 0
    log_CS = -0.5 * freedom * np.log(rest_CS) - 0.5 * np.log(square_CS) + opens_up
    evidence_CS = np.exp(log_CS - log_CS.max()) + _TINY
    weights_CS = evidence_CS * np.exp(-0.5 * np.square(SKEWS / SKEW_SPREAD))
    weights_CS /= weights_CS.sum()
    # Draws of centre and skew, then of curvature and floor given these; always the same ones.
    random = np.random.default_rng(0)
    picked = random.choice(weights_CS.size, _DRAWS, p=weights_CS.ravel())
    scatter_DT = random.standard_t(freedom, (2, _DRAWS))
    at = np.unravel_index(picked, weights_CS.shape)
    curvature = np.abs(slope_CS[at] + error_CS[at] * scatter_DT[0])
    level = mean + math.sqrt(variance / weight.sum()) * scatter_DT[1]
    evidence_S = evidence_CS.sum(axis=0)
    centre_S = grid @ evidence_CS / evidence_S
    valley = Valley(
        centre=grid[at[0]],
        floor=level - curvature * mean_CS[at],
        curvature=curvature,
        skew=SKEWS[at[1]],
        noise=math.sqrt(variance),
        evidence=evidence_S,
        centre_given=centre_S,
        variance_given=np.square(grid) @ evidence_CS / evidence_S - np.square(centre_S),
    )
    return valley, _quantiles(grid, weights_CS.sum(axis=1))


def _quantiles(grid: Array, weights: Array) -> tuple[float, float, float]:
    below = np.cumsum(weights) - weights / 2
    tail = (1 - CONFIDENCE) / 2
    low, middle, high = np.interp([tail, 0.5, 1 - tail], below, grid).tolist()
    return low, middle, high


def _unfitted(points: _Points, best: int, *, note: str, runs: int) -> Optimum:
    """Say what fewer than three points tell: the optimum is somewhere between the best run's neighbours."""
    at, tested = float(points.x[best]), points.tested
    place = tested.index(at)
    low = tested[place - 1] if place else -math.inf
    high = tested[place + 1] if place + 1 < len(tested) else math.inf
    sides: tuple[tuple[float, float], ...] = ((low, -points.spacing), (high, points.spacing))
    add = tuple((at + end) / 2 if math.isfinite(end) else at + step for end, step in sides)
    note = "; ".join(filter(None, [note, "too few values near the best one to fit"]))
    loss = math.exp(float(points.y[best]))
    return Optimum(at, low, high, loss, False, add, (), points.diverged, runs, note)


def _next(points: _Points, open_left: bool, open_right: bool) -> tuple[float, ...]:
    first, last, gap = points.tested[0], points.tested[-1], points.spacing
    below = [first - 2 * gap, first - gap] if open_left else []
    above = [last + gap, last + 2 * gap] if open_right else []
    return (*below, *above)


def _shape(u: Array | float, skew: Array) -> Array:
    """Return ``2 (exp(s u) - s u - 1) / s^2``, which is ``u^2`` for s = 0."""
    z = np.asarray(skew * u)
    near_zero = np.abs(z) < _NEAR_ZERO  # where the difference loses its digits
    safe = np.where(near_zero, 1.0, z)
    return np.asarray(np.square(u) * np.where(near_zero, 1 + z / 3, 2 * (np.expm1(safe) - safe) / safe**2))
