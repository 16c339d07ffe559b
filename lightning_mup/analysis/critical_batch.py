"""The critical batch size, from how many steps each batch size needs to reach the same loss.

Shapes: P runs, C candidates for the critical batch size, S points of a loss curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from lightning_mup.analysis.optimum import CONFIDENCE
from lightning_mup.analysis.runs import listed

Array = npt.NDArray[np.float64]
Verdict = Literal["measured", "below", "above", "unclear"]
_STEP = 0.01  # octaves between candidates
_BEYOND = 8.0  # octaves beyond the outermost batches; the law differs from its limit by 0.4% there
_OUTLIER = 2.0  # standard deviations; a run that is farther off counts linearly (Huber), which costs 1% of efficiency
_PASSES = 10  # of Huber's weights
_MEDIAN = 1.4826  # standard deviation of normal numbers over their median size
_ENOUGH = 3  # points: two parameters, and one that can disagree
_MISFIT = 2.0  # scatter that is this many times what was stated is noted


@dataclass(frozen=True, slots=True)
class CriticalBatch:
    """The batch size at which steps and tokens are each twice their least, with a 95% interval.

    All batches are in the unit that was given, samples or tokens.

    Args:
        value: the critical batch size; nan unless the runs enclose its interval.
        low: lower end of its interval; 0 where the runs do not reach low enough to tell.
        high: upper end; inf where they do not reach high enough.
        steps_min: fitted steps to the loss at an endless batch; nan where there is no value.
        verdict: ``"measured"``; ``"below"`` (the upper end is all that is known) or ``"above"`` (the lower end);
            ``"unclear"``: the runs do not tell.
        add: batches to run next so that they do; empty where they do.
        batches: batches that were fitted.
        noise: estimated standard deviation of the log of one run's steps; nan without a fit.
        note: what is unusual, ``""`` where nothing is.
    """

    value: float
    low: float
    high: float
    steps_min: float
    verdict: Verdict
    add: tuple[float, ...] = ()
    batches: tuple[float, ...] = ()
    noise: float = math.nan
    note: str = ""

    @property
    def examples_min(self) -> float:
        """Fitted samples or tokens to the loss at a small batch, ``steps_min * value``."""
        return self.steps_min * self.value

    def __str__(self) -> str:
        """Print the value with its interval, or the bound."""
        return {
            "measured": f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]",
            "below": f"below {self.high:.4g}",
            "above": f"above {self.low:.4g}",
            "unclear": "unclear",
        }[self.verdict]


@dataclass(frozen=True, slots=True)
class _Profile:
    """How well each candidate explains the steps.

    Args:
        log2_batch: ``[C]``, log2 of the candidate.
        level: ``[C]``, log of its best ``steps_min``.
        rest: ``[C]``, Huber's sum of squares, and what was stated.
        freedom: degrees of freedom of the noise.
    """

    log2_batch: Array
    level: Array
    rest: Array
    freedom: float

    @property
    def best(self) -> int:
        return int(self.rest.argmin())

    @property
    def noise(self) -> float:
        return math.sqrt(float(self.rest.min()) / self.freedom)

    def interval(self) -> tuple[float, float]:
        """Return log2 of the nearest candidates that the data reject; infinite where they reject none on a side."""
        quantile = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2))
        kept = np.flatnonzero(self.rest <= self.rest.min() * (1 + quantile**2 / self.freedom))
        low = -math.inf if kept[0] == 0 else float(self.log2_batch[kept[0] - 1])
        return low, math.inf if kept[-1] == len(self.rest) - 1 else float(self.log2_batch[kept[-1] + 1])


def find_critical_batch(
    batches: Sequence[float], steps: Sequence[float], *, noise: float = 0.03, trust: float = 2.0
) -> CriticalBatch:
    """Fit ``steps = steps_min (1 + critical / batch)`` to the steps that runs needed to reach one loss.

    It is the same as ``(steps / steps_min - 1) (examples / examples_min - 1) = 1`` with ``examples = batch steps`` and
    ``examples_min = critical steps_min``. The fit is to log steps with Huber's loss; the interval holds the candidates
    that the profile of that loss does not reject (F test). Noise is told from the misfit, repeats included, and from
    what is stated. Where the interval is not within the batches, no value is given but a bound.

    The law supposes that the learning rate was tuned at each batch, and that no run's schedule ends on the way.

    Measured (5 or 9 batches from 16 to 4096 with 150 to 450 planted, 1 to 3 seeds, noise of 2% to 10%, none or one run
    in twelve with 4 times that): the interval covers the planted value in 93% to 98% of trials.

    Args:
        batches: each run's batch size, in samples or tokens (> 0); equal ones are repeats.
        steps: each run's steps to the loss (> 0), see :func:`steps_to_loss`; inf or nan where it was not reached.
        noise: standard deviation between seeds to expect, as a fraction of the steps (> 0).
        trust: how many runs' worth that expectation counts (> 0).

    Raises:
        ValueError: the lists differ in length or are empty, or a number is out of range.

    Examples:
        >>> batches = [32, 64, 128, 256, 512, 1024]
        >>> found = find_critical_batch(batches, [1000 * (1 + 200 / b) for b in batches])
        >>> round(found.value, -1), round(found.steps_min, -1), found.verdict
        (200.0, 1000.0, 'measured')
        >>> far = find_critical_batch(batches, [1000 * (1 + 5000 / b) for b in batches])
        >>> far.verdict, far.add
        ('above', (2048.0, 4096.0))

    Reference:
        arXiv:1812.06162, equation 2.11 and Appendix A.1.
    """
    x, y, missed = _points(batches, steps, noise, trust)
    tested = sorted({float(b) for b in batches})
    note = f"did not reach the loss, so left out: {listed(f'{b:g}' for b in missed)}" if missed else ""
    fitted = tuple(np.unique(x).tolist())
    if len(fitted) < _ENOUGH:
        add = (tested[0] / 2, tested[-1] * 2)
        told = f"{_ENOUGH} batches or more are needed, {len(fitted)} reached the loss"
        return CriticalBatch(math.nan, 0.0, math.inf, math.nan, "unclear", add, fitted, note=_joined(note, told))
    profile = _profile(np.log2(x), np.log(y), noise, trust)
    low, high = (float(2.0**end) for end in profile.interval())
    verdict = _verdict(low, high, fitted)
    if profile.noise > _MISFIT * noise:
        told = f"steps scatter about the law by {profile.noise:.2g} of their size: is the rate tuned at each batch?"
        note = _joined(note, told)
    value, steps_min = (float(2.0 ** profile.log2_batch[profile.best]), math.exp(profile.level[profile.best]))
    measured = verdict == "measured"
    return CriticalBatch(
        value=value if measured else math.nan,
        low=low if verdict in ("measured", "above") else 0.0,
        high=high if verdict in ("measured", "below") else math.inf,
        steps_min=steps_min if measured else math.nan,
        verdict=verdict,
        add=_next(fitted, verdict),
        batches=fitted,
        noise=profile.noise,
        note=note,
    )


def steps_to_loss(steps: Sequence[float], losses: Sequence[float], target: float, *, octaves: float = 0.25) -> float:
    """Return the first step at which a smoothed loss curve reaches a target; inf where it does not.

    Each loss gives way to the line through the log losses within ``octaves / 2`` to either side on the axis of
    ``log(1 + step)``; between steps the curve is linear there. Noise alone would make the first step too early.

    Args:
        steps: steps of the losses, ascending (>= 0).
        losses: losses there (> 0); the curve ends before the first inf or nan.
        target: the loss to reach (> 0).
        octaves: length of the window (>= 0); 0 for no smoothing.

    Raises:
        ValueError: the lists differ in length or are empty, a number is out of range, or the first loss is as low as
            the target, which says nothing about when it was reached.

    Examples:
        >>> round(steps_to_loss([100, 200, 400, 800], [4.0, 3.6, 3.3, 3.1], 3.2), 1)
        562.7
        >>> steps_to_loss([100, 200, 400, 800], [4.0, 3.6, 3.3, 3.1], 3.0)
        inf
    """
    x_S, y_S = _curve(steps, losses, target, octaves)
    smooth_S = _smoothed(x_S, y_S, octaves * math.log(2) / 2)
    goal = math.log(target)
    reached = np.flatnonzero(smooth_S <= goal)
    if not len(reached):
        return math.inf
    if (at := int(reached[0])) == 0:
        raise ValueError(
            f"the first loss, {losses[0]:.4g} at step {steps[0]:g}, is as low as {target:g}; set a lower one"
        )
    share = (goal - smooth_S[at - 1]) / (smooth_S[at] - smooth_S[at - 1])
    return math.expm1(float(x_S[at - 1] + share * (x_S[at] - x_S[at - 1])))


def _points(
    batches: Sequence[float], steps: Sequence[float], noise: float, trust: float
) -> tuple[Array, Array, list[float]]:
    """Return batch and steps of each run, and the batches at which one did not reach the loss."""
    if len(batches) != len(steps) or len(batches) == 0:
        raise ValueError(f"give the steps for each batch, got {len(batches)} batches and {len(steps)} steps")
    if not (noise > 0 and trust > 0):
        raise ValueError(f"noise and trust must be positive, got {noise!r} and {trust!r}; 0.03 and 2 are usual")
    if bad := [b for b in batches if not 0 < b < math.inf] + [s for s in steps if s <= 0]:
        raise ValueError(f"batches must be positive and finite, and steps positive, got {bad[0]!r}; leave that run out")
    missed = {float(b) for b, s in zip(batches, steps, strict=True) if not math.isfinite(s)}
    runs = [(b, s) for b, s in zip(batches, steps, strict=True) if b not in missed]
    x, y = np.array(runs, dtype=np.float64).reshape(-1, 2).T
    return x, y, sorted(missed)


def _profile(x: Array, y: Array, noise: float, trust: float) -> _Profile:
    log2_batch = np.arange(x.min() - _BEYOND, x.max() + _BEYOND + _STEP, _STEP)
    off_CP = y - np.logaddexp(0, math.log(2) * (log2_batch[:, None] - x))
    level_C = np.median(off_CP, axis=1)
    stated, freedom = trust * noise**2, len(x) - 2 + trust
    limit = _OUTLIER * math.sqrt((stated + (len(x) - 2) * _spread(np.abs(off_CP - level_C[:, None])) ** 2) / freedom)
    for _ in range(_PASSES):
        weight_CP = limit / np.maximum(np.abs(off_CP - level_C[:, None]), limit)
        level_C = (weight_CP * off_CP).sum(axis=1) / weight_CP.sum(axis=1)
    size_CP = np.abs(off_CP - level_C[:, None])
    rest_CP = np.where(size_CP < limit, np.square(size_CP), limit * (2 * size_CP - limit))
    return _Profile(log2_batch, level_C, rest_CP.sum(axis=1) + stated, freedom)


def _spread(size_CP: Array) -> float:
    """Return the standard deviation that half of the runs tell, so that an outlier does not hide itself.

    It is the median distance from the law of least absolute deviations, which two runs determine and are 0 from.
    """
    return float(np.median(np.sort(size_CP[size_CP.sum(axis=1).argmin()])[2:])) * _MEDIAN


def _verdict(low: float, high: float, fitted: Sequence[float]) -> Verdict:
    reaches_low, reaches_high = fitted[0] <= low, high <= fitted[-1]
    if reaches_low and reaches_high:
        return "measured"
    if reaches_low:
        return "above"
    return "below" if reaches_high else "unclear"


def _next(fitted: Sequence[float], verdict: Verdict) -> tuple[float, ...]:
    below = (fitted[0] / 4, fitted[0] / 2) if verdict in ("below", "unclear") else ()
    above = (fitted[-1] * 2, fitted[-1] * 4) if verdict in ("above", "unclear") else ()
    return (*below, *above)


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _curve(steps: Sequence[float], losses: Sequence[float], target: float, octaves: float) -> tuple[Array, Array]:
    """Return log(1 + step) and log loss, up to where the curve diverges."""
    if len(steps) != len(losses) or len(steps) == 0:
        raise ValueError(f"give one loss for each step, got {len(steps)} steps and {len(losses)} losses")
    if not (0 < target < math.inf and 0 <= octaves < math.inf):
        raise ValueError(f"target must be positive and octaves not negative, got {target!r} and {octaves!r}")
    if bad := [loss for loss in losses if loss <= 0]:
        raise ValueError(f"losses must be positive, got {bad[0]!r}; inf or nan says that the run diverged")
    x_S, y_S = np.array(steps, dtype=np.float64), np.array(losses, dtype=np.float64)
    if not (x_S[0] >= 0 and (np.diff(x_S) > 0).all() and x_S[-1] < math.inf):
        raise ValueError(
            f"steps must ascend from 0 or more, got {listed(f'{s:g}' for s in steps)}; sort them, each once"
        )
    end = int(np.argmin(np.isfinite(y_S))) if not np.isfinite(y_S).all() else len(y_S)
    return np.log1p(x_S[:end]), np.log(y_S[:end])


def _smoothed(x_S: Array, y_S: Array, half: float) -> Array:
    """Return at each point the least-squares line through those that are no farther than `half`, where these are 3."""
    first, end = np.searchsorted(x_S, x_S - half, side="left"), np.searchsorted(x_S, x_S + half, side="right")
    count = end - first

    def mean(z_S: Array) -> Array:
        total = np.concatenate([[0.0], np.cumsum(z_S)])
        return np.asarray((total[end] - total[first]) / count)

    square = mean(x_S**2) - mean(x_S) ** 2
    slope = (mean(x_S * y_S) - mean(x_S) * mean(y_S)) / np.where(count < _ENOUGH, 1.0, square)
    return np.where(count < _ENOUGH, y_S, mean(y_S) + slope * (x_S - mean(x_S)))
