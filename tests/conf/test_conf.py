"""Files of conf/ that stand for themselves instantiate what they name; test_train.py has those of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import lightning_mup
from lightning_mup.data.module import TokenDataModule
from lightning_mup.models.llama import Llama

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("callbacks", "data", "model")
OF_RUNS = {"checkpoint", "default", "none"}  # callbacks that name a run's folder, or several
FILES = sorted(
    str(path.relative_to(CONF).with_suffix(""))
    for group in GROUPS
    for path in (CONF / group).glob("*.yaml")
    if path.stem not in OF_RUNS
)
KINDS = {
    "callbacks/grafting": lightning_mup.Grafting,
    "callbacks/parametrize": lightning_mup.Parametrize,
    "callbacks/spectral_normalization": lightning_mup.SpectralNormalization,
    "callbacks/watch_features": lightning_mup.WatchUpdates,
    "callbacks/watch_updates": lightning_mup.WatchUpdates,
    "callbacks/weight_decay": lightning_mup.WeightDecay,
    "data/embedded": TokenDataModule,
    "data/embedded_site": TokenDataModule,
    "data/fineweb": TokenDataModule,
    "data/fineweb_paper": TokenDataModule,
    "data/folder": TokenDataModule,
    "data/openwebtext": TokenDataModule,
    "data/shards": TokenDataModule,
    "data/synthetic": TokenDataModule,
    "model/gpt": Llama,
    "model/huggingface_llama": transformers.LlamaForCausalLM,
    "model/llama": Llama,
    "model/llama_1.4b": Llama,
    "model/llama_190m": Llama,
    "model/llama_1b": Llama,
    "model/llama_380m": Llama,
    "model/llama_3b": Llama,
    "model/llama_640m": Llama,
    "model/llama_8b": Llama,
}


def test_every_file_has_a_kind() -> None:
    assert sorted(KINDS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_composes_and_instantiates(name: str) -> None:
    group, _, choice = name.rpartition("/")
    data = ["+data.vocab_size=96", "+data.context=16"] if group == "model" else []
    with initialize_config_module("lightning_mup.conf", version_base="1.3"), torch.device("meta"):
        found = instantiate(compose(overrides=[f"+{group}={choice}", *data]))
    inside = {"callbacks": choice, "model": "net"}  # callbacks stand side by side, a network beside its base
    made = found[group][inside[group]] if group in inside else found[group]
    assert isinstance(made, KINDS[name])


def test_callbacks_stand_side_by_side() -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        found = instantiate(compose(overrides=["+callbacks=[parametrize,weight_decay,watch_updates]"]))
    assert found.callbacks.parametrize.base == {"width": 128}
    assert found.callbacks.weight_decay.amount.value == 1e-4
    assert found.callbacks.watch_updates.every_n_steps == 100


def test_an_override_reaches_the_callback() -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose(overrides=["+callbacks=parametrize", "callbacks.parametrize.rules=[mup,complete_p]"])
    assert instantiate(config).callbacks.parametrize.rules == ["mup", "complete_p"]
