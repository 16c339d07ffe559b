"""The cluster recipe: its commands compose, its table is what the optimizers say, and torchrun runs its strategy."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from lightning_mup.core.ownership import Load
from recipes.cluster import expect

RECIPE = Path(__file__).parents[2] / "recipes" / "cluster"
MATRIX = Load(torch.empty(8, 8, device="meta"), work=1e6, state_bytes=600)
TABLE = Load(torch.empty(32, 8, device="meta"), work=100.0, state_bytes=2048, elementwise=True)


def printed(*arguments: str, **environment: str) -> list[str]:
    found = asked(*arguments, **environment)
    assert found.returncode == 0, found.stderr
    return shlex.split(found.stdout)


def asked(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPE / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize("strategy", ["ddp", "mup_ddp", "mup_fsdp", "mup_hsdp"])
@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_commands_compose(strategy: str, launcher: str) -> None:
    words = printed("1.4b", "muon", strategy, "data.workers=4", LAUNCHER=launcher, NODES="2", HOST="node0:29500")
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", overrides)
    assert (config.trainer.num_nodes, config.data.workers, config.method.optimizer) == (2, 4, "muon_adam")
    chosen = config.trainer.strategy
    assert chosen == strategy if isinstance(chosen, str) else chosen._target_.endswith("MupFSDPStrategy")
    assert isinstance(chosen, str) or chosen.replicas == (2 if strategy == "mup_hsdp" else 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("2b", "muon", "ddp"), "unknown size '2b'; give 190m, 380m, 640m or 1.4b"),
        (("190m", "adem", "ddp"), "unknown method 'adem'; give adam, muon, shampoo or soap"),
        (("190m", "adam", "fsdp"), "unknown strategy 'fsdp'; give ddp, mup_ddp, mup_fsdp or mup_hsdp"),
        (("190m", "adam", "ddp"), "give HOST=NODE:PORT"),
    ],
)
def test_unknown_words_are_refused(words: tuple[str, ...], said: str) -> None:
    found = asked(*words, LAUNCHER="torchrun", NODES="2")
    assert found.returncode == 2
    assert said in found.stderr


@pytest.mark.parametrize("method", expect.METHODS)
def test_the_recorded_table_is_what_the_optimizers_say(method: str) -> None:
    recorded = [line.split() for line in (RECIPE / "expect.txt").read_text().splitlines()]
    for row in expect.rows("190m", method):
        assert " ".join(row).split() in recorded


def test_bytes_by_hand() -> None:
    """A matrix of 256 bytes with an owner and a table of 1024 bytes, over four ranks."""
    loads = [MATRIX, TABLE]
    assert expect.replicated(loads, 4) == (1280, 2648, 1.0, 1920, 0)
    assert expect.divided(loads, 4)[:2] == (1280, 2048)
    assert expect.divided(loads, 4).divided == 960
    full, hybrid = expect.sharded(loads, 4), expect.sharded(loads, 4, 2)
    assert (full.weights, full.state, full.sent, full.divided) == (320, 600 + 512, 2880, 48 + 48)
    assert (hybrid.weights, hybrid.state, hybrid.sent, hybrid.divided) == (640, 600 + 1024, 1920 + 640, 32 + 96)


def test_torchrun_trains_under_it_and_goes_on(tmp_path: Path) -> None:
    run = ["data=synthetic", "method=blocked_soap", "strategy=mup_fsdp", "trainer.devices=2", "budget.steps=3"]
    run += ["model.net.width=64", "data.batch_size=4", "data.context=32", f"folder={tmp_path}/run", "verbose=false"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "lightning_mup.train", *run]
    for said in ("finished at step 3", "was finished before"):
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert said in found.stdout + found.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_dir()
    alone = [word for word in run if not word.startswith(("strategy", "trainer.devices"))]
    main = [sys.executable, "-m", "lightning_mup.train", *alone]
    found = subprocess.run(main, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "was finished before" in found.stdout + found.stderr
