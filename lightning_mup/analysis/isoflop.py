"""How a FLOP budget is best split between parameters and tokens: from runs of equal FLOPs, and from a fitted law.

Shapes: K budgets, N runs of one budget, Q pairs of exponents, B draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_mup.analysis.estimate import Estimate
from lightning_mup.analysis.optimum import CONFIDENCE
from lightning_mup.analysis.power_terms import Array
from lightning_mup.analysis.scaling_law import Fitting, ScalingLaw, estimate
from lightning_mup.analysis.scaling_points import Points, clean, distinct

_DRAWS = 2000
_PARAMETERS = 3  # of a valley, and the fewest sizes that show one
_EXPONENTS = (
    0.15,
    0.25,
    0.35,
    0.5,
    0.7,
)  # how loss may fall with params and with tokens; their pairs are averaged over
_UNKNOWN = Estimate(math.nan, -math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Allocation:
    """The split of a budget that reaches the lowest loss.

    Args:
        flops: the budget C.
        params: parameters N.
        tokens: tokens D.
        tokens_per_param: D / N.
    """

    flops: float
    params: Estimate
    tokens: Estimate
    tokens_per_param: Estimate

    def __str__(self) -> str:
        """Print the three numbers."""
        return f"{self.params} params, {self.tokens} tokens, {self.tokens_per_param} tokens per parameter"


@dataclass(frozen=True, slots=True)
class Budget:
    """What the runs of one FLOP budget say.

    Args:
        flops: geometric mean of the runs' FLOPs.
        params: the best number of parameters; its value is nan and its ends are infinite where nothing tells.
        tokens: the tokens of that size at this budget.
        loss: the fitted loss there; nan where none was fitted.
        bracketed: whether the runs enclose the interval.
        add: numbers of parameters to run next at this budget, so that they do; empty where they do.
        sizes: the numbers of parameters that were run.
        note: what is unusual, ``""`` where nothing is.
    """

    flops: float
    params: Estimate
    tokens: Estimate
    loss: float
    bracketed: bool
    add: tuple[float, ...]
    sizes: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class IsoFlop:
    """The best split by budget, and the power laws ``N ~ C^p``, ``D ~ C^q`` through those that are bracketed.

    Args:
        budgets: one per budget, smallest first.
        params_exponent: p; nan with infinite ends where fewer than two budgets are bracketed.
        tokens_exponent: q, likewise.
        fitting: how the valleys were fitted, and which runs were left out.
        notes: what is unusual, and which runs to add.
        table: the runs that were used: flops, params, tokens and loss.
        lines: draws of log N and log D: their values at ``centre`` and their slopes, ``[B + 1, 4]``, first the fit.
        centre: log of the FLOPs there.
    """

    budgets: tuple[Budget, ...]
    params_exponent: Estimate
    tokens_exponent: Estimate
    fitting: Fitting
    notes: tuple[str, ...]
    table: Mapping[str, tuple[float, ...]] = field(repr=False)
    lines: Array | None = field(repr=False, compare=False)
    centre: float = field(repr=False, compare=False)

    def at(self, flops: float) -> Allocation:
        """Return the best split of a budget by the power laws.

        Args:
            flops: the budget (> 0).

        Raises:
            ValueError: there are no power laws, or flops is not positive.
        """
        if self.lines is None or not (math.isfinite(flops) and flops > 0):
            raise ValueError(
                f"a power law needs two budgets that bracket their optimum, and positive flops; got {flops!r} and "
                f"{sum(b.bracketed for b in self.budgets)} such budgets; {'; '.join(self.notes) or 'give flops > 0'}"
            )
        reach = math.log(flops) - self.centre
        log_n, log_d = (self.lines[:, i] + self.lines[:, 2 + i] * reach for i in (0, 1))
        return _allocation(flops, log_n, log_d)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of one budget: log params less their mean, losses in units of their mean, and log tokens as a line."""

    flops: float
    log_n: Array
    centre: float
    unit: float
    y: Array
    token_slope: float
    token_level: float
    sizes: tuple[float, ...]


