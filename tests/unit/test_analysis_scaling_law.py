from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp

from lightning_mup.analysis.scaling_law import ScalingLaw, fit_compute, fit_joint, fit_loss

Array = np.ndarray
E, A, a, B, b = HOFFMANN = 1.69, 406.4, 0.34, 410.7, 0.28
C = np.geomspace(1e17, 1e21, 12)


def loss_of(n: Array | float, d: Array | float, law: tuple[float, ...] = HOFFMANN) -> Array:
    return np.asarray(law[0] + law[1] * np.asarray(n) ** -law[2] + law[3] * np.asarray(d) ** -law[4])


def runs(count: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Budgets of 6e18 to 3e21 FLOPs at 2 to 200 tokens per parameter."""
    flops = np.exp(random.uniform(np.log(6e18), np.log(3e21), count))
    ratio = np.exp(random.uniform(np.log(2), np.log(200), count))
    n = np.sqrt(flops / 6 / ratio)
    return n, ratio * n


def trial(random: np.random.Generator) -> tuple[ScalingLaw, dict[str, float], tuple[float, float]]:
    """Fit 300 runs with 0.5% noise; return the truths, and the size and loss of a run of 10 times the FLOPs."""
    n, d = runs(300, random)
    law = fit_loss(n, d, loss_of(n, d) * np.exp(0.005 * random.standard_normal(300)), draws=200)
    return law, {"E": E, "a": a, "b": b, "A": A, "B": B}, (3.5e9 * 10**0.5, 7e10 * 10**0.5)


def test_intervals_cover_planted_truth_in_90_to_99_percent_of_trials() -> None:
    """80 trials of four numbers; what more trials gave is recorded in fit_loss."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(80):
        law, truth, big = trial(random)
        rows = [(law.estimates[name], truth[name]) for name in ("E", "a", "b")]
        rows.append((law.loss_at(*big), float(loss_of(*big))))
        rows.append((law.loss_of_run(*big), float(loss_of(*big) * np.exp(0.005 * random.standard_normal()))))
        found.append([(one.low, one.value, one.high, true) for one, true in rows])
    low, value, high, true = np.moveaxis(np.array(found), -1, 0)
    covered = ((low < true) & (true < high)).mean(axis=0)
    assert covered.min() >= 0.9
    assert covered.max() <= 0.99
    # Were the intervals half as long, this test would fail.
    shorter = (value + (low - value) / 2 < true) & (true < value + (high - value) / 2)
    assert shorter.mean(axis=0).max() < 0.9


def test_objective_is_the_one_of_the_paper_and_no_other_start_is_lower() -> None:
    """The reference minimizes Huber's loss of LSE(a - alpha log N, b - beta log D, e) - log L by L-BFGS."""
    random = np.random.default_rng(0)
    n, d = runs(80, random)
    y = np.log(loss_of(n, d)) + 0.01 * random.standard_t(3, 80)
    log_n, log_d = np.log(n), np.log(d)

    def objective(theta: Array) -> float:
        fitted = logsumexp(
            [theta[0] - theta[1] * log_n, theta[2] - theta[3] * log_d, np.full_like(y, theta[4])], axis=0
        )
        r = np.abs(fitted - y)
        return float(1e4 * np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum())

    starts = [
        (math.log(A) + i, a, math.log(B) + j, b, math.log(E) + k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 0)
    ]
    lowest = min(
        (minimize(objective, start, method="L-BFGS-B", options={"maxiter": 3000, "maxfun": 60000}) for start in starts),
        key=lambda result: result.fun,
    )
    law = fit_loss(n, d, np.exp(y), draws=100)
    assert law.fitting.reached * 80 * 1e4 <= lowest.fun * (1 + 1e-4)
    assert law.fitting.reached * 80 * 1e4 == pytest.approx(lowest.fun, rel=1e-2)
    e = law.estimates
    ours = objective(
        np.array([math.log(e["A"].value), e["a"].value, math.log(e["B"].value), e["b"].value, math.log(e["E"].value)])
    )
    assert ours == pytest.approx(law.fitting.reached * 80 * 1e4, rel=1e-6)


@settings(max_examples=10)
@given(
    st.floats(0.5, 3),
    st.floats(0.2, 0.6),
    st.floats(0.2, 0.6),
    st.floats(0.1, 1),
    st.floats(0.1, 1),
    st.floats(1e-3, 1e3),
)
def test_exact_losses_give_the_planted_law_in_any_unit(
    e: float, alpha: float, beta: float, at_n: float, at_d: float, unit: float
) -> None:
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6)))
    planted = (e, at_n * 3e8**alpha, alpha, at_d * 3e10**beta, beta)
    found = fit_loss(n * unit, d, loss_of(n, d, planted), draws=100).estimates
    for name, truth in (("E", e), ("a", alpha), ("b", beta), ("N0", planted[1] ** (1 / alpha) * unit)):
        assert found[name].value == pytest.approx(truth, rel=0.02), name


