from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_mup.analysis.coordinate import (
    Coordinate,
    CoordinateReport,
    Kind,
    fit_slopes,
    load_coordinates,
    merge_blocks,
    save_coordinates,
)
from lightning_mup.analysis.plots import plot_coordinates
from lightning_mup.analysis.updates import Yardstick, as_matrices, spectral_norm
from lightning_mup.core.base import Base
from lightning_mup.core.infer import infer
from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.rules import find_rules
from lightning_mup.core.scaling import Choices, plan
from lightning_mup.core.spec import Dim, ParamSpec, Role

WIDTHS = (64, 128, 256, 512)


def planted(
    slope: float, noise: float = 0.0, layer: str = "fc", kind: Kind = "output", step: int = 1
) -> list[Coordinate]:
    draws = torch.randn(3, len(WIDTHS), generator=torch.Generator().manual_seed(1))
    return [
        Coordinate(n, seed, step, kind, layer, 0.3 * n**slope * math.exp(noise * float(draws[seed, i])), "hidden")
        for i, n in enumerate(WIDTHS)
        for seed in range(3)
    ]


@given(st.floats(-2, 2))
def test_exact_slope_is_recovered(slope: float) -> None:
    (found,) = fit_slopes(planted(slope)).slopes
    assert found.slope == pytest.approx(slope, abs=1e-9)
    assert found.low == pytest.approx(found.high, abs=1e-6)
    assert found.passed == (abs(found.slope) <= 0.1)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1.0])
def test_interval_covers_the_planted_slope(slope: float) -> None:
    (found,) = fit_slopes(planted(slope, noise=0.1)).slopes
    assert found.low < slope < found.high
    assert 0.05 < found.high - found.low < 0.3  # 2 x 2.23 x 0.1 / (sqrt(12) x std of log width 0.775) = 0.17


def test_verdict_names_the_layers_and_their_worst_step() -> None:
    records = planted(0.0) + planted(0.05, layer="a") + planted(0.6, layer="a", step=2) + planted(-0.9, layer="b")
    report = fit_slopes(records + planted(0.0, layer="b", step=2))
    assert not report.passed
    assert [(s.layer, s.step, round(s.slope, 2)) for s in report.failed] == [("b", 1, -0.9), ("a", 2, 0.6)]
    assert "FAIL: 2 of 5 slopes" in report.verdict()
    assert "b -0.90, a +0.60" in report.verdict()
    verdicts = [line.split()[-1] for line in report.table().splitlines()[2:]]
    assert verdicts == ["pass", "FAIL", "FAIL"]


def test_long_verdicts_are_cut_but_the_table_is_not() -> None:
    report = fit_slopes(record for i in range(9) for record in planted(0.5 + i / 100, layer=f"layer{i}"))
    assert report.verdict().endswith("and 3 more")
    assert all(f"layer{i}" in report.table() for i in range(9))


def replace_values(records: Iterable[Coordinate], values: dict[int, float]) -> list[Coordinate]:
    return [Coordinate(r.size, r.seed, r.step, r.kind, r.layer, values.get(r.size, r.value)) for r in records]


@pytest.mark.parametrize(
    ("values", "note", "passed"),
    [
        (dict.fromkeys(WIDTHS, 0.0), "no change", True),
        ({64: 0.0}, "no change at 64", False),
        ({256: math.inf, 512: math.nan}, "not finite at 256, 512", False),
    ],
)
def test_what_has_no_logarithm_is_reported(values: dict[int, float], note: str, passed: bool) -> None:
    report = fit_slopes(replace_values(planted(0.0), values))
    assert (report.slopes[0].note, report.passed) == (note, passed)
    assert math.isnan(report.slopes[0].slope)
    assert note in report.table()


def test_a_failure_without_a_slope_is_the_worst() -> None:
    broken = replace_values(planted(0.0, layer="broken"), {512: math.inf})
    report = fit_slopes(planted(0.9, layer="steep") + broken)
    assert [s.layer for s in report.failed] == ["broken", "steep"]


def test_a_layer_that_is_missing_at_one_size_fails() -> None:
    report = fit_slopes(planted(0.0) + [r for r in planted(0.0, layer="late") if r.size > 64])
    assert [(s.layer, s.note) for s in report.failed] == [("late", "missing at 64")]


def test_two_points_give_no_interval() -> None:
    (found,) = fit_slopes([Coordinate(n, 0, 1, "output", "fc", 1.0) for n in (1, 2)]).slopes
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_refused_input() -> None:
    with pytest.raises(ValueError, match=r"two sizes or more, got \[64\]; give several depths"):
        fit_slopes([r for r in planted(0.0) if r.size == 64], size="depth")
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        fit_slopes(planted(0.0), tolerance=0)


def names(layers: Iterable[str], size: int) -> list[Coordinate]:
    return [Coordinate(size, 0, 1, "output", layer, 1.0) for layer in layers]


def test_only_block_numbers_that_vary_are_merged() -> None:
    records = [r for n in (2, 3) for r in names([f"net.0.{i}.fc" for i in range(n)] + ["net.2", "head.0.fc"], n)]
    assert {r.layer for r in merge_blocks(records)} == {"net.0.*.fc", "net.2", "head.0.fc"}


def test_numbers_below_merged_numbers_stay_apart() -> None:
    records = [r for n in (1, 2) for r in names([f"layers.{i}.mlp.{j}" for i in range(n) for j in (0, 2)], n)]
    assert {r.layer for r in merge_blocks(records)} == {"layers.*.mlp.0", "layers.*.mlp.2"}


