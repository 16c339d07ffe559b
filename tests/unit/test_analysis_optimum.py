from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.analysis.drift import fit_drift
from lightning_mup.analysis.optimum import Optimum, find_optimum, repeat_variance

from .transfer_runs import valley

Shape = Callable[[np.ndarray], np.ndarray]
SHAPES: dict[str, Shape] = {
    "symmetric": lambda u: 0.02 * u * u,
    "steep": lambda u: valley(u, 1.0),  # 1.95 times as high on the right, one octave off
    "cliff": lambda u: valley(u, 1.5),  # 2.8 times
    "linear left": lambda u: np.where(u < 0, 0.04 * (np.sqrt(1 + u * u) - 1), 0.03 * u * u),
}


def measured(shape: Shape, at: float, *, grid: float, seeds: int, noise: float, random: np.random.Generator) -> Optimum:
    xs = np.repeat(np.arange(-4, 4 + grid / 2, grid), seeds)
    losses = 3 * np.exp(shape(xs - at) + noise * random.standard_normal(len(xs)))
    return find_optimum(xs.tolist(), losses.tolist())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("grid", "seeds", "noise", "widest"), [(1.0, 1, 0.002, 0.9), (0.5, 2, 0.003, 0.35)])
def test_interval_covers_the_planted_optimum(name: str, grid: float, seeds: int, noise: float, widest: float) -> None:
    """Measured: 100% at 1 octave, mean length 0.46 to 0.75; 95% to 99.7% at 1/2 octave, 0.26 to 0.27."""
    random = np.random.default_rng(1)
    found = []
    for at in random.uniform(-0.5, 0.5, 300):
        best = measured(SHAPES[name], at, grid=grid, seeds=seeds, noise=noise, random=random)
        found.append((best.low, best.high, at))
    low, high, at = np.array(found).T
    covered = (low < at) & (at < high)
    assert covered.mean() >= 0.9
    assert (high - low).mean() < widest
    # Were the intervals a quarter as long, this test would fail.
    middle, half = (low + high) / 2, (high - low) / 8
    assert (np.abs(at - middle) < half).mean() < 0.9


def test_price_of_another_value_is_covered_too() -> None:
    random = np.random.default_rng(2)
    hits = []
    for at in random.uniform(-0.5, 0.5, 150):
        best = measured(SHAPES["steep"], at, grid=0.5, seeds=2, noise=0.002, random=random)
        assert best.valley is not None
        low, high = np.percentile(best.valley.excess(1.0), [2.5, 97.5])
        hits.append(low < float(valley(1.0 - at, 1.0)) < high)
    assert np.mean(hits) >= 0.9


@given(st.floats(-20, 20), st.floats(-0.9, 0.9), st.floats(0.5, 8))
def test_shifted_values_and_scaled_losses_shift_and_scale_the_optimum(shift: float, at: float, scale: float) -> None:
    xs = np.arange(-3.0, 4.0)
    losses = np.exp(valley(xs - at, 0.5))
    one = find_optimum(xs.tolist(), losses.tolist())
    other = find_optimum((xs + shift).tolist(), (scale * losses).tolist())
    assert other.log2_value - shift == pytest.approx(one.log2_value, abs=0.02)
    assert other.loss == pytest.approx(scale * one.loss, rel=1e-4)
    assert one.log2_value == pytest.approx(at, abs=0.15)


def test_optimum_at_an_edge_names_the_runs_to_add() -> None:
    losses = [3.4, 3.3, 3.2, 3.1, 3.0]
    rising = find_optimum([-10, -9.5, -9, -8.5, -8], losses)
    assert (rising.bracketed, rising.high, rising.add) == (False, math.inf, (-7.5, -7.0))
    falling = find_optimum([-8, -8.5, -9, -9.5, -10], losses)
    assert (falling.bracketed, falling.low, falling.add) == (False, -math.inf, (-11.0, -10.5))
    assert falling.deviation == math.inf


