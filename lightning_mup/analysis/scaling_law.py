"""Scaling laws: how the loss falls with parameters, tokens or compute, and what a planned run will reach.

Shapes: N points, T power-law terms, P = 1 + 2T parameters, B bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_mup.analysis.estimate import Estimate
from lightning_mup.analysis.optimum import CONFIDENCE
from lightning_mup.analysis.power_terms import (
    DELTA,
    DRAWS,
    EXPONENTS,
    HIGHEST,
    LOWEST,
    RESAMPLING,
    Array,
    Fit,
    Terms,
    fit_terms,
    stretch,
)
from lightning_mup.analysis.runs import listed
from lightning_mup.analysis.scaling_points import Points, check_independent, check_varied, clean
from lightning_mup.core.registry import near

_NAMES = {"params": ("N0", "a", "A"), "tokens": ("D0", "b", "B"), "flops": ("C0", "c", "")}  # scale, exponent, scale^a
_TAILS = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))  # percent
_NEAR = 1.05  # within this factor of a limit of the search
_FEW = 0.05  # share of the starts
_ENOUGH = 2  # runs per parameter
_LARGEST_LOG = 700.0  # exp of more is no number


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a law was fitted; what :func:`~lightning_mup.analysis.forecast.export` writes of the checklist by itself.

    Args:
        points: number of points fitted.
        left_out: what was left out, and why, one line each.
        parameters: number of parameters fitted.
        start: starting values.
        agreeing: share of the starts that ended in the optimum.
        objective: what was minimized.
        reached: its value at the optimum, per point.
        optimizer: how.
        intervals: where the intervals come from.
        noise: standard deviation of one run's log loss about the law.
    """

    points: int
    left_out: tuple[str, ...]
    parameters: int
    start: str
    agreeing: float
    objective: str
    reached: float
    optimizer: str
    intervals: str
    noise: float


@dataclass(frozen=True, slots=True, eq=False)
class ScalingLaw:
    """A fitted law ``L = E + sum_t (x_t / X_t)^-c_t``, with intervals.

    Args:
        form: the law in words.
        sizes: names of the x_t, in order: ``("params", "tokens")`` or ``("flops",)``.
        estimates: every parameter by name.
        fitting: how it was fitted.
        largest: largest value fitted of each of the sizes.
        notes: what is unusual.
        table: the points fitted: each of the sizes, and ``"loss"``.
        draws: ``[B + 1, P]``: E, the log X_t, the c_t: first the fit, then the bootstrap's draws.
        residuals: ``[N]``, log loss less its fit.
    """

    form: str
    sizes: tuple[str, ...]
    estimates: Mapping[str, Estimate]
    fitting: Fitting
    largest: tuple[float, ...]
    notes: tuple[str, ...]
    table: Mapping[str, tuple[float, ...]] = field(repr=False)
    draws: Array = field(repr=False)
    residuals: Array = field(repr=False)

    def loss_at(self, *sizes: float) -> Estimate:
        """Return the mean loss of runs of a size, with the interval of the law's parameters.

        Args:
            sizes: parameters and tokens, or FLOPs (> 0), in the order of the field ``sizes``.

        Raises:
            ValueError: there are more or fewer numbers than the law has sizes, or one is not positive.
        """
        return estimate(np.exp(self._log_losses(sizes)))

    def loss_of_run(self, *sizes: float) -> Estimate:
        """Return the loss of one run of a size, with the interval of the law's parameters and one run's noise.

        The noise is that of the residuals, stretched by ``sqrt(N / (N - P))`` and by Student's factor, for they are
        smaller and fewer than the noise. That the law holds beyond the largest run is taken for granted.

        Args:
            sizes: parameters and tokens, or FLOPs (> 0), in the order of the field ``sizes``.

        Raises:
            ValueError: there are more or fewer numbers than the law has sizes, or one is not positive.
        """
        means = self._log_losses(sizes)
        random = np.random.default_rng(1)
        noise = random.choice(self.residuals, len(means) - 1) * stretch(
            self.fitting.points, self.fitting.parameters, len(means) - 1, random
        )
        return estimate(np.exp(means + np.concatenate([[0.0], noise])))

    def _log_losses(self, sizes: Sequence[float]) -> Array:
        if len(sizes) != len(self.sizes) or not all(math.isfinite(x) and x > 0 for x in sizes):
            raise ValueError(f"give positive {' and '.join(self.sizes)}, got {listed(sizes) or 'nothing'}")
        count = len(sizes)
        scale, exponent = self.draws[:, 1 : 1 + count], self.draws[:, 1 + count :]
        return np.asarray(np.log(self.draws[:, 0] + np.exp(-exponent * (np.log(sizes) - scale)).sum(axis=1)))

    def __str__(self) -> str:
        """Print the form and the parameters."""
        return f"{self.form}: " + ", ".join(f"{name} = {value}" for name, value in self.estimates.items())


