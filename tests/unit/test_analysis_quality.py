"""Metrics of transfer on planted truths, and what the reference's figures say, method by method."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mup.analysis.optimum import Optimum, find_optimum
from lightning_mup.analysis.quality import SizesEstimate, asymptotic_penalty, fit_error, robustness, transfer_quality
from lightning_mup.analysis.runs import read_runs
from lightning_mup.analysis.shift import Repair, Shift
from lightning_mup.analysis.transfer import transfer_table

from .transfer_runs import Planted, write_runs

SIZES = (64, 128, 256, 512, 1024)
NOISE = 0.002


def optima_of(
    optimum: Mapping[int, float],
    curvature: Mapping[int, float],
    *,
    floor: float = 1.2,
    noise: float = NOISE,
    seed: int = 0,
) -> dict[int, Optimum]:
    """Sweeps over whole octaves, two seeds each, of quadratic valleys in log loss."""
    random = np.random.default_rng(seed)
    found = {}
    for size, centre in optimum.items():
        xs = np.repeat(np.arange(-4, 5) + round(centre), 2).astype(float)
        log_loss = floor + curvature[size] * (xs - centre) ** 2 + noise * random.standard_normal(len(xs))
        found[size] = find_optimum(xs.tolist(), np.exp(log_loss).tolist(), noise=max(noise, 1e-5))
    return found


def flat(value: float) -> dict[int, float]:
    return dict.fromkeys(SIZES, value)


# -- error of the power law -------------------------------------------------------------------------------------------


def scatter_about_a_line(optima: Mapping[int, Optimum], truth: Mapping[int, float]) -> float:
    """E of the true optima: sqrt(S / (S - 2)) times the weighted RMS distance to their own best line."""
    x = np.log2(np.array(list(truth), dtype=float))
    y = np.array(list(truth.values()))
    weight = np.array([optima[size].deviation for size in truth]) ** -2.0
    slope, offset = np.polyfit(x, y, 1, w=np.sqrt(weight))
    return float(np.sqrt(len(x) / (len(x) - 2) * np.average((y - slope * x - offset) ** 2, weights=weight)))


def kinked(height: float) -> dict[int, float]:
    """Optima on a power law of slope -1, but for the middle size, which is `height` octaves off."""
    return {n: -7.0 - math.log2(n / 64) + (height if n == 256 else 0.0) for n in SIZES}


@pytest.mark.parametrize("height", [0.0, 0.3, 1.0])
def test_error_of_the_power_law_covers_the_planted_one(height: float) -> None:
    covered, values, truths = 0, [], []
    for seed in range(60):
        optima = optima_of(kinked(height), flat(0.02), seed=seed)
        found, truth = fit_error(optima), scatter_about_a_line(optima, kinked(height))
        covered += found.low <= truth <= found.high
        values.append(found.value)
        truths.append(truth)
    assert covered >= 55
    assert abs(np.median(values) - np.median(truths)) < 0.06
    # A constant optimum's error says nothing of a power law's: the wrong reading fails the same test.
    spread = float(np.std([kinked(height)[n] for n in SIZES], ddof=2))
    assert spread > np.median(truths) + 0.2


def test_error_without_noise_is_that_of_the_points() -> None:
    optima = optima_of(kinked(0.7), flat(0.02), noise=0.0)
    assert fit_error(optima).value == pytest.approx(scatter_about_a_line(optima, kinked(0.7)), rel=0.05)
    exact = fit_error(optima_of(kinked(0.0), flat(0.02), noise=0.0))
    assert exact.low == 0 == exact.value < exact.high < 0.2


# -- robustness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [-1.0, 0.0, 0.5])
def test_exponent_of_an_errors_price_is_covered(kappa: float) -> None:
    curvature = {n: 0.02 * (n / 256) ** kappa for n in SIZES}
    found = [robustness(optima_of(flat(-7.3), curvature, seed=seed)) for seed in range(60)]
    # The price in nats of one octave, in float64 from the planted valleys.
    price = {n: math.exp(1.2) * math.expm1(curvature[n]) for n in SIZES}
    truth = float(np.polyfit(np.log2(SIZES), np.log2(list(price.values())), 1)[0])
    assert truth == pytest.approx(kappa, abs=0.02)
    covered = sum(one.low <= truth <= one.high for one in found)
    assert covered >= 54
    assert abs(np.median([one.value for one in found]) - truth) < 0.1
    wrong = sum(one.low <= truth + 0.6 <= one.high for one in found)
    assert wrong < 30


def test_price_is_in_nats_of_loss() -> None:
    """Valleys of one shape in log loss: the price falls with the loss itself."""
    found = {}
    for n in SIZES:
        found |= optima_of({n: -7.0}, {n: 0.02}, floor=2.0 - 0.2 * math.log2(n / 64), noise=0.0)
    assert robustness(found).value == pytest.approx(-0.2 / math.log(2), abs=0.01)


# -- the limit of what is lost ----------------------------------------------------------------------------------------

limits = st.floats(0.005, 0.5)
rates = st.floats(0.25, 2.0)


@given(limits, rates)
@settings(max_examples=30, deadline=None)
def test_limit_of_a_saturating_loss_is_covered(limit: float, rate: float) -> None:
    lost = {n: limit * (1 - (64 / n) ** rate) ** 2 for n in SIZES}
    found = asymptotic_penalty(lost, noise=0.01 * limit, base=64)
    assert found.low <= limit <= found.high
    assert found.low > max(lost.values()) - 0.03 * limit  # it is beyond the largest size


@given(st.floats(-0.2, 0.2), st.sampled_from([-0.1, 0.1]), st.floats(0.5, 2.0))
@settings(max_examples=30, deadline=None)
def test_limit_of_a_difference_is_covered(limit: float, change: float, rate: float) -> None:
    lost = {n: limit + change * (64 / n) ** rate for n in (64, 128, 256, 512, 1024, 2048)}
    found = asymptotic_penalty(lost, noise=0.0005)
    assert found.low <= limit <= found.high


def test_limit_with_noise_is_covered() -> None:
    random, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(300):
        limit, rate = float(random.uniform(0.01, 0.1)), float(random.uniform(0.5, 2))
        lost = {n: limit * (1 - (64 / n) ** rate) ** 2 + 0.002 * random.standard_normal() for n in SIZES}
        found = asymptotic_penalty(lost, noise=0.002, base=64)
        covered += found.low <= limit <= found.high
        widths.append(found.high - found.low)
    assert covered >= 280
    assert np.median(widths) < 0.1


def test_growth_without_limit_is_told() -> None:
    growing = {n: 0.01 * math.log2(n / 64) ** 2 for n in SIZES}  # the optimum follows a power law
    found = asymptotic_penalty(growing, noise=0.0003, base=64)
    assert (found.value, found.high) == (math.inf, math.inf)
    assert found.low > growing[1024]
    assert "grows with size, no limit seen" in found.note
    unsure = asymptotic_penalty(growing, noise=0.02, base=64)
    assert unsure.high == math.inf > unsure.value
    falling = asymptotic_penalty({n: 0.1 - 0.02 * math.log2(n / 64) for n in SIZES}, noise=0.0003)
    assert (falling.value, falling.low) == (-math.inf, -math.inf)


def test_nothing_lost_has_a_limit_about_nothing() -> None:
    random = np.random.default_rng(1)
    found = [
        asymptotic_penalty({n: 0.002 * random.standard_normal() for n in SIZES}, noise=0.002, base=64)
        for _ in range(200)
    ]
    assert sum(one.low <= 0 <= one.high for one in found) >= 186
    assert sum(math.isfinite(one.high) for one in found) >= 186


def test_divergence_and_missing_losses() -> None:
    lost = {64: 0.0, 128: 0.01, 256: math.inf, 512: 0.03}
    found = asymptotic_penalty(lost, noise=0.001, base=64)
    assert (found.value, found.note) == (math.inf, "diverges at 256")
    gap = asymptotic_penalty({**lost, 256: math.nan}, noise={128: 0.001, 512: 0.001}, base=64)
    assert gap.note.endswith("no loss known, so left out: 256")
    assert gap.sizes == (64, 128, 512)
    assert 0.03 < gap.low < gap.high < math.inf


# -- refusals ---------------------------------------------------------------------------------------------------------


def open_ended(size: int) -> dict[int, Optimum]:
    return {size: find_optimum([-9, -8, -7], [3.2, 3.1, 3.0])}


def test_too_few_bracketed_sizes_are_refused() -> None:
    two = optima_of({64: -7.0, 128: -7.0}, {64: 0.02, 128: 0.02}) | open_ended(256)
    for found in (fit_error(two), robustness(two), fit_error({}), robustness(open_ended(64))):
        assert math.isnan(found.value)
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert "too few" in found.note
        assert str(found) == found.note
    assert "not bracketed, so left out: 256" in fit_error(two).note
    for found in (
        asymptotic_penalty({64: 0.0, 128: 0.01}, noise=0.001, base=64),
        asymptotic_penalty({64: 0.0, 128: 0.01}, noise=0.001),
        asymptotic_penalty({64: 0.0, 128: 0.01, 256: math.nan}, noise=0.001, base=64),
        asymptotic_penalty({64: 0.0, 128: 0.01, 256: 0.02}, noise={128: 0.001}, base=64),
        asymptotic_penalty({}, noise=0.001),
    ):
        assert math.isnan(found.value)
        assert found.note.startswith("too few")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robustness({}, error=0.0), "error must be positive and finite, got 0.0; 1 is a factor of two"),
        (lambda: asymptotic_penalty({0: 0.1}, noise=0.1), "sizes must be positive, got 0"),
        (lambda: asymptotic_penalty({64: 0.1}, noise=-1.0), "noise must be positive, got -1.0 at 64"),
        (lambda: asymptotic_penalty({64: 0.1}, noise=1.0, base=128), "no size is above base=128, got 64"),
        (lambda: Shift(128, 64, 1.0, 1.2, 1.1), "size must be above base > 0, got base=128 and size=64"),
        (lambda: Shift(64, 128, 0.0, 1.2, 1.1), "multiplier and tolerance must be positive, got 0.0"),
        (lambda: Shift(64, 128, math.nan, 1.2, 1.1), "multiplier and tolerance must be positive, got nan"),
        (lambda: Shift(64, 128, 1.0, 1.0, 1.1), "best_loss must be positive and at most loss, got 1.1 and 1.0"),
        (
            lambda: Repair(Shift(64, 128, 1.0, 1.2, 1.1), Shift(64, 256, 1.0, 1.2, 1.1)),
            "a variant must be compared between the same sizes",
        ),
    ],
)
def test_what_makes_no_sense_is_an_error(call: Any, message: str) -> None:  # noqa: ANN401 - a thunk
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()


# -- a group of runs --------------------------------------------------------------------------------------------------


def test_quality_of_planted_runs(tmp_path: Path) -> None:
    sizes = (64, 128, 256, 512)
    write_runs(tmp_path / "mup", Planted(sizes=sizes))
    write_runs(tmp_path / "sp", Planted("sp", slope=-0.5, sizes=sizes), seed=1)
    mup, sp = transfer_table(read_runs(tmp_path)).groups
    stands, moves = transfer_quality(mup), transfer_quality(sp)
    for found in (stands, moves):
        assert found.fit_error.low == 0  # both are power laws
        assert found.robustness.low < -0.05 / math.log(2) < found.robustness.high  # the loss falls as n^-0.072
    assert (stands.drift.verdict, moves.drift.verdict) == ("stands", "moves")
    assert stands.penalty.low < 0.01
    assert stands.penalty.value < 0.02
    assert moves.penalty.high == math.inf
    assert moves.penalty.low > 0.05
    assert str(moves).count("\n") == 3
    unbracketed = Planted("ntk", slope=-2.0, sizes=sizes, log2_lr=(-8, -7, -6, -5))
    write_runs(tmp_path / "ntk", unbracketed)
    (refused,) = [g for g in transfer_table(read_runs(tmp_path)).groups if g.rules == "ntk"]
    for estimate in (transfer_quality(refused).fit_error, transfer_quality(refused).penalty):
        assert math.isnan(estimate.value)


def test_estimates_print_with_their_interval() -> None:
    assert str(SizesEstimate(0.5, -1.0, math.inf)) == "0.5 [-1, inf]"


# -- the reference's figures ------------------------------------------------------------------------------------------

PAPER = json.loads((Path(__file__).parents[1] / "golden" / "paper_transfer.json").read_text())
METHODS = ("Muon", "Muon-Adam", "AdaMuon", "Shampoo", "#Shampoo", "#Shampoo2", "SOAP")


def width_row(method: str, rules: str, variant: str = "plain") -> dict[str, Any]:
    (row,) = [r for r in PAPER["width"]["rows"] if (r["method"], r["rules"], r["variant"]) == (method, rules, variant)]
    return dict(row)


def shift_of(method: str, rules: str, variant: str = "plain") -> Shift:
    row = width_row(method, rules, variant)
    sizes: Sequence[int] = PAPER["width"]["sizes"]
    return Shift(sizes[0], sizes[-1], row["best_multiplier"], row["losses"][-1], row["best_loss"])


@pytest.mark.parametrize(
    ("method", "rules", "variant", "direction"),
    [
        # Section f.7, 1: updates of fixed RMS drift up by 2.8 to 4; 2: unblocked SOAP drifts down to 0.35.
        ("Muon", "muP", "plain", "stands"),
        ("Muon-Adam", "muP", "plain", "stands"),
        ("AdaMuon", "muP", "plain", "rises"),
        ("Shampoo", "muP", "plain", "stands"),
        ("#Shampoo", "muP", "plain", "rises"),
        ("#Shampoo2", "muP", "plain", "rises"),
        ("SOAP", "muP", "plain", "falls"),
        # Under SP whatever has a part of Adam's falls; Muon's own update needs no rule between square matrices.
        ("Muon", "SP", "plain", "stands"),
        ("Muon-Adam", "SP", "plain", "falls"),
        ("AdaMuon", "SP", "plain", "falls"),
        ("Shampoo", "SP", "plain", "stands"),
        ("#Shampoo", "SP", "plain", "falls"),
        ("#Shampoo2", "SP", "plain", "falls"),
        ("SOAP", "SP", "plain", "falls"),
        # Figure 3.
        ("Shampoo", "muP", "blocked", "stands"),
        ("#Shampoo", "muP", "blocked", "stands"),
        ("#Shampoo2", "muP", "blocked", "stands"),
        ("SOAP", "muP", "blocked", "stands"),
        ("Shampoo", "SP", "blocked", "falls"),
        ("#Shampoo", "SP", "blocked", "falls"),
        ("#Shampoo2", "SP", "blocked", "falls"),
        ("SOAP", "SP", "blocked", "falls"),
        ("AdaMuon", "none", "normalized", "stands"),
        ("#Shampoo", "none", "normalized", "stands"),
        ("#Shampoo2", "none", "normalized", "stands"),
        ("SOAP", "none", "normalized", "stands"),
    ],
)
def test_who_drifts_and_which_way(method: str, rules: str, variant: str, direction: str) -> None:
    found = shift_of(method, rules, variant)
    assert found.direction == direction
    assert found.slope == pytest.approx(math.log2(width_row(method, rules, variant)["best_multiplier"]) / 5)
    assert str(found).startswith(f"{direction}, slope ")


def test_every_row_of_the_figures_is_read() -> None:
    assert len(PAPER["width"]["rows"]) == 26
    assert len(PAPER["depth"]["rows"]) == 14
    assert all(len(row["losses"]) == 6 for row in PAPER["width"]["rows"])
    assert all(len(row["losses"]) == 7 for row in PAPER["depth"]["rows"])


@pytest.mark.parametrize("method", METHODS)
def test_sp_is_worse_at_large_width(method: str) -> None:
    mup, sp = width_row(method, "muP"), width_row(method, "SP")
    for at in (4, 5):  # 2048 and 4096
        assert sp["losses"][at] > mup["losses"][at]
    found = Repair(shift_of(method, "SP"), shift_of(method, "muP"))
    assert found.cost < 0
    # Tuned at 4096, it is worse or as good as muP: #Shampoo differs by less than the pictures can be read to.
    assert found.tuned_cost < 0.0005


def test_base_sizes_agree_between_sp_and_mup() -> None:
    for method in METHODS:
        assert width_row(method, "muP")["losses"][0] == width_row(method, "SP")["losses"][0]


@pytest.mark.parametrize("method", ["#Shampoo", "#Shampoo2", "SOAP"])
def test_blocking_repairs_the_drift_but_costs_loss(method: str) -> None:
    found = Repair(shift_of(method, "muP"), shift_of(method, "muP", "blocked"))
    assert found.repairs
    assert abs(found.after.slope) < abs(found.before.slope)
    assert found.cost > 0.02
    assert found.tuned_cost > 0.015
    # The cost grows with width: blocks of 128 are all of the narrowest model.
    plain, blocked = width_row(method, "muP")["losses"], width_row(method, "muP", "blocked")["losses"]
    costs = np.array(blocked) - np.array(plain)
    assert costs[0] == 0
    assert costs[-1] > 1.5 * costs[1] > 0


def test_blocking_has_nothing_to_repair_where_nothing_drifts() -> None:
    found = Repair(shift_of("Shampoo", "muP"), shift_of("Shampoo", "muP", "blocked"))
    assert not found.repairs
    assert "nothing to repair" in str(found)
    assert found.cost > 0.05


def test_blocking_does_not_repair_sp() -> None:
    for method in ("#Shampoo", "#Shampoo2", "SOAP"):
        found = Repair(shift_of(method, "SP"), shift_of(method, "SP", "blocked"))
        assert not found.repairs
        assert "does not repair the drift" in str(found)


@pytest.mark.parametrize("method", ["AdaMuon", "#Shampoo", "#Shampoo2", "SOAP"])
def test_spectral_normalization_repairs_without_loss(method: str) -> None:
    found = Repair(shift_of(method, "muP"), shift_of(method, "none", "normalized"))
    assert found.repairs
    assert abs(found.after.slope) < abs(found.before.slope)
    assert found.cost < 0  # with the base's value it is better at 4096
    assert found.tuned_cost < 0.004  # and tuned there as good; SOAP, which Adam's readout helps, loses 0.0037


def test_loss_lost_shrinks_but_for_shampoo2() -> None:
    """#Shampoo2 loses only 0.003 at 4096 though it drifts: its valley is flat. Repairs do not make that smaller."""
    for method in ("#Shampoo", "SOAP"):
        assert shift_of(method, "muP", "blocked").lost < shift_of(method, "muP").lost
    for method in ("AdaMuon", "#Shampoo", "SOAP"):
        assert shift_of(method, "none", "normalized").lost < shift_of(method, "muP").lost
    kept = shift_of("#Shampoo2", "muP").lost
    assert kept == pytest.approx(0.0031)
    assert shift_of("#Shampoo2", "muP", "blocked").lost > shift_of("#Shampoo2", "none", "normalized").lost > kept


