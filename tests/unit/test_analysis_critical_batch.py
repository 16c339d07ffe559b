from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_mup.analysis.critical_batch import CriticalBatch, find_critical_batch, steps_to_loss

BATCHES = np.array([16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0])


def needed(batches: np.ndarray, critical: float, steps_min: float = 1000.0) -> np.ndarray:
    return steps_min * (1 + critical / batches)


def measured(
    critical: float, *, batches: np.ndarray, seeds: int, noise: float, outliers: float, random: np.random.Generator
) -> CriticalBatch:
    each = np.repeat(batches, seeds)
    spread = noise * np.where(random.random(len(each)) < outliers, 4.0, 1.0)
    steps = needed(each, critical) * np.exp(spread * random.standard_normal(len(each)))
    return find_critical_batch(each.tolist(), steps.tolist())


@given(st.floats(40, 1600), st.floats(1, 1e6), st.floats(1e-3, 1e6))
def test_planted_critical_batch_comes_back_within_5_percent(critical: float, steps_min: float, unit: float) -> None:
    found = find_critical_batch((unit * BATCHES).tolist(), needed(BATCHES, critical, steps_min).tolist())
    assert found.verdict == "measured"
    assert found.value == pytest.approx(unit * critical, rel=0.01)
    assert found.steps_min == pytest.approx(steps_min, rel=0.01)
    assert found.examples_min == pytest.approx(steps_min * unit * critical, rel=0.01)
    assert found.low < unit * critical < found.high
    assert found.add == ()
    examples = unit * BATCHES * needed(BATCHES, critical, steps_min)
    steps = needed(BATCHES, critical, steps_min)
    # The batch that needs twice the steps of the largest one run is too small where that is not endless.
    twice = steps_min * critical / (2 * steps[-1] - steps_min)
    assert critical < 250 or abs(twice / critical - 1) > 0.05
    assert (steps / found.steps_min - 1) * (examples / found.examples_min - 1) == pytest.approx(np.ones(9), rel=0.1)


@pytest.mark.parametrize(
    ("noise", "seeds", "every", "outliers"),
    [(0.02, 1, 1, 0.0), (0.05, 3, 2, 0.0), (0.1, 3, 1, 0.0), (0.03, 2, 1, 1 / 12), (0.03, 1, 2, 0.0)],
)
def test_interval_covers_the_planted_critical_batch(noise: float, seeds: int, every: int, outliers: float) -> None:
    random = np.random.default_rng(1)
    found, truth, errors = [], [], []
    for _ in range(200):
        critical = float(np.exp(random.uniform(math.log(150), math.log(450))))
        made = measured(critical, batches=BATCHES[::every], seeds=seeds, noise=noise, outliers=outliers, random=random)
        assert made.verdict == "measured"
        found.append((made.low, made.high))
        truth.append(critical)
        errors.append(math.log(made.value / critical))
    low, high = np.log(np.array(found)).T
    at = np.log(np.array(truth))
    assert 0.9 <= ((low < at) & (at < high)).mean() <= 0.995
    assert abs(np.mean(errors)) < 0.05
    # Were the intervals a third as long, this test would fail.
    middle, half = (low + high) / 2, (high - low) / 6
    assert (np.abs(at - middle) < half).mean() < 0.9


def test_outlier_moves_the_value_by_less_than_least_squares_would_let_it() -> None:
    steps = needed(BATCHES, 250)
    steps[-1] *= 2
    found = find_critical_batch(BATCHES.tolist(), steps.tolist())
    grid = np.exp(np.linspace(math.log(20), math.log(2000), 2000))
    off = np.log(steps) - np.log1p(grid[:, None] / BATCHES)
    least = grid[np.square(off - off.mean(axis=1, keepdims=True)).sum(axis=1).argmin()]
    assert found.low < 250 < found.high
    assert abs(math.log(found.value / 250)) < 0.25 * abs(math.log(least / 250))
    assert found.note.startswith("steps scatter about the law by")


