"""Ledgers beside and inside the folders of a report: which entries count, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mup.analysis.costs import booked, cost_parts, said_of_cost
from lightning_mup.analysis.report import write_report
from lightning_mup.analysis.runs import read_runs
from lightning_mup.ledger import book, ledger_of

from .test_analysis_report import Page
from .transfer_runs import Planted, write_runs


def sweep(folder: Path, name: str, method: str = "muon") -> Path:
    """A sweep of 21 runs, all booked, one of which failed first."""
    runs = write_runs(folder / name, Planted(method=method, seeds=1, log2_lr=(-9, -8, -7, -6, -5)))
    book(ledger_of(runs), runs, {runs / "gone": "failed"})
    book(ledger_of(runs), runs, {run.folder: "finished" for run in read_runs(runs)})
    return runs


def test_entries_of_the_folders_alone_count(tmp_path: Path) -> None:
    one, other = sweep(tmp_path, "one"), sweep(tmp_path, "other", "adamw")
    assert booked(one).total().runs == 16
    assert {entry.sweep for entry in booked(one).entries} == {"one"}
    assert booked(tmp_path).total().runs == booked(one, other).total().runs == 32


def test_shares_are_those_of_the_largest_run(tmp_path: Path) -> None:
    """Five runs at each of three widths; a run costs as width^2: 5 (1 + 1/4 + 1/16) runs of the largest."""
    folder = sweep(tmp_path, "one")
    said = said_of_cost(booked(folder), read_runs(folder))
    share = 5 * (1 + 1 / 4 + 1 / 16)
    assert f"{share:.3g} times one run at the largest size, and {100 * share / 16:.3g}% of as many runs" in said
    assert said.startswith("16 runs and 1 failed attempts took")
    assert "(1 attempts left no record of their cost)" in said


def test_the_page_has_a_section(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = sweep(tmp_path, "one")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"sweep": "one", "fol')
    ledger, runs = booked(folder), read_runs(folder)
    write_report(runs, tmp_path / "out", ledger=ledger)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.cells[page.cells.index("muon") - 1 :][:6] == ["one", "muon", "15", "15", "0", "0"]
    assert "ledger.jsonl, line 17" in "".join(cost_parts(ledger, runs))


def test_without_a_ledger_nothing_is_said(tmp_path: Path) -> None:
    folder = write_runs(tmp_path / "runs", Planted(seeds=1))
    assert booked(folder).entries == ()
    assert said_of_cost(booked(folder), read_runs(folder)) == ""
    assert cost_parts(booked(folder), []) == []
