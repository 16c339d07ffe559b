"""Every public optimizer under gradients of every kind: zero, tiny, huge, low rank, half precision, not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mup as mup
from lightning_mup import StackedOptimizer
from tests.unit.test_linalg import Stubborn

Optimizer = type[StackedOptimizer]
Settings = dict[str, Any]
Params = dict[str, nn.Parameter]
Values = dict[str, Tensor]

PUBLIC = [value for name in mup.__all__ if isinstance(value := getattr(mup, name), type)]
OPTIMIZERS = [cls for cls in PUBLIC if issubclass(cls, StackedOptimizer) and cls is not StackedOptimizer]
COMMON: list[Settings] = [{}, {"graft": "adam"}, {"graft": "sgd"}, {"spectral_norm": True}]
CASES: list[tuple[Optimizer, Settings]] = [
    *((cls, settings) for cls in OPTIMIZERS for settings in COMMON),
    (mup.Shampoo, {"block_size": 2, "precondition_every": 2}),
    (mup.Shampoo, {"root": "newton", "relative_matrix_eps": False}),
    (mup.SOAP, {"block_size": 2, "warmup": "qr"}),
    (mup.SOAP, {"relative_eps": True, "precondition_every": 2, "warmup_steps": 1}),
    (mup.AdaMuon, {"rms_align": True}),
    (mup.Muon, {"ns_dtype": torch.bfloat16}),
]
every_class = pytest.mark.parametrize("cls", OPTIMIZERS)
every_case = pytest.mark.parametrize(("cls", "settings"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))

SHAPES: list[tuple[int, ...]] = [(1, 1), (1, 7), (7, 1), (5, 4), (5, 4), (7,)]
STEPS = 4


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    return {f"w{i}": nn.Parameter(draw(shape, 100 + i).to(dtype)) for i, shape in enumerate(SHAPES)}


def gradients(step: int) -> list[Tensor]:
    return [draw(shape, 10 * step + i) for i, shape in enumerate(SHAPES)]


def take_step(optimizer: StackedOptimizer, grads: list[Tensor]) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(p.dtype)
    optimizer.step()


def snapshot(optimizer: StackedOptimizer, params: Params) -> Values:
    """Every weight and every tensor of its state, step counters included."""
    weights = {name: p.detach().clone() for name, p in params.items()}
    states = {f"{n} {key}": value.clone() for n, p in params.items() for key, value in optimizer.state[p].items()}
    return weights | states


def changed(before: Values, after: Values) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def not_finite(values: Values) -> list[str]:
    return [name for name, value in values.items() if not value.isfinite().all()]


# Finite gradients

KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "low rank": lambda g, step: g if g.ndim < 2 else g[:, :1] * g[:1],
    "tiny": lambda g, step: g * 1e-30,
    "large": lambda g, step: g * 1e15,
    "mixed": lambda g, step: g * 10.0 ** torch.linspace(-18, 18, g.numel()).view_as(g),  # squares fit into float32
    "tiny, then large": lambda g, step: g * 10.0 ** (12 * step - 30),
    "zero at first": lambda g, step: g * (step > 1),
    "zero in between": lambda g, step: g * (step % 2),
}


@every_case
def test_zero_gradients_move_nothing(cls: Optimizer, settings: Settings) -> None:
    params = parameters()
    optimizer = cls(params.items(), lr=1.0, **settings)
    before = snapshot(optimizer, params)
    for _ in range(STEPS):
        take_step(optimizer, [torch.zeros(shape) for shape in SHAPES])
    after = snapshot(optimizer, params)
    assert [name for name in changed(before, after) if name in params] == []
    assert not_finite(after) == []


@pytest.mark.parametrize("kind", KINDS)
@every_case
def test_finite_gradients_give_finite_numbers(cls: Optimizer, settings: Settings, kind: str) -> None:
    params = parameters()
    optimizer = cls(params.items(), lr=0.1, **settings)
    for step in range(1, STEPS + 1):
        take_step(optimizer, [KINDS[kind](g, step) for g in gradients(step)])
        assert not_finite(snapshot(optimizer, params)) == []


@every_class
def test_a_parameter_without_axes_is_one_entry(cls: Optimizer) -> None:
    scalar, vector = (nn.Parameter(torch.full(shape, 2.0)) for shape in ((), (1,)))
    for p in (scalar, vector):
        take_step(cls([p], lr=0.1), [torch.full(p.shape, 0.5)])
    assert scalar.isfinite()
    assert torch.equal(scalar, vector[0])


@every_class
def test_huge_gradients_leave_weights_finite(cls: Optimizer) -> None:
    """Their squares are none of float32's numbers."""
    params = parameters()
    optimizer = cls(params.items(), lr=0.1)
    for step in range(1, STEPS + 1):
        take_step(optimizer, [g * 1e30 for g in gradients(step)])
    assert [name for name in not_finite(snapshot(optimizer, params)) if name in params] == []


@every_class
def test_huge_gradients_leave_the_state_finite(cls: Optimizer) -> None:
    """Or else the parameter never moves again, which nobody is told."""
    params = parameters()
    optimizer = cls(params.items(), lr=0.1)
    take_step(optimizer, [g * 1e30 for g in gradients(1)])
    assert not_finite(snapshot(optimizer, params)) == []


