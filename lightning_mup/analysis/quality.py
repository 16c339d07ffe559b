"""Transfer in numbers: does a power law fit the optima, how does an error's price grow, what is lost in the limit?

Kalra & Barkeshli (arXiv:2605.21486) name three metrics: the error E of the optimum's power law, the exponent kappa of
robustness to errors of extrapolation, and the asymptotic penalty R(inf). Their formulas could not be read. The
definitions here are this package's own, in the spirit of that abstract; they will differ in detail.

Shapes: S sizes, D draws, B exponents of the grid, K coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import chndtr, ndtri, stdtrit

from lightning_mup.analysis.drift import Drift
from lightning_mup.analysis.estimate import Estimate
from lightning_mup.analysis.groups import AtSize, Group
from lightning_mup.analysis.optimum import CONFIDENCE, Array, Optimum

_ENOUGH = 3  # sizes
_LINE = 2  # parameters of a line
_TAIL = (1 - CONFIDENCE) / 2
_NORMAL = float(ndtri(1 - _TAIL))
_APPROACH = np.linspace(0.25, 2, 176)  # exponents b towards a limit; finite-width corrections are n^-1
_GROWTH = np.linspace(-2, -1e-9, 81)  # those of growth without one; the last is growth with log n
_DRAWS = 4000


@dataclass(frozen=True, slots=True)
class SizesEstimate(Estimate):
    """What several sizes say together, with its 95% interval; nan where they do not suffice.

    Args:
        sizes: sizes that it comes from.
        note: what was left out, or why there is no number.
    """

    sizes: tuple[int, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        """Print the number with its interval, or why there is none."""
        return self.note if math.isnan(self.value) else Estimate.__str__(self)


@dataclass(frozen=True, slots=True)
class TransferQuality:
    """What one group's runs say about transfer.

    Args:
        drift: slope of the optimum against size.
        fit_error: see :func:`fit_error`, in octaves.
        robustness: see :func:`robustness`.
        penalty: see :func:`asymptotic_penalty`, in nats.
    """

    drift: Drift
    fit_error: SizesEstimate
    robustness: SizesEstimate
    penalty: SizesEstimate

    def __str__(self) -> str:
        """Print one line per number."""
        lines = [
            ("drift of the optimum", self.drift),
            ("error of its power law E, octaves", self.fit_error),
            ("exponent of an error's price kappa", self.robustness),
            ("loss lost in the limit R(inf), nats", self.penalty),
        ]
        return "\n".join(f"{name}: {value}" for name, value in lines)


def transfer_quality(group: Group, *, error: float = 1.0) -> TransferQuality:
    """Return a group's drift and the three metrics.

    The loss lost at a size counts where both its optimum and the base's are bracketed.

    Args:
        group: of :func:`~lightning_mup.analysis.groups.make_groups`.
        error: the error whose price is followed, in octaves (> 0).

    Raises:
        ValueError: the error is not positive.

    Reference:
        Kalra & Barkeshli 2026 (arXiv:2605.21486).
    """
    optima = {at.size: at.optimum for at in group.sizes}
    known = [at for at in group.sizes if at.optimum.bracketed and group.at_base.optimum.bracketed]
    diverged = [at for at in group.sizes if at.lost == math.inf]
    penalty = asymptotic_penalty(
        {at.size: at.lost for at in (*known, *diverged)},
        noise={at.size: _noise(at) for at in known},
        base=group.base,
    )
    return TransferQuality(group.drift, fit_error(optima), robustness(optima, error=error), penalty)


# -- the three metrics ------------------------------------------------------------------------------------------------


def fit_error(optima: Mapping[int, Optimum]) -> SizesEstimate:
    """Return how far optima scatter about a power law in size, in octaves, beyond what their own noise explains.

    ``E^2 = S / (S - 2) sum w r^2 / sum w`` with the distances ``r`` of the true optima to the line of ``log2 optimum``
    against ``log2 size``, and weights ``w = 1 / deviation^2``. Measured optima add noise: ``sum w r^2`` is noncentral
    chi-squared with S - 2 degrees of freedom, which gives E its value (noise taken off) and its interval. Where that
    begins at 0, the optima agree with a power law. E speaks of these sizes, not of further ones.

    Args:
        optima: optimum by size; those not bracketed are left out and named.

    Returns:
        E >= 0; nan with a note where fewer than three sizes are bracketed.

    Examples:
        >>> from lightning_mup.analysis.optimum import find_optimum
        >>> def best(at):
        ...     xs = [at - 2, at - 1, at, at + 1, at + 2]
        ...     return find_optimum(xs, [3 + 0.1 * (x - at) ** 2 for x in xs])
        >>> fit_error({64: best(-7), 128: best(-8), 256: best(-9)}).low
        0.0
        >>> print(fit_error({64: best(-7), 128: best(-8)}))
        bracketed at 2 sizes, which are too few: 64, 128

    Reference:
        Kalra & Barkeshli 2026 (arXiv:2605.21486), the metric E; the formula is this package's.
    """
    known, note = _bracketed(optima)
    if len(known) < _ENOUGH:
        return _refused(tuple(known), note)
    weight = np.array([best.deviation for best in known.values()]) ** -2
    values = np.array([best.log2_value for best in known.values()])
    slope_of = _slope_weights(known, weight)
    centre = float(weight @ values / weight.sum())
    residual = values - centre - float(slope_of @ values) * _centred(known, weight)
    total, freedom = float(weight @ np.square(residual)), len(known) - _LINE
    scale = math.sqrt(len(known) / freedom / weight.sum())
    low, high = _excess(total, freedom, 1 - _TAIL), _excess(max(total, freedom), freedom, _TAIL)
    value, low, high = (scale * math.sqrt(part) for part in (max(total - freedom, 0.0), low, high))
    return SizesEstimate(value, low, high, tuple(known), note)


def robustness(optima: Mapping[int, Optimum], *, error: float = 1.0) -> SizesEstimate:
    """Return kappa in ``price ~ size^kappa``, the price in nats of missing the optimum by a fixed error.

    The price is the mean of those of ``error`` octaves too much and too little. For kappa < 0 larger models forgive
    more, for kappa > 0 less. The line through ``log2 price`` against ``log2 size`` is weighted by the prices' own
    uncertainty; its interval comes from the valleys' draws, and grows where the prices scatter by more.

    Args:
        optima: optimum by size; those not bracketed are left out and named.
        error: in octaves (> 0); beyond 2 the fitted valleys are extrapolated.

    Returns:
        kappa; nan with a note where fewer than three sizes are bracketed.

    Raises:
        ValueError: the error is not positive.

    Examples:
        >>> from lightning_mup.analysis.optimum import find_optimum
        >>> def best(curvature):
        ...     xs = [-9, -8, -7, -6, -5]
        ...     return find_optimum(xs, [3 + curvature * (x + 7) ** 2 for x in xs], noise=1e-4)
        >>> kappa = robustness({64: best(0.08), 128: best(0.04), 256: best(0.02)})
        >>> kappa.low < -1 < kappa.high
        True

    Reference:
        Kalra & Barkeshli 2026 (arXiv:2605.21486), the exponent kappa; the formula is this package's.
    """
    if not 0 < error < math.inf:
        raise ValueError(f"error must be positive and finite, got {error!r}; 1 is a factor of two")
    known, note = _bracketed(optima)
    if len(known) < _ENOUGH:
        return _refused(tuple(known), note)
    log_price_SD = np.array([_log2_price(best, error, number) for number, best in enumerate(known.values())])
    middle = np.median(log_price_SD, axis=1)
    spread = np.diff(np.percentile(log_price_SD, (15.87, 84.13), axis=1), axis=0)[0] / 2
    weight = spread**-2
    slope_of = _slope_weights(known, weight)
    slope = float(slope_of @ middle)
    residual = middle - float(weight @ middle / weight.sum()) - slope * _centred(known, weight)
    below, above = np.quantile(slope_of @ log_price_SD, (_TAIL, 1 - _TAIL)).tolist()
    stretch = _stretch(float(weight @ np.square(residual)), len(known) - _LINE)
    return SizesEstimate(
        slope, slope - stretch * (slope - below), slope + stretch * (above - slope), tuple(known), note
    )


def asymptotic_penalty(
    lost: Mapping[int, float], *, noise: Mapping[int, float] | float, base: int | None = None
) -> SizesEstimate:
    """Return R(inf), the loss that is lost as size grows without bound.

    With a base, from which a value was transferred, ``lost(n) = R (1 - (n / base)^-b)^2``: the optimum approaches a
    limit as ``n^-b`` and the valley keeps its shape. Without one, ``lost(n) = R + A n^-b``, as for the difference of
    the best losses of two parametrizations. Each exponent b from 1/4 to 2 counts as much as the numbers support it.
    Where growth without limit explains them as well (b <= 0; 0 is growth with log n, a power law of the optimum), the
    interval has no end on that side; where it explains them better than any b > 0, the value is infinite.

    Args:
        lost: loss lost in nats by size; inf where what was transferred diverges, nan (left out) where it is unknown.
        noise: standard deviation of each (> 0), or one for all; sizes without one are left out.
        base: the size that loses nothing by construction; None where there is none.

    Returns:
        R(inf); nan with a note where fewer than three sizes are known, the base included.

    Raises:
        ValueError: a size, a noise or the base is not positive, or no size is above the base.

    Examples:
        >>> lost = {n: 0.04 * (1 - 64 / n) ** 2 for n in (64, 128, 256, 512, 1024)}
        >>> found = asymptotic_penalty(lost, noise=0.0005, base=64)
        >>> found.low < 0.04 < found.high
        True
        >>> asymptotic_penalty({n: 0.01 * math.log2(n / 64) ** 2 for n in lost}, noise=0.0005, base=64).value
        inf

    Reference:
        Kalra & Barkeshli 2026 (arXiv:2605.21486), the penalty R(inf); the formula is this package's.
    """
    errors = dict(noise) if isinstance(noise, Mapping) else dict.fromkeys(lost, noise)
    _check_penalty(lost, errors, base)
    if diverged := sorted(size for size, loss in lost.items() if loss == math.inf):
        return SizesEstimate(math.inf, math.inf, math.inf, tuple(sorted(lost)), f"diverges at {_listed(diverged)}")
    known = [
        n for n in sorted(lost) if n == base or (math.isfinite(lost[n]) and math.isfinite(errors.get(n, math.nan)))
    ]
    missing = [n for n in sorted(lost) if n not in known]
    note = f"no loss known, so left out: {_listed(missing)}" if missing else ""
    used = [n for n in known if n != base]
    if len(used) + (base is not None) < _ENOUGH:
        here = f"{len(used)} sizes{'' if base is None else ' beside the base'}"
        return SizesEstimate(
            math.nan, -math.inf, math.inf, tuple(known), "; ".join(filter(None, [f"too few: {here}", note]))
        )
    fits = _Fits.of(used, [lost[n] for n in used], [errors[n] for n in used], base)
    return fits.limit(tuple(known), note)


@dataclass(frozen=True, slots=True)
class _Fits:
    """Fits of ``R + A g`` or ``R g^2`` with one g per exponent, scaled so that g = 1 at the largest size."""

    mean_BK: Array
    root_BKK: Array  # a root of the coefficients' covariance
    misfit_B: Array  # chi squared
    reach_B: Array  # of g in the limit
    squared: bool
    freedom: int

    @classmethod
    def of(cls, sizes: list[int], lost: list[float], noise: list[float], base: int | None) -> _Fits:
        ratio = np.log(np.array(sizes) / (min(sizes) if base is None else base))
        exponent_B = np.concatenate([_GROWTH, _APPROACH])
        end_B = np.expm1(-exponent_B * ratio[-1])
        g_BP = np.expm1(-exponent_B[:, None] * ratio) / end_B[:, None]
        columns = np.square(g_BP)[..., None] if base is not None else np.stack([np.ones_like(g_BP), g_BP], axis=2)
        scaled_BPK, wanted = columns / np.array(noise)[:, None], np.array(lost) / np.array(noise)
        covariance = np.linalg.inv(scaled_BPK.transpose(0, 2, 1) @ scaled_BPK)
        mean_BK = np.einsum("bij,bpj,p->bi", covariance, scaled_BPK, wanted)
        return cls(
            mean_BK=mean_BK,
            root_BKK=np.linalg.cholesky(covariance),
            misfit_B=np.square(wanted - np.einsum("bpk,bk->bp", scaled_BPK, mean_BK)).sum(axis=1),
            reach_B=np.where(exponent_B > 0, -1 / end_B, math.inf),
            squared=base is not None,
            freedom=len(sizes) - mean_BK.shape[1] - 1,
        )

    def limit(self, sizes: tuple[int, ...], note: str) -> SizesEstimate:
        """Draw exponents and coefficients, and see where they lead; compare with growth that leads nowhere."""
        growth, approach = self.misfit_B[: len(_GROWTH)], self.misfit_B[len(_GROWTH) :]
        best = int(growth.argmin())
        least, unlimited = float(approach.min()), float(growth[best])
        scale = max(1.0, min(least, unlimited) / self.freedom) if self.freedom > 0 else 1.0
        volume = np.abs(np.linalg.det(self.root_BKK[len(_GROWTH) :]))
        weight = np.exp((least - approach) / (2 * scale)) * volume
        random = np.random.default_rng(0)
        at = len(_GROWTH) + random.choice(len(weight), _DRAWS, p=weight / weight.sum())
        wobble = np.einsum("dij,dj->di", self.root_BKK[at], random.standard_normal((_DRAWS, self.mean_BK.shape[1])))
        drawn_DK = self.mean_BK[at] + _stretch(min(least, unlimited), self.freedom) * wobble
        reach_D = self.reach_B[at]
        limits = drawn_DK[:, 0] * reach_D**2 if self.squared else drawn_DK[:, 0] + drawn_DK[:, 1] * reach_D
        low, value, high = np.quantile(limits, (_TAIL, 0.5, 1 - _TAIL)).tolist()
        change, error = float(self.mean_BK[best, -1]), float(np.linalg.norm(self.root_BKK[best, -1]))
        if abs(change) <= _NORMAL * error or unlimited >= least + scale * _NORMAL**2:
            return SizesEstimate(value, low, high, sizes, note)
        note = "; ".join(filter(None, [f"{'grows' if change > 0 else 'falls'} with size, no limit seen", note]))
        value = math.copysign(math.inf, change) if unlimited + scale * _NORMAL**2 < least else value
        low, high = (low, math.inf) if change > 0 else (-math.inf, high)
        return SizesEstimate(value, low, high, sizes, note)


# -- parts ------------------------------------------------------------------------------------------------------------


def _noise(at: AtSize) -> float:
    """Return the standard deviation of a loss lost: that of the fit, and what the best value's own error costs."""
    valley = at.optimum.valley
    own = math.nan if valley is None else at.optimum.loss * float(valley.excess(at.optimum.log2_value).mean())
    return math.hypot((at.lost_high - at.lost_low) / (2 * _NORMAL), own)


