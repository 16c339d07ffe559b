"""Sums of power laws fitted to losses, many problems at once: the engine of the scaling laws.

Shapes: N points, T power-law terms, P = 1 + 2T parameters, K problems (starts or resamples).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
DELTA = 1e-3
"""Where the Huber loss turns from square to straight, in log loss: the value of arXiv:2203.15556."""
EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
"""Exponents from which fits start."""
LOWEST, HIGHEST = 1e-3, 10.0
"""Limits of the exponents."""
DRAWS = 1000
RESAMPLING = "fits to points with exponential weights (Bayesian bootstrap), stretched about the fit for small samples"
_NO_FLOOR = 9.0  # E is at least exp(-9), about 1e-4, of the smallest loss
_CHUNK = 48  # problems in one block, so that a block stays in the processor's cache
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-9, 1e9
_STEPS, _POLISH_STEPS, _POLISHED = 40, 500, 4  # all starts go some way, the best few to the end
_EXACT, _CLOSE = 1e-10, 1e-6  # a step's gain, as a fraction of the objective, that ends a fit and a resample's fit
_AGREES = 1e-3  # a start whose objective is this fraction above the lowest one's found the same optimum
_LEAST_DRAWS = 100
_LARGEST_LOG = 300.0  # of a term, so that sums and squares stay numbers
_NOTHING = 1e-12  # objectives below this are those of exact numbers
_SMALLEST_SHARE = 1e-3  # of the smallest loss, for a term that a start's linear solution makes negative


@dataclass(frozen=True, eq=False)
class Terms:
    """Points of ``log L = log(exp(e) + sum_t on_t exp(p_t - c_t x_t))``, with parameters ``(e, p_1.., log c_1..)``.

    Args:
        x_TN: log of the size that term t falls with, less its mean.
        on_TN: 1 where a point's loss has the term, 0 where not.
        y_N: log loss.
    """

    x_TN: Array
    on_TN: Array
    y_N: Array

    @property
    def parameters(self) -> int:
        """P, the number of parameters."""
        return 1 + 2 * len(self.x_TN)

    def log_loss(self, theta_KP: Array) -> Array:
        """Return the fitted log losses, ``[K, N]``."""
        return np.asarray(np.log(np.exp(theta_KP[:, :1]) + self._parts(theta_KP).sum(axis=1)))

    def slopes(self, theta_KP: Array) -> tuple[Array, Array]:
        """Return the fitted log losses, ``[K, N]``, and their derivatives by the parameters, ``[K, P, N]``."""
        count = len(self.x_TN)
        parts_KTN = self._parts(theta_KP)
        floor_K1 = np.exp(theta_KP[:, :1])
        loss_KN = floor_K1 + parts_KTN.sum(axis=1)
        slopes_KPN = np.empty((len(theta_KP), self.parameters, len(self.y_N)))
        slopes_KPN[:, 0] = floor_K1 / loss_KN
        for t in range(count):
            slopes_KPN[:, 1 + t] = parts_KTN[:, t] / loss_KN
            rate_K1 = np.exp(theta_KP[:, 1 + count + t, None])
            slopes_KPN[:, 1 + count + t] = -rate_K1 * self.x_TN[t] * slopes_KPN[:, 1 + t]
        return np.log(loss_KN), slopes_KPN

    def starts(self) -> Array:
        """Return starting values, ``[K, P]``: E and the terms by least squares of relative errors, given exponents.

        Two terms of one point start from every pair of :data:`EXPONENTS`, terms of different points from equal ones.
        """
        count = len(self.x_TN)
        shared = bool((self.on_TN.sum(axis=0) > 1).any())
        grid = itertools.product(EXPONENTS, repeat=count) if shared else ((c,) * count for c in EXPONENTS)
        c_KT = np.array(list(grid))
        loss_N = np.exp(self.y_N)
        columns_KNP = np.ones((len(c_KT), len(loss_N), 1 + count))
        columns_KNP[..., 1:] = self.on_TN.T * np.exp(-c_KT[:, None, :] * self.x_TN.T)
        columns_KNP /= loss_N[:, None]
        square_KPP = columns_KNP.transpose(0, 2, 1) @ columns_KNP
        square_KPP += 1e-9 * np.trace(square_KPP, axis1=1, axis2=2)[:, None, None] * np.eye(1 + count)
        sizes_KP = np.linalg.solve(square_KPP, columns_KNP.sum(axis=1)[..., None])[..., 0]
        sizes_KP = np.maximum(sizes_KP, _SMALLEST_SHARE * loss_N.min())
        return np.concatenate([np.log(sizes_KP), np.log(c_KT)], axis=1)

    def clip(self, theta_KP: Array) -> Array:
        """Return parameters within their limits."""
        count = len(self.x_TN)
        low, high = np.full(self.parameters, -50.0), np.full(self.parameters, 50.0)
        low[0] = self.y_N.min() - _NO_FLOOR
        low[1 + count :], high[1 + count :] = np.log(LOWEST), np.log(HIGHEST)
        return np.clip(theta_KP, low, high)

    def _parts(self, theta_KP: Array) -> Array:
        count = len(self.x_TN)
        p_KT1, c_KT1 = theta_KP[:, 1 : 1 + count, None], np.exp(theta_KP[:, 1 + count :, None])
        return np.asarray(self.on_TN * np.exp(np.minimum(p_KT1 - c_KT1 * self.x_TN, _LARGEST_LOG)))


@dataclass(frozen=True, eq=False)
class Fit:
    """The optimum over all starts, and the resamples about it.

    Args:
        terms: the points.
        draws_BP: E, the log scales and the exponents: first the optimum, then the resamples.
        residuals_N: log loss less its fit.
        objective: Huber's loss, summed over the points.
        delta: where it turns straight.
        starts: number of starts.
        agreeing: share of them that ended in the optimum.
    """

    terms: Terms
    draws_BP: Array
    residuals_N: Array
    objective: float
    delta: float
    starts: int
    agreeing: float

    @property
    def least(self) -> float:
        """The smallest E that the search allows."""
        return float(np.exp(self.terms.y_N.min() - _NO_FLOOR))


def fit_terms(terms: Terms, centre_T: Array, *, delta: float, draws: int) -> Fit:
    """Fit from every start, then fit resamples from the optimum.

    A resample gives each point a weight of the standard exponential distribution, so that even few points stay enough.
    Its departure from the optimum, in (log E, p, log c), is multiplied by :func:`stretch`.

    Args:
        terms: the points, with centred sizes.
        centre_T: means that were taken off the log sizes.
        delta: where Huber's loss turns straight (> 0).
        draws: resamples (>= 100).

    Raises:
        ValueError: delta or draws is out of range.
    """
    if not (delta > 0 and draws >= _LEAST_DRAWS):
        raise ValueError(
            f"delta must be positive and draws >= {_LEAST_DRAWS}, got {delta!r} and {draws!r}; "
            f"{DELTA:g} and {DRAWS} are usual"
        )
    starts_SP = terms.starts()
    ones = np.ones((len(starts_SP), len(terms.y_N)))
    ends_SP, objective_S = descend(terms, starts_SP, ones, delta=delta, steps=_STEPS, tolerance=_CLOSE)
    lead = objective_S.argsort()[:_POLISHED]
    lead_SP, lead_S = descend(terms, ends_SP[lead], ones[lead], delta=delta, steps=_POLISH_STEPS, tolerance=_EXACT)
    best_1P, lowest = lead_SP[[lead_S.argmin()]], float(lead_S.min())
    random = np.random.default_rng(0)
    weight_BN = random.standard_exponential((draws, len(terms.y_N)))
    from_best = np.repeat(best_1P, draws, axis=0)
    drawn_BP, _ = descend(terms, from_best, weight_BN, delta=delta, steps=_STEPS, tolerance=_CLOSE)
    factor_B = stretch(len(terms.y_N), terms.parameters, draws, random)
    theta_BP = np.concatenate([best_1P, terms.clip(best_1P + (drawn_BP - best_1P) * factor_B[:, None])])
    count = len(terms.x_TN)
    exponents = np.exp(theta_BP[:, 1 + count :])
    scales = centre_T + theta_BP[:, 1 : 1 + count] / exponents
    return Fit(
        terms=terms,
        draws_BP=np.concatenate([np.exp(theta_BP[:, :1]), scales, exponents], axis=1),
        residuals_N=terms.y_N - terms.log_loss(best_1P)[0],
        objective=lowest,
        delta=delta,
        starts=len(starts_SP),
        agreeing=float((objective_S <= lowest * (1 + _AGREES) + _NOTHING).mean()),
    )


def stretch(points: int, parameters: int, draws: int, random: np.random.Generator) -> Array:
    """Return factors ``sqrt(N / (N - P)) sqrt(f / chi^2_f)``, f = N - P, that make resamples as wide as Student's t.

    Examples:
        >>> random = np.random.default_rng(0)
        >>> [round(float(stretch(n, 5, 10000, random).std()), 2) for n in (20, 300)]
        [0.24, 0.04]
    """
    freedom = points - parameters
    return np.asarray(np.sqrt(points / random.chisquare(freedom, draws)))


def huber(r: Array, delta: float) -> Array:
    """Return Huber's loss: ``r^2 / 2`` up to delta, then ``delta (|r| - delta / 2)``.

    Examples:
        >>> huber(np.array([0.5, -3.0]), 1.0).tolist()
        [0.125, 2.5]
    """
    size = np.abs(r)
    inside = np.minimum(size, delta)
    return np.asarray(inside * (size - inside / 2))


def descend(
    terms: Terms, theta_KP: Array, weight_KN: Array, *, delta: float, steps: int, tolerance: float
) -> tuple[Array, Array]:
    """Minimize ``sum_n w_n huber(fitted_n - y_n)`` for K problems by Levenberg-Marquardt steps with Huber's weights.

    Args:
        terms: the points.
        theta_KP: where to start.
        weight_KN: weight of each point in each problem (>= 0).
        delta: where Huber's loss turns straight (> 0).
        steps: largest number of steps.
        tolerance: a problem is done once a step lowers its objective by less than this fraction.

    Returns:
        Parameters ``[K, P]`` and objectives ``[K]``.
    """
    blocks = [
        _descend(terms, theta_KP[at : at + _CHUNK], weight_KN[at : at + _CHUNK], (delta, tolerance), steps)
        for at in range(0, len(theta_KP), _CHUNK)
    ]
    return np.concatenate([theta for theta, _ in blocks]), np.concatenate([objective for _, objective in blocks])


def _descend(
    terms: Terms, theta_KP: Array, weight_KN: Array, limits: tuple[float, float], steps: int
) -> tuple[Array, Array]:
    delta, tolerance = limits
    theta_KP = terms.clip(theta_KP)
    fitted, slopes = terms.slopes(theta_KP)
    objective = (weight_KN * huber(fitted - terms.y_N, delta)).sum(axis=1)
    damping, live = np.full(len(theta_KP), _FIRST_DAMPING), np.arange(len(theta_KP))
    for _ in range(steps):
        r = fitted - terms.y_N
        pull = weight_KN[live] / np.maximum(np.abs(r) / delta, 1.0)
        tilted = slopes * pull[:, None]
        square = tilted @ slopes.transpose(0, 2, 1)
        diagonal = np.einsum("kpp->kp", square)
        damp = damping[live, None] * np.maximum(diagonal, 1e-12 * diagonal.max(axis=1, keepdims=True)) + 1e-300
        np.einsum("kpp->kp", square)[...] += damp
        step = np.linalg.solve(square, (tilted @ r[..., None]))[..., 0]
        trial = terms.clip(theta_KP[live] - step)
        new_fitted, new_slopes = terms.slopes(trial)
        new = (weight_KN[live] * huber(new_fitted - terms.y_N, delta)).sum(axis=1)
        better = new <= objective[live]
        gain = objective[live] - new
        damping[live] = np.clip(damping[live] * np.where(better, 0.1, 10.0), _LEAST_DAMPING, _MOST_DAMPING)
        done = np.where(better, gain <= tolerance * objective[live], damping[live] >= _MOST_DAMPING)
        theta_KP[live[better]], objective[live[better]] = trial[better], new[better]
        fitted[better], slopes[better] = new_fitted[better], new_slopes[better]
        live, fitted, slopes = live[~done], fitted[~done], slopes[~done]
        if not len(live):
            break
    return theta_KP, objective
