"""Savings from run directories: which runs count, what comes back, and what is refused; the section and its picture."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_mup.analysis.laws import find_laws
from lightning_mup.analysis.report import write_report
from lightning_mup.analysis.runs import Run, read_runs
from lightning_mup.analysis.savings import can_compare, find_savings
from lightning_mup.analysis.savings_plots import pictures_of
from lightning_mup.commands import report as command
from lightning_mup.core.plan import aligned

from .test_analysis_report import Page
from .transfer_runs import Planted, facts_of, write_run

SIZES = (64, 128, 256)
STEPS = 200
NOISE = 0.001


def compute(size: int) -> float:
    return steps(size) * 1024 * 60.0 * size**2


def steps(size: int) -> int:
    """Tokens as parameters."""
    return STEPS * (size // SIZES[0]) ** 2


def facts(planted: Planted, size: int, x: int, seed: int) -> dict[str, object]:
    return facts_of(replace(planted, changes={"max_steps": steps(size)}), size, x, seed)


def study(
    folder: Path,
    saved: dict[str, float],
    *,
    seeds: int = 3,
    lrs: tuple[float, ...] = (-7,),
    sizes: tuple[int, ...] = SIZES,
) -> Path:
    """Write runs of methods that need 1/saved of AdamW's compute; other rates than 2^-7 are worse at every size."""
    random = np.random.default_rng(0)
    for method, times in {"adamw": 1.0, **saved}.items():
        planted = replace(Planted(sizes=sizes), method=method)
        for size in sizes:
            for x in lrs if size == sizes[0] else (-7,):
                for seed in range(seeds):
                    loss = 5 * (times * compute(size) / 1e12) ** -0.05 * math.exp(0.02 * (x + 7) ** 2)
                    name = folder / method / f"{size}-{x}-{seed}"
                    write_run(name, facts(planted, size, x, seed), loss * math.exp(NOISE * random.standard_normal()))
    return folder


def runs_of(folder: Path, saved: dict[str, float], **settings: object) -> list[Run]:
    return read_runs(study(folder, saved, **settings))  # type: ignore[arg-type]


def test_what_was_planted_comes_back(tmp_path: Path) -> None:
    found = find_savings(runs_of(tmp_path, {"muon": 1.4, "sgd": 0.5}))
    assert found.baseline == "adamw, mup"
    for label, times in (("muon, mup", 1.4), ("sgd, mup", 0.5)):
        multiplier = found.multipliers[label]
        assert multiplier.value == pytest.approx(times, rel=0.03)  # noise of 0.1% / sqrt(3) on a loss ~ cost^-0.05
        assert multiplier.high / multiplier.low < 1.1
        assert [row.cost for row in multiplier.rows] == [compute(size) for size in SIZES]
        assert [row.runs for row in multiplier.rows] == [3] * len(SIZES)


@pytest.mark.parametrize(("cost", "unit"), [("flops", 60.0), ("6nd", 60.0), ("seconds", None)])
def test_costs(tmp_path: Path, cost: str, unit: float | None) -> None:
    """6 x 10 width^2 parameters happen to be the FLOPs per token; every run takes as many seconds."""
    runs = runs_of(tmp_path, {"muon": 1.4})
    if unit is None:
        found = find_savings(runs, cost="seconds")
        assert "two costs" in found.refused["muon, mup"] or "one cost" in found.refused["muon, mup"]
        return
    row = find_savings(runs, cost=cost).multipliers["muon, mup"].rows[0]  # type: ignore[arg-type]
    assert row.cost == STEPS * 1024 * unit * SIZES[0] ** 2


def test_a_sweep_is_read_as_tuned_at_its_smallest_size(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"muon": 1.4}, lrs=(-9, -8, -7, -6))
    found = find_savings(runs)
    assert {carried.lr for carried in found.carried.values()} == {2.0**-7}
    assert all(len(carried.runs) == 9 for carried in found.carried.values())
    assert len([note for note in found.notes if "9 runs with other settings" in note]) == 2


def test_of_settings_run_at_all_sizes_the_smallest_size_chooses(tmp_path: Path) -> None:
    """2^-9 is the best at the largest size, which would be tuning there."""
    planted = Planted(sizes=SIZES)
    for method in ("adamw", "muon"):
        for size in SIZES:
            for x in (-9, -7):
                off = 0.02 * (x + (7 if size == SIZES[0] else 9)) ** 2
                loss = 5 * (compute(size) / 1e12) ** -0.05 * math.exp(off)
                write_run(tmp_path / f"{method}{size}{x}", facts(replace(planted, method=method), size, x, 0), loss)
    assert {carried.lr for carried in find_savings(read_runs(tmp_path)).carried.values()} == {2.0**-7}


