"""Sizes, FLOPs and scaling of Llama: the paper's table, and how its parameters are read against a base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lightning_mup as mup
from lightning_mup.models.llama import Llama
from tests.unit.reading import meta

GPT2_TOKENS = 50257


def sized(**changes: Any) -> Llama:  # noqa: ANN401 - any of its settings
    sizes: dict[str, Any] = {"vocab_size": 96, "width": 64, "depth": 2, "context": 16, "head_dim": 16} | changes
    return Llama(sizes.pop("vocab_size"), **sizes)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "params", "non_embedding", "flops"),
    [
        (512, 185_680_896, 134.2e6, 4.320e18),
        (768, 379_184_640, 302.0e6, 1.781e19),
        (1024, 639_797_248, 536.9e6, 5.038e19),
        (1536, 1_362_349_056, 1.208e9, 2.268e20),
    ],
)
def test_the_sizes_of_the_paper(width: int, params: int, non_embedding: float, flops: float) -> None:
    net = meta(lambda: Llama(GPT2_TOKENS, width=width, depth=32, context=1024))
    assert isinstance(net, Llama)
    assert sum(p.numel() for p in net.parameters()) == params
    assert net.non_embedding_params == pytest.approx(non_embedding, rel=5e-4)
    assert 3 * net.forward_flops(1024) * 20 * params == pytest.approx(flops, rel=5e-4)


def test_the_exact_flops_of_the_paper() -> None:
    net = meta(lambda: Llama(GPT2_TOKENS, width=512, depth=32, context=1))
    assert isinstance(net, Llama)
    assert 3 * 3_713_617_920 * net.forward_flops(1024) == 4_320_355_351_737_139_200


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 1, "tied": True}, {"mlp": "gelu", "mlp_expansion": 1.0, "positions": "learned"}, {"depth": 3}],
)
def test_flops_equal_those_counted(changes: dict[str, Any]) -> None:
    """Matrix products as torch counts them; beside these there is the softmax."""
    net, context = sized(**changes), 16
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        net(torch.zeros(3, context, dtype=torch.long))
    softmax = len(net.layers) * 3 * context * 4
    assert net.forward_flops(context) == counter.get_total_flops() / (3 * context) + softmax


def test_non_embedding_params_leave_out_tables_and_readout() -> None:
    net = sized(positions="learned", norm_scale=True)
    outside = (96 + 16 + 96) * 64
    assert net.non_embedding_params == sum(p.numel() for p in net.parameters()) - outside
    assert sized(tied=True).non_embedding_params == sized().non_embedding_params


# -- against a base ----------------------------------------------------------------------------------------------------


def planned(**changes: Any) -> dict[str, mup.ParamPlan]:  # noqa: ANN401
    made = mup.plan(
        meta(lambda: sized(**{"width": 256, "depth": 4} | changes)),
        lambda: sized(**changes),
        rules=["mup", "complete_p"],
        method="adam",
    )
    return {param.spec.name: param for param in made.params}


def roles(params: dict[str, mup.ParamPlan]) -> dict[str, str]:
    return {name.split(".")[-2]: param.spec.role.value for name, param in params.items()}


HIDDEN = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "hidden")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"embedding": "input", "readout": "output", **HIDDEN}),
        (
            {"kv_heads": 2},
            {"embedding": "input", "readout": "output", **HIDDEN, "k_proj": "output", "v_proj": "output"},
        ),
        ({"tied": True}, {"embedding": "input", **HIDDEN}),
        ({"positions": "learned"}, {"embedding": "input", "positions": "input", "readout": "output", **HIDDEN}),
        (
            {"norm_scale": True, "qk_norm": False},
            {"embedding": "input", "readout": "output", **HIDDEN}
            | dict.fromkeys(("attention_norm", "mlp_norm", "norm"), "vector"),
        ),
        (
            {"mlp": "gelu", "mlp_expansion": 1.0},
            {"embedding": "input", "readout": "output", **{k: v for k, v in HIDDEN.items() if k != "gate_proj"}},
        ),
    ],
)
def test_roles_and_branches_are_read(changes: dict[str, Any], expected: dict[str, str]) -> None:
    params = planned(**changes)
    assert roles(params) == expected
    ends = {f"layers.{i}.{end}.weight" for i in range(4) for end in ("attention.o_proj", "mlp.down_proj")}
    assert {name for name, param in params.items() if param.spec.branch} == ends
    assert {str(p.spec.depth) for n, p in params.items() if n.startswith("layers")} == {"4/2"}
    assert all(param.spec.certain for param in params.values())


def test_the_last_matrix_of_a_branch_takes_its_multiplier() -> None:
    """Width x 4 and depth x 2, Adam: hidden rates by 1/4, those at a branch's end by 1/2 more, for the 1/L."""
    params = planned()
    rate = {name: params[f"layers.3.{name}.weight"].lr for name in ("attention.q_proj", "attention.o_proj")}
    assert rate == {"attention.q_proj": 0.25, "attention.o_proj": 0.125}
    assert params["layers.0.mlp.down_proj.weight"].folded == 0.5
    assert params["embedding.weight"].lr == 1
    assert params["readout.weight"].lr == 0.25


def test_a_tied_readout_is_multiplied() -> None:
    embedding = planned(tied=True)["embedding.weight"]
    assert embedding.spec.readout == ("readout",)
    assert embedding.readout == 0.25


def test_checkpointed_blocks_are_read_alike() -> None:
    plain, checkpointed = planned(), planned(checkpoint_activations=True)
    assert {n: p.lr for n, p in plain.items()} == {n: p.lr for n, p in checkpointed.items()}


def test_heads_that_grow_are_told() -> None:
    """The softmax scale is that of heads that stay."""
    with pytest.warns(UserWarning, match=r"head_dim 32 against 16"):
        mup.plan(sized(head_dim=32), lambda: sized(head_dim=16, width=32), rules="mup", method="adam")
