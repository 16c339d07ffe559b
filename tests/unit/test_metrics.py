"""Metrics of matrices against plain numpy and recorded numbers, and as torchmetrics: sums, resets, ranks."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_mup.metrics import (
    RMS,
    Alignment,
    DecayTimescale,
    EffectiveLearningRate,
    RelativeUpdate,
    SpectralNorm,
    StableRank,
)
from lightning_mup.metrics.functional import alignments, as_stack, decay_timescale, relative_sizes, spectral_norms
from tests.models import generator

GOLDEN = Path(__file__).parents[1] / "golden"
Array = NDArray[np.float64]
OF_MATRICES: tuple[type[Metric], ...] = (RMS, SpectralNorm, StableRank)


def exact(metric: Metric) -> Any:  # noqa: ANN401 - a metric of any class
    return metric.set_dtype(torch.float64)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- by other means: numpy's eigenvalues and plain loops ---------------------------------------------------------------


def rms(a: Array) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in a.ravel()) / a.size)


def top(a: Array) -> float:
    """The largest singular value by another way than an SVD."""
    return math.sqrt(np.linalg.eigvalsh(a @ a.T)[-1])


REFERENCE: dict[type[Metric], Callable[[Array], float]] = {
    RMS: rms,
    SpectralNorm: top,
    StableRank: lambda a: float(np.trace(a @ a.T)) / top(a) ** 2,
}


def alignment(inputs: Array, change: Array) -> float:
    exponents = [math.log(rms(change @ x) / (rms(change) * rms(x)), len(x)) for x in inputs]
    return sum(exponents) / len(exponents)


SIZES = st.integers(1, 12)


@pytest.mark.parametrize("kind", OF_MATRICES)
@given(count=st.integers(1, 4), rows=SIZES, columns=SIZES, power=st.integers(-150, 150), seed=st.integers(0, 2**32))
def test_each_matrix_is_as_by_numpy(
    kind: type[Metric], count: int, rows: int, columns: int, power: int, seed: int
) -> None:
    stack = drawn(seed, count, rows, columns) * 10.0**power  # squares of which overflow
    scale = 1.0 if kind is StableRank else 10.0**power
    wanted = sum(REFERENCE[kind](a.numpy() / 10.0**power) for a in stack) / count * scale
    metric = exact(kind())
    metric.update(stack)
    assert float(metric.compute()) == pytest.approx(wanted, rel=1e-12)


@given(rows=SIZES, columns=st.integers(2, 12), tokens=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_alignment_is_as_by_numpy(rows: int, columns: int, tokens: int, seed: int) -> None:
    inputs, change = drawn(seed, tokens, columns), drawn(seed + 1, rows, columns)
    metric = exact(Alignment())
    metric.update(1e200 * inputs, 1e-200 * change)
    assert float(metric.compute()) == pytest.approx(alignment(inputs.numpy(), change.numpy()), rel=1e-9, abs=1e-11)


@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 2**32))
def test_relative_update_is_as_by_numpy(rows: int, columns: int, seed: int) -> None:
    change, weight = drawn(seed, rows, columns), drawn(seed + 1, rows, columns)
    for norm, order in (("frobenius", "fro"), ("spectral", 2)):
        metric = exact(RelativeUpdate(norm))  # type: ignore[arg-type]
        metric.update(change, weight)
        wanted = np.linalg.norm(change.numpy(), order) / np.linalg.norm(weight.numpy(), order)  # type: ignore[call-overload]
        assert float(metric.compute()) == pytest.approx(wanted, rel=1e-12)


CASES = {case["name"]: case for case in json.loads((GOLDEN / "update_metrics.json").read_text())["cases"]}


@pytest.mark.parametrize("name", CASES)
def test_recorded_numbers(name: str) -> None:
    case, arrays = CASES[name], np.load(GOLDEN / "update_metrics.npz")
    update = torch.as_tensor(arrays[case["update_array"]]).double().T  # stored as [in, out]
    inputs = torch.as_tensor(arrays[case["inputs_array"]]).double()
    for kind, key, tolerance in (
        (RMS, "root_mean_square", 1e-6),  # recorded in single precision
        (SpectralNorm, "exact_spectral_norm", 1e-12),
        (StableRank, "exact_stable_rank", 1e-12),
        (SpectralNorm, "spectral_norm_estimate", 2e-3),  # seven steps of power iteration
        (StableRank, "stable_rank", 4e-3),
    ):
        assert float(exact(kind())(update)) == pytest.approx(case[key], rel=tolerance), key
    assert float(exact(Alignment())(inputs, update)) == pytest.approx(case["alignment"], rel=1e-11)


# -- properties --------------------------------------------------------------------------------------------------------


def test_known_alignments() -> None:
    width, tokens = 4096, drawn(0, 64, 4096)
    apart = exact(Alignment())(tokens, drawn(1, 128, width))
    assert float(apart) == pytest.approx(0.5, abs=0.005)
    aligned = exact(Alignment())(tokens[:1], drawn(1, 128, 1) * tokens[:1])  # rank one, along the token
    assert float(aligned) == pytest.approx(1.0, rel=1e-12)


def test_stable_ranks_lie_between_one_and_the_rank() -> None:
    assert float(exact(StableRank())(torch.eye(7).double())) == pytest.approx(7.0)
    assert float(exact(StableRank())(drawn(0, 7, 1) @ drawn(1, 1, 9))) == pytest.approx(1.0)


def test_vectors_scalars_and_stacks_of_stacks() -> None:
    assert as_stack(torch.ones(())).shape == (1, 1, 1)
    assert as_stack(torch.ones(2, 3, 4, 5)).shape == (6, 4, 5)
    assert float(SpectralNorm()(torch.tensor([3.0, 4.0]))) == pytest.approx(5.0)
    assert as_stack(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_zeros_have_values() -> None:
    zeros, ones = torch.zeros(2, 3, 3), torch.ones(2, 3, 3)
    assert [float(kind()(zeros)) for kind in OF_MATRICES] == [0.0, 0.0, 0.0]
    assert relative_sizes(zeros, ones).tolist() == relative_sizes(zeros, zeros).tolist() == [0.0, 0.0]
    assert relative_sizes(ones, zeros).tolist() == [math.inf, math.inf]


def test_tokens_and_changes_of_zeros_are_not_counted() -> None:
    inputs, change = drawn(0, 4, 8), drawn(1, 8, 8)
    padded = torch.cat([inputs, torch.zeros(5, 8)])
    stack = torch.stack([change, torch.zeros(8, 8)])
    wanted = float(exact(Alignment())(inputs, change))
    assert float(exact(Alignment())(padded, stack)) == pytest.approx(wanted, rel=1e-12)
    assert math.isnan(Alignment()(inputs, torch.zeros(8, 8)))
    assert math.isnan(Alignment()(inputs[:, :1], change[:, :1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    stack = torch.ones(2, 3, 3)
    stack[0, 1, 2] = bad
    assert [math.isnan(value) for value in spectral_norms(stack)] == [True, False]
    assert all(math.isnan(kind()(stack)) for kind in OF_MATRICES)
    assert [math.isnan(value) for value in relative_sizes(stack, torch.ones(2, 3, 3))] == [True, False]
    assert [math.isnan(value) for value in relative_sizes(torch.zeros(2, 3, 3), stack)] == [True, False]
    assert [math.isnan(value) for value in alignments(torch.ones(2, 3), stack)[0]] == [True, False]
    assert math.isnan(alignments(stack[0], torch.ones(3, 3))[0])


def test_each_matrix_may_have_its_own_inputs() -> None:
    inputs, change = drawn(0, 3, 5, 8), drawn(1, 3, 4, 8)
    totals, counts = alignments(inputs, change)
    assert counts.tolist() == [5, 5, 5]
    wanted = [alignment(x.numpy(), a.numpy()) for x, a in zip(inputs, change, strict=True)]
    assert (totals / counts).tolist() == pytest.approx(wanted, rel=1e-12)
    shared = alignments(inputs[:2], change)[1]  # a batch of two sequences, seen by all
    assert shared.tolist() == [10, 10, 10]


def test_no_precision_is_lost_under_autocast() -> None:
    inputs, change = drawn(0, 3, 8).float(), drawn(1, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = alignments(inputs, change)[0]
    assert torch.equal(inside, alignments(inputs, change)[0])


def test_no_graph_is_kept() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    assert not SpectralNorm()(weight).requires_grad
    assert not RelativeUpdate()(weight, weight).requires_grad
    assert not Alignment()(weight, weight).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RMS()(torch.ones(2, dtype=torch.long)), TypeError, "floating-point dtype, got torch.int64"),
        (lambda: RMS()(torch.ones(0, 2)), ValueError, r"must have entries, got shape \(0, 2\)"),
        (lambda: RelativeUpdate("spectrall"), ValueError, "did you mean 'spectral'"),  # type: ignore[arg-type]
        (lambda: RelativeUpdate()(torch.ones(2, 2), torch.ones(2, 3)), ValueError, r"got \(2, 2\) and \(2, 3\)"),
        (lambda: Alignment()(torch.ones(2, 3), torch.ones(3, 2)), ValueError, "end in the change's 2 columns"),
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# -- as torchmetrics ---------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[[], Metric], list[tuple[Any, ...]]]] = {
    "rms": (RMS, [(drawn(0, 3, 4),), (drawn(1, 5, 2),)]),
    "spectral norm": (SpectralNorm, [(drawn(0, 3, 4),), (drawn(1, 5, 2, 6),)]),
    "stable rank": (StableRank, [(drawn(0, 3, 4),), (drawn(1, 5, 2),)]),
    "relative": (RelativeUpdate, [(drawn(0, 3, 4), drawn(2, 3, 4)), (drawn(1, 5, 2), drawn(3, 5, 2))]),
    "alignment": (Alignment, [(drawn(0, 3, 4), drawn(2, 5, 4)), (drawn(1, 9, 6), drawn(3, 2, 6))]),
    "rate": (EffectiveLearningRate, [(0.1, 1e-3), (0.05, 5e-4)]),
    "timescale": (DecayTimescale, [(1e-3,), (5e-4,)]),
}
WEIGHTS = {"spectral norm": (1, 5), "alignment": (3, 9)}  # matrices; tokens


@pytest.mark.parametrize("name", CALLS)
def test_accumulates_resets_and_survives_copies(name: str) -> None:
    build, calls = CALLS[name]
    metric = exact(build())
    alone = [float(metric(*call)) for call in calls]  # forward gives each update's own value
    one, two = WEIGHTS.get(name, (1, 1))
    wanted = (one * alone[0] + two * alone[1]) / (one + two)
    if name == "timescale":
        wanted = 2 / (1 / alone[0] + 1 / alone[1])
    for copied in (metric, deepcopy(metric), pickle.loads(pickle.dumps(metric))):  # noqa: S301
        assert float(copied.compute()) == pytest.approx(wanted, rel=1e-12)
    metric.reset()
    metric.update(*calls[1])
    assert float(metric.compute()) == pytest.approx(alone[1], rel=1e-12)


def test_a_collection_takes_them() -> None:
    found = MetricCollection([RMS(), SpectralNorm(), StableRank()])(2 * torch.eye(4))
    assert {name: float(value) for name, value in found.items()} == {"RMS": 1.0, "SpectralNorm": 2.0, "StableRank": 4.0}


def test_nothing_seen_is_no_number() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(RMS().compute())


def test_rates_and_time_scales() -> None:
    metric = EffectiveLearningRate()
    metric.update(0.1, 1e-3)
    assert float(metric.compute()) == pytest.approx(0.01)
    assert decay_timescale(0.0) == float(DecayTimescale()(0.0)) == math.inf
    scale = DecayTimescale()
    for step in range(10):  # a schedule to zero: half of the peak's decay on average
        scale.update(1e-3 * (1 - step / 9))
    assert float(scale.compute()) == pytest.approx(2000.0)
