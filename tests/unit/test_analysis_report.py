from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from lightning_mup.analysis.features import feature_changes
from lightning_mup.analysis.optimum import find_optimum
from lightning_mup.analysis.plot_parts import loss_limits, spread
from lightning_mup.analysis.report import write_report
from lightning_mup.analysis.runs import read_runs
from lightning_mup.analysis.transfer import TransferReport, cells, transfer_table
from lightning_mup.analysis.transfer_plots import pictures, render, save_pictures
from lightning_mup.commands import report as command

from .transfer_runs import Planted, facts_of, write_run, write_runs

pytest.importorskip("matplotlib")
PNG = b"\x89PNG"
VOID = {"meta", "img", "br"}
FILES = {"report.html", "report.json", "report.csv", "report.png", "runs.csv", "recommended.yaml"}


class Page(HTMLParser):
    """Text of table cells and sources of images; complains where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_runs(folder, Planted(cliff=2.6, seeds=1))
    write_runs(folder, Planted("sp", slope=-1.0, cliff=2.6, seeds=1), seed=1)
    write_run(folder / "killed <&>", facts_of(Planted(), 256, -7, 9), None)
    return folder


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TransferReport, Path]:
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    found, files = write_report(read_runs(sweep), out)
    report = found.transfer
    assert report is not None
    assert {file.name for file in files} == FILES == {file.name for file in out.iterdir()}
    return report, out


def test_page_holds_the_tables_and_loads_nothing(written: tuple[TransferReport, Path]) -> None:
    report, out = written
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    expected = [cell for group in report.groups for at in group.sizes for cell in cells(group, at)]
    first = page.cells.index(expected[0], page.cells.index("moves"))
    assert page.cells[first : first + len(expected)] == expected
    assert len(page.loaded) == 4
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.loaded)
    assert not {"script", "link", "iframe"} & page.tags
    assert not re.search(r"https?://|@import|url\(", text)
    for known in (
        "text-3fe1",
        "torch 2.13.0",
        "killed &lt;&amp;&gt;",
        "% of one run",
        "Diverged runs",
        "The slope says",
    ):
        assert known in text


def test_tables_for_programs_agree_with_the_report(written: tuple[TransferReport, Path]) -> None:
    report, out = written
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["log2_best"]) for row in rows] == [row["log2_best"] for row in report.rows()]
    found = json.loads((out / "report.json").read_text())
    assert [group["verdict"] for group in found["groups"]] == ["stands", "moves"]
    assert len(found["features"]) == 2 * 3 * 2 * 2  # groups, sizes, roles, steps
    assert yaml.safe_load((out / "recommended.yaml").read_text())["rules"] == "mup"
    assert (out / "report.png").read_bytes().startswith(PNG)


def test_the_table_of_runs_is_enough_to_find_the_optima_again(written: tuple[TransferReport, Path]) -> None:
    report, out = written
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"finished", "diverged", "unfinished"}
    for group in report.groups:
        for at in group.sizes:
            mine = [row for row in rows if (row["rules"], int(row["width"])) == (group.rules, at.size)]
            ended = [row for row in mine if row["status"] != "unfinished"]
            losses = [float(row["val_loss"]) if row["status"] == "finished" else math.inf for row in ended]
            assert str(find_optimum([math.log2(float(row["lr"])) for row in ended], losses)) == str(at.optimum)


def test_second_report_leaves_nothing_of_the_first(written: tuple[TransferReport, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recommended.yaml").write_text("lr: 1")
    write_runs(tmp_path / "runs", Planted(log2_lr=(-11, -10, -9), seeds=1))
    _, files = write_report(read_runs(tmp_path / "runs"), tmp_path / "out")
    assert (
        {file.name for file in files} == FILES - {"recommended.yaml"} == {f.name for f in (tmp_path / "out").iterdir()}
    )
    assert "Nothing is recommended" in (tmp_path / "out" / "report.html").read_text()


def test_without_matplotlib_there_is_a_page_without_pictures(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, files = write_report(read_runs(sweep), tmp_path)
    assert {file.name for file in files} == FILES - {"report.png"}
    page = Page((tmp_path / "report.html").read_text())
    assert page.loaded == []
    assert "pip install" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "planted",
    [
        [Planted(sizes=(64,), seeds=1)],
        [Planted(axis="depth", sizes=(2, 4)), Planted("sp x complete_p", axis="depth", sizes=(2, 4, 8), method="sgd")],
    ],
    ids=["one size", "ragged"],
)
def test_odd_sets_of_runs_are_drawn(planted: list[Planted], tmp_path: Path) -> None:
    for one in planted:
        write_runs(tmp_path, one)
    found = transfer_table(read_runs(tmp_path), axis=planted[0].axis)  # type: ignore[arg-type]
    for picture in pictures(found, feature_changes(found.groups)):
        assert render(picture).startswith(PNG)
        assert "nan" not in picture.sentence
    assert math.isfinite(loss_limits(found.groups)[1])


def test_nothing_but_diverged_runs_is_said_and_not_drawn(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", Planted(log2_lr=(-4, -3), cliff=1))
    _, files = write_report(read_runs(tmp_path / "runs"), tmp_path)
    assert {file.name for file in files} == FILES - {"report.png", "recommended.yaml"}
    text = (tmp_path / "report.html").read_text()
    assert "None: no run has a finite loss." in text
    assert "2 x muon, mup, width 64, depth 4, lr 0.0625" in text
    assert "nan" not in "".join(Page(text).cells)


def test_sizes_keep_their_colour_from_panel_to_panel(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    write_runs(tmp_path, Planted(sizes=(64, 128)))
    write_runs(tmp_path, Planted("sp", sizes=(64, 128, 256)))
    figure = Figure()
    pictures(transfer_table(read_runs(tmp_path)))[0].draw(figure)
    colours = [{text.get_text(): text.get_color() for text in ax.texts} for ax in figure.axes]
    assert colours[0]["128"] == colours[1]["128"] != colours[0]["256"]


def test_pictures_show_the_numbers(written: tuple[TransferReport, Path]) -> None:
    from matplotlib.figure import Figure

    report, _ = written
    curves, drifts, losses = (picture for picture in pictures(report))
    figures = {}
    for picture in (curves, drifts, losses):
        figures[picture.title] = figure = Figure(picture.size)
        picture.draw(figure)
    sp, mup = figures[curves.title].axes
    titles = [ax.get_title().split("\n") for ax in (sp, mup)]
    assert [title[0] for title in titles] == [
        "muon, standard parametrization (sp)",
        "muon, maximal update parametrization (mup)",
    ]
    assert [title[1].split(":")[0] for title in titles] == ["best learning rate moves", "best learning rate stands"]
    assert [title[2][:30] for title in titles] == ["carried from width 64 to 256, "] * 2
    assert [t.get_text() for t in mup.texts] == ["width 64", "128", "256"]
    dashed = [line for line in sp.lines if line.get_linestyle() == "--"]
    (carried,) = {line.get_xdata()[0] for line in dashed}
    assert carried == next(g for g in report.groups if g.rules == "sp").at_base.optimum.log2_value
    crosses = sum(len(line.get_xdata()) for ax in (sp, mup) for line in ax.lines if line.get_marker() == "x")
    assert crosses == len(report.diverged)
    words = [text.get_text() for text in figures[drifts.title].axes[0].texts]
    assert sorted(word.split()[0] + " " + word.split()[-1] for word in words) == ["mup stands", "sp moves"]
    low, high = figures[losses.title].axes[0].get_ylim()
    assert all(low < at.optimum.loss < high for group in report.groups for at in group.sizes)


@pytest.mark.parametrize(("cliff", "said"), [(2.0, ["diverged"]), (math.inf, [])])
def test_a_band_is_there_for_runs_that_diverged_alone(cliff: float, said: list[str], tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    write_runs(tmp_path, Planted(cliff=cliff))
    figure = Figure()
    pictures(transfer_table(read_runs(tmp_path)))[0].draw(figure)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts if text.get_text() == "diverged"] == said
    assert len(ax.patches) == len(said)


def test_each_method_has_its_own_range_of_rates(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    write_runs(tmp_path, Planted(log2_lr=(-9, -8, -7, -6, -5)))
    write_runs(tmp_path, Planted(method="adamw", log2_lr=(-12, -11, -10, -9, -8, -7, -6)))
    figure = Figure()
    pictures(transfer_table(read_runs(tmp_path)))[0].draw(figure)
    adamw, muon = (ax.get_xlim() for ax in figure.axes)
    assert adamw[0] < -12 + 0.1 < muon[0] < -9


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to draw in"):
        save_pictures([], tmp_path / "x.png")


def test_labels_keep_apart() -> None:
    placed = spread([0.0, 0.1, 0.2, 3.0], 1.0)
    assert placed == pytest.approx([-0.9, 0.1, 1.1, 3.0])
    assert spread([5.0, 1.0], 1.0) == [5.0, 1.0]


def test_command_writes_and_prints(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(sweep), "--out", str(tmp_path), "--loss", "train_loss"])) == 0
    printed = capsys.readouterr().out
    assert "muon, sp: best learning rate against width: slope -1.0" in printed
    assert "1 unfinished run was left out" in printed
    assert json.loads((tmp_path / "report.json").read_text())["metric"] == "train_loss"
    with pytest.raises(SystemExit):
        parser.parse_args([str(sweep), "--axis", "height"])