@pytest.mark.parametrize("bad", [math.inf, math.nan, 5.0])  # 5.0 is so far above 3.0 that it is no part of the valley
def test_diverged_run_is_a_bound_not_a_missing_value(bad: float) -> None:
    xs, losses = [-10, -9, -8, -7, -6], [3.5, 3.3, 3.1, 3.0, bad]
    bounded, open_ended = find_optimum(xs, losses), find_optimum(xs[:-1], losses[:-1])
    assert bounded.bracketed
    assert -8 < bounded.low < bounded.high < -6
    assert not open_ended.bracketed
    assert bounded.diverged == (() if bad == 5.0 else (-6.0,))


def test_one_diverged_seed_makes_a_value_diverged() -> None:
    best = find_optimum([-9, -8, -7, -6, -6], [3.2, 3.05, 3.0, 2.9, math.inf])
    assert best.diverged == (-6.0,)
    assert best.high < -6


def test_lonely_divergence_below_the_optimum_is_noted_but_no_bound() -> None:
    best = find_optimum([-9, -8, -7, -6, -5, -4], [3.4, math.inf, 3.1, 3.0, 3.05, 3.2])
    assert round(best.log2_value) == -6
    assert best.note == "a run diverged at 2^-8 though none did at 2^-6"


def test_too_few_points_and_all_diverged() -> None:
    two = find_optimum([-8, -7, -6], [3.0, 2.9, math.inf])
    assert (two.log2_value, two.low, two.high, two.valley) == (-7.0, -8.0, -6.0, None)
    assert two.add == (-7.5, -6.5)
    one = find_optimum([-8], [3.0])
    assert (one.low, one.high, one.add) == (-math.inf, math.inf, (-9.0, -7.0))
    none = find_optimum([-8, -7], [math.inf, math.nan])
    assert math.isnan(none.log2_value)
    assert (none.add, none.high) == ((-10.0, -9.0), -8.0)


def test_noise_makes_the_interval_longer_and_seeds_shorter() -> None:
    lengths = {}
    for noise, seeds in ((0.001, 3), (0.01, 3), (0.01, 12)):
        best = measured(SHAPES["symmetric"], 0.2, grid=0.5, seeds=seeds, noise=noise, random=np.random.default_rng(0))
        lengths[noise, seeds] = best.high - best.low
    assert lengths[0.001, 3] < lengths[0.01, 12] < lengths[0.01, 3]


def test_flat_valley_asks_for_seeds() -> None:
    flat = find_optimum(list(range(-7, 8)), [3 + 0.0005 * abs(x) ** 1.5 for x in range(-7, 8)], noise=0.003)
    assert flat.note == "flat for this noise: run more seeds" or not flat.bracketed