@dataclass(frozen=True, slots=True)
class JointLaw:
    """Laws ``L = E + (C/C0)^-c`` that share E.

    Args:
        irreducible: E.
        laws: one law by label; their draws belong together, so what is computed of two has an interval too.
    """

    irreducible: Estimate
    laws: Mapping[str, ScalingLaw]


def fit_loss(
    params: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    leave_out: Mapping[int, str] | None = None,
    delta: float = DELTA,
    draws: int = DRAWS,
) -> ScalingLaw:
    """Fit ``L = E + (N/N0)^-a + (D/D0)^-b`` by Huber's loss of the log loss, with bootstrap intervals.

    Measured, 300 trials each of four sets of 300 runs (three laws, noise of 0.5% and 1%), the intervals cover E in
    95% to 97%, a in 93% to 94%, b in 94% to 97%, the loss of 10 times the FLOPs in 95% to 98% and that of one such run
    in 95% to 97%. With 15 runs it is 93% to 97% (60 trials); with 8, 83% to 92% (100 trials), which is too little.

    Args:
        params: parameters N of each run (> 0).
        tokens: tokens D of each run (> 0).
        losses: each run's loss (> 0); a run whose loss is inf or nan is left out, and named.
        leave_out: why a run is to be left out, by its position.
        delta: log loss at which the objective turns from square to straight (> 0).
        draws: bootstrap draws (>= 100).

    Raises:
        ValueError: the lists differ in length, a number is out of range, there are fewer than six points, all losses
            are equal, or params or tokens do not vary enough, or not independently, to tell the exponents.

    Examples:
        >>> sizes = [(n, d) for n in (1e7, 3e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)]
        >>> n, d = zip(*sizes)
        >>> law = fit_loss(n, d, [1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28 for n, d in sizes])
        >>> round(law.estimates["E"].value, 3), round(law.estimates["a"].value, 3)
        (1.69, 0.34)

    Reference:
        arXiv:2203.15556, approach 3; arXiv:2404.10102 on intervals that are too short.
    """
    points = clean({"params": params, "tokens": tokens}, losses, leave_out or {})
    check_varied(points, parameters=5)
    check_independent(points)
    x_TN = np.log(np.stack([points.table["params"], points.table["tokens"]]))
    terms, centre_T = _terms(x_TN, np.ones_like(x_TN), points.table["loss"])
    fit = fit_terms(terms, centre_T, delta=delta, draws=draws)
    return _law("L = E + (N/N0)^-a + (D/D0)^-b", ("params", "tokens"), fit, points, (0, 1))


