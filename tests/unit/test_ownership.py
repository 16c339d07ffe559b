"""Which rank owns what: balanced, complete, the same on every rank; and what transforms say that they compute."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_mup as mup
from lightning_mup.core.ownership import Load, assign, deferred_state, is_shared
from lightning_mup.core.transform import Chain, Context, Transform, product_work, work_of
from lightning_mup.strategies.mup_ddp import MupDDPStrategy
from lightning_mup.transforms.orthogonalize import Orthogonalize
from lightning_mup.transforms.shampoo import Shampoo
from lightning_mup.transforms.soap import Soap

WORKS = st.lists(st.integers(1, 10**6).map(float), max_size=40)


def heavy(work: float, size: int = 1) -> Load:
    return Load(torch.ones(1, 1), 1000.0 + work, size)


def elementwise(side: int) -> Load:
    return Load(torch.ones(side, side), 16.0 * side**2, 8 * side**2)


@given(WORKS, st.integers(1, 9))
def test_work_is_divided_evenly(works: list[float], ranks: int) -> None:
    items, totals = [heavy(work) for work in works], [(0.0, 0)] * ranks
    owners = assign(items, totals)
    assert [total for total, _ in totals] == [
        sum(item.work for item, owner in zip(items, owners, strict=True) if owner == rank) for rank in range(ranks)
    ]
    least = max([sum(item.work for item in items) / ranks, *(item.work for item in items), 0.0])
    everything = sorted((item.work for item in items), reverse=True)
    least = max(least, sum(everything[ranks - 1 : ranks + 1]) if len(everything) > ranks else 0.0)  # two share a rank
    assert max(total for total, _ in totals) <= 4 / 3 * least


@given(st.integers(1, 50), st.integers(1, 9))
def test_alike_matrices_are_spread_to_the_last_one(count: int, ranks: int) -> None:
    for item in (heavy(5.0), elementwise(4)):
        owners = assign([item] * count, [(0.0, 0)] * ranks)
        counts = [owners.count(rank) for rank in range(ranks)]
        assert max(counts) == math.ceil(count / ranks)
        assert min(counts) == count // ranks


def test_what_is_elementwise_goes_where_there_is_room() -> None:
    items = [heavy(9000.0, size=100), heavy(10.0, size=100), *[elementwise(8)] * 8]
    owners = assign(items, totals := [(0.0, 0)] * 2)
    assert [owners[2:].count(rank) for rank in (0, 1)] == [4, 4]
    assert totals[0][1] == totals[1][1]


def test_what_comes_later_goes_on_top() -> None:
    totals = [(0.0, 0)] * 2
    assert assign([heavy(7.0), heavy(5.0)], totals) == [0, 1]
    assert assign([heavy(1.0)], totals) == [1]


@pytest.mark.parametrize(
    ("shape", "work", "state", "shared"),
    [
        ((8,), 16.0, 4, True),
        ((8,), 1000.0, 4, False),  # a vector under a method for matrices
        ((8, 8), 16.0, 4, False),
        ((8, 8), 16.0, 0, True),  # SGD without momentum
        ((8, 8), 1000.0, 0, False),
    ],
)
def test_what_all_ranks_step(shape: tuple[int, ...], work: float, state: int, shared: bool) -> None:
    entries = math.prod(shape)
    assert is_shared(Load(torch.ones(shape), work * entries, state * entries), "divide") == shared
    everywhere = shared or work < 100
    assert is_shared(Load(torch.ones(shape), work * entries, state * entries), "replicate") == everywhere


def in_place(x: torch.Size, a: torch.Size, b: torch.Size, *, out_shape: torch.Size, **kwargs: object) -> int:
    """Return the operations of a product that torch's counter does not know."""
    return 2 * math.prod(a) * b[-1]


def measured(transform: Transform, rows: int, columns: int) -> float:
    """Count the operations of the products of a step that takes no roots."""
    x = torch.randn(1, rows, columns)
    state = transform.init(x)
    transform.update(x, state, Context(1))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        transform.update(x, state, Context(2))
    return float(counter.get_total_flops())


RARE = 10**9  # steps between roots
TRANSFORMS: list[Transform] = [
    Orthogonalize(),
    Orthogonalize(steps=3),
    Shampoo(every=RARE),
    Shampoo(every=RARE, block_size=16),
    Shampoo(every=RARE, max_dim=40),
    Soap(every=RARE, warmup_steps=1),
    Soap(every=RARE, warmup_steps=1, block_size=16),
    Soap(every=RARE, warmup_steps=1, max_dim=40),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (64, 32)], ids=str)
def test_declared_work_is_what_is_counted(transform: Transform, shape: tuple[int, int]) -> None:
    passes = 16.0 * shape[0] * shape[1]
    assert work_of(transform, *shape) - passes == pytest.approx(measured(transform, *shape), rel=0.02)


def test_roots_count_as_often_as_they_are_taken() -> None:
    seldom, often = (Shampoo(every=every).work(32, 32) for every in (10, 1))
    assert often - seldom == pytest.approx(0.9 * 2 * 18 * 32**3)


def test_a_transform_that_does_not_say_counts_as_newton_schulz() -> None:
    class Silent:
        name = "silent"

    assert work_of(Chain((Silent(),)), 8, 4) == 5 * product_work(8, 4)  # type: ignore[arg-type]


def test_loads_of_an_optimizer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].requires_grad_(False)
    loads = mup.Muon(net.named_parameters(), lr=0.1).loads()
    assert {load.param for load in loads} == set(net.parameters())
    by_param = {load.param: load for load in loads}
    assert by_param[net[0].weight].work == 4 * 4 * 32 + 5 * product_work(4, 4)  # momentum and orthogonalization
    assert by_param[net[1].weight].work == 0
    assert [by_param[p].state_bytes for p in (net[0].weight, net[0].bias)] == [64, 32]


def test_state_is_deferred_until_it_is_needed() -> None:
    layer = nn.Linear(4, 4)
    with deferred_state():
        optimizer = mup.Muon(layer.named_parameters(), lr=0.1)
    assert not optimizer.state
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[layer.weight]) == {"momentum/ema", "step"}


def test_an_undivided_optimizer_has_its_whole_state() -> None:
    layer = nn.Linear(4, 4)
    optimizer = mup.Muon(layer.named_parameters(), lr=0.1)
    assert optimizer.whole_state_dict()["state"].keys() == {0, 1}
    assert copy.deepcopy(optimizer).state_dict()["state"].keys() == {0, 1}


def test_settings_of_the_strategy_are_checked() -> None:
    with pytest.raises(ValueError, match="elementwise must be 'divide' or 'replicate'"):
        MupDDPStrategy(elementwise="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exchange_mb > 0, got 'divide' and 0"):
        MupDDPStrategy(exchange_mb=0)


def test_local_sgd_is_refused() -> None:
    class State:
        start_localSGD_iter = 5

    with pytest.raises(ValueError, match="State lets ranks have gradients of their own"):
        MupDDPStrategy(ddp_comm_state=State())
