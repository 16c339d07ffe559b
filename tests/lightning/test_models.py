"""One callback line reads every parameter of models as users have them, and trains them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import lightning as L
import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_mup import Parametrize, ParamSpec, Plan
from tests.lightning.zoo import CASES, CLASSES, STEPS, Case, Plain, classify, hugging_face_loss, images, llama, text


def trainer_with(callback: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )


def fitted(case: Case, size: tuple[int, int], base: tuple[int, int]) -> tuple[Plain, Plan]:
    """Train a model of (width, depth) for a few steps, by nothing but one callback."""

    def module(width: int, depth: int) -> Plain:
        return Plain(case.build(width, depth), case.batch, case.loss)

    rules = "mup" if size[1] == base[1] else ["mup", "complete_p"]
    parametrize = Parametrize(base=lambda: module(*base), rules=rules, roles=case.roles)
    trainer = trainer_with(parametrize)
    target = module(*size)
    before = {n: p.detach().clone() for n, p in target.named_parameters()}
    trainer.fit(target)
    moved = [n for n, p in target.named_parameters() if not torch.equal(p, before[n])]
    assert len(target.losses) == STEPS
    assert all(map(math.isfinite, target.losses))
    assert len(moved) > len(before) / 2
    assert parametrize.plan is not None
    return target, parametrize.plan


def check_roles(specs: Sequence[ParamSpec], expected: Mapping[str, str]) -> None:
    """Check that each parameter is named by exactly one pattern, and has its role."""
    unused = set(expected)
    for spec in specs:
        hits = [pattern for pattern in expected if fnmatch.fnmatchcase(spec.name, pattern)]
        assert len(hits) == 1, f"{spec.name} is named by {hits}"
        assert spec.role.value == expected[hits[0]], f"{spec.name} was read as {spec.role.value}: {spec.why}"
        assert spec.why
        unused -= set(hits)
    assert not unused


def any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def specs_of(plan: Plan) -> dict[str, ParamSpec]:
    return {param.spec.name: param.spec for param in plan.params}


@pytest.mark.parametrize("name", CASES)
def test_wider_model(name: str) -> None:
    case = CASES[name]
    target, plan = fitted(case, (32, 2), base=(16, 2))
    print(f"\n{name}\n{plan}")
    assert [p.spec.name for p in plan.params] == [n for n, _ in target.named_parameters()]
    check_roles([p.spec for p in plan.params], case.expected)
    for spec in specs_of(plan).values():
        assert spec.depth.ratio == 1
        ratios = {"input": (1, 2), "hidden": (2, 2), "output": (2, 1), "vector": (1, spec.fan_out.ratio)}
        assert (spec.fan_in.ratio, spec.fan_out.ratio) == ratios[spec.role.value]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.deepens])
def test_deeper_and_wider_model(name: str) -> None:
    case = CASES[name]
    _, plan = fitted(case, (32, 4), base=(16, 2))
    print(f"\n{name}\n{plan}")
    check_roles([p.spec for p in plan.params], case.expected)
    ends = {spec.name for spec in specs_of(plan).values() if spec.branch}
    assert ends == {name for name in specs_of(plan) if any_match(name, case.branches)}
    for param in plan.params:
        spec = param.spec
        assert spec.depth.ratio == (2 if spec.block and "downsample" not in spec.name and not _skip(spec) else 1)
        assert param.folded == (0.5 if spec.branch else 1)
        assert spec.depth.ratio == 2 or not spec.branch


def _skip(spec: ParamSpec) -> bool:
    return ".shortcut." in spec.name


def test_sizes_are_those_of_one_matrix() -> None:
    """A fused projection counts as three matrices, an LSTM's as four; convolutions sum over the kernel too."""
    _, vit = fitted(CASES["vit"], (32, 2), base=(16, 2))
    qkv = vit["net.encoder.layers.0.self_attn.in_proj_weight"].spec
    assert (str(qkv.fan_out), str(qkv.fan_in), qkv.split) == ("32/16", "32/16", 3)
    patches = vit["net.patches.weight"].spec
    assert (str(patches.fan_out), str(patches.fan_in)) == ("32/16", "48/48")
    positions = vit["net.positions"].spec
    assert (str(positions.fan_out), positions.fan_in.ratio, positions.why) == ("32/16", 1, "roles")
    _, lstm = fitted(CASES["lstm"], (32, 2), base=(16, 2))
    gates = lstm["net.lstm.weight_hh_l1"].spec
    assert (str(gates.fan_out), str(gates.fan_in), gates.split) == ("32/16", "32/16", 4)
    assert lstm["net.gru.weight_ih_l0_reverse"].spec.split == 3
    _, net = fitted(CASES["resnet"], (32, 2), base=(16, 2))
    conv = net["net.layer1.0.conv1.weight"].spec
    assert (str(conv.fan_in), conv.fan_in.ratio) == (f"{32 * 9}/{16 * 9}", 2)