def depth_losses(method: str, rules: str) -> list[float]:
    (row,) = [r for r in PAPER["depth"]["rows"] if (r["method"], r["rules"]) == (method, rules)]
    return list(row["losses"])


@pytest.mark.parametrize("method", METHODS)
def test_depth_transfers_with_branches_over_depth(method: str) -> None:
    transferred, plain = depth_losses(method, "alpha=1"), depth_losses(method, "SP")
    assert all(np.diff(transferred) < 0)
    assert plain[-1] > transferred[-1]
    sizes = PAPER["depth"]["sizes"]
    for multiplier in PAPER["depth"]["best_multiplier_range"]:
        assert Shift(sizes[0], sizes[-1], multiplier, transferred[-1], transferred[-1]).direction == "stands"
    worse = np.array(plain) - np.array(transferred)
    assert worse[-1] > worse[1]


def test_penalty_of_sp_over_mup_grows_in_the_figures() -> None:
    """The difference of two parametrizations at the base's value, as the third metric takes it."""
    sizes = PAPER["width"]["sizes"]
    for method in ("Muon-Adam", "AdaMuon", "#Shampoo", "SOAP"):
        lost = np.array(width_row(method, "SP")["losses"]) - np.array(width_row(method, "muP")["losses"])
        found = asymptotic_penalty(dict(zip(sizes, lost.tolist(), strict=True)), noise=0.002)
        assert found.value == found.high == math.inf, method