def test_a_sweep_at_fixed_tokens_is_no_frontier(tmp_path: Path) -> None:
    runs = [replace(run, max_steps=STEPS) for run in runs_of(tmp_path, {"muon": 1.4})]
    assert not can_compare(runs)
    assert any("tokens per parameter differ by a factor of 16" in note for note in find_savings(runs).notes)


def test_any_baseline(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"muon": 1.4})
    for name in ("muon", "muon, mup"):
        found = find_savings(runs, baseline=name)
        assert found.baseline == "muon, mup"
        assert found.multipliers["adamw, mup"].value == pytest.approx(1 / 1.4, rel=0.03)
    with pytest.raises(
        ValueError, match=r"no runs of 'muonn' to compare with; there are adamw, mup.*did you mean 'muon"
    ):
        find_savings(runs, baseline="muonn")
    with pytest.raises(ValueError, match="cost must be one of flops, 6nd, seconds, got 'flop'; did you mean 'flops'"):
        find_savings(runs, cost="flop")  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"muon": 1.4}, sizes=(64,))
    assert not can_compare(runs)
    assert "muon, mup" in find_savings(runs).refused
    assert find_laws(find_savings(runs)).refused == "no method has runs at 3 different costs"
    alone = [run for run in runs if run.method == "muon"]
    with pytest.raises(ValueError, match="no runs of adamw or adam to compare with"):
        find_savings(alone)
    other = [replace(run, data="other") if run.method == "muon" else run for run in runs]
    with pytest.raises(ValueError, match="other"):
        find_savings(other)


def test_a_run_that_diverged_is_a_bound(tmp_path: Path) -> None:
    study(tmp_path, {"muon": 1.4})
    planted = Planted(method="shampoo", sizes=SIZES)
    for size in SIZES:
        loss = math.inf if size == SIZES[-1] else 5 * (compute(size) / 1e12) ** -0.05
        write_run(tmp_path / f"shampoo{size}", facts(planted, size, -7, 0), loss)
    found = find_savings(read_runs(tmp_path)).multipliers["shampoo, mup"]
    assert found.rows[-1].diverged
    assert found.trend.verdict == "unclear"
    assert [row.cost for row in found.rows] == [compute(size) for size in SIZES]


def test_the_report_has_a_section_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    study(tmp_path / "runs", {"muon": 1.4}, lrs=(-8, -7, -6))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])) == 0
    assert "compute saved over adamw, mup, in flops" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.json",
        "report.png",
        "runs.csv",
        "savings.csv",
    }
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert {"script", "link"}.isdisjoint(page.tags)
    assert "1 (baseline)" in page.cells
    assert all(source.startswith("data:image/png") for source in page.loaded)
    assert len(page.loaded) == 1
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(written["laws"]["laws"]) == {"adamw, mup", "muon, mup"}
    assert written["laws"]["checklist"]["data"] == "text-3fe1"
    found = written["savings"]
    assert [method["group"] for method in found["methods"]] == ["adamw, mup", "muon, mup"]
    assert found["methods"][1]["low"] < 1.4 < found["methods"][1]["high"]


def test_a_sweep_at_all_sizes_has_both_stories(tmp_path: Path) -> None:
    for method, times in (("adamw", 1.0), ("muon", 1.4)):
        planted = Planted(method=method, sizes=SIZES)
        for size in SIZES:
            for x in (-9, -8, -7, -6, -5):
                loss = 5 * (times * compute(size) / 1e12) ** -0.05 * math.exp(0.02 * (x + 7) ** 2)
                write_run(tmp_path / "runs" / f"{method}{size}{x}", facts(planted, size, x, 0), loss)
    report, files = write_report(read_runs(tmp_path / "runs"), tmp_path / "out")
    assert report.transfer is not None
    assert report.savings is not None
    assert {"report.csv", "savings.csv", "recommended.yaml"} <= {path.name for path in files}
    assert report.table().startswith(report.transfer.table())
    assert report.savings.table() == "\n".join(aligned(report.savings.summary()))
    write_report([run for run in read_runs(tmp_path / "runs") if run.method == "muon"], tmp_path / "out")
    assert not (tmp_path / "out" / "savings.csv").exists()


def test_every_method_of_many_has_a_look_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    saved = {f"method{i}": 1 + 0.1 * i for i in range(9)}
    (picture,) = pictures_of(find_savings(runs_of(tmp_path, saved, seeds=1)))
    figure = Figure(figsize=picture.size, layout="constrained")
    picture.draw(figure)
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == len(SIZES)]  # type: ignore[arg-type]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(saved) + 1
    assert all(f"method{i}, mup" in "".join(text.get_text() for text in figure.axes[1].texts) for i in range(9))
