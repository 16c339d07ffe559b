"""Repeated blocks: names that map onto the base, and depth."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_mup import Base, ParamSpec
from lightning_mup.core.blocks import Blocks
from lightning_mup.core.infer import infer
from tests.unit.blocks import LectureBlock, Model, NanoGPT, ResidualModel


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def depths(model: nn.Module, base: nn.Module) -> dict[str, str]:
    blocks = Blocks(model, names_of(base))
    return {name: str(blocks.depth(name)[0]) for name in names_of(model)}


def linear_blocks(*widths: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(w, w), nn.ReLU()) for w in widths]


def test_first_maps_to_first_and_last_to_last() -> None:
    blocks = Blocks(Model(*linear_blocks(*[4] * 7)), names_of(Model(*linear_blocks(*[4] * 3))))
    mapped = [blocks.base_name(f"blocks.{i}.0.weight").split(".")[1] for i in range(7)]
    assert (mapped[:2], mapped[-1]) == (["0", "1"], "2")
    assert set(mapped) <= {"0", "1", "2"}


def test_unlike_blocks_map_to_their_own_kind() -> None:
    """Of a wider last block, only the last one of the deeper model is a copy."""
    blocks = Blocks(Model(*linear_blocks(4, 4, 4, 8)), names_of(Model(*linear_blocks(4, 8))))
    assert [blocks.base_name(f"blocks.{i}").split(".")[1] for i in range(4)] == ["0", "0", "0", "1"]


def test_shallower_model_than_its_base() -> None:
    blocks = Blocks(Model(*linear_blocks(4)), names_of(Model(*linear_blocks(4, 4, 4))))
    assert blocks.base_name("blocks.0.0.weight") in {"blocks.0.0.weight", "blocks.2.0.weight"}
    assert str(blocks.depth("blocks.0.0.weight")[0]) == "1/3"


def test_named_sequential_is_no_list_of_blocks() -> None:
    parts = OrderedDict(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4))
    model = nn.Module()
    model.net = nn.Sequential(parts)
    assert set(depths(model, model).values()) == {"1/1"}


def stage(depth: int) -> nn.Module:
    made = nn.Module()
    made.blocks = nn.ModuleList(linear_blocks(*[4] * depth))
    made.downsample = nn.Linear(4, 4)
    return made


def test_stages_share_one_stream() -> None:
    found = depths(Model(stage(2), stage(6)), Model(stage(2), stage(2)))
    assert {d for name, d in found.items() if ".blocks." in name} == {"8/4"}


def test_encoder_and_decoder_are_two_streams() -> None:
    def both(encoder: int, decoder: int) -> nn.Module:
        made = nn.Module()
        made.encoder, made.decoder = Model(*linear_blocks(*[4] * encoder)), Model(*linear_blocks(*[4] * decoder))
        return made

    found = depths(both(8, 2), both(2, 2))
    assert {name.split(".")[0]: depth for name, depth in found.items()} == {"encoder": "8/2", "decoder": "2/2"}


def test_heads_and_experts_are_no_depth() -> None:
    found = depths(Model(LectureBlock(32), LectureBlock(32)), Model(LectureBlock(16), LectureBlock(16)))
    assert set(found.values()) == {"2/2"}


def specs(model: nn.Module, base: nn.Module, branches: Sequence[str] | None = None) -> dict[str, ParamSpec]:
    return {spec.name: spec for spec in infer(model, Base.of(base), branches=branches)}


def bare_list(kind: type[nn.Module], width: int, depth: int) -> nn.Module:
    return kind(*[nn.Linear(width, width) for _ in range(depth)])


@pytest.mark.parametrize(
    ("kind", "branches", "depth", "ends"),
    [
        (ResidualModel, None, "4/2", True),
        (Model, None, "4/2", False),  # nobody is seen to add: a depth rule will ask
        (Model, [], "1/1", False),
        (Model, ["blocks.*.weight"], "4/2", True),
    ],
)
def test_lists_of_bare_matrices(kind: type[nn.Module], branches: Sequence[str] | None, depth: str, ends: bool) -> None:
    """They may be a residual network or a plain one, which has no depth to speak of."""
    found = specs(bare_list(kind, 8, 4), bare_list(kind, 4, 2), branches=branches)
    assert {str(spec.depth) for spec in found.values()} == {depth}
    assert all(spec.branch == ends for spec in found.values())


def test_named_branches_replace_what_would_be_found() -> None:
    found = specs(Model(NanoGPT(), NanoGPT()), Model(NanoGPT()), branches=["*.attn.c_proj.weight"])
    assert sorted(n for n, s in found.items() if s.branch) == [
        f"blocks.{i}.attn.c_proj.{what}" for i in range(2) for what in ("bias", "weight")
    ]


def test_shortcuts_have_no_depth() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(x) + self.conv(x)

    found = specs(Model(Block(), Block(), Block()), Model(Block()))
    assert {n.split(".")[2]: str(s.depth) for n, s in found.items()} == {"shortcut": "1/1", "conv": "3/1"}
    assert [n for n, s in found.items() if s.branch and "weight" in n] == [f"blocks.{i}.conv.weight" for i in range(3)]


@pytest.mark.parametrize("name", ["heads", "experts", "lm_heads"])
def test_parallel_parts_of_a_whole_model_are_no_depth(name: str) -> None:
    def side_by_side(count: int) -> nn.Module:
        made = nn.Module()
        made.add_module(name, nn.ModuleList(linear_blocks(*[4] * count)))
        return made

    assert set(depths(side_by_side(4), side_by_side(2)).values()) == {"1/1"}
    assert Blocks(side_by_side(4), names_of(side_by_side(2))).resized(f"{name}.0.0.weight")


def test_biases_of_bare_branch_ends_are_ends_too() -> None:
    """Experts in one tensor keep their biases beside them, as down_proj and down_proj_bias."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.down, self.down_bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))

    model, base = Model(Block(), Block()), Model(Block())
    found = {s.name: s for s in infer(model, Base.of(base), roles={"*.down": "hidden"}, branches=["blocks.*.down"])}
    assert {n.split(".", 2)[2] for n, s in found.items() if s.branch} == {"down", "down_bias"}


def test_the_block_is_the_innermost_one() -> None:
    for base in (Model(stage(2), stage(3)), Model(stage(1), stage(1))):
        blocks = Blocks(Model(stage(2), stage(3)), names_of(base))
        assert blocks.depth("blocks.1.blocks.2.0.weight")[1] == "blocks.1.blocks.2"
