"""What holds of inference for every model, found by random models."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import nn

from tests.unit.reading import facts, meta, read

TABLE = {(True, False): "input", (True, True): "hidden", (False, True): "output", (False, False): "hidden"}


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, list[bool]]:
    """A stack of linear layers and convolutions at two sizes, any subset of whose widths grows."""
    grows = draw(st.lists(st.booleans(), min_size=2, max_size=6))
    factor = draw(st.integers(2, 3))
    sizes = [draw(st.integers(1, 5)) for _ in grows]
    kernels = [draw(st.sampled_from([0, 1, 3])) for _ in grows[1:]]
    bias = draw(st.booleans())

    def make(scale: int) -> nn.Module:
        widths = [size * scale if grown else size for size, grown in zip(sizes, grows, strict=True)]
        pairs = zip(widths, widths[1:], kernels, strict=False)
        layers = [nn.Conv1d(i, o, k, bias=bias) if k else nn.Linear(i, o, bias=bias) for i, o, k in pairs]
        return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])

    return meta(lambda: make(factor)), meta(lambda: make(1)), grows


@given(stacks())
@settings(max_examples=60)
def test_roles_follow_growth(made: tuple[nn.Module, nn.Module, list[bool]]) -> None:
    model, base, grows = made
    found = [spec for name, spec in read(model, base).items() if name.endswith("weight")]
    assert [spec.role.value for spec in found] == [TABLE[out, into] for into, out in itertools.pairwise(grows)]
    assert [spec.certain for spec in found] == [into or out for into, out in itertools.pairwise(grows)]


@given(stacks())
@settings(max_examples=60)
def test_sizes_multiply_to_the_number_of_entries(made: tuple[nn.Module, nn.Module, list[bool]]) -> None:
    model, base, _ = made
    for spec in read(model, base).values():
        assert spec.fan_out.size * spec.fan_in.size * spec.stack * spec.split == math.prod(spec.shape)


class Parent(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.register_buffer("unused", torch.zeros(3))
        self.child = child


@given(stacks())
@settings(max_examples=40)
def test_a_parent_and_buffers_change_only_names(made: tuple[nn.Module, nn.Module, list[bool]]) -> None:
    model, base, _ = made
    inside = read(Parent(model), Parent(base))
    assert [name.removeprefix("child.") for name in inside] == list(read(model, base))
    for own, spec in zip(read(model, base).values(), inside.values(), strict=True):
        assert (facts(own), own.depth, own.why) == (facts(spec), spec.depth, spec.why)


@given(stacks())
@settings(max_examples=40)
def test_a_model_that_is_its_base_has_no_ratios(made: tuple[nn.Module, nn.Module, list[bool]]) -> None:
    model, _, _ = made
    assert {ratio for spec in read(model, model).values() for ratio in spec.ratios.values()} <= {1}


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40)
def test_any_depth_against_any_depth(depth: int, base_depth: int) -> None:
    """Every block finds a counterpart, of the same kind, whichever of the two is deeper."""

    def make(width: int, blocks: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width)
        return meta(lambda: nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False))

    found = read(make(16, depth), make(8, base_depth))
    assert {str(spec.depth) for spec in found.values()} == {f"{depth}/{base_depth}"}
    for name, spec in found.items():
        assert spec.base_name.split(".", 2)[2] == name.split(".", 2)[2]
        assert spec.branch == (".out_proj." in name or ".linear2." in name)