def test_a_stream_that_grows_alike_at_every_depth_is_flat() -> None:
    def change(position: float) -> float:
        return 0.2 + position

    records = [
        Coordinate(depth, 0, 1, "output", f"layers.{i}", change((i + 1) / depth), "stream")
        for depth in (4, 8, 16, 32)
        for i in range(depth)
    ]
    assert abs(fit_slopes(records, size="depth").slopes[0].slope) < 0.015


def test_records_survive_a_file(tmp_path: Path) -> None:
    records = [*planted(0.3, noise=0.1), Coordinate(64, 0, 2, "update", "b", math.inf)]
    save_coordinates(records, tmp_path / "check.csv")
    assert load_coordinates(tmp_path / "check.csv") == records


def test_rows_hold_every_slope() -> None:
    rows = fit_slopes(planted(0.0) + planted(0.5, kind="update")).rows()
    assert [(row["kind"], row["passed"]) for row in rows] == [("output", True), ("update", False)]


# -- spectral norms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 3, 5), (2, 1, 1), (1, 7, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_spectral_norm_agrees_with_torch(shape: tuple[int, int, int], scale: float) -> None:
    stack = torch.randn(shape)
    wanted = float(torch.linalg.matrix_norm(stack, ord=2).amax()) * scale
    assert spectral_norm(stack * scale) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("value", "norm"), [(0.0, 0.0), (math.inf, math.inf), (math.nan, math.inf)])
def test_spectral_norm_of_special_values(value: float, norm: float) -> None:
    assert spectral_norm(torch.full((1, 2, 2), value)) == norm


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        (nn.Linear(3, 5), "weight", (1, 5, 3)),
        (nn.Linear(3, 5), "bias", (1, 5, 1)),
        (nn.Embedding(7, 4), "weight", (1, 4, 7)),
        (nn.Conv2d(3, 5, 2), "weight", (1, 5, 12)),
        (nn.ConvTranspose2d(3, 5, 2), "weight", (1, 5, 12)),
        (nn.LSTM(3, 5), "weight_ih_l0", (4, 5, 3)),
    ],
)
def test_parameters_become_matrices(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    spec = next(s for s in infer(module, Base.of(module)) if s.name == name)
    assert tuple(as_matrices(module.get_parameter(name), spec).shape) == shape


def test_experts_are_matrices_of_their_own() -> None:
    spec = ParamSpec("w", Role.HIDDEN, (6, 5, 3), Dim(3, 3), Dim(5, 5), stack=6)
    assert as_matrices(torch.ones(6, 5, 3), spec).shape == (6, 5, 3)


def yardstick(rules: str, choices: Choices | None = None) -> Yardstick:
    made = plan(nn.Linear(64, 64), base=lambda: nn.Linear(16, 16), rules=rules, choices=choices)
    return Yardstick.of(made["weight"], find_rules(rules))


@pytest.mark.parametrize("rules", ["mup", "sp", "ntk", "mean_field", "sp_per_layer"])
def test_a_right_update_measures_the_same_under_all_rules(rules: str) -> None:
    assert yardstick(rules).update == pytest.approx(1.0)
    assert yardstick(rules).output == pytest.approx(1.0)


def test_a_hooked_multiplier_counts_towards_the_update() -> None:
    hooked = yardstick("mean_field", Choices(multipliers="hook"))
    assert hooked.update == pytest.approx(2.0)  # the bare weight must move 1/a = sqrt(4) times as far


# -- pictures ----------------------------------------------------------------------------------------------------------


def report(slope: float) -> CoordinateReport:
    return fit_slopes([*planted(slope), *planted(slope, kind="update"), *planted(slope, step=10)])


def test_a_picture_is_written(tmp_path: Path) -> None:
    broken = fit_slopes(replace_values(planted(0.0), dict.fromkeys(WIDTHS, math.inf)))
    plot_coordinates({"mup": report(0.0), "sp": report(1.0), "none": broken}, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to draw in \{\}"):
        plot_coordinates({}, tmp_path / "check.png")


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_mup\[plots\]'"):
        plot_coordinates({"mup": report(0.0)}, tmp_path / "check.png")


def test_the_interval_is_students() -> None:
    records = planted(0.3, noise=0.1)
    (found,) = fit_slopes(records).slopes
    points = zip(*((r.size, r.value) for r in records), strict=True)
    x, y = (torch.tensor([math.log(v) for v in values]).double() for values in points)
    x, y = x - x.mean(), y - y.mean()
    error = ((y - found.slope * x).square().sum() / (len(records) - 2) / x.square().sum()).sqrt()
    margin = 2.228139 * float(error)  # Student's t, two-sided 95%, 10 degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.slope - margin, found.slope + margin), rel=1e-5)


def test_divergence_is_told_before_what_is_missing() -> None:
    records = [r for r in replace_values(planted(0.0, layer="late"), {512: math.inf}) if r.size > 64]
    report = fit_slopes(planted(0.0) + records)
    assert [(s.layer, s.note) for s in report.failed] == [("late", "not finite at 512")]


def test_roles_are_read_off_the_largest_size() -> None:
    """At the smallest, nothing grows, so that each matrix counts as hidden."""
    records = [Coordinate(n, 0, 1, "output", "fc", 1.0, "hidden" if n == 64 else "output") for n in WIDTHS]
    assert [s.group for s in fit_slopes(records).slopes] == ["output"]


def test_the_depth_rules_own_power_is_no_fault() -> None:
    """Under 1/sqrt(L) branches each weight moves by 1/sqrt(L), too."""
    of = ParamSpec("w", Role.HIDDEN, (64, 64), Dim(64, 16), Dim(64, 16), Dim(8, 2))
    assert Yardstick.of(ParamPlan(of), find_rules("depth_mup")).update == 0.5
    assert Yardstick.of(ParamPlan(of), find_rules("complete_p")).update == 1.0