def fit_isoflop(
    flops: Sequence[float],
    params: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    same: float = 0.02,
    noise: float = 0.002,
    trust: float = 4.0,
    leave_out: Mapping[int, str] | None = None,
) -> IsoFlop:
    """Find each budget's best size, and the power laws through them.

    At one budget the loss is a valley in log N. A parabola is biased where the grid is wide or off the centre, so the
    valley is ``L = E + A N^-a + B' N^b``, which is what a law of parameters and tokens gives at ``D ~ 1 / N``: E, A and
    B' by least squares for each budget, a and b averaged over pairs, which all budgets share, by how well they fit
    (Student's t). The noise is that of all budgets' misfit, and what is stated beside.

    Measured, 200 trials for each noise of 0.1% to 0.4% (5 budgets of 7 sizes): the intervals cover the optimum, p, q
    and the split at 100 times the largest budget in 95% to 98%.

    Args:
        flops: FLOPs of each run (> 0), counted in one way.
        params: its parameters (> 0).
        tokens: its tokens (> 0).
        losses: its loss (> 0); a run whose loss is inf or nan is left out, and named.
        same: largest fraction by which the FLOPs of runs of one budget differ (> 0).
        noise: standard deviation between seeds to expect, as a fraction of the loss (> 0).
        trust: how many runs' worth that expectation counts (> 0).
        leave_out: why a run is to be left out, by its position.

    Raises:
        ValueError: the lists differ in length, a number is out of range, no run is left, or tokens do not fall as
            params grow at equal FLOPs.

    Examples:
        >>> runs = [(c, n, c / 6 / n) for c in (1e19, 1e20, 1e21) for n in np.geomspace(0.2, 5, 7) * (c / 120) ** 0.5]
        >>> c, n, d = zip(*runs)
        >>> iso = fit_isoflop(c, n, d, [1.7 + (n / 1e7) ** -0.3 + (d / 2e8) ** -0.3 for _, n, d in runs])
        >>> round(iso.params_exponent.value, 2), round(iso.at(1e22).tokens_per_param.value)
        (0.5, 20)

    Reference:
        arXiv:2203.15556, approach 2; arXiv:2603.22339 on the parabola's bias.
    """
    if not (same > 0 and noise > 0 and trust > 0):
        raise ValueError(f"same, noise and trust must be positive, got {same!r}, {noise!r} and {trust!r}")
    points = clean({"flops": flops, "params": params, "tokens": tokens}, losses, leave_out or {})
    if not points.count:
        raise ValueError(f"none of the {len(losses)} runs can be fitted: {'; '.join(points.left_out) or 'no runs'}")
    groups = _by_budget(points.table, same)
    fitted = [group for group in groups if len(group.sizes) >= _PARAMETERS]
    drawn, spread = _valleys(fitted, noise, trust) if fitted else ({}, noise)
    budgets = [_budget(group, drawn.get(group.flops)) for group in groups]
    notes = tuple(f"at {b.flops:.3g} FLOPs: {b.note}" for b in budgets if b.note)
    good = [(group, drawn[group.flops][:, 0]) for group, b in zip(groups, budgets, strict=True) if b.bracketed]
    if len(good) < 2:
        notes += (f"{len(good)} of {len(groups)} budgets bracket their optimum, a power law needs two",)
    lines, centre = _lines(good) if len(good) > 1 else (None, math.nan)
    return IsoFlop(
        budgets=tuple(budgets),
        params_exponent=_UNKNOWN if lines is None else estimate(lines[:, 2]),
        tokens_exponent=_UNKNOWN if lines is None else estimate(lines[:, 3]),
        fitting=_fitting(points, len(fitted), spread, f"stated noise {noise:g}, counted as {trust:g} runs"),
        notes=notes,
        table={name: tuple(values.tolist()) for name, values in points.table.items()},
        lines=lines,
        centre=centre,
    )


def compute_optimal(law: ScalingLaw, flops: float, *, flops_per_param_token: float = 6.0) -> Allocation:
    """Return the split of a budget that a law of parameters and tokens gives: ``a (N/N0)^-a = b (D/D0)^-b``.

    Args:
        law: result of :func:`~lightning_mup.analysis.scaling_law.fit_loss`.
        flops: the budget C (> 0).
        flops_per_param_token: k of ``C = k N D`` (> 0).

    Raises:
        ValueError: the law is of something else, or a number is not positive.

    Examples:
        >>> from lightning_mup.analysis.scaling_law import fit_loss
        >>> n, d = zip(*[(n, d) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)])
        >>> law = fit_loss(n, d, [1.7 + (n / 1e7) ** -0.3 + (d / 2e8) ** -0.3 for n, d in zip(n, d)])
        >>> round(compute_optimal(law, 1e22).tokens_per_param.value)
        20

    Reference:
        arXiv:2203.15556, equation 4.
    """
    if law.sizes != ("params", "tokens"):
        raise ValueError(f"the law must be one of params and tokens, got one of {law.sizes}; fit_loss makes such")
    if not (math.isfinite(flops) and flops > 0 and flops_per_param_token > 0):
        raise ValueError(f"flops and flops_per_param_token must be > 0, got {flops!r} and {flops_per_param_token!r}")
    _, log_n0, log_d0, a, b = law.draws.T
    log_nd = math.log(flops / flops_per_param_token)
    log_n = (np.log(a / b) + a * log_n0 - b * log_d0 + b * log_nd) / (a + b)
    return _allocation(flops, log_n, log_nd - log_n)


