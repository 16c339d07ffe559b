"""What modules do with their parameters by hand, and sizes that are no widths: asked for, never guessed silently."""

from __future__ import annotations

import ast
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mup import Choices, plan
from lightning_mup.core.base import head_dims
from lightning_mup.core.products import hand_products


class Lm(nn.Module):
    """Ties its readout by a product, without a module."""

    def __init__(self, width: int, vocabulary: int = 50) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table(x)) @ self.table.weight.T


class LinearLm(Lm):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(self.table(x)), self.table.weight)


class Pooled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(8, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * self.body(x)) @ self.query


class Readout(nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.readout = nn.Linear(width, vocabulary, bias=False)


class Classifier(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, width), nn.Linear(width, classes)


def test_products_are_seen() -> None:
    assert hand_products(Lm(8)) == hand_products(LinearLm(8)) == {"table.weight"}
    assert hand_products(Pooled(8)) == {"query"}
    assert hand_products(nn.TransformerEncoderLayer(16, 2)) == set()


@pytest.mark.parametrize("kind", [Lm, LinearLm])
def test_a_readout_tied_by_hand_is_asked_for(kind: type[Lm]) -> None:
    with pytest.raises(
        ValueError, match=r"embedding 'table.weight' is used as a matrix .* multiplied by 0.25"
    ) as error:
        plan(kind(64), lambda: kind(16))
    roles = ast.literal_eval(re.search(r"roles=(\{.*?\})", str(error.value)).group(1))  # type: ignore[union-attr]
    assert plan(kind(64), lambda: kind(16), choices=Choices(roles=roles))["table.weight"].lr == 1
    assert plan(kind(64), lambda: kind(16), rules="sp")["table.weight"].readout == 1


def test_a_vector_that_sums_over_the_width_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"'query' \(64,\) looks like a gain or bias, but is used in a matrix product"):
        plan(Pooled(64), lambda: Pooled(16))
    made = plan(Pooled(64), lambda: Pooled(16), choices=Choices(roles={"query": "output"}))
    assert (made["query"].lr, made["gain"].lr) == (0.25, 1)


def test_a_vocabulary_of_another_length_is_no_width() -> None:
    made = plan(Readout(1024, 1024), lambda: Readout(64, 1000))["readout.weight"]
    assert (made.spec.role.value, made.init, made.lr) == ("output", 1 / 16, 1 / 16)


def test_a_side_that_hardly_grows_is_told() -> None:
    with pytest.warns(UserWarning, match=r"'head.weight' is read as hidden, .* one hardly does \(fan_out 110/100"):
        plan(Classifier(1024, 110), lambda: Classifier(64, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(Classifier(1024, 110), lambda: Classifier(64, 100), choices=Choices(roles={"head.weight": "hidden"}))


def test_blocks_shared_in_depth_are_refused_under_depth_rules() -> None:
    class Shared(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            block = nn.TransformerEncoderLayer(16, 2, 32)
            self.layers = nn.ModuleList([block] * depth)

    with pytest.raises(ValueError, match=r"is shared by several blocks \('layers.1.* 'mup x complete_p' say nothing"):
        plan(Shared(8), lambda: Shared(2), rules="complete_p")


def test_blocks_of_two_widths_in_turn_must_keep_their_ratios() -> None:
    class Turns(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            sizes = [width * (4 if i % 2 == 0 else 1) for i in range(depth)]
            self.b = nn.ModuleList(
                nn.ModuleDict({"fc1": nn.Linear(width, size), "fc2": nn.Linear(size, width)}) for size in sizes
            )

    with pytest.raises(ValueError, match="stand in like blocks, but have grown by"):
        plan(Turns(512, 6), lambda: Turns(64, 3), rules="complete_p")


def test_heads_are_read_from_their_number_too() -> None:
    class NanoAttention(nn.Module):
        def __init__(self, n_embd: int, n_head: int) -> None:
            super().__init__()
            self.n_embd, self.n_head = n_embd, n_head
            self.c_attn = nn.Linear(n_embd, 3 * n_embd)

    assert head_dims(NanoAttention(64, 4)) == {"": 16}
    with pytest.warns(UserWarning, match="larger heads than the base"):
        plan(NanoAttention(64, 4), NanoAttention(32, 4))