def test_power_law_without_irreducible_loss_misses_the_exponent_that_the_law_covers() -> None:
    random = np.random.default_rng(0)
    flops = np.geomspace(1e18, 1e22, 60)
    losses = (1.7 + (flops / 1e19) ** -0.2) * np.exp(0.003 * random.standard_normal(60))
    law = fit_compute(flops, losses)
    assert law.estimates["E"].covers(1.7)
    assert law.estimates["c"].covers(0.2)
    assert law.estimates["C0"].covers(1e19)
    x = np.stack([np.ones(60), -np.log(flops / 1e20)], axis=1)
    (_, slope), rest, *_ = np.linalg.lstsq(x, np.log(losses))
    error = math.sqrt(rest[0] / 58 * np.linalg.inv(x.T @ x)[1, 1])
    assert abs(slope - 0.2) > 10 * error
    farther = 1.7 + (1e24 / 1e19) ** -0.2
    assert law.loss_at(1e24).covers(farther)
    assert losses.min() * 100**-slope < farther - 0.1


def test_outliers_move_least_squares_and_leave_huber() -> None:
    random = np.random.default_rng(3)
    n, d = runs(100, random)
    losses = loss_of(n, d) * np.exp(0.002 * random.standard_normal(100))
    losses[np.argsort(n * d)[-40:][::5]] *= 1.3  # some large runs went wrong
    truth, big = float(loss_of(1e10, 2e11)), (1e10, 2e11)
    robust = fit_loss(n, d, losses, draws=200)
    squares = fit_loss(n, d, losses, draws=200, delta=1e3)
    assert abs(robust.loss_at(*big).value / truth - 1) < 0.005
    assert robust.loss_at(*big).covers(truth)
    assert robust.estimates["E"].covers(E)
    assert abs(squares.loss_at(*big).value / truth - 1) > 0.05


def test_joint_fit_shares_the_irreducible_loss_and_is_surer_of_it() -> None:
    random = np.random.default_rng(1)
    planted = {"adamw": (2e19, 0.15), "muon": (1.4e19, 0.15), "soap": (1.2e19, 0.17)}
    hits, narrower = [], []
    for _ in range(24):
        table = {}
        for label, (c0, c) in planted.items():
            flops = np.geomspace(1e17, 1e21, 20)
            table[label] = (flops, (1.6 + (flops / c0) ** -c) * np.exp(0.003 * random.standard_normal(20)))
        joint = fit_joint(table, draws=200)
        own = [(joint.laws[label].estimates["c"], c) for label, (_, c) in planted.items()]
        hits.append([joint.irreducible.covers(1.6), *(one.covers(c) for one, c in own)])
        alone = fit_compute(*table["muon"], draws=200).estimates["E"]
        narrower.append((joint.irreducible.high - joint.irreducible.low) / (alone.high - alone.low))
        assert all(law.estimates["E"] == joint.irreducible for law in joint.laws.values())
    assert np.mean(hits, axis=0).min() >= 0.875
    assert np.mean(narrower) < 0.8


def test_few_runs_have_wide_intervals_that_cover() -> None:
    """15 runs for five parameters: without the stretch for small samples this covers too seldom."""
    random = np.random.default_rng(2)
    hits = []
    for _ in range(24):
        n, d = runs(15, random)
        law = fit_loss(n, d, loss_of(n, d) * np.exp(0.005 * random.standard_normal(15)), draws=200)
        hits.append([law.estimates["a"].covers(a), law.estimates["b"].covers(b), law.estimates["E"].covers(E)])
    assert np.mean(hits, axis=0).min() >= 0.9