def _allocation(flops: float, log_n: Array, log_d: Array) -> Allocation:
    params, tokens, ratio = (estimate(np.exp(np.clip(x, -700, 700))) for x in (log_n, log_d, log_d - log_n))
    return Allocation(flops, params, tokens, ratio)


def _by_budget(table: Mapping[str, Array], same: float) -> list[_Runs]:
    order = np.argsort(table["flops"], kind="stable")
    log_c = np.log(table["flops"][order])
    groups: list[list[int]] = []
    for at, c in zip(order.tolist(), log_c.tolist(), strict=True):
        if groups and c - math.log(table["flops"][groups[-1][0]]) <= math.log1p(same):
            groups[-1].append(at)
        else:
            groups.append([at])
    return [_runs({name: values[group] for name, values in table.items()}) for group in groups]


def _runs(table: Mapping[str, Array]) -> _Runs:
    log_n, log_d = np.log(table["params"]), np.log(table["tokens"])
    centre, unit = float(log_n.mean()), float(table["loss"].mean())
    x = log_n - centre
    square = float(x @ x)
    if square and x @ log_d >= 0:
        raise ValueError(
            f"at {table['flops'][0]:.3g} FLOPs tokens do not fall as params grow from {table['params'].min():.3g} to "
            f"{table['params'].max():.3g}; check how FLOPs are counted"
        )
    return _Runs(
        flops=math.exp(float(np.log(table["flops"]).mean())),
        log_n=x,
        centre=centre,
        unit=unit,
        y=table["loss"] / unit,
        token_slope=float(x @ log_d) / square if square else -1.0,
        token_level=float(log_d.mean()),
        sizes=tuple(distinct(table["params"])),
    )


def _valleys(groups: Sequence[_Runs], noise: float, trust: float) -> tuple[dict[float, Array], float]:
    """Return draws of log N at the optimum and of the loss there, ``[B, 2]``, by budget, and the noise.

    Log N is inf, or -inf, where a draw has no optimum.
    """
    pairs_Q2 = np.array(list(itertools.product(_EXPONENTS, repeat=2)))
    solved = [_solve(group, pairs_Q2) for group in groups]
    rest_Q = sum((rest for _, _, rest in solved), np.zeros(len(pairs_Q2))) + trust * noise**2
    freedom = sum(len(g.y) - _PARAMETERS for g in groups) + trust
    weight_Q = (rest_Q / rest_Q.min()) ** (-0.5 * freedom)
    random = np.random.default_rng(0)
    picked_B = random.choice(len(pairs_Q2), _DRAWS, p=weight_Q / weight_Q.sum())
    deviation_B = np.sqrt(rest_Q[picked_B] / random.chisquare(freedom, _DRAWS))
    a_B, b_B = pairs_Q2[picked_B].T
    drawn = {}
    for group, (c_Q3, root_Q33, _) in zip(groups, solved, strict=True):
        scatter_B3 = np.einsum("bij,bj->bi", root_Q33[picked_B], random.standard_normal((_DRAWS, _PARAMETERS)))
        c0_B, fall_B, rise_B = (c_Q3[picked_B] + deviation_B[:, None] * scatter_B3).T
        valley_B = (fall_B > 0) & (rise_B > 0)
        ratio_B = np.where(valley_B, a_B * fall_B, 1.0) / np.where(valley_B, b_B * rise_B, 1.0)
        x_B = np.where(valley_B, np.log(ratio_B) / (a_B + b_B), np.where(fall_B > rise_B, np.inf, -np.inf))
        inside_B = np.clip(x_B, group.log_n.min(), group.log_n.max())
        loss_B = c0_B + fall_B * np.exp(-a_B * inside_B) + rise_B * np.exp(b_B * inside_B)
        drawn[group.flops] = np.stack([x_B + group.centre, loss_B * group.unit], axis=1)
    return drawn, math.sqrt(float(weight_Q @ rest_Q) / float(weight_Q.sum()) / freedom)


def _fitting(points: Points, budgets: int, noise: float, expected: str) -> Fitting:
    return Fitting(
        points=points.count,
        left_out=points.left_out,
        parameters=_PARAMETERS * budgets,
        start="none: each valley is linear in E, A and B' at given exponents",
        agreeing=1.0,
        objective="squares of the loss over the budget's mean loss",
        reached=noise**2,
        optimizer=f"least squares for each pair of exponents from {', '.join(map(str, _EXPONENTS))}; {expected}",
        intervals=f"{100 * CONFIDENCE:g}%, percentiles of {_DRAWS} draws of Student's t over pairs of exponents",
        noise=noise,
    )


