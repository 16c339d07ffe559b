from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from lightning_mup.analysis.features import feature_changes
from lightning_mup.analysis.recommend import Recommendation
from lightning_mup.analysis.runs import read_runs
from lightning_mup.analysis.sentences import in_short, of_cost, of_drift, of_features, of_losses, of_valleys
from lightning_mup.analysis.transfer import Group, TransferReport, cells, transfer_table

from .transfer_runs import Planted, facts_of, valley, write_run, write_runs

MUP = Planted(cliff=2.6)
SP = Planted("sp", slope=-1.0, cliff=2.6)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TransferReport:
    folder = tmp_path_factory.mktemp("sweep")
    write_runs(folder, MUP)
    write_runs(folder, SP, seed=1)
    write_run(folder / "killed", facts_of(MUP, 256, -7, 9), None)
    return transfer_table(read_runs(folder))


def group_of(report: TransferReport, rules: str) -> Group:
    return next(g for g in report.groups if g.rules == rules)


def test_planted_optima_slopes_and_verdicts_are_found(report: TransferReport) -> None:
    for planted, verdict in ((MUP, "stands"), (SP, "moves")):
        group = group_of(report, planted.rules)
        for at in group.sizes:
            assert at.optimum.low < planted.optimum(at.size) < at.optimum.high
            assert at.optimum.loss == pytest.approx(planted.loss(at.size, planted.optimum(at.size)), rel=0.003)
        assert group.drift.low < planted.slope < group.drift.high
        assert group.drift.verdict == verdict


def test_price_of_transfer_is_that_of_the_planted_valley(report: TransferReport) -> None:
    for at in group_of(report, "mup").sizes:
        assert abs(at.lost) < 0.003
    base, double, target = group_of(report, "sp").sizes
    assert base.lost == 0
    carried = base.transferred
    expected = SP.loss(128, carried) - SP.loss(128, SP.optimum(128))
    assert double.lost == pytest.approx(expected, abs=0.02)
    assert double.lost_low < expected < double.lost_high
    expected = SP.loss(256, carried) - SP.loss(256, SP.optimum(256))
    assert target.lost == pytest.approx(expected, rel=0.25)


def test_transfer_into_divergence_says_so(tmp_path: Path) -> None:
    write_runs(tmp_path, Planted("sp", slope=-1.0, cliff=1.5, log2_lr=tuple(range(-12, -3))))
    group = transfer_table(read_runs(tmp_path)).groups[0]
    assert group.sizes[1].loss < math.inf
    assert group.target.loss == math.inf
    assert cells(group, group.target)[5:7] == ["diverged", "diverged"]


def test_far_values_are_interpolated_and_untested_ones_unknown(tmp_path: Path) -> None:
    write_runs(tmp_path, Planted("sp", slope=-2.5, sizes=(64, 128), log2_lr=tuple(range(-14, -5)), seeds=1, skew=0.3))
    write_runs(tmp_path, Planted("sp", slope=2, sizes=(64, 128), log2_lr=(-9, -8, -7, -6, -5), seeds=1, method="sgd"))
    far, _ = transfer_table(read_runs(tmp_path)).groups
    at = far.target
    assert far.method == "muon"
    expected = Planted("sp", slope=-2.5, sizes=(64, 128), skew=0.3).loss(128, at.transferred)
    assert at.loss == pytest.approx(expected, rel=0.02)
    write_runs(tmp_path, Planted("mup", sizes=(64,), seeds=1))
    write_runs(tmp_path, Planted("mup", sizes=(128,), base=64, log2_lr=(-14, -13, -12), seeds=1))
    outside = group_of(transfer_table(read_runs(tmp_path)), "mup")
    assert math.isnan(outside.target.loss)
    assert cells(outside, outside.target)[5:7] == ["-", "-"]


def test_depth_and_weight_decay_work_alike(tmp_path: Path) -> None:
    planted = Planted(slope=0.0, axis="depth", sizes=(4, 8, 16), tuned="weight_decay", cliff=2.6)
    write_runs(tmp_path, planted)
    write_run(tmp_path / "zero", facts_of(planted, 4, -7, 0) | {"weight_decay": 0}, 3.5)
    found = transfer_table(read_runs(tmp_path), axis="depth", tuned="weight_decay")
    (group,) = found.groups
    assert group.drift.verdict == "stands"
    assert [at.size for at in group.sizes] == [4, 8, 16]
    assert found.notes == ("left out, because weight_decay is 0, which has no place on a logarithmic axis: zero",)
    chosen = found.recommended()
    assert chosen is not None
    assert chosen.settings["lr"] == 2.0**-6
    assert chosen.settings["weight_decay"] == pytest.approx(2.0**-7, rel=0.15)
    assert found.table().count("\nmuon, mup  ") == 3


