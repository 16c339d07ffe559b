"""Several vectors that find the largest singular values together, compared with exact ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.core.linalg import power_iteration
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize, block_iteration
from lightning_mup.core.transform import Context
from tests.models import generator


def stack(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def exact(x_NOI: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(x_NOI.double(), ord=2).to(x_NOI.dtype)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_the_estimate_is_a_lower_bound_and_better_than_one_vectors(
    count: int, rows: int, columns: int, vectors: int, seed: int
) -> None:
    a_NOI = stack(count, rows, columns, seed=seed)
    v_NKO = stack(count, min(vectors, rows, columns), rows, seed=seed + 1)
    sigma_N, new_NKO = block_iteration(a_NOI, v_NKO)
    first_NO = torch.nn.functional.normalize(v_NKO[:, 0], dim=1)
    single_N, _ = power_iteration(a_NOI, first_NO)
    assert new_NKO.shape == v_NKO.shape
    assert (sigma_N <= exact(a_NOI) * (1 + 1e-5)).all()
    assert (sigma_N >= single_N * (1 - 2e-3)).all()  # of several alike, what is left of the smaller ones counts, too


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 9))
def test_as_many_vectors_as_there_are_singular_values_are_exact_at_once(rows: int, columns: int, seed: int) -> None:
    a_NOI = stack(2, rows, columns, seed=seed, dtype=torch.float64)
    sigma_N, _ = block_iteration(a_NOI, stack(2, min(rows, columns), rows, seed=seed + 1, dtype=torch.float64))
    torch.testing.assert_close(sigma_N, exact(a_NOI), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_any_scale_and_any_rank(scale: float, rank: int) -> None:
    a_NOI = (stack(2, 6, rank) @ stack(2, rank, 9, seed=1)) * scale
    v_NKO = stack(2, 4, 6, seed=2)
    for _ in range(30):
        sigma_N, v_NKO = block_iteration(a_NOI, v_NKO)
    torch.testing.assert_close(sigma_N / scale, exact(a_NOI / scale), rtol=1e-3, atol=0)


def test_a_rotating_direction_is_followed_where_one_vector_is_late() -> None:
    """The two first singular vectors change places at every step, as an optimizer's may."""
    several, single = (SpectralNormalize(warmup_steps=2, vectors=vectors) for vectors in (4, 1))
    state, other = (normalize.init(torch.zeros(1, 8, 8)) for normalize in (several, single))
    norms = []
    for step in range(1, 9):
        values = torch.tensor([2.0, 1.8, *[0.5] * 6]) if step % 2 else torch.tensor([1.8, 2.0, *[0.5] * 6])
        a_NOI = torch.diag(values)[None]
        both = ((several, state), (single, other))
        norms.append([float(exact(n.update(a_NOI, s, Context(step)))) for n, s in both])
    assert max(abs(norm - 1) for norm, _ in norms[2:]) < 1e-3
    assert max(abs(norm - 1) for _, norm in norms[2:]) > 0.02


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_says_nothing_leaves_the_vectors(value: float) -> None:
    a_NOI, v_NKO = torch.full((1, 3, 4), value), stack(1, 2, 3)
    sigma_N, new_NKO = block_iteration(a_NOI, v_NKO, iterations=2)
    assert torch.equal(new_NKO, v_NKO)
    assert float(sigma_N) == 0 if value == 0 else not bool(sigma_N.isfinite())


@pytest.mark.parametrize("normalize", [SpectralNormalize(), SpectralNormalize(vectors=2), RmsNormalize()])
def test_zeros_stay_zeros_however_small_the_unit(normalize: SpectralNormalize | RmsNormalize) -> None:
    zeros_NOI = torch.zeros(1, 3, 4)
    for unit in (1.0, 1e-38):
        factor_N11 = normalize.factors(zeros_NOI, normalize.init(zeros_NOI), Context(1), unit=unit)
        assert torch.equal(factor_N11, torch.zeros(1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "iterations"), [((1, 5, 4), 1), ((1, 2, 3), 1), ((2, 2, 4), 1), ((4, 4), 1), ((1, 2, 4), 0)]
)
def test_misfits_are_refused(shape: tuple[int, ...], iterations: int) -> None:
    with pytest.raises(ValueError, match=r"v must have shape \(1, 1 to 4, 4\) and iterations be >= 1, got"):
        block_iteration(torch.ones(1, 4, 5), torch.ones(shape), iterations=iterations)
