from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lightning_mup.analysis.isoflop import IsoFlop, compute_optimal, fit_isoflop
from lightning_mup.analysis.scaling_law import fit_compute, fit_loss

Law = tuple[float, float, float, float, float]
HOFFMANN: Law = (1.69, 406.4, 0.34, 410.7, 0.28)
UNEQUAL: Law = (0.8, 60.0, 0.2, 3000.0, 0.4)
BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)


def loss_of(n: np.ndarray, d: np.ndarray, law: Law) -> np.ndarray:
    return law[0] + law[1] * n ** -law[2] + law[3] * d ** -law[4]


def best_size(flops: float, law: Law) -> float:
    """Minimize the loss along C = 6 N D, by a numerical search."""
    found = minimize_scalar(
        lambda x: float(loss_of(np.exp(x), flops / 6 / np.exp(x), law)), bounds=(5, 40), options={"xatol": 1e-9}
    )
    return math.exp(found.x)


def table(law: Law, *, off: float = 1.0, span: float = 4.0, sizes: int = 7) -> tuple[np.ndarray, ...]:
    rows = [(c, n) for c in BUDGETS for n in best_size(c, law) * off * np.geomspace(1 / span, span, sizes)]
    c, n = np.array(rows).T
    return c, n, c / 6 / n, loss_of(n, c / 6 / n, law)


@settings(max_examples=25)
@given(st.floats(0.2, 0.5), st.floats(0.2, 0.5), st.floats(0.1, 0.6), st.floats(5, 100), st.floats(0.6, 1.6))
def test_planted_optimum_is_found_within_5_percent(
    alpha: float, beta: float, at: float, ratio: float, off: float
) -> None:
    """The optimum at 1e19 FLOPs has this ratio of tokens to parameters and this share of the loss from its size."""
    n = math.sqrt(1e19 / 6 / ratio)
    law = (1.7, at * n**alpha, alpha, alpha / beta * at * (ratio * n) ** beta, beta)
    iso = fit_isoflop(*table(law, off=off))
    for budget, flops in zip(iso.budgets, BUDGETS, strict=True):
        best = best_size(flops, law)
        assert budget.bracketed
        assert budget.params.value == pytest.approx(best, rel=0.05)
        assert budget.tokens.value == pytest.approx(flops / 6 / best, rel=0.05)
        assert budget.loss == pytest.approx(float(loss_of(np.array(best), np.array(flops / 6 / best), law)), rel=2e-3)
    assert iso.params_exponent.value == pytest.approx(beta / (alpha + beta), abs=0.005)
    assert iso.tokens_exponent.value == pytest.approx(alpha / (alpha + beta), abs=0.005)
    assert iso.at(1e19).tokens_per_param.value == pytest.approx(ratio, rel=0.1)


def test_parabola_fails_where_the_valley_does_not() -> None:
    """Sizes from 1/10 to 10 times twice the optimum: the field's usual parabola is off by more than 5%."""
    c, n, d, losses = table(UNEQUAL, off=2.0, span=10.0)
    iso = fit_isoflop(c, n, d, losses)
    for budget, flops in zip(iso.budgets, BUDGETS, strict=True):
        at = c == flops
        bend, slope, _ = np.polyfit(np.log(n[at] / 1e8), losses[at], 2)
        truth = best_size(flops, UNEQUAL)
        assert abs(1e8 * math.exp(-slope / 2 / bend) / truth - 1) > 0.05
        assert abs(budget.params.value / truth - 1) < 0.05


@pytest.mark.parametrize(("law", "noise"), [(HOFFMANN, 0.001), (HOFFMANN, 0.004), (UNEQUAL, 0.002)])
def test_intervals_cover_the_planted_optimum_and_exponents(law: Law, noise: float) -> None:
    """200 trials for each noise gave 95% to 98% for optimum, exponents, size and tokens per parameter at 1e22 FLOPs."""
    random = np.random.default_rng(0)
    true_n = [best_size(c, law) for c in BUDGETS]
    p, far = law[4] / (law[2] + law[4]), best_size(1e22, law)
    hits, short = [], []
    for _ in range(60):
        c, n, d, losses = table(law, off=float(np.exp(random.uniform(-0.4, 0.4))))
        iso = fit_isoflop(c, n, d, losses * np.exp(noise * random.standard_normal(len(n))))
        best = [
            (b.params.low, b.params.value, b.params.high, true) for b, true in zip(iso.budgets, true_n, strict=True)
        ]
        at = iso.at(1e22)
        hits.append(
            [
                np.mean([low < true < high for low, _, high, true in best]),
                iso.params_exponent.covers(p),
                iso.tokens_exponent.covers(1 - p),
                at.params.covers(far),
                at.tokens_per_param.covers(1e22 / 6 / far**2),
            ]
        )
        short.append(np.mean([v * (lo / v) ** 0.4 < true < v * (hi / v) ** 0.4 for lo, v, hi, true in best]))
    assert np.mean(hits, axis=0).min() >= 0.9
    assert np.mean(short) < 0.9  # intervals of two fifths of the length would fail