def test_noise_is_shared_between_sizes(tmp_path: Path) -> None:
    write_runs(tmp_path, Planted(sizes=(64,), seeds=1))
    alone = transfer_table(read_runs(tmp_path)).groups[0].at_base.optimum
    write_runs(tmp_path, Planted(sizes=(128,), base=64, seeds=4), noise=0.02)
    beside = transfer_table(read_runs(tmp_path)).groups[0].at_base.optimum
    assert beside.high - beside.low > 1.5 * (alone.high - alone.low)


def test_groups_that_differ_in_what_is_held_are_told_apart(tmp_path: Path) -> None:
    for decay in (0.0, 0.001):
        write_runs(tmp_path / f"{decay}", Planted(sizes=(64, 128), seeds=1, changes={"weight_decay": decay}))
    labels = [g.label for g in transfer_table(read_runs(tmp_path)).groups]
    assert labels == ["muon, mup, weight_decay 0", "muon, mup, weight_decay 0.001"]


def test_base_that_was_not_run_gives_way_to_the_smallest(tmp_path: Path) -> None:
    write_runs(tmp_path, Planted(sizes=(128, 256), seeds=1, base=32))
    (group,) = transfer_table(read_runs(tmp_path)).groups
    assert group.base == 128
    assert group.at_base.transferred == group.at_base.optimum.log2_value


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", facts_of(MUP, 64, -7, 0), 3.0)
    write_run(tmp_path / "b", facts_of(MUP, 64, -6, 0) | {"max_steps": 400}, 2.9)
    with pytest.raises(ValueError, match="muon, mup at width 64 have different max_steps: 200, 400"):
        transfer_table(read_runs(tmp_path))
    write_run(tmp_path / "c/1", facts_of(MUP, 64, -7, 0), 3.0)
    write_run(tmp_path / "c/2", facts_of(MUP, 64, -6, 0) | {"context": 128}, 2.9)
    with pytest.raises(ValueError, match="different context cannot be compared"):
        transfer_table(read_runs(tmp_path / "c"))
    with pytest.raises(ValueError, match="axis must be one of width, depth, got 'widht'; did you mean 'width'"):
        transfer_table([], axis="widht")  # type: ignore[arg-type]
    write_run(tmp_path / "d", facts_of(MUP, 64, -7, 0), None)
    with pytest.raises(ValueError, match="none of the 1 runs has ended"):
        transfer_table(read_runs(tmp_path / "d"))


def test_unfinished_and_diverged_runs_are_reported(report: TransferReport) -> None:
    assert [report.name_of(run) for run in report.unfinished] == ["killed"]
    assert all(9 not in {run.seed for run in at.runs} for g in report.groups for at in g.sizes)
    planted = sum(SP.loss(n, x) == math.inf for n in SP.sizes for x in SP.log2_lr) * SP.seeds
    planted += sum(MUP.loss(n, x) == math.inf for n in MUP.sizes for x in MUP.log2_lr) * MUP.seeds
    assert len(report.diverged) == planted > 0


def test_costs_are_shares_of_the_target(report: TransferReport) -> None:
    group = group_of(report, "mup")
    per_step = 60 * 1024
    failed = sum(run.status == "diverged" for run in group.at_base.runs)
    base = per_step * 64**2 * (200 * (14 - failed) + 100 * failed)
    assert group.at_base.flops == base
    assert group.share_of_run == pytest.approx(base / (per_step * 256**2 * 200))
    assert group.share_of_tuning == pytest.approx(group.share_of_run / 14)
    assert f"{100 * group.share_of_run:.3g}% of one run" in of_cost(group)


def test_recommended_is_the_rules_that_stand_as_yaml_that_reads_back(report: TransferReport) -> None:
    chosen = report.recommended()
    assert chosen is not None
    read = yaml.safe_load(chosen.to_yaml())
    assert read == chosen.settings
    assert list(read) == ["method", "rules", "lr", "weight_decay"]
    assert (read["method"], read["rules"], read["weight_decay"]) == ("muon", "mup", pytest.approx(2.0**-12, rel=1e-5))
    assert read["lr"] == pytest.approx(2.0**-7, rel=0.15)
    assert "# Slope of the optimum against width:" in chosen.to_yaml()