@pytest.mark.parametrize(
    ("xs", "losses", "noise", "message"),
    [
        ([1, 2], [1.0], 0.002, "got 2 values and 1 losses"),
        ([], [], 0.002, "got 0 values"),
        ([1], [-1.0], 0.002, r"got -1\.0"),
        ([math.inf], [1.0], 0.002, "got inf"),
        ([1], [1.0], 0.0, r"must be positive, got 0\.0"),
    ],
)
def test_wrong_input_is_refused(xs: list[float], losses: list[float], noise: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_optimum(xs, losses, noise=noise)


def test_repeats_tell_the_noise() -> None:
    random = np.random.default_rng(0)
    xs = np.repeat(np.arange(50.0), 4)
    total, freedom = repeat_variance(xs.tolist(), (3 * np.exp(0.004 * random.standard_normal(200))).tolist())
    assert freedom == 150
    assert math.sqrt(total / freedom) == pytest.approx(0.004, rel=0.15)


def _sizes(
    shapes: Sequence[Shape], start: float, slope: float, *, noise: float, random: np.random.Generator
) -> dict[int, Optimum]:
    """Return optima at doubling sizes, from one run per octave."""
    middle = (len(shapes) - 1) / 2
    return {
        64 * 2**i: measured(shape, start + slope * (i - middle), grid=1.0, seeds=1, noise=noise, random=random)
        for i, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("name", [*SHAPES, "unlike"])
@pytest.mark.parametrize(("slope", "verdict"), [(0.0, "stands"), (-0.5, "moves"), (0.4, "moves")])
def test_slope_is_covered_and_judged(name: str, slope: float, verdict: str) -> None:
    random = np.random.default_rng(3)
    drifts = []
    for start in random.uniform(-0.5, 0.5, 40):
        skews = random.normal(0.7, 0.5, 4) if name == "unlike" else [None] * 4
        shapes = [SHAPES[name] if skew is None else partial(valley, skew=skew) for skew in skews]
        drifts.append(fit_drift(_sizes(shapes, start, slope, noise=0.002, random=random)))
    assert np.mean([drift.low < slope < drift.high for drift in drifts]) >= 0.9
    assert [drift.verdict for drift in drifts].count(verdict) >= (34 if name == "unlike" else 36)
    # Were the intervals a fifth as long, this test would fail.
    assert np.mean([abs(drift.slope - slope) < (drift.high - drift.low) / 10 for drift in drifts]) < 0.9


def test_what_is_unknown_of_the_common_shape_does_not_blur_the_slope() -> None:
    """Two thirds of the length that optima of unrelated shapes would give, and half for steep walls."""
    random = np.random.default_rng(4)
    shares = []
    for start in random.uniform(-0.5, 0.5, 20):
        optima = _sizes([SHAPES["cliff"]] * 4, start, 0.0, noise=0.002, random=random)
        x, weight = np.arange(4), np.array([best.deviation**-2 for best in optima.values()])
        apart = 1.96 / math.sqrt(weight @ np.square(x - weight @ x / weight.sum()))
        drift = fit_drift(optima)
        shares.append((drift.high - drift.low) / 2 / apart)
    assert np.median(shares) < 0.75


def test_scatter_beyond_the_optima_s_own_noise_makes_the_slope_unclear() -> None:
    def at(where: float) -> Optimum:
        return measured(SHAPES["symmetric"], where, grid=0.5, seeds=3, noise=0.001, random=np.random.default_rng(0))

    straight = fit_drift({64: at(0), 128: at(0), 256: at(0)})
    scattered = fit_drift({64: at(0), 128: at(1), 256: at(-0.2)})
    assert straight.verdict == "stands"
    assert scattered.verdict == "unclear"
    assert scattered.high - scattered.low > 5 * (straight.high - straight.low)


def test_unbracketed_optima_are_left_out_by_name() -> None:
    edge = find_optimum([0, 1, 2], [3.2, 3.1, 3.0])
    fine = find_optimum([0, 1, 2, 3, 4], [3.2, 3.05, 3.0, 3.05, 3.2])
    drift = fit_drift({64: fine, 128: fine, 256: edge})
    assert (drift.sizes, drift.note) == ((64, 128), "not bracketed, so left out: 256")
    alone = fit_drift({64: fine, 128: edge})
    assert (alone.verdict, str(alone)) == ("unclear", "unclear")
    assert math.isnan(alone.slope)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        fit_drift({64: fine}, tolerance=0)


@pytest.mark.parametrize(("noise", "seeds"), [(0.001, 1), (0.002, 3)])
def test_noisy_quadratics_are_found_to_a_tenth_of_a_notch(noise: float, seeds: int) -> None:
    """In all of 30 trials, with rates an octave apart; the best run itself is off by more in most."""
    random = np.random.default_rng(0)
    off, best_off = [], []
    for centre in random.uniform(-7.5, -6.5, 30):
        xs = np.repeat(np.arange(-10.0, -3.0), seeds)
        losses = 3 * np.exp(0.02 * (xs - centre) ** 2 + noise * random.standard_normal(len(xs)))
        off.append(abs(find_optimum(xs.tolist(), losses.tolist(), noise=noise).log2_value - centre))
        best_off.append(abs(xs[losses.argmin()] - centre))
    assert max(off) < 0.1
    assert np.median(best_off) > 0.1