def _solve(group: _Runs, pairs_Q2: Array) -> tuple[Array, Array, Array]:
    """Return for each pair of exponents E, A and B', a root of their covariance at noise 1, and the sum of squares."""
    x_N = group.log_n
    columns_QN3 = np.stack(
        [np.ones((len(pairs_Q2), len(x_N))), np.exp(-pairs_Q2[:, :1] * x_N), np.exp(pairs_Q2[:, 1:] * x_N)], axis=-1
    )
    inverse_Q3N = np.linalg.pinv(columns_QN3)
    c_Q3 = inverse_Q3N @ group.y
    rest_Q = np.square(group.y - np.einsum("qni,qi->qn", columns_QN3, c_Q3)).sum(axis=1)
    _, r_Q33 = np.linalg.qr(columns_QN3)
    return c_Q3, np.linalg.inv(r_Q33), rest_Q


def _budget(group: _Runs, drawn_B2: Array | None) -> Budget:
    step = (group.sizes[-1] / group.sizes[0]) ** (1 / (len(group.sizes) - 1)) if len(group.sizes) > 1 else 2.0
    below, above = (
        (group.sizes[0] / step**2, group.sizes[0] / step),
        (group.sizes[-1] * step, group.sizes[-1] * step**2),
    )
    if drawn_B2 is None:
        note = (
            f"{len(group.sizes)} of the {_PARAMETERS} sizes or more that show an optimum; {_to_run((*below, *above))}"
        )
        return Budget(group.flops, _UNKNOWN, _UNKNOWN, math.nan, False, (*below, *above), group.sizes, note)
    low, middle, high = np.quantile(drawn_B2[:, 0], [0.025, 0.5, 0.975], method="nearest").tolist()
    first, last = math.log(group.sizes[0]), math.log(group.sizes[-1])
    open_low, open_high = low < first, high > last
    add = (*(below if open_low else ()), *(above if open_high else ()))
    at = min(max(middle, first), last)
    ends = (at, -math.inf if open_low else low, math.inf if open_high else high)
    tokens = [group.token_level + group.token_slope * (x - group.centre) for x in (at, ends[2], ends[1])]
    where = {(True, False): "below", (False, True): "above", (True, True): "on neither side of"}
    note = f"the optimum is not bracketed {where[open_low, open_high]} what was run; {_to_run(add)}" if add else ""
    return Budget(
        flops=group.flops,
        params=Estimate(*map(_exp, ends)),
        tokens=Estimate(*map(_exp, tokens)),
        loss=float(np.median(drawn_B2[:, 1])),
        bracketed=not add,
        add=add,
        sizes=group.sizes,
        note=note,
    )


def _to_run(sizes: Sequence[float]) -> str:
    return "run " + ", ".join(f"{n:.3g}" for n in sizes) + " params"


def _exp(log: float) -> float:
    return math.exp(log) if log < math.inf else math.inf


def _lines(good: Sequence[tuple[_Runs, Array]]) -> tuple[Array, float]:
    """Fit log N and log D against log C in each draw, each budget weighted by its own uncertainty.

    Where the optima scatter about the line by more than that, draws are stretched as in
    :func:`~lightning_mup.analysis.drift.fit_drift`.
    """
    log_c = np.log([group.flops for group, _ in good])
    n_KB = np.array(
        [np.clip(x, group.centre + group.log_n.min(), group.centre + group.log_n.max()) for group, x in good]
    )
    n_KB = np.concatenate([np.median(n_KB, axis=1, keepdims=True), n_KB], axis=1)
    d_KB = np.array([g.token_level + g.token_slope * (x - g.centre) for (g, _), x in zip(good, n_KB, strict=True)])
    weight_K = 1 / np.maximum(n_KB[:, 1:].var(axis=1), 1e-12)
    weight_K /= weight_K.sum()
    centre = float(weight_K @ log_c)
    reach = log_c - centre
    spread = float(weight_K @ reach**2)
    levels = [weight_K @ y for y in (n_KB, d_KB)]
    slopes = [(weight_K * reach) @ y / spread for y in (n_KB, d_KB)]
    lines = np.stack([*levels, *slopes], axis=1)
    freedom = len(good) - 2
    if freedom:
        rest_K = n_KB[:, 0] - levels[0][0] - slopes[0][0] * reach
        chi = math.sqrt(float((np.square(rest_K) / np.maximum(n_KB[:, 1:].var(axis=1), 1e-12)).sum()) / freedom)
        if chi > 1:
            factor = chi * np.sqrt(freedom / np.random.default_rng(1).chisquare(freedom, len(lines) - 1))
            lines[1:] = lines[0] + (lines[1:] - lines[0]) * factor[:, None]
    return lines, centre