@pytest.mark.parametrize("value", [1e-05, 2.5e-07, 3.0, 0.00793, 1e20, "mup x complete_p", 'a"b: #c', "no", "1e5"])
def test_yaml_scalars_keep_value_and_type(value: str | float) -> None:
    read = yaml.safe_load(Recommendation({"x": value}, ("one\ntwo",)).to_yaml())["x"]
    assert read == value
    assert isinstance(read, str) == isinstance(value, str)


def test_rules_whose_optimum_moves_are_recommended_last(tmp_path: Path) -> None:
    write_runs(tmp_path, Planted("sp", slope=-0.6, floor=1.0))
    write_runs(tmp_path, Planted("mup"))
    found = transfer_table(read_runs(tmp_path))
    assert group_of(found, "sp").target.loss < group_of(found, "mup").target.loss
    chosen = found.recommended()
    assert chosen is not None
    assert chosen.settings["rules"] == "mup"


def test_nothing_is_recommended_where_no_base_brackets_an_optimum(tmp_path: Path) -> None:
    write_runs(tmp_path, Planted(log2_lr=(-11, -10, -9), seeds=1))
    found = transfer_table(read_runs(tmp_path))
    assert found.recommended() is None
    assert [row["add"] for row in found.rows()] == [[0.003906, 0.007812]] * 3


def test_json_holds_only_plain_numbers(report: TransferReport, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(report.to_json(), parse_constant=refuse)
    assert [g["verdict"] for g in found["groups"]] == ["stands", "moves"]
    assert len(found["sizes"]) == 6
    write_runs(tmp_path, Planted(log2_lr=(-4, -3), cliff=1))
    diverged = json.loads(transfer_table(read_runs(tmp_path)).to_json(), parse_constant=refuse)
    assert diverged["sizes"][0]["best_loss"] == "inf"
    assert diverged["recommended"] is None


def test_feature_changes_are_those_of_the_transferred_value(report: TransferReport) -> None:
    found = feature_changes(report.groups)
    assert {f.step for f in found} == {1, 200}
    by = {(f.group, f.role, f.size): f.value for f in found if f.step == 200}
    assert by["muon, sp", "hidden", 256] / by["muon, sp", "hidden", 64] == pytest.approx(2)
    assert by["muon, mup", "input", 256] == by["muon, mup", "input", 64]
    text = of_features(found, "width")
    assert "at most 25% more or less (muon, mup)" in text
    assert "by a factor of 2 (muon, sp: hidden)" in text
    assert feature_changes(report.groups, prefix="nothing/") == []


def test_sentences_claim_what_the_numbers_show(report: TransferReport) -> None:
    assert f"{len(report.diverged)} runs diverged" in of_valleys(report)
    assert "muon, sp: at width 256 the best learning rate is 0.2" in of_valleys(report)
    assert "muon, mup: the best learning rate stays where it is with width" in of_drift(report)
    assert "muon, sp: the best learning rate moves with width" in of_drift(report)
    mup, sp = of_losses(report).split(". muon, sp")
    assert "not told apart from none" in mup
    assert "more than noise" in sp
    assert valley(2.0, 0.7) > 0.08  # what sp loses, in log loss


def test_a_panel_says_in_short_what_its_runs_show(report: TransferReport, tmp_path: Path) -> None:
    mup, sp = (in_short(group, report).split("\n") for group in sorted(report.groups, key=lambda g: g.rules))
    assert mup[0].startswith("best learning rate stands: slope ")
    assert sp[0].startswith("best learning rate moves: slope -")
    lost = next(g for g in report.groups if g.rules == "sp").target.lost
    assert sp[1] == f"carried from width 64 to 256, it costs {lost:.3f} nats"
    write_runs(tmp_path, Planted(sizes=(64,)))
    one = transfer_table(read_runs(tmp_path))
    assert in_short(one.groups[0], one) == "best learning rate unclear"
    write_runs(tmp_path / "cliff", Planted("sp", slope=-2, cliff=1.5))
    steep = transfer_table(read_runs(tmp_path / "cliff"))
    assert in_short(steep.groups[0], steep).endswith("it diverges")
