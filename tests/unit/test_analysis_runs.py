from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from lightning_mup.analysis.runs import check_same_data, listed, read_metrics, read_run, read_runs, without_repeats

from .transfer_runs import Planted, facts_of, write_run, write_runs

SMALL = Planted(sizes=(64,), log2_lr=(-8, -7), seeds=1)


def planted(folder: Path, name: str, *, loss: float | None = 3.0, seed: int = 0, changes: dict | None = None) -> Path:
    return write_run(folder / name, facts_of(SMALL, 64, -7, seed) | (changes or {}), loss)


def test_runs_are_found_at_any_depth_and_say_how_they_ended(tmp_path: Path) -> None:
    write_runs(tmp_path / "sweep", SMALL)
    killed = planted(tmp_path, "a/b/killed", loss=None)
    whole = (killed / "metrics.jsonl").read_text().rsplit("\n", 1)[0]
    (killed / "metrics.jsonl").write_text(whole + '\n{"step": 101, "val/loss": 3.0}\n')  # tells no flops
    planted(tmp_path, "diverged", loss=math.inf)
    runs = read_runs(tmp_path, tmp_path / "sweep")  # twice, counted once
    assert sorted(run.status for run in runs) == ["diverged", "finished", "finished", "unfinished"]
    by_status = {run.status: run for run in runs}
    assert by_status["diverged"].loss() == math.inf
    assert math.isnan(by_status["unfinished"].loss())
    assert by_status["finished"].loss("train_loss") == pytest.approx(by_status["finished"].loss() + 0.1)
    assert by_status["unfinished"].flops == 60 * 64**2 * 1024 * 100  # of the last line that tells


def test_metrics_merge_lines_and_the_last_of_a_step_wins(tmp_path: Path) -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": "-inf"}, {"step": 2, "b": 5.0}, {"step": 2, "a": 3.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3')
    assert read_metrics(file) == ({"step": 1, "a": -math.inf}, {"step": 2, "a": 3.0, "b": 5.0})


@pytest.mark.parametrize("line", ['{"step": 1,', "[1]", "{}", '{"step": null}', "7"])
def test_broken_line_names_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(file)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", '{"lr": 1,\n"width"', r"run\.json, line 2: broken JSON"),
        ("run.json", "[]", "must hold a JSON object, got list"),
        ("run.json", '{"lr": 1}', "lacks name, method"),
        ("result.json", '{"step', r"result\.json, line 1: broken"),
        ("result.json", '{"status": "finished"}', "lacks step, tokens"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = planted(tmp_path, "run")
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(folder)


@pytest.mark.parametrize(("name", "value"), [("lr", "nan"), ("lr", -1), ("width", -64), ("max_steps", "many")])
def test_wrong_settings_are_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"run\.json: {name} must be a number >= 0"):
        read_run(planted(tmp_path, "run", changes={name: value}))


def test_unknown_status_and_missing_loss(tmp_path: Path) -> None:
    folder = planted(tmp_path, "run")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"val_loss": None}))
    with pytest.raises(ValueError, match="finished without a val_loss; compare all runs by train_loss"):
        read_run(folder).loss()
    (folder / "result.json").write_text(json.dumps(result | {"val_loss": "nan"}))
    assert read_run(folder).loss() == math.inf
    (folder / "result.json").write_text(json.dumps(result | {"status": "done"}))
    with pytest.raises(ValueError, match="status must be 'finished' or 'diverged', got 'done'"):
        read_run(folder)


def test_newest_of_two_runs_with_the_same_settings_is_kept_and_noted(tmp_path: Path) -> None:
    new = planted(tmp_path, "a", loss=2.0)
    old = planted(tmp_path, "b", loss=3.0, changes={"config": {"heads": 2}})
    planted(tmp_path, "c", loss=None)  # began anew, but has no result
    planted(tmp_path, "d", loss=2.5, seed=1)
    os.utime(old / "result.json", (1, 1))
    kept, notes = without_repeats(read_runs(tmp_path))
    assert sorted(run.loss() for run in kept) == [2.0, 2.5]
    (note,) = notes
    place = new.relative_to(Path.cwd()) if new.is_relative_to(Path.cwd()) else new
    assert note.startswith(f"{place} was used and not ")
    assert "heads" in note


def test_losses_on_different_data_are_not_compared(tmp_path: Path) -> None:
    planted(tmp_path, "a")
    planted(tmp_path, "b", changes={"data": "other-1"})
    with pytest.raises(ValueError, match=r"different data cannot be compared: 'text-3fe1' in .*'other-1' in"):
        check_same_data(read_runs(tmp_path))
    assert check_same_data(read_runs(tmp_path / "a")) == "text-3fe1"


def test_long_lists_are_cut() -> None:
    assert listed("abcdef", limit=2) == "a, b and 4 more"
    assert listed("ab") == "a, b"