def test_transposed_weights() -> None:
    """Hugging Face's Conv1D keeps its weight as (in, out)."""
    _, plan = fitted(CASES["gpt2"], (32, 2), base=(16, 2))
    up = plan["net.transformer.h.0.mlp.c_fc.weight"].spec
    assert (up.shape, str(up.fan_in), str(up.fan_out)) == ((32, 128), "32/16", "128/64")


@pytest.mark.parametrize("name", ["llama, tied", "gpt2, tied"])
def test_tied_readout(name: str) -> None:
    target, plan = fitted(CASES[name], (32, 2), base=(16, 2))
    embedding = plan["net.lm_head.weight"]
    assert embedding.spec.name.endswith(("embed_tokens.weight", "wte.weight"))
    assert embedding.spec.tied_to == ("net.lm_head.weight",)
    assert embedding.spec.readout == ("net.lm_head",)
    assert embedding.readout == 0.5
    assert "tied" in embedding.spec.why
    assert len(target.net.lm_head._forward_hooks) + len(target.net.lm_head._forward_pre_hooks) == 1


def test_grouped_query_attention_with_a_fixed_number_of_key_heads() -> None:
    """Keys and values of fixed size are read out of the stream: only their input grows."""
    case = Case(lambda w, d: llama(w, d, tied=False, kv_heads=1), text, hugging_face_loss, {})
    _, plan = fitted(case, (32, 2), base=(16, 2))
    roles = {short: plan[f"net.model.layers.1.self_attn.{short}_proj.weight"].spec.role.value for short in "qkvo"}
    assert roles == {"q": "hidden", "k": "output", "v": "output", "o": "hidden"}


def test_bottleneck_resnet_deepens_in_one_stage() -> None:
    """Depth is that of the whole stream, whichever stage grows."""

    def build(width: int, depth: int) -> nn.Module:
        sizes = [2 * width, 4 * width]
        config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[2, depth], num_labels=CLASSES)
        return ResNetForImageClassification(config)

    case = Case(build, images, classify, {})
    _, plan = fitted(case, (16, 4), base=(16, 2))
    inside = [s for s in specs_of(plan).values() if ".layers." in s.name and ".shortcut." not in s.name]
    assert {str(spec.depth) for spec in inside} == {"6/4"}
    ends = {s.name for s in inside if s.branch}
    assert ends == {s.name for s in inside if ".layer.2.normalization." in s.name}


def test_frozen_parameters_stay_out() -> None:
    case = CASES["llama"]

    def build(width: int, depth: int) -> nn.Module:
        model = case.build(width, depth)
        model.model.embed_tokens.requires_grad_(False)
        return model

    frozen = Case(build, text, hugging_face_loss, {})
    target, plan = fitted(frozen, (32, 2), base=(16, 2))
    assert "net.model.embed_tokens.weight" in dict(target.named_parameters())
    assert "net.model.embed_tokens.weight" not in specs_of(plan)


def test_a_base_built_on_meta_has_no_initial_values() -> None:
    def build() -> Plain:
        with torch.device("meta"):
            return Plain(llama(16, 2, tied=False), text, hugging_face_loss)

    case = CASES["llama"]
    trainer = trainer_with(Parametrize(base=build()))
    with pytest.raises(ValueError, match=r"initial values of \['net\.model\.embed_tokens\.weight'.*initialize='keep'"):
        trainer.fit(Plain(case.build(32, 2), text, hugging_face_loss))
