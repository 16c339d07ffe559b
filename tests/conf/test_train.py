"""Every choice of every group trains: composed by Hydra, instantiated, run for three steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from lightning_mup.train import train

CONF = Path(__file__).parents[2] / "conf"
TINY = [
    "data=synthetic",
    "data.context=16",
    "data.batch_size=4",
    "data.val_batches=2",
    "model.net.width=32",
    "model.net.depth=1",
    "model.net.head_dim=8",
    "model.base.width=16",
    "budget={steps: 3}",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_MUP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def tiny(folder: Path, *overrides: str) -> DictConfig:
    return compose("train", overrides=[*TINY, *overrides, f"folder={folder}"])


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def assert_trained(folder: Path, config: DictConfig) -> None:
    assert math.isfinite(train(config))
    assert result(folder)["step"] == 3


@pytest.mark.parametrize("method", options("method"))
def test_method(tmp_path: Path, method: str) -> None:
    assert_trained(tmp_path, tiny(tmp_path, f"method={method}"))
    assert json.loads((tmp_path / "run.json").read_text())["method"] == method


@pytest.mark.parametrize("rules", options("rules"))
def test_rules(tmp_path: Path, rules: str) -> None:
    deep = ["model.base.depth=1", "model.net.depth=2"] if rules in ("complete_p", "depth_mup") else []
    assert_trained(tmp_path, tiny(tmp_path, f"rules={rules}", *deep))


@pytest.mark.parametrize("policy", options("weight_decay"))
def test_weight_decay(tmp_path: Path, policy: str) -> None:
    long = ["weight_decay.timescale=2"] if policy == "timescale" else []  # of three steps
    assert_trained(tmp_path, tiny(tmp_path, f"weight_decay={policy}", *long))


@pytest.mark.parametrize("schedule", options("schedule"))
def test_schedule(tmp_path: Path, schedule: str) -> None:
    assert_trained(tmp_path, tiny(tmp_path, f"schedule={schedule}"))


OF_THE_RUN = {"grafting", "parametrize", "weight_decay"}  # it has its own; test_conf.py holds these files


@pytest.mark.parametrize("callbacks", sorted({*options("callbacks")} - OF_THE_RUN))
def test_callbacks(tmp_path: Path, callbacks: str) -> None:
    assert_trained(tmp_path, tiny(tmp_path, f"callbacks={callbacks}"))


@pytest.mark.parametrize("logger", options("logger"))
def test_logger(tmp_path: Path, logger: str) -> None:
    if logger == "tensorboard":
        pytest.importorskip("tensorboard")
    assert_trained(tmp_path, tiny(tmp_path, f"logger={logger}"))


@pytest.mark.parametrize("model", options("model"))
def test_model(tmp_path: Path, model: str) -> None:
    if model == "huggingface_llama":
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        net = [f"model.net.config.{key}={2 * size}" for key, size in sizes.items()]
        base = [f"model.base.config.{key}={size}" for key, size in sizes.items()]
        others = [line for line in TINY if not line.startswith("model.")]
        few = ["model.net.config.num_hidden_layers=1", "model.net.config.head_dim=8", f"folder={tmp_path}"]
        config = compose("train", overrides=[*others, f"model={model}", *net, *base, *few])
    else:
        config = tiny(tmp_path, f"model={model}", "model.net.vocab_size=64", "model.net.kv_heads=null")
    assert_trained(tmp_path, config)