def _bracketed(optima: Mapping[int, Optimum]) -> tuple[dict[int, Optimum], str]:
    known = {size: best for size, best in sorted(optima.items()) if best.bracketed and best.valley is not None}
    missing = [size for size in sorted(optima) if size not in known]
    return known, f"not bracketed, so left out: {_listed(missing)}" if missing else ""


def _refused(sizes: tuple[int, ...], note: str) -> SizesEstimate:
    why = f"bracketed at {len(sizes)} sizes, which are too few: {_listed(sizes) or 'none'}"
    return SizesEstimate(math.nan, -math.inf, math.inf, sizes, "; ".join(filter(None, [why, note])))


def _centred(sizes: Mapping[int, Optimum], weight: Array) -> Array:
    x = np.log2(np.array(list(sizes), dtype=np.float64))
    return np.asarray(x - float(weight @ x / weight.sum()))


def _slope_weights(sizes: Mapping[int, Optimum], weight: Array) -> Array:
    """Return what the weighted line's slope takes from each value."""
    x = _centred(sizes, weight)
    return np.asarray(weight * x / float(weight @ np.square(x)))


def _excess(total: float, freedom: int, share: float) -> float:
    """Return the noncentrality for which chi-squared is below ``total`` with probability ``share``, or 0."""
    if chndtr(total, freedom, 0.0) <= share:
        return 0.0
    end = total + 10 * math.sqrt(total + freedom) + 20
    return float(brentq(lambda excess: chndtr(total, freedom, excess) - share, 0.0, end))


