"""Sweeps through every launcher, jobs of several processes within a multirun, and the scripts that Slurm would get."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.utils import instantiate
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_mup.commands import slurm
from lightning_mup.launch import RANK_VARIABLES, runs_apart
from tests.conf.valley.app import main

ROOT = Path(__file__).parents[2]
GRID = ("sweep=width_lr", "model.net.width=128", "method=muon", "hydra.sweeper.grid.radius=1")


def _program(module: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], level = before
    root.setLevel(level)


# -- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_grows_through_a_launcher_of_several_processes(launcher: str) -> None:
    pytest.importorskip("joblib" if launcher == "joblib" else "submitit")
    if launcher == "submitit_local":  # one job is preempted, and submitted again in the same folder
        Path("trouble").write_text("SIGUSR2 0.125")
    done = _program("tests.conf.valley.app", *GRID, f"launcher={launcher}")
    assert done.returncode == 0, done.stderr
    values = {path.parent.name: float(path.read_text()) for path in Path("runs/width_lr").glob("*/result.txt")}
    assert values == {f"method=muon,width=128,lr=2^{k}": float((k + 5) ** 2) for k in (-6, -5, -4, -3)}
    assert "round 2: 1 jobs for 1 combinations" in done.stdout
    runs = {path.parent.name: len(path.read_text().splitlines()) for path in Path("runs").rglob("ran.txt")}
    preempted = {"method=muon,width=128,lr=2^-3": 2} if launcher == "submitit_local" else {}
    assert runs == dict.fromkeys(values, 1) | preempted


@pytest.mark.parametrize("name", ["basic", "joblib", "submitit_local", "submitit_slurm"])
def test_launchers_compose_and_are_built(name: str) -> None:
    if name != "basic":
        pytest.importorskip("joblib" if name == "joblib" else "submitit")
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", [f"launcher={name}", "trainer.devices=4"], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        launcher = Plugins.instance()._instantiate(config.hydra.launcher)
    if name == "submitit_slurm":
        assert (launcher.params["tasks_per_node"], launcher.params["nodes"]) == (4, 1)  # type: ignore[attr-defined]
        (plugin,) = [instantiate(plugin) for plugin in config.trainer.plugins]
        assert isinstance(plugin, SLURMEnvironment)
        assert plugin.auto_requeue is False


# -- several processes within a job -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored_logging")
def test_jobs_run_apart_with_their_own_words_and_no_rank(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/mine.yaml").write_text("name: mine\nlr: 0.0625\n")
    Path("trouble").write_text("ValueError 0.1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("LOCAL_RANK", "0")  # left behind by somebody else
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    words = ["--config-dir=mine", "devices=2", "method=mine", "sweep=grid", "hydra.sweeper.grid.radius=1"]
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    with pytest.raises(SystemExit):
        main()
    told = capfd.readouterr()
    assert "lr=0.125 is too much" in told.err  # the job's own message
    assert "1 of 3 jobs failed" in told.err
    assert "tests.conf.valley.app ended with exit code 1 in" in told.err
    folder = Path("runs/grid")
    jobs = [f"devices=2,method=mine,lr=2^{k}" for k in (-5, -4, -3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*jobs, "multirun.yaml"])
    assert [(folder / job / "result.txt").exists() for job in jobs] == [True, True, False]
    for job in jobs:
        (environment,) = (folder / job / "ran.txt").read_text().splitlines()
        assert not {*RANK_VARIABLES, "PL_GLOBAL_SEED"} & set(environment.split())
        assert sorted(path.name for path in (folder / job / ".hydra").iterdir()) == [
            "config.yaml",
            "hydra.yaml",
            "overrides.yaml",
        ]


def test_jobs_under_slurm_or_alone_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        single = compose("train", return_hydra_config=True)
        job = compose("train", ["hydra.job.num=0"], return_hydra_config=True)
    try:
        HydraConfig.instance().set_config(single)
        assert not runs_apart(2)
        HydraConfig.instance().set_config(job)
        assert runs_apart(2)
        assert runs_apart("auto")
        assert not runs_apart(1)
        monkeypatch.setenv("SLURM_NTASKS", "2")
        monkeypatch.setenv("SLURM_JOB_NAME", "train")
        assert not runs_apart(2)
    finally:
        HydraConfig.instance().cfg = None


def test_two_jobs_of_two_processes_each_train_in_one_multirun() -> None:
    small = ["debug=fast", "data=synthetic", "data.context=16", "data.batch_size=4", "model.net.width=32"]
    several = ["trainer.devices=2", "strategy=ddp", "trainer.enable_progress_bar=false"]
    done = _program("lightning_mup.train", "-m", *small, "model.net.depth=1", *several, "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#0 :") == done.stdout.count("#1 :") == 1  # one multirun, not one for each process
    runs = sorted(Path("runs/debug").glob("*/"))
    assert len(runs) == 2
    assert not Path("multirun").exists()
    assert not Path("outputs").exists()
    for seed, run in enumerate(runs):
        assert f"seed={seed}" in run.name
        assert json.loads((run / "result.json").read_text())["status"] == "finished"
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert set(steps) == {0, 1, 2, 3}
        assert len([step for step in steps if step == 3]) <= 2  # training and validation
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert done.stderr.count("distributed_backend=gloo") + done.stdout.count("distributed_backend=gloo") == 2


# -- Slurm ------------------------------------------------------------------------------------------------------------


def _script(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    slurm.add_arguments(parser)
    capsys.readouterr()
    assert slurm.run(parser.parse_args(list(words))) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)  # noqa: S607 - any bash will do
    return text.splitlines()


RESOURCES = (
    "trainer.devices=4",
    "++trainer.num_nodes=2",
    "hydra.launcher.timeout_min=90",
    "hydra.launcher.partition=gpu",
)
FLAGS = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=90", "--partition=gpu", "--requeue"}


def test_the_script_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    lines = _script(capsys, "method=muon", "name='a run'", *RESOURCES)
    flags = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {*FLAGS, "--signal=USR1@120", "--mem=32G"} <= flags  # Lightning's signal: it saves and requeues
    command = "srun python -m lightning_mup.train method=muon 'name='\"'\"'a run'\"'\"'' trainer.devices=4"
    assert lines[-1] == f"{command} ++trainer.num_nodes=2"
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", shlex.split(lines[-1])[4:])
    assert (config.name, config.trainer.num_nodes, config.trainer.devices) == ("a run", 2, 4)


def test_the_script_of_a_sweep_is_submitits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    lines = _script(capsys, "sweep=width_lr", "method=adamw,muon", "launcher=submitit_slurm", *RESOURCES)
    flags = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {*FLAGS, "--signal=USR2@120", "--mem=32GB", "--array=0-29%30"} <= flags
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert command.endswith(f"submitit.core._submit {Path('runs/width_lr/.submitit').resolve()}/%j")
    assert not Path("runs").exists()


def test_lists_without_a_grid_count_their_product(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    assert "#SBATCH --array=0-5%6" in _script(capsys, "--multirun", "method=adamw,muon", "seed=0,1,2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher=joblib"], "launcher=joblib is not for Slurm"),
        (["trainer.device=2"], "did you mean 'trainer.devices'"),
    ],
)
def test_words_that_do_not_fit_slurm_are_refused(words: list[str], message: str) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=message):
        slurm.run(argparse.Namespace(words=words, multirun=False))
