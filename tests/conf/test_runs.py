"""Runs that are repeated, killed, resumed, diverge or do not fit; and what they leave for W&B and the plan."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch
from hydra import compose

from lightning_mup.train import plan_of, train
from tests.conf.test_train import TINY, _cache, _hydra, result, tiny  # noqa: F401 - fixtures
from tests.unit.wandb_file import read_offline

SIZES = {"190m": 512, "380m": 768, "640m": 1024, "1.4b": 1536}


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first = train(tiny(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert train(tiny(tmp_path)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_from_the_checkpoint_before_where_a_save_was_cut_off(tmp_path: Path) -> None:
    first = train(tiny(tmp_path, "callbacks=checkpoint"))
    (tmp_path / "result.json").unlink()
    saved = tmp_path / "checkpoints" / "last.ckpt"
    saved.rename(saved.with_name("last.ckpt.old"))
    with patch.object(L.Trainer, "fit", autospec=True, side_effect=L.Trainer.fit) as fit:
        assert train(tiny(tmp_path, "callbacks=checkpoint")) == first
    assert fit.call_args.kwargs["ckpt_path"] == f"{saved}.old"


def test_a_folder_is_one_run(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    with pytest.raises(
        ValueError, match=r"holds another run: method.lr=0.5 \(there: 0.0078125\).*give another name= or fold"
    ):
        train(tiny(tmp_path, "method.lr=0.5"))
    train(tiny(tmp_path, "trainer.enable_progress_bar=false", "callbacks=none"))  # how, not what


def test_the_same_seed_is_the_same_run(tmp_path: Path) -> None:
    losses = [train(tiny(tmp_path / name, f"seed={seed}")) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_divergence_is_a_result(tmp_path: Path, method: str) -> None:
    config = tiny(tmp_path, f"method={method}", "method.lr=1e30", "budget.steps=30", "schedule=constant")
    assert train(config) == math.inf
    assert (result(tmp_path)["status"], result(tmp_path)["val_loss"]) == ("diverged", None)
    assert result(tmp_path)["step"] < 30
    assert train(config) == math.inf  # and is not repeated


def test_fewer_steps_than_the_budget_stop_early_on_its_schedule(tmp_path: Path) -> None:
    train(tiny(tmp_path / "whole", "budget.steps=8", "callbacks=none"))
    train(tiny(tmp_path / "part", "budget.steps=8", "callbacks=none", "trainer.max_steps=4"))
    lines = {
        name: [line for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
        for name in ("whole", "part")
    }
    losses = {name: [json.loads(line)["train/loss"] for line in found] for name, found in lines.items()}
    assert losses["part"] == losses["whole"][:4]
    assert result(tmp_path / "part")["step"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.steps=null"], "budget must be exactly one of"),
        (["budget.tokens=1e6"], "budget must be exactly one of"),
        (["budget.steps=null", "budget.tokens=10"], "is less than one step of 64 tokens"),
        (["+model.base.widht=8"], "model.base.widht is no argument of model.net; did you mean 'width'"),
        (["method.optimizer=muonn"], "did you mean 'muon'"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path, *overrides))


def test_what_wandb_gets(tmp_path: Path) -> None:
    train(tiny(tmp_path, "logger=wandb", "name=widths"))
    found = read_offline(tmp_path)
    assert (found.run.run_group, found.run.job_type) == ("widths", "adamw")
    assert found.config["model.net.width"] == 32
    assert found.config["method.lr"] == 0.0078125
    assert found.metrics["train/*"] == "tokens"
    losses = [row for row in found.history if "train/loss" in row]
    assert [row["tokens"] for row in losses] == [64, 128, 192]
    assert all(row["flops"] > 0 for row in losses)
    assert any("val/loss" in row for row in found.history)
    assert list(tmp_path.rglob("*.table.json"))
    assert found.exited


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = ["budget.steps=40", "callbacks.checkpoint.every_n_train_steps=10", "method=muon_adam"]
    settings += ["weight_decay=width", "callbacks=[default,watch_updates]", "callbacks.watch_updates.every_n_steps=5"]
    expected = train(tiny(tmp_path / "whole", *settings))
    folder = tmp_path / "killed"
    words = [*TINY, *settings, f"folder={folder}"]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 25):
        assert running.poll() is None
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert not (folder / "result.json").exists()
    assert train(tiny(folder, *settings)) == expected
    assert result(folder)["train_loss"] == result(tmp_path / "whole")["train_loss"]
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


SLOWLY = """
import sys, time
import torch
torch.set_num_threads(1)
from lightning_mup import train
from lightning_mup.callbacks.record_run import RecordRun
spent = RecordRun.spent
RecordRun.spent = lambda self, step: (time.sleep(0.1), spent(self, step))[1]
train.main()
"""


# -- the paper's section 4 ---------------------------------------------------------------------------------------------

TABLE_4 = {  # method -> rate, multiplier of embedding and readout, warm-up tokens, decay at width 512
    "adam": (4e-3, 1.0, 742_723_584, 2e-4),
    "muon": (8e-3, 1.6, 11_140_854, 3.2e-4),
    "shampoo": (2e-3, 32.0, 185_680_896, 2e-4),
    "soap": (3.2e-2, 1.0, 23_210_112, 2e-4),
}
HIDDEN = {"adam": -1, "muon": 0, "shampoo": -1, "soap": 0}  # powers of width in the rates
READOUT = {"adam": -1, "muon": -1, "shampoo": -1, "soap": 0}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", TABLE_4)
def test_plan_of_the_paper(size: str, method: str) -> None:
    config = compose("train", overrides=[f"experiment=llama_{size}", f"method={method}", "folder=unused"])
    rate, multiplier, warmup, decay = TABLE_4[method]
    ratio = SIZES[size] / 512
    found = plan_of(config)
    rates = {
        "net.embedding.weight": multiplier,
        "net.layers.0.attention.q_proj.weight": ratio ** HIDDEN[method],
        "net.layers.31.mlp.down_proj.weight": ratio ** HIDDEN[method],
        "net.readout.weight": multiplier * ratio ** READOUT[method],
    }
    assert config.method.lr == rate
    assert {name: found[name].lr for name in rates} == pytest.approx(rates)
    assert config.schedule.warmup.n == warmup
    assert config.weight_decay.weight_decay == decay
    assert all(param.weight_decay == pytest.approx(1 / ratio) for param in found.params)