def test_what_is_left_out_is_named_with_the_reason() -> None:
    flops = [*C, C[0], C[3], C[5]]
    losses = [*(1.7 + (C / 1e19) ** -0.2), math.inf, 1.7 + (C[3] / 1e19) ** -0.2, 9.0]
    law = fit_compute(flops, losses, leave_out={14: "another tokenizer"}, draws=100)
    assert law.fitting.points == 12
    assert law.fitting.left_out == (
        "run 12 (flops 1e+17): its loss is inf",
        f"run 13 (flops {C[3]:.4g}): it repeats run 3 in every number",
        f"run 14 (flops {C[5]:.4g}): another tokenizer",
    )
    assert law.estimates["c"].value == pytest.approx(0.2, rel=1e-3)
    assert len(law.table["loss"]) == 12


def test_seeds_of_one_size_are_no_duplicates() -> None:
    losses = 1.7 + (C / 1e19) ** -0.2
    law = fit_compute([*C, *C], [*losses, *(losses * 1.001)], draws=100)
    assert law.fitting.points == 24


def test_law_that_is_not_told_by_the_runs_says_so() -> None:
    random = np.random.default_rng(0)
    flops = np.geomspace(1e19, 2e19, 8)
    law = fit_compute(flops, (1.7 + (flops / 1e19) ** -0.15) * np.exp(0.01 * random.standard_normal(8)))
    assert any("not told from 0" in note or "not bounded" in note for note in law.notes)


def test_fit_of_few_runs_says_that_its_intervals_are_short() -> None:
    few, enough = (fit_compute(C[:k], 1.7 + (C[:k] / 1e19) ** -0.2, draws=100).notes for k in (5, 6))
    assert "5 runs for 3 parameters are few" in few[0]
    assert not any("are few" in note for note in enough)


N3, D3 = (grid.ravel() for grid in np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11]))
L3 = loss_of(N3, D3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_loss(N3[:5], D3[:5], L3[:5]), "5 parameters need at least 6 runs, got 5"),
        (lambda: fit_loss(N3, D3, np.full(9, 3.0)), "all 9 losses are 3"),
        (
            lambda: fit_loss(np.full(9, 1e7), D3 * np.arange(1, 10), L3),
            "params takes 1 of the 3 values.*add runs at params 4e",
        ),
        (lambda: fit_loss(N3, np.full(9, 1e9), L3 * np.arange(1, 10)), "tokens takes 1 .* exponent b.*1.6e"),
        (lambda: fit_loss(np.geomspace(1e7, 1e9, 9), 20 * np.geomspace(1e7, 1e9, 9), L3), "tokens follow params"),
        (lambda: fit_loss(N3, D3, [math.nan] * 9), "got 0 that can be fitted.*its loss is nan"),
        (lambda: fit_loss(-N3, D3, L3), "params must be positive and finite, got -1e"),
        (lambda: fit_loss(N3, D3 * math.inf, L3), "tokens must be positive and finite, got inf"),
        (lambda: fit_loss(N3, D3, -L3), "loss must be positive"),
        (lambda: fit_loss(N3, D3[:8], L3), "one number per run"),
        (lambda: fit_loss(N3, D3, L3, leave_out={9: "late"}), "leave_out names run 9; there are runs 0 to 8"),
        (lambda: fit_loss(N3, D3, L3, draws=10), "draws >= 100, got 0.001 and 10"),
        (lambda: fit_loss(N3, D3, L3, delta=0), "delta must be positive"),
        (lambda: fit_compute([1e18, 1e19, 1e20], [3, 2.5, 2.2]), "3 parameters need at least 4 runs"),
        (lambda: fit_compute([-1e18, 1e19, 1e20, 1e21], [3, 2.5, 2.2, 2]), "flops must be positive"),
        (lambda: fit_compute([1e18, 1e18, 1e19, 1e19], [3, 2.9, 2.5, 2.4]), "flops takes 2 of .*add runs at flops 4e"),
        (lambda: fit_joint({}), "at least one label"),
        (lambda: fit_joint({"muon": (C, C**-0.1)}, leave_out={"mun": {}}), "names 'mun'; did you mean 'muon'"),
        (lambda: fit_joint({"muon": (C, C**-0.1), "soap": (C[:2], C[:2])}), "at least 3 runs of soap, got 2"),
        (lambda: fit_compute(C, C**-0.1, draws=100).loss_at(1e8, 1e9), "give positive flops, got"),
        (lambda: fit_compute(C, C**-0.1, draws=100).loss_of_run(-1.0), "give positive flops, got -1"),
    ],
)
def test_input_that_tells_nothing_is_refused_in_words(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