@pytest.mark.parametrize(("critical", "verdict"), [(2.0, "below"), (64000.0, "above")])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_batches_that_do_not_enclose_it_give_a_bound_and_what_to_add(
    critical: float, verdict: str, noise: float
) -> None:
    random = np.random.default_rng(2)
    hits = []
    for _ in range(40):
        found = measured(critical, batches=BATCHES, seeds=1, noise=noise, outliers=0, random=random)
        assert found.verdict == verdict
        assert math.isnan(found.value)
        assert found.add == ((4.0, 8.0) if verdict == "below" else (8192.0, 16384.0))
        hits.append(found.low < critical < found.high)
        assert (found.low == 0) == (verdict == "below")
        assert (found.high == math.inf) == (verdict == "above")
        assert str(found).startswith(verdict)
    assert np.mean(hits) >= 0.9


def test_batches_too_near_to_each_other_tell_nothing() -> None:
    batches = [200.0, 220.0, 240.0]
    found = find_critical_batch(batches, needed(np.array(batches), 220).tolist())
    assert (found.verdict, found.low, found.high, str(found)) == ("unclear", 0, math.inf, "unclear")
    assert found.add == (50.0, 100.0, 480.0, 960.0)


def test_runs_that_did_not_reach_the_loss_are_named() -> None:
    steps = needed(BATCHES, 250)
    steps[0] = math.inf
    found = find_critical_batch(BATCHES.tolist(), steps.tolist())
    assert found.note == "did not reach the loss, so left out: 16"
    assert found.batches == tuple(BATCHES[1:])
    assert found.value == pytest.approx(250, rel=0.05)
    none = find_critical_batch([16, 32, 64], [math.inf, math.nan, math.inf])
    assert (none.verdict, none.batches, none.add) == ("unclear", (), (8.0, 128.0))


def test_fewer_than_three_batches_are_refused_by_name() -> None:
    found = find_critical_batch([16, 64, 64], [3000, 2000, 2010])
    assert (found.verdict, math.isnan(found.value)) == ("unclear", True)
    assert found.note == "3 batches or more are needed, 2 reached the loss"


def test_steps_that_do_not_fall_are_no_measurement() -> None:
    equal = find_critical_batch(BATCHES.tolist(), [500.0] * 9)
    assert equal.verdict == "below"
    assert equal.high < BATCHES[0]
    rising = find_critical_batch(BATCHES.tolist(), np.geomspace(500, 2000, 9).tolist())
    assert math.isnan(rising.value)
    assert "is the rate tuned at each batch?" in rising.note


