"""Every choice of every group trains: composed by Hydra, instantiated, run for three steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_mup.core.spec import Role
from lightning_mup.data.synthetic import MarkovChain
from lightning_mup.train import plan_of, train

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


SHRUNK = [
    "data=synthetic",
    "trainer=cpu",
    "data.context=16",
    "data.batch_size=4",
    "data.val_batches=2",
    "model.net.width=32",
    "model.net.depth=1",
    "model.net.head_dim=8",
    "model.base={width: 16, depth: 1}",
    "trainer.max_steps=3",
    "trainer.enable_progress_bar=false",
    "hydra.mode=RUN",
]


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment(tmp_path: Path, experiment: str) -> None:
    paper = ["model.net.vocab_size=64", "budget={steps: 20000000, tokens_per_parameter: null}"]  # beyond its warm-up
    words = [f"experiment={experiment}", *SHRUNK, *(paper if "llama" in experiment else []), f"folder={tmp_path}"]
    assert_trained(tmp_path, compose("train", overrides=words))


RULES = {  # of hidden matrices' rate and weight decay at twice the base's width, for Muon with Adam beside; the label
    "none": (1, 1 / 2, "mup"),
    "sp": (1, 1, "sp, decay constant"),
    "mup_only": (1, 1, "mup, decay constant"),
    "decay_only": (1, 1 / 2, "sp"),
    "adam_rule": (1 / 2, 1 / 2, "mup, Adam rule"),
    "kimi_factor": (2**0.5, 1 / 2, "mup, Kimi factor"),
    "eps_kept": (1, 1 / 2, "mup, eps kept"),
    "decay_sqrt": (1, 2**-0.5, "mup, decay -0.5"),
    "decay_square": (1, 1 / 4, "mup, decay -2.0"),
}


@pytest.mark.parametrize("ablation", options("ablation"))
def test_ablation(tmp_path: Path, ablation: str) -> None:
    """Each trains; each has the rate and the decay that it names, and a label of its own."""
    config = tiny(tmp_path, "method=muon_adam", "weight_decay=width", f"ablation={ablation}")
    assert_trained(tmp_path, config)
    lr, factor, label = RULES[ablation]
    hidden = next(p for p in plan_of(config).params if p.spec.role is Role.HIDDEN)
    assert hidden.lr == pytest.approx(lr)
    assert instantiate(config.weight_decay).policy.factor(hidden.spec) == pytest.approx(factor)
    kept = all(value == 1 for p in plan_of(config).params for value in p.eps.values())
    assert kept == (ablation == "eps_kept" or label.startswith("sp"))
    assert json.loads((tmp_path / "run.json").read_text())["rules"] == label


@pytest.mark.parametrize("debug", options("debug"))
def test_debug(tmp_path: Path, debug: str) -> None:
    lines = [line for line in TINY if not line.startswith("budget")]
    config = compose("train", overrides=[*lines, f"debug={debug}", "trainer.max_steps=3", f"folder={tmp_path}"])
    assert_trained(tmp_path, config)


@pytest.mark.parametrize("data", ["embedded", "folder", "shards"])
def test_data(tmp_path: Path, data: str) -> None:
    (tmp_path / "text").mkdir()
    for name in range(40):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} " * 200)
    chain = MarkovChain(vocab_size=64, tokens=4000, val_tokens=2000, cache=tmp_path / "cache")
    chain.prepare()
    given = {
        "embedded": [],
        "folder": [f"data.source.path={tmp_path / 'text'}"],
        "shards": [f"data.source.{key}={paths[0]}" for key, paths in zip(("train", "val"), chain.files(), strict=True)],
    }
    words = [line for line in TINY if line != "data=synthetic"]
    assert_trained(tmp_path, compose("train", overrides=[f"data={data}", *words, *given[data], f"folder={tmp_path}"]))


@pytest.mark.parametrize("group", ["trainer", "strategy"])
def test_the_rest_composes(tmp_path: Path, group: str) -> None:
    for choice in options(group):
        assert "strategy" in tiny(tmp_path, f"{group}={choice}").trainer


def test_every_group_is_held_by_a_test() -> None:
    here = {
        "ablation",
        "callbacks",
        "data",
        "debug",
        "experiment",
        "logger",
        "method",
        "model",
        "rules",
        "schedule",
        "strategy",
    }
    elsewhere = {"hydra", "launcher", "sweep", "paper"}  # test_sweep.py, test_launchers.py, test_runs.py
    here |= {"strategy", "trainer", "weight_decay"}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} - {"__pycache__"} == here | elsewhere