def test_optimum_outside_of_the_runs_names_sizes_that_bracket_it() -> None:
    c, n, d, losses = table(HOFFMANN, off=8.0)
    iso = fit_isoflop(c, n, d, losses)
    first = iso.budgets[0]
    assert not any(b.bracketed for b in iso.budgets)
    assert first.params.low == 0
    assert first.tokens.high == math.inf
    assert max(first.add) < min(first.sizes)
    assert "not bracketed below" in first.note
    assert f"{first.add[0]:.3g}" in first.note
    assert math.isnan(iso.params_exponent.value)
    with pytest.raises(ValueError, match="two budgets that bracket"):
        iso.at(1e20)
    more = [(b.flops, x) for b in iso.budgets for x in (*b.add, b.add[0] ** 2 / b.add[1])]
    c2, n2 = np.array(more).T
    d2 = c2 / 6 / n2
    again = fit_isoflop([*c, *c2], [*n, *n2], [*d, *d2], [*losses, *loss_of(n2, d2, HOFFMANN)])
    assert all(b.bracketed for b in again.budgets)
    assert again.budgets[0].params.value == pytest.approx(best_size(1e18, HOFFMANN), rel=0.05)
    above = fit_isoflop(*table(HOFFMANN, off=0.1)).budgets[0]
    assert min(above.add) > max(above.sizes)
    assert above.params.high == math.inf


def test_two_sizes_or_equal_losses_show_no_optimum() -> None:
    c, n, d, losses = table(HOFFMANN, sizes=2)
    few = fit_isoflop(c, n, d, losses)
    assert all(math.isnan(b.params.value) and len(b.add) == 4 for b in few.budgets)
    assert "2 of the 3 sizes" in few.notes[0]
    c, n, d, losses = table(HOFFMANN)
    flat = fit_isoflop(c, n, d, np.full_like(losses, 3.0))
    assert not any(b.bracketed for b in flat.budgets)
    assert math.isnan(flat.params_exponent.value)


def test_diverged_runs_are_left_out_and_runs_of_nearly_one_budget_go_together() -> None:
    c, n, d, losses = table(HOFFMANN)
    random = np.random.default_rng(0)
    losses[3] = math.inf
    iso = fit_isoflop(c * (1 + 0.005 * random.random(len(c))), n, d, losses)
    assert len(iso.budgets) == len(BUDGETS)
    assert "its loss is inf" in iso.fitting.left_out[0]
    assert iso.budgets[0].params.value == pytest.approx(best_size(1e18, HOFFMANN), rel=0.05)


def test_one_bad_budget_leaves_the_others_power_law() -> None:
    c, n, d, losses = table(HOFFMANN)
    keep = ~((c == 1e20) & (n > best_size(1e20, HOFFMANN) * 0.9))
    iso = fit_isoflop(c[keep], n[keep], d[keep], losses[keep])
    assert [b.bracketed for b in iso.budgets] == [True] * 4 + [False]
    assert "1e+20 FLOPs" in iso.notes[0]
    assert iso.at(1e20).params.value == pytest.approx(best_size(1e20, HOFFMANN), rel=0.05)


def test_fitted_law_gives_the_split_that_a_search_gives() -> None:
    random = np.random.default_rng(0)
    n, d = np.exp(random.uniform(16, 23, 200)), np.exp(random.uniform(20, 26, 200))
    law = fit_loss(n, d, loss_of(n, d, HOFFMANN) * np.exp(0.002 * random.standard_normal(200)))
    for flops in (1e20, 1e23):
        split, truth = compute_optimal(law, flops), best_size(flops, HOFFMANN)
        assert split.params.value == pytest.approx(truth, rel=0.1)
        assert split.params.covers(truth)
        assert split.tokens_per_param.covers(flops / 6 / truth**2)
        assert split.params.value * split.tokens.value * 6 == pytest.approx(flops)


def _iso() -> IsoFlop:
    return fit_isoflop(*table(HOFFMANN))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_isoflop([], [], [], []), "none of the 0 runs"),
        (lambda: fit_isoflop([1e18], [1e8], [1e9], [math.nan]), "none of the 1 runs .*its loss is nan"),
        (lambda: fit_isoflop([-1e18], [1e8], [1e9], [3.0]), "flops must be positive"),
        (lambda: fit_isoflop([1e18] * 3, [1e7, 2e7, 4e7], [1e9, 1e9, 1e9], [3.0, 2.9, 3.0]), "tokens do not fall"),
        (lambda: fit_isoflop([1e18], [1e8], [1e9], [3.0], noise=0), "noise and trust must be positive"),
        (lambda: fit_isoflop([1e18], [1e8, 1e9], [1e9], [3.0]), "one number per run"),
        (lambda: _iso().at(-1.0), "positive flops; got -1"),
        (lambda: compute_optimal(fit_compute([1e18, 1e19, 1e20, 1e21], [3, 2.5, 2.2, 2]), 1e20), "fit_loss makes such"),
    ],
)
def test_input_that_tells_nothing_is_refused_in_words(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
