"""How an optimum moves with size: the slope of log2 of the optimum against log2 of the size, and what it means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from lightning_mup.analysis.optimum import CONFIDENCE, Optimum

Verdict = Literal["stands", "moves", "unclear"]
TOLERANCE = 0.25
"""Largest slope that stands: the optimum moves by half an octave over four times the size."""
_LINE = 2  # parameters of a line


@dataclass(frozen=True, slots=True)
class Drift:
    """The fitted ``d log2(optimum) / d log2(size)`` with its 95% interval.

    Args:
        slope: the slope; nan where there are fewer than two bracketed optima.
        low: lower end of its interval.
        high: upper end.
        offset: log2 of the fitted optimum at size 1; nan without a slope.
        verdict: ``"stands"``: the whole interval is within the tolerance; ``"moves"``: it is not, and excludes 0;
            ``"unclear"``: the runs do not tell.
        sizes: sizes whose optima were fitted.
        note: what was left out, and why.
    """

    slope: float
    low: float
    high: float
    offset: float
    verdict: Verdict
    sizes: tuple[int, ...] = ()
    note: str = ""

    def at(self, size: float) -> float:
        """Return log2 of the fitted optimum at a size."""
        return self.offset + self.slope * math.log2(size)

    def __str__(self) -> str:
        """Print the slope with its interval, and the verdict."""
        if math.isnan(self.slope):
            return self.verdict
        return f"{self.slope:+.2f} [{self.low:+.2f}, {self.high:+.2f}] {self.verdict}"


def fit_drift(optima: Mapping[int, Optimum], *, tolerance: float = TOLERANCE) -> Drift:
    """Fit a line through the optima by least squares, each weighted by its own uncertainty.

    The slope's error is that of the optima. Where they scatter about the line by more than that, it grows by the factor
    ``sqrt(chi^2 / (sizes - 2))``, and Student's quantile takes the normal one's place. Optima that are not bracketed
    are left out and named.

    Args:
        optima: optimum by size.
        tolerance: largest slope, up or down, that stands (> 0).

    Raises:
        ValueError: the tolerance is not positive.

    Examples:
        >>> def best(at):
        ...     xs = [at - 2, at - 1, at, at + 1, at + 2]
        ...     return find_optimum(xs, [3 + 0.1 * (x - at) ** 2 for x in xs])
        >>> from lightning_mup.analysis.optimum import find_optimum
        >>> fit_drift({64: best(-7), 128: best(-8), 256: best(-9)}).verdict
        'moves'
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}; {TOLERANCE} is usual")
    known = {size: best for size, best in sorted(optima.items()) if best.bracketed and best.valley is not None}
    missing = [size for size in sorted(optima) if size not in known]
    note = f"not bracketed, so left out: {', '.join(map(str, missing))}" if missing else ""
    if len(known) < _LINE:
        return Drift(math.nan, -math.inf, math.inf, math.nan, "unclear", tuple(known), note or "one size has no slope")
    slope, offset, error = _line(known)
    low, high = slope - error, slope + error
    return Drift(slope, low, high, offset, _verdict(low, high, tolerance), tuple(known), note)


def _line(known: Mapping[int, Optimum]) -> tuple[float, float, float]:
    """Return the slope, the offset and half of the slope's interval."""
    x = np.log2(np.array(list(known), dtype=np.float64))
    y = np.array([best.log2_value for best in known.values()])
    weight = np.array([best.deviation**-2 for best in known.values()])
    middle = float(weight @ x / weight.sum())
    square = float(weight @ np.square(x - middle))
    slope = float(weight @ ((x - middle) * y)) / square
    offset = float(weight @ (y - slope * x) / weight.sum())
    freedom = len(x) - _LINE
    quantile, scatter = float(ndtri((1 + CONFIDENCE) / 2)), 1.0
    if freedom:
        chi = math.sqrt(float(weight @ np.square(y - offset - slope * x)) / freedom)
        if chi > 1:
            quantile, scatter = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)), chi
    return slope, offset, quantile * scatter / math.sqrt(square)


def _verdict(low: float, high: float, tolerance: float) -> Verdict:
    if -tolerance <= low and high <= tolerance:
        return "stands"
    return "moves" if low > 0 or high < 0 else "unclear"
