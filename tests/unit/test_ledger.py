"""The ledger: each run once, failed and repeated ones too, by several processes, over lines that were cut off."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mup.ledger import Entry, Ledger, Status, book, ledger_of, read_ledger

SWEEP = Path("runs/widths")
PATH = Path("runs/ledger.jsonl")


def log(folder: Path, steps: range, *, start: float = 0.0, method: str = "muon") -> None:
    """Log steps of one teraflop and one second each; the start tells trainings apart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"method": method}))
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "flops": step * 1e12, "seconds": step + start}) + "\n")
            file.write(json.dumps({"step": step, "val/loss": 2.0}) + "\n")


def finish(folder: Path, steps: int, *, start: float = 0.0) -> None:
    (folder / "result.json").write_text(json.dumps({"flops": steps * 1e12, "seconds": steps + start}))


def add(folder: Path, status: Status = "finished") -> tuple[Entry, ...]:
    return book(ledger_of(SWEEP), SWEEP, {folder: status})


def test_a_run_is_booked_once_with_what_it_recorded() -> None:
    folder = SWEEP / "lr=2^-4"
    log(folder, range(1, 11))
    finish(folder, 10)
    (entry,) = add(folder)
    assert (entry.sweep, entry.folder, entry.method, entry.status) == ("widths", "widths/lr=2^-4", "muon", "finished")
    assert (entry.flops, entry.seconds) == (1e13, 10.0)
    assert add(folder) == ()
    assert read_ledger(PATH).entries == (entry,)


def test_an_attempt_that_failed_costs_and_so_do_steps_that_are_taken_again() -> None:
    folder = SWEEP / "lr=2^-4"
    log(folder, range(1, 8))  # seven steps, of which a checkpoint keeps four
    (first,) = add(folder, "failed")
    assert (first.flops, first.status) == (7e12, "failed")
    assert add(folder, "failed") == ()  # it was not even started again
    log(folder, range(5, 11))
    finish(folder, 10)
    (second,) = add(folder)
    assert second.flops == 6e12
    total = read_ledger(PATH).total()
    assert (total.runs, total.finished, total.failed, total.flops) == (1, 1, 1, 1.3e13)
    assert total.seconds == 13.0


@settings(max_examples=60)
@given(attempts=st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=5))
def test_every_step_counts_as_often_as_it_was_taken(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, float]]
) -> None:
    runs = tmp_path_factory.mktemp("runs")
    folder, taken, at = runs / "widths" / "run", 0, 0
    for steps, kept in attempts:
        start = math.floor(at * kept)  # the checkpoint from which it goes on
        log(folder, range(start + 1, start + steps + 1))
        at, taken = start + steps, taken + steps
        if steps % 2:  # half of the interruptions are booked
            book(runs / "ledger.jsonl", runs / "widths", {folder: "failed"})
    finish(folder, at)
    book(runs / "ledger.jsonl", runs / "widths", {folder: "finished"})
    first_to_last = {"flops": taken * 1e12, "seconds": float(taken)}
    total = read_ledger(runs / "ledger.jsonl").total()
    assert total.flops == pytest.approx(first_to_last["flops"])
    assert total.seconds == pytest.approx(first_to_last["seconds"])
    assert total.runs == 1


def test_a_run_that_was_deleted_and_trained_anew_costs_twice() -> None:
    folder = SWEEP / "lr=2^-4"
    for start in (0.0, 0.125):
        for name in ("metrics.jsonl", "result.json"):
            (folder / name).unlink(missing_ok=True)
        log(folder, range(1, 5), start=start)
        finish(folder, 4, start=start)
        add(folder)
    total = read_ledger(PATH).total()
    assert (total.runs, total.finished, total.flops) == (2, 2, 8e12)


def test_a_run_without_a_record_is_not_free() -> None:
    (SWEEP / "theirs").mkdir(parents=True)
    (entry,) = add(SWEEP / "theirs")
    assert (entry.flops, entry.seconds, entry.method) == (None, None, "")
    assert add(SWEEP / "theirs") == ()
    total = read_ledger(PATH).total()
    assert (total.unknown, total.flops, total.runs) == (1, 0.0, 1)


# -- totals -----------------------------------------------------------------------------------------------------------


def _filled() -> Ledger:
    for sweep, method, status, steps in (
        ("widths", "muon", "finished", 4),
        ("widths", "adamw", "diverged", 2),
        ("depths", "muon", "failed", 3),
    ):
        folder = Path("runs") / sweep / f"method={method}"
        log(folder, range(1, steps + 1), method=method)
        book(PATH, Path("runs") / sweep, {folder: status})  # type: ignore[dict-item]
    return read_ledger(PATH)


