"""Telescoping sweeps by Hydra: levels, budgets, the ledger, resumption, launchers, and settings that do not fit."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from lightning_mup.ledger import read_ledger
from lightning_mup.run_cost import run_flops
from lightning_mup.sweep import from_words
from lightning_mup.sweep_telescope import TelescopingSweep
from lightning_mup.train import build
from tests.conf.drifting.app import bottom, main

ROOT = Path(__file__).parents[2]
COST = "hydra.sweeper.cost._target_=tests.conf.drifting.app.flops"
SWEEP = ("sweep=telescope", "method=adamw,muon", COST, "hydra.sweeper.grid={radius: 2, step: 1.0}")
TARGET = 1e6 * 2048**2
Program = Callable[..., None]


@pytest.fixture
def drifting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """The stand-in program, in this process."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def program(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["app.py", *words, "hydra/job_logging=none"])
        main()

    yield program
    root.handlers[:], level = before
    root.setLevel(level)


def _jobs(folder: str = "runs/telescope") -> dict[tuple[str, int], dict[str, float]]:
    """Method and width to loss by the learning rate's label."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for path in Path(folder).glob("*/result.json"):
        names = dict(part.split("=") for part in path.parent.name.split(","))
        loss = json.loads(path.read_text())["val_loss"]
        found.setdefault((names["method"], int(names["width"])), {})[names["lr"]] = math.inf if loss is None else loss
    return found


def _runs(folder: str = "runs/telescope") -> list[int]:
    return [len(path.read_text().splitlines()) for path in Path(folder).glob("*/ran.txt")]


def _spent(jobs: dict[tuple[str, int], dict[str, float]], method: str) -> float:
    return sum(1e6 * width**2 * len(losses) for (name, width), losses in jobs.items() if name == method)


# -- levels -----------------------------------------------------------------------------------------------------------


def test_levels_follow_the_drifting_optimum_within_the_share(
    drifting: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    drifting(*SWEEP)
    jobs, printed = _jobs(), capsys.readouterr().out
    for method in ("adamw", "muon"):
        widths = sorted(width for name, width in jobs if name == method)
        assert widths == [64, 128, 256]
        assert _spent(jobs, method) <= 0.2 * TARGET
        for width in widths:
            losses = jobs[method, width]
            best = float(min(losses, key=losses.__getitem__).removeprefix("2^"))
            tried = sorted(float(label.removeprefix("2^")) for label in losses)
            spacing = min(b - a for a, b in itertools.pairwise(tried))
            assert abs(best - bottom(method, width)) <= spacing / 2 + 1e-9
            assert tried[0] < bottom(method, width) < tried[-1]
        ranges = [max(map(_log2, jobs[method, n])) - min(map(_log2, jobs[method, n])) for n in widths]
        assert ranges == sorted(ranges, reverse=True)
        row = next(line for line in printed.splitlines() if line.startswith(f"method={method}  "))
        at_target = float(row.split()[-1])
        assert (
            abs(math.log2(at_target) - bottom(method, 2048)) < 0.5
        )  # half of the base's notch; the base is off by 0.97
    plan, first = printed.index("telescoping sweep in runs/telescope"), printed.index("round 1:")
    assert plan < first
    assert "of the target's run" in printed[plan:first]
    drifting(*SWEEP)
    assert _jobs() == jobs
    assert set(_runs()) == {1}


def _log2(label: str) -> float:
    return float(label.removeprefix("2^"))


def test_a_dry_run_says_what_it_costs_and_starts_nothing(drifting: Program, capsys: pytest.CaptureFixture[str]) -> None:
    drifting(*SWEEP, "hydra.sweeper.dry_run=true")
    printed = capsys.readouterr().out
    assert "(at most 20.00%)" in printed
    assert "nothing was started" in printed
    assert not Path("runs").exists()


def test_what_is_printed_is_what_is_run(drifting: Program, capsys: pytest.CaptureFixture[str]) -> None:
    drifting(*SWEEP, "method=muon", "hydra.sweeper.grid.max_extend=0")
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.endswith("grow within the share")]
    jobs = _jobs()
    assert int(line.split()[0]) == sum(map(len, jobs.values()))
    total = read_ledger("runs/ledger.jsonl").total()
    assert line.split(": ")[1].startswith(f"{total.flops:.3g} FLOPs, {total.share_of(TARGET):.2%}")


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_each_combination_has_its_own_cost_and_centre(method: str) -> None:
    words = ["sweep=telescope", "model.net.width=512", "model.net.depth=2,4", f"method={method}"]
    _, sweep = from_words(words)
    assert isinstance(sweep, TelescopingSweep)
    shallow, deep = sweep.telescopes
    assert shallow.target == 512
    assert shallow.target_flops < deep.target_flops
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", [*words[:2], "model.net.depth=4", f"method={method}"])
    assert deep.target_flops == run_flops(config)
    assert abs(deep.centre - math.log2(config.method.lr)) <= 0.25
    overrides = [sweep.overrides(job) for job in sweep.next_jobs()]
    assert len({word for job in overrides for word in job if word.startswith("model.net.width=")}) == 1
    assert all("model.net.width=64" in job for job in overrides)


def test_the_cost_is_what_a_run_records() -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", ["data=synthetic", "budget={steps: null, tokens_per_parameter: 3}", "folder=x"])
        assert isinstance(config, DictConfig)
        record = build(config).record
    assert run_flops(config) == record.spent(int(str(record.facts["max_steps"])))["flops"]


# -- resumption, failures and the ledger ------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_and_its_ledger_has_every_step(drifting: Program) -> None:
    Path("trouble").write_text("KeyboardInterrupt 0.03")
    with pytest.raises(KeyboardInterrupt):
        drifting(*SWEEP)
    interrupted = len(_runs())
    assert 0 < sum(map(len, _jobs().values())) < interrupted
    Path("trouble").unlink()
    drifting(*SWEEP)
    runs = sorted(_runs())
    assert runs == [1] * (len(runs) - 1) + [2]
    ledger = read_ledger("runs/ledger.jsonl")
    planned = sum(_spent(_jobs(), method) for method in ("adamw", "muon"))
    assert ledger.total().runs == len(runs)
    assert ledger.total().flops == pytest.approx(planned + 1e6 * 64**2 / 2)  # half a run was lost at the base's width
    text = Path("runs/ledger.jsonl").read_text()
    drifting(*SWEEP)
    assert Path("runs/ledger.jsonl").read_text() == text


def test_failed_jobs_cost_too_and_stop_their_combination_alone(
    drifting: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("trouble").write_text("ValueError 0.06")  # muon's base alone
    with pytest.raises(SystemExit):
        drifting(*SWEEP)
    assert "jobs failed:" in capsys.readouterr().err
    jobs = _jobs()
    assert ("adamw", 128) in jobs
    assert ("muon", 128) not in jobs
    ledger = read_ledger("runs/ledger.jsonl")
    failed = [entry for entry in ledger.entries if entry.status == "failed"]
    assert {entry.flops for entry in failed} == {1e6 * 64**2 / 2}
    assert {entry.method for entry in failed} == {"muon"}
    Path("trouble").unlink()
    drifting(*SWEEP)
    after = read_ledger("runs/ledger.jsonl")
    assert after.total(method="muon").failed == len(failed)
    lost = len(failed) * 1e6 * 64**2 / 2
    assert after.total(method="muon").flops == pytest.approx(_spent(_jobs(), "muon") + lost)
    assert set(after.totals("sweep")) == {"telescope"}


def test_where_a_level_diverges_its_combination_ends(drifting: Program, capsys: pytest.CaptureFixture[str]) -> None:
    drifting("sweep=telescope", COST, "method.lr=64", "hydra.sweeper.grid={radius: 2, step: 1.0, max_extend: 1}")
    assert "all runs of a level diverged for the run; give a smaller centre" in capsys.readouterr().out
    assert {width for _, width in [_parts(path) for path in Path("runs/telescope").glob("*/")]} == {64}
    assert read_ledger("runs/ledger.jsonl").total().diverged == 6


def _parts(path: Path) -> tuple[str, int]:
    names = dict(part.split("=") for part in path.name.split(","))
    return names.get("method", ""), int(names["width"])


def test_a_ledger_elsewhere(drifting: Program) -> None:
    grid = "hydra.sweeper.grid={radius: 1, step: 1.0, max_extend: 0}"
    drifting("sweep=telescope", COST, grid, "hydra.sweeper.ledger=elsewhere/costs.jsonl")
    assert not Path("runs/ledger.jsonl").exists()
    entries = read_ledger("elsewhere/costs.jsonl").entries
    assert {(Path("elsewhere") / entry.folder / "result.json").exists() for entry in entries} == {True}


def test_a_grid_sweep_keeps_a_ledger_too(drifting: Program) -> None:
    drifting("sweep=width_lr", "model.net.width=64,128", "hydra.sweeper.grid.radius=1")
    total = read_ledger("runs/ledger.jsonl").total(sweep="width_lr")
    assert total.runs == len(_runs("runs/width_lr"))
    assert total.share_of(1e6 * 128**2) == pytest.approx(
        sum(1e6 * int(names["width"]) ** 2 for names in _names("runs/width_lr")) / (1e6 * 128**2)
    )


def _names(folder: str) -> list[dict[str, str]]:
    return [dict(part.split("=") for part in path.parent.name.split(",")) for path in Path(folder).glob("*/ran.txt")]


# -- launchers --------------------------------------------------------------------------------------------------------


def test_levels_through_a_launcher_of_several_processes(drifting: Program) -> None:
    pytest.importorskip("joblib")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    words = [*SWEEP, "method=muon"]
    command = [sys.executable, "-m", "tests.conf.drifting.app", *words, "launcher=joblib"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    parallel = _jobs()
    total = read_ledger("runs/ledger.jsonl").total()
    assert total.runs == sum(map(len, parallel.values()))
    drifting(*words, "name=one_by_one")
    assert _jobs("runs/one_by_one") == parallel


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.net.width=64,128"], "lists widths, which the telescope doubles by itself; give model.net.width=NUM"),
        (["+hydra.sweeper.axes={model.net.width: [64]}"], "axes lists model.net.width"),
        (["model.net.width=128"], r"9 runs at width 64 cost .*give share="),
        (["model.net.width=32"], "base must be a width from 1 to the target's"),
        (["model.net.width=1024", "hydra.sweeper.telescope.share=0"], "share and drift must be positive"),
        (["model.net.width=1024", "method.lr=-1"], "needs a positive centre"),
        (["model.net.width=1024", "method.lr=0.1,0.2"], "lists values of method.lr"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_words(["sweep=telescope", *words])