@pytest.mark.parametrize(
    ("batches", "steps", "noise", "message"),
    [
        ([1, 2], [1.0], 0.03, "got 2 batches and 1 steps"),
        ([], [], 0.03, "got 0 batches"),
        ([0, 2, 4], [1.0, 1.0, 1.0], 0.03, "got 0; leave"),
        ([math.inf, 2], [1.0, 1.0], 0.03, "got inf"),
        ([1, 2], [1.0, -1.0], 0.03, r"got -1\.0"),
        ([1], [1.0], 0.0, r"must be positive, got 0\.0"),
    ],
)
def test_wrong_input_is_refused(batches: list[float], steps: list[float], noise: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_critical_batch(batches, steps, noise=noise)


def curve(steps: np.ndarray) -> np.ndarray:
    return 2.0 + 8.0 * (steps + 20.0) ** -0.3


def first_step(target: float) -> float:
    """The step at which the curve is at the target, solved by hand."""
    return (8.0 / (target - 2.0)) ** (1 / 0.3) - 20.0


@given(st.floats(150, 3500), st.integers(40, 400), st.sampled_from([0.0, 0.25, 0.5]))
def test_step_at_which_a_curve_reaches_its_target(step: float, points: int, octaves: float) -> None:
    steps = np.linspace(0, 4000, points)
    target = float(curve(np.array([step]))[0])
    assert first_step(target) == pytest.approx(step)
    found = steps_to_loss(steps.tolist(), curve(steps).tolist(), target, octaves=octaves)
    assert found == pytest.approx(step, rel=0.03 if points < 100 or step < 400 else 0.005)


def test_smoothing_keeps_noise_from_making_the_step_too_early() -> None:
    """Measured with noise of 0.5%: 11% too early without smoothing, within 1% with it."""
    random = np.random.default_rng(0)
    steps = np.arange(0, 4001, 10)
    raw, smooth = [], []
    for _ in range(100):
        losses = (curve(steps) * np.exp(0.005 * random.standard_normal(len(steps)))).tolist()
        raw.append(steps_to_loss(steps.tolist(), losses, 2.9, octaves=0) / first_step(2.9))
        smooth.append(steps_to_loss(steps.tolist(), losses, 2.9) / first_step(2.9))
    assert np.mean(smooth) == pytest.approx(1, abs=0.02)
    assert np.mean(raw) < 0.95
    assert np.std(smooth) < 0.05


def test_curve_that_ends_or_diverges_before_its_target_never_reaches_it() -> None:
    assert steps_to_loss([1, 2, 3], [5.0, 4.0, 3.5], 3.0) == math.inf
    assert steps_to_loss([1, 2, 3, 4], [5.0, 4.0, math.nan, 2.0], 3.0) == math.inf
    assert steps_to_loss([1, 2], [math.inf, 2.0], 3.0) == math.inf
    assert 2 < steps_to_loss([1, 2, 4, 8], [5.0, 4.0, 2.9, math.inf], 3.0, octaves=0) < 4


@pytest.mark.parametrize(
    ("steps", "losses", "target", "octaves", "message"),
    [
        ([1, 2], [3.0], 2.0, 0.25, "got 2 steps and 1 losses"),
        ([], [], 2.0, 0.25, "got 0 steps"),
        ([2, 1], [3.0, 2.9], 2.0, 0.25, "steps must ascend from 0 or more, got 2, 1"),
        ([1, 1], [3.0, 2.9], 2.0, 0.25, "sort them, each once"),
        ([-1, 1], [3.0, 2.9], 2.0, 0.25, "ascend from 0"),
        ([1, math.nan], [3.0, 2.9], 2.0, 0.25, "got 1, nan"),
        ([1, 2], [3.0, 0.0], 2.0, 0.25, r"losses must be positive, got 0\.0"),
        ([1, 2], [3.0, 2.9], math.nan, 0.25, "target must be positive and octaves not negative, got nan"),
        ([1, 2], [3.0, 2.9], 2.0, -1.0, r"got 2\.0 and -1\.0"),
        ([1, 2], [3.0, 2.9], 3.5, 0.25, "the first loss, 3 at step 1, is as low as 3.5"),
    ],
)
def test_wrong_curve_is_refused(
    steps: list[float], losses: list[float], target: float, octaves: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        steps_to_loss(steps, losses, target, octaves=octaves)


@given(st.lists(st.floats(0.5, 50), min_size=3, max_size=12, unique=True), st.integers(0, 50))
def test_smoothing_is_the_line_through_the_window(steps: list[float], seed: int) -> None:
    """Against numpy's polynomial fit, point by point."""
    xs = np.sort(np.array(steps))
    assume(np.diff(np.log1p(xs)).min() > 0.01)
    losses = 10 - np.cumsum(np.random.default_rng(seed).uniform(0.1, 0.3, len(xs)))
    x, y = np.log1p(xs), np.log(losses)
    half = math.log(2)  # a window of two octaves
    smooth = []
    for at in x:
        near = np.abs(x - at) <= half
        line = np.polyfit(x[near] - at, y[near], 1) if near.sum() > 2 else [0, y[x == at][0]]
        smooth.append(line[1])
    goal = (smooth[-2] + smooth[-1]) / 2
    assume(min(smooth[:-1]) > goal > smooth[-1])
    expected = math.expm1((x[-2] + x[-1]) / 2)
    assert steps_to_loss(xs.tolist(), losses.tolist(), math.exp(goal), octaves=2.0) == pytest.approx(expected, rel=1e-6)
