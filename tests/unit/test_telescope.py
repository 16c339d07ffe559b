"""Telescoping planner: equal costs, narrowing grids, and where it lands when the optimum drifts as O(1/width)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.analysis.optimum import Optimum, find_optimum
from lightning_mup.telescope import FEWEST, Telescope, follow, telescope

BASE, NOTCH = 64, 0.5
Loss = Callable[[int, float], float]


def cost(power: int) -> Callable[[int], float]:
    return lambda width: 1e6 * float(width) ** power


# -- what is planned --------------------------------------------------------------------------------------------------


@given(
    doublings=st.integers(3, 9),
    power=st.sampled_from([2, 3, 4]),
    radius=st.floats(1.0, 4.0),
    per_side=st.integers(2, 8),
    share=st.floats(0.05, 1.0),
    drift=st.floats(0.2, 3.0),
)
def test_every_plan_keeps_its_promises(
    doublings: int, power: int, radius: float, per_side: int, share: float, drift: float
) -> None:
    target, step = BASE * 2**doublings, radius / per_side
    flops = cost(power)
    if (2 * per_side + 1) * flops(BASE) > share * flops(target):
        with pytest.raises(ValueError, match="may be spent; give share="):
            telescope(BASE, target, flops, centre=-6, radius=radius, step=step, share=share, drift=drift)
        return
    made = telescope(BASE, target, flops, centre=-6, radius=radius, step=step, share=share, drift=drift)
    assert made.cost == pytest.approx(sum((2 * level.radius + 1) * flops(level.width) for level in made.levels))
    assert made.cost <= share * flops(target) * (1 + 1e-6)
    assert [level.width for level in made.levels] == [BASE * 2**i for i in range(len(made.levels))]
    assert made.levels[0].values(-6.0) == pytest.approx(np.linspace(-6 - radius, -6 + radius, 2 * per_side + 1))
    for i, (before, level) in enumerate(zip(made.levels, made.levels[1:], strict=False), 1):
        assert FEWEST <= level.runs <= made.levels[0].runs
        assert level.radius * level.step >= drift / 2**i + before.step / 4 - 1e-9  # it covers what can remain
        assert level.step >= step / 4 - 1e-12
    left = share * flops(target) - made.cost
    deeper = BASE * 2 ** len(made.levels)
    if len(made.levels) == 1 and deeper <= target:  # no second level, because it could not have been paid
        assert left < FEWEST * flops(deeper)


def test_levels_cost_the_same_where_the_base_grid_is_fine() -> None:
    flops, target = cost(2), BASE * 64
    part = 0.2 * flops(target) / 4
    per_side = int((part / flops(BASE) - 1) // 2)
    made = telescope(BASE, target, flops, centre=-6, radius=3, step=3 / per_side, share=0.2, drift=1.0)
    assert len(made.levels) == 4  # the widths whose three runs an equal part pays for
    for level in made.levels:
        assert 0.85 * part < level.cost < 1.1 * part
    spans = [level.radius * level.step for level in made.levels]
    assert all(late < early for early, late in itertools.pairwise(spans))
    assert [level.runs for level in made.levels] == sorted((level.runs for level in made.levels), reverse=True)


def test_the_cost_grows_as_the_logarithm_of_the_width() -> None:
    """A final run of cost C at width N costs O(C log N) to tune, when each level costs as much as the final run."""
    for doublings in (4, 6, 8):
        target = BASE * 2**doublings
        made = telescope(BASE, target, cost(2), centre=-6, radius=3, step=0.02, share=0.5 * doublings, drift=1.0)
        assert made.cost <= 0.5 * doublings * cost(2)(target)
        assert len(made.levels) >= doublings - 1


def test_a_mapping_of_costs_is_a_function_of_width() -> None:
    widths = {BASE * 2**i: cost(2)(BASE * 2**i) for i in range(7)}
    of_mapping = telescope(BASE, BASE * 64, widths, centre=-6)
    assert of_mapping == telescope(BASE, BASE * 64, cost(2), centre=-6)
    assert hash(of_mapping) == hash(telescope(BASE, BASE * 64, cost(2), centre=-6))


def test_a_target_between_doublings_and_a_target_that_is_the_base() -> None:
    assert [level.width for level in telescope(512, 1536, cost(4), centre=-7, share=0.2).levels] == [512]
    assert len(telescope(64, 64, cost(2), centre=-7, share=5).levels) == 1
    assert [level.width for level in telescope(64, 200, cost(2), centre=-7, share=5).levels] == [64, 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": 0}, "base must be a width from 1"),
        ({"target": 32}, "base must be a width from 1 to the target's, got base 64 and target 32"),
        ({"centre": math.nan}, "centre must be log2"),
        ({"step": 0.0}, "0 < step <= radius"),
        ({"step": 3.0}, "0 < step <= radius"),
        ({"radius": math.inf}, "0 < step <= radius"),
        ({"share": 0.0}, "share and drift must be positive"),
        ({"share": math.nan}, "share and drift must be positive"),
        ({"drift": -1.0}, "share and drift must be positive"),
        ({"flops": lambda width: -1.0}, "flops of one run at width 64 must be positive and finite, got -1.0"),
        ({"flops": lambda width: math.inf}, "must be positive and finite, got inf"),
        ({"flops": {64: 1.0}}, "flops has no cost of width 128; it has 64"),
        ({"share": 1e-6}, r"5 runs at width 64 cost 0.1% of the target's run"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"base": BASE, "target": BASE * 64, "flops": cost(2), "centre": -6.0} | changes
    with pytest.raises(ValueError, match=message):
        telescope(settings.pop("base"), settings.pop("target"), settings.pop("flops"), **settings)  # type: ignore[arg-type]


# -- where it lands ---------------------------------------------------------------------------------------------------


class Valleys:
    """Noisy losses over widths, whose optimum drifts as ``a / width``; counts what it is asked for."""

    def __init__(self, *, limit: float, drift: float, skew: float, noise: float, power: int, seed: int) -> None:
        self.limit, self.drift, self.skew, self.noise, self.power = limit, drift, skew, noise, power
        self.random = np.random.default_rng(seed)
        self.flops = 0.0

    def optimum(self, width: int) -> float:
        return self.limit + self.drift * BASE / width

    def __call__(self, width: int, x: float) -> float:
        self.flops += cost(self.power)(width)
        far = x - self.optimum(width)
        height = 0.03 * far**2 * math.exp(self.skew * far / 4)
        floor = 2.5 + 20 / width**0.5
        return math.inf if far > 3.5 else floor * math.exp(height + self.noise * self.random.standard_normal())


def land(made: Telescope, valleys: Valleys) -> tuple[Optimum, tuple[Optimum, ...]]:
    found = follow(made, valleys)
    return made.at_target(found), found


def tune_at_base(made: Telescope, valleys: Valleys) -> float:
    """What one does without: the base's grid alone, at the same price, each value as often as the share pays."""
    times = max(1, int(made.share * made.target_flops // made.levels[0].cost))
    values = [x for x in made.levels[0].values(made.centre) for _ in range(min(times, 20))]
    return find_optimum(values, [valleys(BASE, x) for x in values]).log2_value


def _planted(trials: int, power: int, doublings: int) -> list[tuple[Telescope, Valleys]]:
    random = np.random.default_rng(power)
    pairs = []
    for seed in range(trials):
        drift = float(random.choice([-1, 1]) * random.uniform(0.8, 1.0))
        valleys = Valleys(
            limit=float(random.uniform(-6.5, -5.5)),
            drift=drift,
            skew=float(random.uniform(0, 1)),
            noise=0.002,
            power=power,
            seed=seed,
        )
        made = telescope(BASE, BASE * 2**doublings, cost(power), centre=-6, radius=2, step=NOTCH, share=0.2, drift=1.0)
        pairs.append((made, valleys))
    return pairs


@pytest.mark.parametrize(("power", "doublings"), [(2, 5), (2, 6), (4, 4)])
def test_it_lands_within_half_a_notch_for_a_fifth_of_the_target(power: int, doublings: int) -> None:
    """The notch is the base grid's spacing, half an octave; tuning at the base alone misses by more than half."""
    errors, missed, covered = [], [], 0
    for made, valleys in _planted(40, power, doublings):
        best, _ = land(made, valleys)
        truth = valleys.optimum(made.target)
        assert valleys.flops <= 0.2 * cost(power)(made.target)
        errors.append(abs(best.log2_value - truth))
        covered += best.low <= truth <= best.high
        missed.append(abs(tune_at_base(made, valleys) - truth))
    assert np.mean(np.array(errors) <= NOTCH / 2) >= 0.95
    assert np.mean(np.array(missed) <= NOTCH / 2) <= 0.05  # the wrong way
    assert np.median(errors) < 0.3 * np.median(missed)
    assert covered >= 0.85 * len(errors)


def test_without_noise_it_lands_closer_with_a_larger_share() -> None:
    errors = []
    for share in (0.05, 0.2, 0.8):
        valleys = Valleys(limit=-6.3, drift=1.0, skew=0.0, noise=1e-9, power=2, seed=0)
        made = telescope(BASE, BASE * 64, cost(2), centre=-6, radius=2, step=NOTCH, share=share, drift=1.0)
        _, found = land(made, valleys)
        errors.append(abs(found[-1].log2_value - valleys.optimum(made.target)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


def test_one_level_is_the_base_give_or_take_the_drift() -> None:
    made = telescope(BASE, BASE * 8, cost(4), centre=-6, radius=2, step=0.5, share=0.005, drift=1.0)
    assert len(made.levels) == 1
    best, (found,) = land(made, Valleys(limit=-6, drift=0, skew=0, noise=0.001, power=4, seed=0))
    assert best.log2_value == pytest.approx(found.log2_value, abs=0.05)
    assert best.high - best.low >= 2 * 1.96 * 0.5 * (1 - 1 / 8) * 0.99


def test_where_nothing_is_bracketed_nothing_is_claimed() -> None:
    made = telescope(BASE, BASE * 64, cost(2), centre=-6, radius=1, step=0.5, share=0.2)
    found = follow(made, lambda width, x: 3.0 - 0.2 * x if x < 0 else math.inf, max_extend=0)
    best = made.at_target(found)
    assert (best.low, best.high, best.bracketed) == (-math.inf, math.inf, False)
    assert "no level's grid encloses" in best.note


def test_a_level_that_diverges_ends_the_telescope() -> None:
    made = telescope(BASE, BASE * 64, cost(2), centre=-6)
    found = follow(made, lambda width, x: math.inf if width > BASE else 3 + 0.1 * (x + 6) ** 2)
    assert [math.isnan(best.log2_value) for best in found] == [False, True]
    assert made.at_target(found).log2_value == pytest.approx(-6, abs=0.1)
    with pytest.raises(ValueError, match="give the optima of 1 to"):
        made.at_target([])


@given(centre=st.floats(-20, 5), radius=st.integers(1, 4), eighths=st.integers(1, 24))
def test_a_levels_grid_stands_around_the_optimum_found(centre: float, radius: int, eighths: int) -> None:
    level = telescope(BASE, BASE * 64, cost(2), centre=0, radius=radius * eighths / 16, step=eighths / 16).levels[0]
    grid = level.grid("lr", centre)
    values = [grid.log2(k) for k in grid.first(centre=2.0**centre)]
    assert len(values) == level.runs
    assert values[level.radius] == pytest.approx(centre, abs=level.step / 16 + 1e-9)
    assert np.diff(values) == pytest.approx(level.step)