@pytest.mark.parametrize("donor", ["adam", "sgd"])
def test_huge_gradients_have_a_length(donor: str) -> None:
    params = {"w": nn.Parameter(torch.zeros(5, 4))}
    optimizer = mup.Muon(params.items(), lr=0.1, graft=donor)
    take_step(optimizer, [1e30 * draw((5, 4), 0)])
    assert params["w"].isfinite().all()


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
@every_case
def test_half_precision_rounds_the_weights_alone(
    cls: Optimizer, settings: Settings, weight_decay: float, dtype: torch.dtype
) -> None:
    halves, wholes = parameters(dtype), {name: nn.Parameter(p.float()) for name, p in parameters(dtype).items()}
    half, whole = (cls(p.items(), lr=0.1, weight_decay=weight_decay, **settings) for p in (halves, wholes))
    for step in range(1, STEPS + 1):
        grads = [g.to(dtype) for g in gradients(step)]
        take_step(half, grads)
        take_step(whole, grads)
        found = snapshot(half, halves)
        for name, value in snapshot(whole, wholes).items():
            # The last bit of a sum depends on where an entry lies, which may tip what is rounded.
            tolerance = torch.finfo(dtype).eps if name in wholes else 1e-6
            torch.testing.assert_close(found[name].float(), value, rtol=tolerance, atol=1e-6 * float(value.abs().max()))
        for name, p in wholes.items():
            p.data.copy_(halves[name])  # so that roundings do not add up
    assert {value.dtype for p in halves.values() for value in half.state[p].values()} == {torch.float32}


# Gradients that are not finite

BAD = [math.nan, math.inf, -math.inf]
POISONED = 3  # the first of two matrices of one shape


def poisoned(step: int, bad: float) -> list[Tensor]:
    grads = gradients(step)
    grads[POISONED][2, 1] = bad
    return grads


def trained(cls: Optimizer, nonfinite: str) -> tuple[StackedOptimizer, Params]:
    params = parameters()
    optimizer = cls(params.items(), lr=0.1, weight_decay=1e-3, nonfinite=nonfinite)
    for step in (1, 2):
        take_step(optimizer, gradients(step))
    return optimizer, params


@pytest.mark.parametrize("bad", BAD)
@every_class
def test_raise_names_the_parameter_and_changes_nothing(cls: Optimizer, bad: float) -> None:
    optimizer, params = trained(cls, "raise")
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"the gradient of 'w3' is not finite .*nothing was changed"):
        take_step(optimizer, poisoned(3, bad))
    assert changed(before, snapshot(optimizer, params)) == []


@pytest.mark.parametrize("bad", BAD)
@every_class
def test_skip_leaves_the_step_out(cls: Optimizer, bad: float) -> None:
    (optimizer, params), (other, never) = (trained(cls, "skip") for _ in range(2))
    before = snapshot(optimizer, params)
    take_step(optimizer, poisoned(3, bad))
    assert changed(before, snapshot(optimizer, params)) == []
    for each in (optimizer, other):
        take_step(each, gradients(4))
    assert changed(snapshot(other, never), snapshot(optimizer, params)) == []
    assert all(float(optimizer.state[p]["step"]) == 3 for p in params.values())


@pytest.mark.filterwarnings(r"ignore:torch\.linalg\.eigh failed in a stack")
@pytest.mark.parametrize("bad", BAD)
@every_class
def test_ignore_goes_on_with_everything_else(cls: Optimizer, bad: float) -> None:
    (optimizer, params), (other, healthy) = (trained(cls, "ignore") for _ in range(2))
    for step in (3, 4):
        take_step(optimizer, poisoned(step, bad))
        take_step(other, gradients(step))
    got, want = snapshot(optimizer, params), snapshot(other, healthy)
    assert not_finite(want) == []
    assert "w3" in not_finite(got)
    assert {name.split()[0] for name in changed(want, got)} == {"w3"}
    assert float(got["w3 step"]) == 4


@pytest.mark.parametrize("said", [("skip", "raise"), ("raise", "skip"), ("skip", "skip")], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_the_groups_of_bad_gradients_decide(said: tuple[str, str], count: int) -> None:
    """Those of good ones have no say; of several bad ones, all must agree to skip."""
    params = {name: nn.Parameter(draw((5, 4), i)) for i, name in enumerate("ab")}
    groups = [{"params": [each], "nonfinite": how} for each, how in zip(params.items(), said, strict=True)]
    optimizer = mup.Muon(groups, lr=0.1)
    before, bad = snapshot(optimizer, params), torch.full((5, 4), math.nan)
    refused = pytest.raises(ValueError, match="nothing was changed")
    with refused if "raise" in said[:count] else nullcontext():
        take_step(optimizer, [bad, draw((5, 4), 2) if count == 1 else bad])
    assert changed(before, snapshot(optimizer, params)) == []


# Eigendecompositions that fail

DECOMPOSED: list[tuple[Optimizer, Settings]] = [
    (mup.Shampoo, {"precondition_every": 1}),
    (mup.SOAP, {}),
    (mup.SOAP, {"graft": "adam", "block_size": 3, "spectral_norm": True}),
]
REFUSALS: dict[str, Callable[[Tensor], bool]] = {
    "in float32": lambda s: s.dtype == torch.float32,
    "at all": lambda s: True,
}


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize(("cls", "settings"), DECOMPOSED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_failed_eigendecompositions_are_told_once(
    cls: Optimizer, settings: Settings, refusal: str, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    optimizer = cls(params.items(), lr=0.1, **settings)
    before = snapshot(optimizer, params)
    monkeypatch.setattr(torch.linalg, "eigh", Stubborn(REFUSALS[refusal], raises))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # Python's own: one warning per place and text
        for step in range(1, STEPS + 1):
            take_step(optimizer, gradients(step))
    after = snapshot(optimizer, params)
    assert not_finite(after) == []
    assert set(params) <= set(changed(before, after))
    assert len(told) == 1
    assert "torch.linalg.eigh failed in a stack" in str(told[0].message)