def fit_compute(
    flops: Sequence[float],
    losses: Sequence[float],
    *,
    leave_out: Mapping[int, str] | None = None,
    delta: float = DELTA,
    draws: int = DRAWS,
) -> ScalingLaw:
    """Fit ``L = E + (C/C0)^-c`` by Huber's loss of the log loss, with bootstrap intervals.

    Args:
        flops: FLOPs C of each run (> 0).
        losses: each run's loss (> 0); a run whose loss is inf or nan is left out, and named.
        leave_out: why a run is to be left out, by its position.
        delta: log loss at which the objective turns from square to straight (> 0).
        draws: bootstrap draws (>= 100).

    Raises:
        ValueError: the lists differ in length, a number is out of range, there are fewer than four points, all losses
            are equal, or there are fewer than three different FLOPs.

    Examples:
        >>> c = [1e18, 1e19, 1e20, 1e21, 1e22]
        >>> law = fit_compute(c, [1.7 + (x / 1e19) ** -0.15 for x in c])
        >>> round(law.estimates["E"].value, 3), round(law.loss_at(1e23).value, 3)
        (1.7, 1.951)

    Reference:
        arXiv:2203.15556, approach 3, for the objective; arXiv:2404.10102 on intervals that are too short.
    """
    return fit_joint({"": (flops, losses)}, leave_out={"": leave_out or {}}, delta=delta, draws=draws).laws[""]


def fit_joint(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    leave_out: Mapping[str, Mapping[int, str]] | None = None,
    delta: float = DELTA,
    draws: int = DRAWS,
) -> JointLaw:
    """Fit ``L = E + (C/C0)^-c`` to several methods' runs on the same data: one E, and C0 and c of each.

    Measured for three methods of 20 runs (150 trials) and 100 runs (80 trials), noise of 0.3%: the intervals cover E,
    the exponents and the loss at 10 times the FLOPs in 94% to 99%; for one method alone in 92% to 98%.

    Args:
        runs: FLOPs and losses of each method's runs, by label; see :func:`fit_compute`.
        leave_out: why a run is to be left out, by label and position.
        delta: log loss at which the objective turns from square to straight (> 0).
        draws: bootstrap draws (>= 100).

    Raises:
        ValueError: there is no label, a label of ``leave_out`` is unknown, or a method's runs are not enough.

    Examples:
        >>> c = [1e18, 1e19, 1e20, 1e21]
        >>> both = {"muon": [1.7 + (x / 1e19) ** -0.15 for x in c], "adamw": [1.7 + (x / 2e19) ** -0.15 for x in c]}
        >>> joint = fit_joint({label: (c, losses) for label, losses in both.items()})
        >>> round(joint.irreducible.value, 3), round(joint.laws["adamw"].estimates["C0"].value / 1e19, 2)
        (1.7, 2.0)

    Reference:
        arXiv:2203.15556, approach 3, for the objective.
    """
    excused = leave_out or {}
    if not runs or (unknown := sorted(excused.keys() - runs.keys())):
        what = f"leave_out names {unknown[0]!r}{near(unknown[0], runs)}" if runs else f"got {runs!r}"
        raise ValueError(f"give runs of at least one label, and leave out runs of these alone; {what}")
    points = {
        label: clean({"flops": flops}, losses, excused.get(label, {}), label) for label, (flops, losses) in runs.items()
    }
    parameters = 1 + 2 * len(points)
    for group in points.values():
        check_varied(group, parameters=3 if len(points) == 1 else 2)  # E is shared
    on_TN = np.repeat(np.eye(len(points)), [group.count for group in points.values()], axis=1)
    log_N = np.log(np.concatenate([group.table["flops"] for group in points.values()]))
    losses_N = np.concatenate([group.table["loss"] for group in points.values()])
    terms, centre_T = _terms(log_N * on_TN, on_TN, losses_N)
    fit = fit_terms(terms, centre_T, delta=delta, draws=draws)
    shared = f", one E for {', '.join(points)}" if parameters > 3 else ""
    laws = {
        label: _law(f"L = E + (C/C0)^-c{shared}", ("flops",), fit, group, (t,))
        for t, (label, group) in enumerate(points.items())
    }
    return JointLaw(estimate(fit.draws_BP[:, 0]), laws)


def estimate(draws: Array) -> Estimate:
    """Return the first number with the interval that holds 95% of the others.

    Examples:
        >>> print(estimate(np.array([5.0, *range(101)])))
        5 [2.5, 97.5]
    """
    low, high = np.percentile(draws[1:], _TAILS).tolist()
    return Estimate(float(draws[0]), low, high)