def test_totals_by_sweep_and_method_and_shares() -> None:
    ledger = _filled()
    assert {name: total.flops for name, total in ledger.totals("sweep").items()} == {"widths": 6e12, "depths": 3e12}
    assert {name: total.flops for name, total in ledger.totals("method").items()} == {"muon": 7e12, "adamw": 2e12}
    muon = ledger.total(sweep="widths", method="muon")
    assert (muon.runs, muon.finished, muon.diverged, muon.failed, muon.flops) == (1, 1, 0, 0, 4e12)
    assert ledger.total().share_of(9e13) == pytest.approx(0.1)
    assert ledger.total().share_of_tuning(9e13) == pytest.approx(0.1 / 3)
    assert ledger.total().share_of_tuning(9e13, runs=5) == pytest.approx(0.02)
    assert ledger.table().splitlines()[1].split() == ["widths", "muon", "1", "1", "0", "0", "4e+12", "4", "0"]


def test_what_cannot_be_answered_is_refused() -> None:
    ledger = _filled()
    with pytest.raises(ValueError, match="no method 'muonn' in the ledger; did you mean 'muon'"):
        ledger.total(method="muonn")
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="target_flops must be positive and finite"):
            ledger.total().share_of(target)
    with pytest.raises(ValueError, match="at least one run, got runs=0"):
        Ledger(()).total().share_of_tuning(1.0)


# -- the file ---------------------------------------------------------------------------------------------------------


def _write_many(writer: int, count: int) -> None:
    for number in range(count):
        folder = Path(f"runs/sweep{writer}/lr={number}{'x' * 200}")
        log(folder, range(1, 3), start=writer / 8)
        book(PATH, folder.parent, {folder: "finished"})


def test_several_processes_write_whole_lines() -> None:
    writers, count = 4, 25
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(writer, count)) for writer in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * writers
    ledger = read_ledger(PATH)
    assert (ledger.broken, ledger.repeated) == ((), 0)
    assert {name: total.runs for name, total in ledger.totals("sweep").items()} == {
        f"sweep{writer}": count for writer in range(writers)
    }
    assert ledger.total().flops == writers * count * 2e12


@settings(max_examples=30)
@given(cut=st.integers(1, 150))
def test_a_line_that_was_cut_off_is_named_and_loses_no_other(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    runs = tmp_path_factory.mktemp("runs")
    path, folders = runs / "ledger.jsonl", [runs / "widths" / name for name in ("a", "b", "c")]
    for folder in folders:
        log(folder, range(1, 3))
    book(path, runs / "widths", {folders[0]: "finished"})
    whole = path.read_bytes()
    book(path, runs / "widths", {folders[1]: "finished"})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])  # killed while it wrote the second
    assert len(read_ledger(path).entries) == 1
    (broken,) = read_ledger(path).broken
    assert broken.startswith(f"{path}, line 2: '{{")
    book(path, runs / "widths", dict.fromkeys(folders, "finished"))
    ledger = read_ledger(path)
    assert [entry.folder for entry in ledger.entries] == ["widths/a", "widths/b", "widths/c"]
    assert len(ledger.broken) == 1


def test_a_line_that_stands_twice_counts_once() -> None:
    folder = SWEEP / "lr=2^-4"
    log(folder, range(1, 5))
    finish(folder, 4)
    add(folder)
    row = json.loads(PATH.read_text())
    PATH.write_text(json.dumps(row) + "\n" + json.dumps(row | {"when": "2030-01-01T00:00:00+00:00"}) + "\n")
    ledger = read_ledger(PATH)
    assert (len(ledger.entries), ledger.repeated, ledger.total().flops) == (1, 1, 4e12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "unfinished"}, "line 1: status must be one of"),
        ({"flops": -1.0}, "line 1: flops must be >= 0 or null, got -1.0"),
        ({"seconds": "long"}, "line 1: seconds must be >= 0 or null"),
        ({"flops": None, "when": ...}, "line 1 lacks when"),
    ],
)
def test_wrong_values_are_refused_with_their_line(changes: dict[str, object], message: str) -> None:
    folder = SWEEP / "lr=2^-4"
    log(folder, range(1, 5))
    add(folder)
    row = json.loads(PATH.read_text()) | changes
    PATH.write_text(json.dumps({key: value for key, value in row.items() if value is not ...}) + "\n")
    with pytest.raises(ValueError, match=message):
        read_ledger(PATH)
    PATH.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        read_ledger(PATH)