def _log2_price(best: Optimum, error: float, number: int) -> Array:
    """Return draws of log2 of the price of an error, shuffled: all valleys' draws share their random numbers."""
    assert best.valley is not None
    valley = replace(best.valley, centre=np.zeros_like(best.valley.centre))
    rise = (np.expm1(valley.excess(error)) + np.expm1(valley.excess(-error))) / 2
    log_price = np.log2(np.maximum(rise, 1e-300)) + valley.floor / math.log(2)
    return np.asarray(np.random.default_rng(number).permutation(log_price))


def _stretch(misfit: float, freedom: int) -> float:
    """Return what widens an interval where numbers scatter by more than their own uncertainty says."""
    chi = math.sqrt(misfit / freedom) if freedom > 0 else 0.0
    return chi * float(stdtrit(freedom, 1 - _TAIL)) / _NORMAL if chi > 1 else 1.0


def _check_penalty(lost: Mapping[int, float], noise: Mapping[int, float], base: int | None) -> None:
    if bad := [n for n in (*lost, *([] if base is None else [base])) if n <= 0]:
        raise ValueError(f"sizes must be positive, got {bad[0]!r}")
    if wrong := [n for n in lost if n != base and noise.get(n, 1.0) <= 0]:
        raise ValueError(f"noise must be positive, got {noise[wrong[0]]!r} at {wrong[0]}; 0.002 of the loss is usual")
    if base is not None and lost and max(lost) < base:
        raise ValueError(f"no size is above base={base}, got {_listed(sorted(lost))}; a limit needs larger ones")


def _listed(sizes: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, sizes))
