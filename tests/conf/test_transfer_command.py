"""`lightning-mup transfer`: a sweep, its report, and what it recommends, from one command; killed in between, too."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_mup.cli import main
from tests.conf.test_train import _cache  # noqa: F401 - a fixture
from tests.unit.wandb_file import read_offline

ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=quickstart",
    "data=synthetic",
    "data.context=16",
    "data.batch_size=4",
    "data.val_batches=2",
    "model.net.depth=1",
    "model.net.head_dim=8",
    "model.base={width: 16, depth: 1}",
    "budget.steps=4",
    "method=adamw",
    "model.net.width=16,32",
    "hydra.sweeper.grid={radius: 1, max_extend: 0}",
    "callbacks=none",
]
JOBS = 2 * 2 * 3  # rules, widths, rates


def results(folder: Path) -> dict[str, dict[str, object]]:
    """Return what runs found, by their folder's name, without their times."""
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    return {name: {key: value for key, value in one.items() if key != "seconds"} for name, one in found.items()}


@pytest.mark.filterwarnings("ignore:.*the best value is at the edge")
def test_from_sweep_to_recommendation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["transfer", *SMALL, "logger=wandb"]) == 0
    folder = tmp_path / "runs" / "quickstart"
    assert len(results(folder)) == JOBS
    report = folder / "report"
    assert {"report.html", "report.json", "report.csv", "report.png"} <= {path.name for path in report.iterdir()}
    with (report / "report.csv").open(newline="") as file:
        assert {(row["method"], row["rules"]) for row in csv.DictReader(file)} == {("adamw", "sp"), ("adamw", "mup")}
    assert "mup" in capsys.readouterr().out
    found = read_offline(report)
    assert (found.run.job_type, found.run.run_group) == ("report", "quickstart")
    assert list((report / "wandb").rglob("*.table.json"))
    assert list((report / "wandb").rglob("*.png"))

    before = results(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert main(["transfer", *SMALL, "logger=wandb"]) == 0  # again: nothing is trained twice
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == times
    assert results(folder) == before


def test_what_is_recommended_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recommended.yaml").write_text(
        'method: "muon_adam"\nrules: "mup x complete_p"\nlr: 0.03\nweight_decay: 0.001\n'
    )
    words = [word for word in SMALL[1:] if not word.startswith(("method=", "hydra.", "model.net.width", "budget"))]
    assert main(["train", "@recommended.yaml", *words, "model.net.width=32", "budget.steps=3", "name=large"]) == 0
    (path,) = (tmp_path / "runs" / "large").rglob("run.json")
    run = json.loads(path.read_text())
    assert (run["method"], run["rules"], run["lr"], run["weight_decay"]) == (
        "muon_adam",
        "mup x complete_p",
        0.03,
        0.001,
    )


def test_a_file_without_a_recommendation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("lr: 0.1\n")
    assert main(["train", f"@{tmp_path / 'other.yaml'}"]) == 2
    assert "holds no recommendation" in capsys.readouterr().err


def test_words_without_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "method=muon"]) == 2
    assert "name no sweep; give experiment=width_transfer" in capsys.readouterr().err


def test_a_killed_sweep_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL, "rules=mup", "budget.steps=12", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=4"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert main(["transfer", *words]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    running = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "transfer", *words],
        cwd=tmp_path / "killed",
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    killed = tmp_path / "killed" / "runs" / "quickstart"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(results(killed)) < 2:
        assert running.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # into the third run
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*/result.json")}
    assert 2 <= len(finished) < 6
    monkeypatch.chdir(tmp_path / "killed")
    assert main(["transfer", *words]) == 0
    assert results(killed) == results(tmp_path / "whole" / "runs" / "quickstart")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


SLOWLY = """
import sys, time
import torch
torch.set_num_threads(1)
from lightning_mup.callbacks.record_run import RecordRun
from lightning_mup.cli import main
spent = RecordRun.spent
RecordRun.spent = lambda self, step: (time.sleep(0.05), spent(self, step))[1]
main(sys.argv[1:])
"""