def _terms(x_TN: Array, on_TN: Array, losses_N: Array) -> tuple[Terms, Array]:
    """Return the points with centred sizes, and the centres."""
    centre_T = np.asarray(x_TN.sum(axis=1) / on_TN.sum(axis=1))
    return Terms((x_TN - centre_T[:, None]) * on_TN, on_TN, np.log(losses_N)), centre_T


def _law(form: str, sizes: tuple[str, ...], fit: Fit, points: Points, terms: tuple[int, ...]) -> ScalingLaw:
    total = len(fit.terms.x_TN)
    own = fit.draws_BP[:, [0, *(1 + t for t in terms), *(1 + total + t for t in terms)]]
    at = fit.terms.on_TN[terms[0]] > 0
    return ScalingLaw(
        form=form,
        sizes=sizes,
        estimates=_estimates(own, sizes),
        fitting=_fitting(fit, points),
        largest=tuple(float(points.table[name].max()) for name in sizes),
        notes=_notes(fit, own, sizes),
        table={name: tuple(column.tolist()) for name, column in points.table.items()},
        draws=own,
        residuals=fit.residuals_N[at],
    )


def _estimates(draws: Array, sizes: tuple[str, ...]) -> dict[str, Estimate]:
    found = {"E": estimate(draws[:, 0])}
    for t, name in enumerate(sizes):
        scale, exponent, factor = _NAMES[name]
        log_scale, c = draws[:, 1 + t], draws[:, 1 + len(sizes) + t]
        found |= {scale: estimate(_exp(log_scale)), exponent: estimate(c)}
        found |= {factor: estimate(_exp(c * log_scale))} if factor else {}
    return found


def _exp(logs: Array) -> Array:
    return np.asarray(np.exp(np.clip(logs, -_LARGEST_LOG, _LARGEST_LOG)))


def _fitting(fit: Fit, points: Points) -> Fitting:
    count, parameters = len(fit.terms.y_N), fit.terms.parameters
    return Fitting(
        points=count,
        left_out=points.left_out,
        parameters=parameters,
        start=f"{fit.starts} starts: exponents from {listed(EXPONENTS, 20)}, E and the terms by least squares of "
        "relative errors given these; each resample from the optimum",
        agreeing=fit.agreeing,
        objective=f"Huber's loss of the log loss, delta {fit.delta:g}, summed over the points",
        reached=fit.objective / count,
        optimizer=f"Levenberg-Marquardt with Huber's weights and exact derivatives, exponents within {LOWEST:g} and "
        f"{HIGHEST:g}",
        intervals=f"{100 * CONFIDENCE:g}%, percentiles of {len(fit.draws_BP) - 1} {RESAMPLING}",
        noise=float(np.sqrt(np.square(fit.residuals_N).sum() / (count - parameters))),
    )


def _notes(fit: Fit, own: Array, sizes: tuple[str, ...]) -> tuple[str, ...]:
    low, high = np.percentile(own, _TAILS, axis=0)
    count, parameters = len(fit.terms.y_N), fit.terms.parameters
    notes = []
    if count < _ENOUGH * parameters:
        notes.append(f"{count} runs for {parameters} parameters are few: the 95% intervals cover less than they say")
    if low[0] <= _NEAR * fit.least:
        notes.append("E is not told from 0: the runs do not reach far enough to show where the loss ends")
    for t, name in enumerate(sizes):
        at = 1 + len(sizes) + t
        if low[at] <= _NEAR * LOWEST or high[at] >= HIGHEST / _NEAR:
            notes.append(f"{_NAMES[name][1]} is not bounded by the runs: its interval reaches the limit of the search")
    if fit.agreeing < _FEW:
        notes.append(f"only {fit.agreeing:.0%} of the starts found this optimum; there may be a lower one")
    return tuple(notes)
