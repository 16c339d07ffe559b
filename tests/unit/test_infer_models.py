"""Inference of whole library models, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import transformers
from torch import nn

from lightning_mup import Layout, ParamSpec, Role
from tests.unit.reading import facts, meta, read


def decoder(kind: str, width: int, depth: int, **config: object) -> nn.Module:
    cls = getattr(transformers, kind)
    sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth}
    return meta(lambda: cls(cls.config_class(**sizes, num_attention_heads=width // 8, pad_token_id=0, **config)))


def roles_of(specs: Mapping[str, ParamSpec]) -> dict[str, set[str]]:
    """Roles by the last two parts of the name."""
    found: dict[str, set[str]] = {}
    for name, spec in specs.items():
        found.setdefault(".".join(name.split(".")[-2:]), set()).add(spec.role.value)
    return found


def test_bert() -> None:
    found = read(decoder("BertModel", 32, 4), decoder("BertModel", 16, 2))
    roles = roles_of(found)
    inputs = {name for name, role in roles.items() if role == {"input"}}
    assert inputs == {f"{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert all(
        role == {"hidden"}
        for name, role in roles.items()
        if name.split(".")[0] in ("query", "key", "dense") and "weight" in name
    )
    assert {str(s.depth) for n, s in found.items() if ".layer." in n} == {"4/2"}
    assert {n.split("layer.3.")[1] for n, s in found.items() if s.branch and "layer.3" in n and "weight" in n} == {
        "attention.output.dense.weight",
        "output.dense.weight",
    }


def test_vit_of_hugging_face() -> None:
    def make(width: int) -> nn.Module:
        config = transformers.ViTConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 8)
        return meta(lambda: transformers.ViTForImageClassification(config))

    found = read(make(32), make(16), roles={"*position_embeddings": "input"})
    assert {n.split(".")[-1]: s.role.value for n, s in found.items() if "token" in n} == {"cls_token": "vector"}
    assert found["vit.embeddings.patch_embeddings.projection.weight"].role is Role.INPUT
    assert found["vit.embeddings.position_embeddings"].role is Role.INPUT
    assert found["classifier.weight"].role is Role.OUTPUT
    inside = {s.role.value for n, s in found.items() if ".layers." in n and s.fan_in.size > 1}
    assert inside == {"hidden"}


def test_t5() -> None:
    """Relative positions are looked up per head; four names share one table."""

    def make(width: int, depth: int, decoders: int) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=64,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_heads=width // 8,
            num_layers=depth,
            num_decoder_layers=decoders,
        )
        return meta(lambda: transformers.T5ForConditionalGeneration(config))

    found = read(make(32, 4, 6), make(16, 2, 2))
    assert found["shared.weight"].readout == ("lm_head",)
    assert set(found["shared.weight"].tied_to) >= {"encoder.embed_tokens.weight", "lm_head.weight"}
    assert {s.role.value for n, s in found.items() if "relative" in n} == {"input"}
    assert str(found["encoder.block.3.layer.0.SelfAttention.q.weight"].depth) == "4/2"
    assert str(found["decoder.block.5.layer.2.DenseReluDense.wi.weight"].depth) == "6/2"
    ends = {n.split("block.1.")[1] for n, s in found.items() if s.branch and "decoder.block.1." in n}
    assert ends == {
        "layer.0.SelfAttention.o.weight",
        "layer.1.EncDecAttention.o.weight",
        "layer.2.DenseReluDense.wo.weight",
    }


EXPERTS = {
    "*.mlp.gate.weight": Layout("output", fan_out=(0,)),
    "*.experts.gate_up_proj": Layout(stack=(0,), fan_out=(1,), fan_in=(2,), split=2),
    "*.experts.down_proj": Layout(stack=(0,), fan_out=(1,), fan_in=(2,)),
}


def test_mixtral() -> None:
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}
    found = read(decoder("MixtralModel", 32, 4, **sizes), decoder("MixtralModel", 16, 2, **sizes), roles=EXPERTS)
    up, down = (found[f"layers.3.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj"))
    assert (facts(up), up.stack) == (("hidden", "96/48", "32/16", 2), 4)
    assert (facts(down), down.stack) == (("hidden", "32/16", "96/48", 1), 4)
    assert found["layers.0.mlp.gate.weight"].role is Role.OUTPUT
    assert found["layers.0.self_attn.k_proj.weight"].role is Role.OUTPUT  # as many key heads as in the base
    assert {n.split("layers.0.")[1] for n, s in found.items() if s.branch and "layers.0." in n} == {
        "self_attn.o_proj.weight",
        "mlp.experts.down_proj",
    }


def test_phi3_fused() -> None:
    roles = {"*.qkv_proj.weight": Layout(split=3), "*.gate_up_proj.weight": Layout(split=2)}
    found = read(decoder("Phi3Model", 32, 2), decoder("Phi3Model", 16, 2), roles=roles)
    assert facts(found["layers.0.self_attn.qkv_proj.weight"]) == ("hidden", "32/16", "32/16", 3)
    assert facts(found["layers.0.mlp.gate_up_proj.weight"]) == ("hidden", "96/48", "32/16", 2)
