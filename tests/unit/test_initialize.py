"""Initial values of single tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mup.core.base import Base, Measured
from lightning_mup.core.initialize import draw_normal, initialize, padding_rows
from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.spec import Dim, ParamSpec, Role


def planned(shape: tuple[int, ...], init: float, ratio: int = 4) -> ParamPlan:
    return ParamPlan(ParamSpec("w", Role.HIDDEN, shape, fan_in=Dim(ratio, 1)), init=init)


def run(parameter: torch.Tensor, init: float, measured: Measured, how: str, ratio: int = 4, **kwargs: object) -> None:
    plan = planned(tuple(parameter.shape), init, ratio)
    initialize({"w": nn.Parameter(parameter)}, {"w": plan}, {"w": measured}, how=how, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["scale", "draw"])
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (3, 7), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_is_the_ratio_times_the_bases(how: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, dtype=dtype)
    run(values, 0.5, Measured(0.1, 3.0), how)
    assert Measured.of(values).rms == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("how", ["scale", "draw"])
def test_constants_stay_constants(how: str) -> None:
    for value in (1.0, -2.0, 0.0):
        values = torch.full((4, 3), value)
        run(values, 0.5, Measured(value, abs(value)), how)
        assert torch.equal(values, torch.full((4, 3), 0.5 * value))


def test_zeros_stay_zero_when_scaled() -> None:
    values = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    run(values, 1.0, Measured(0.0, 3.0), "scale")
    assert values.tolist() == [[0.0, 6.0], [0.0, 0.0]]
    zeros = torch.zeros(3)
    run(zeros, 1.0, Measured(0.0, 3.0), "scale")
    assert not zeros.any()


def test_zeros_of_the_base_are_carried_over() -> None:
    values = torch.ones(3)
    run(values, 1.0, Measured(0.0, 0.0), "scale")
    assert not values.any()


def test_means_are_carried_over() -> None:
    values = torch.zeros(100, 100)
    run(values, 0.5, Measured(4.0, 5.0), "draw")
    assert float(values.mean()) == pytest.approx(2.0, abs=0.1)
    assert float(values.std()) == pytest.approx(1.5, rel=0.1)


def test_where_nothing_grows_only_draws_change_values() -> None:
    for how, changed in (("scale", False), ("draw", True), ("keep", False)):
        values = torch.ones(8)
        run(values, 1.0, Measured(0.0, 3.0), how, ratio=1)
        assert bool((values != 1).any()) is changed


def test_draws_depend_on_key_alone() -> None:
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        drawn.append(draw_normal((4, 4), "0/w"))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*drawn)
    keys = ["0/w", "1/w", "0/v", "0/w.weight"]
    assert len({tuple(draw_normal((2,), key).tolist()) for key in keys}) == 4


def test_draws_are_the_same_on_every_machine() -> None:
    assert draw_normal((3,), "0/w").tolist() == pytest.approx([0.831489, 0.321332, -1.22196], abs=1e-6)


def test_padding_rows() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 2, padding_idx=0), "b": nn.EmbeddingBag(4, 2, padding_idx=3)})
    model["c"] = nn.Embedding(5, 2)
    assert padding_rows(model) == {"a.weight": 0, "b.weight": 3}
    assert padding_rows(nn.Embedding(5, 2, padding_idx=1)) == {"weight": 1}
    values = torch.randn(5, 2)
    run(values, 1.0, Measured(0.0, 3.0), "draw", padding={"w": 2})
    assert values.any(dim=1).tolist() == [True, True, False, True, True]


def test_what_has_no_row_is_left_alone() -> None:
    values = nn.Parameter(torch.ones(2))
    initialize({"w": values}, {}, Base.of(nn.Linear(2, 2)).measured)
    assert values.tolist() == [1.0, 1.0]


def test_constants_are_not_blurred_by_rounding() -> None:
    """Mean and RMS of equal entries may differ in the last digits, which are no spread."""
    values = torch.zeros(100)
    run(values, 1.0, Measured(0.1, 0.1 * (1 + 5e-13)), "draw")
    assert len(set(values.tolist())) == 1
