"""The presets of conf/model, composed by Hydra: their sizes, and that they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import lightning_mup as mup
from lightning_mup.models.llama import Llama
from tests.unit.reading import meta

DATA = ("+data.vocab_size=96", "+data.context=16")
GPT2_TOKENS = 50257
PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
SIZES = {
    "llama_190m": 185_680_896,
    "llama_380m": 379_184_640,
    "llama_640m": 639_797_248,
    "llama_1.4b": 1_362_349_056,
    "llama_1b": 1_235_814_400,
    "llama_3b": 3_212_749_824,
    "llama_8b": 8_030_261_248,
}


def composed(choice: str, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        return compose(overrides=[f"+model={choice}", *DATA, *overrides]).model


def built(config: DictConfig) -> nn.Module:
    return meta(lambda: instantiate(config.net))


@pytest.mark.parametrize(("choice", "params"), SIZES.items())
def test_parameters_are_as_published(choice: str, params: int) -> None:
    net = built(composed(choice))
    assert sum(p.numel() for p in net.parameters()) == params
    assert isinstance(net, Llama)


def test_llama_3_shapes_equal_those_of_transformers() -> None:
    """3B has a hidden size of the MLP that no short fraction of the width gives."""
    shapes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    sizes: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
    config = transformers.LlamaConfig(**shapes, **sizes, tie_word_embeddings=True)
    theirs = meta(lambda: transformers.LlamaForCausalLM(config))
    ours = built(composed("llama_3b"))
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in theirs.parameters())


def test_the_default_can_be_built_at_width_64() -> None:
    config = composed("llama", "model.net.width=64", "model.net.kv_heads=1")
    net = instantiate(config.net)
    assert (config.width, config.depth) == (64, 2)
    assert net(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 96)


def test_gpt_is_as_in_the_paper() -> None:
    net = instantiate(composed("gpt").net)
    assert {n.split(".")[-2]: tuple(p.shape) for n, p in net.named_parameters()} == {
        "embedding": (96, 128),
        "positions": (16, 128),
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"), (128, 128)),
        "readout": (96, 128),
    }
    assert len(net.layers) == 3


@pytest.mark.parametrize("choice", PRESETS)
def test_width_and_depth_are_stated(choice: str) -> None:
    config = composed(choice)
    net = built(config)
    table = next(m for m in net.modules() if isinstance(m, nn.Embedding))
    lists = [m for m in net.modules() if isinstance(m, nn.ModuleList)]
    assert (config.width, config.depth) == (table.embedding_dim, len(lists[0]))


@pytest.mark.parametrize("choice", [name for name in PRESETS if name != "huggingface_llama"])
def test_every_setting_can_be_overridden(choice: str) -> None:
    """Without +, as Hydra demands for what a configuration lacks."""
    net = set(composed(choice).net) - {"_target_"}
    assert net == set(Llama.__init__.__annotations__) - {"return"}


@pytest.mark.parametrize("choice", PRESETS)
def test_the_base_fits(choice: str) -> None:
    """What the base changes are arguments of net, with which it can be built and the preset read against it."""
    config = composed(choice)
    changed = OmegaConf.merge(config.net, config.base)
    assert set(changed) == set(config.net)
    base = "self" if changed == config.net else meta(lambda: instantiate(changed))
    found = mup.plan(built(config), base, rules=["mup", "complete_p"], method="adam").params
    assert len([param for param in found if param.spec.branch]) == 2 * config.depth
    assert all(param.spec.depth.ratio == 1 for param in found)


def test_hugging_face_runs() -> None:
    net = instantiate(composed("huggingface_llama", "model.net.config.hidden_size=64").net)
    assert net(torch.zeros(2, 16, dtype=torch.long)).logits.shape == (2, 16, 96)
