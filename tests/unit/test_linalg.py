"""Stacks against plain float64 references, one matrix at a time; sizes, ranks and scales of every kind."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_mup.core.eigen import eigenbasis, inverse_root, qr_step
from lightning_mup.core.linalg import newton_schulz, polar, power_iteration

SHAPES = [(1, 1), (1, 7), (7, 1), (12, 5), (5, 12), (16, 16), (64, 32)]
SIZES = [1, 2, 5, 16, 40]
EXPONENTS = [1 / 4, 1 / 2, 1, 1 / 3]

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31 - 1)
scales = st.integers(-30, 30).map(lambda power: 10.0**power)


def matrices(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def statistics(size: int, seed: int = 0, rank: int | None = None) -> Tensor:
    factor = matrices((size, size if rank is None else rank), seed)
    return factor @ factor.mT / size


def error(got: Tensor, want: Tensor | np.ndarray) -> float:
    want = torch.as_tensor(want, dtype=torch.float64)
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300))


def plain_newton_schulz(x: np.ndarray, eps: float) -> np.ndarray:
    if x.shape[0] > x.shape[1]:
        return plain_newton_schulz(x.T, eps).T
    x = x / (math.sqrt(sum(float(e) ** 2 for e in x.ravel())) + eps)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def plain_root(s: np.ndarray, exponent: float, ridge: float) -> np.ndarray:
    u, w, _ = np.linalg.svd(s)  # for semidefinite matrices the eigendecomposition, by another algorithm
    return u @ np.diag((w + ridge) ** -exponent) @ u.T


def plain_newton_root(a: np.ndarray, p: int) -> np.ndarray:
    identity = np.eye(len(a))
    z = (1 + p) / (2 * np.linalg.norm(a))
    m, h = z * a, z ** (1 / p) * identity
    before = np.abs(m - identity).max()
    for _ in range(100):
        if before <= 1e-6:
            return h
        t = (1 + 1 / p) * identity - m / p
        m, new = np.linalg.matrix_power(t, p) @ m, h @ t
        now = np.abs(m - identity).max()
        if now > 1.2 * before:
            return h
        h, before = new, now
    return h


# Newton-Schulz and polar factors


@given(shapes, seeds, scales, st.sampled_from([0.0, 1e-7, 1e-2]))
def test_newton_schulz(shape: tuple[int, int], seed: int, scale: float, eps: float) -> None:
    x_NOI = matrices(shape, seed) * scale
    for got, x in zip(newton_schulz(x_NOI, eps=eps), x_NOI, strict=True):
        assert error(got, plain_newton_schulz(x.numpy(), eps)) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_at_usual_sizes(shape: tuple[int, int]) -> None:
    x_NOI = matrices(shape)
    for got, x in zip(newton_schulz(x_NOI), x_NOI, strict=True):
        assert error(got, plain_newton_schulz(x.numpy(), 1e-7)) < 2e-14
        assert np.linalg.svd(got.numpy(), compute_uv=False).max() < 1.21


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_newton_schulz_in_low_precision(
    shape: tuple[int, int], scale: float, dtype: torch.dtype, within: float
) -> None:
    x_NOI = (matrices(shape) * scale).float()
    want_NOI = np.stack([plain_newton_schulz(x.double().numpy(), 0.0) for x in x_NOI])
    got_NOI = newton_schulz(x_NOI, eps=0.0, dtype=dtype)
    assert got_NOI.dtype == torch.float32
    assert error(got_NOI, want_NOI) < within
    rounded_NOI = newton_schulz(x_NOI.to(dtype), eps=0.0)
    assert rounded_NOI.dtype == dtype
    assert error(rounded_NOI, want_NOI) < 2 * within


def test_newton_schulz_eps_is_absolute() -> None:
    x_NOI = matrices((3, 4), dtype=torch.float32) * 1e-30
    assert newton_schulz(x_NOI, eps=1e-7).abs().max() < 1e-19
    assert error(newton_schulz(x_NOI, eps=1e-30), newton_schulz(x_NOI * 1e30, eps=1.0)) < 1e-5


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_newton_schulz_keeps_zeros(eps: float, dtype: torch.dtype) -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4, dtype=dtype), eps=eps), torch.zeros(2, 3, 4, dtype=dtype))
    mixed_NOI = matrices((3, 4), dtype=dtype)
    mixed_NOI[1] = 0
    assert torch.equal(newton_schulz(mixed_NOI)[1], torch.zeros(3, 4, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_polar(shape: tuple[int, int], scale: float) -> None:
    x_NOI = matrices(shape) * scale
    for got, x in zip(polar(x_NOI), x_NOI.numpy(), strict=True):
        small = min(shape)
        gram = got @ got.T if shape[0] == small else got.T @ got
        assert error(gram, np.eye(small)) < 1e-12
        stretch = x @ got.numpy().T if shape[0] == small else got.numpy().T @ x
        assert np.abs(stretch - stretch.T).max() < 1e-12 * scale * math.sqrt(math.prod(shape))
        assert np.linalg.eigvalsh(stretch).min() > 0


def test_polar_without_full_rank() -> None:
    left_NOR, right_NRI = matrices((8, 2)), matrices((2, 6), seed=1)
    got_NOI = polar(left_NOR @ right_NRI)
    for got, left, right in zip(got_NOI, left_NOR.numpy(), right_NRI.numpy(), strict=True):
        q, r = np.linalg.qr(left)
        u, _, v = np.linalg.svd(r @ right, full_matrices=False)
        assert error(got, q @ u @ v) < 1e-12
    assert not polar(torch.zeros(2, 3, 4)).any()


def test_newton_schulz_with_converging_coefficients_is_polar() -> None:
    x_NOI = matrices((5, 12))
    assert error(newton_schulz(x_NOI, steps=40, coefficients=(15 / 8, -10 / 8, 3 / 8)), polar(x_NOI)) < 1e-12


# Inverse roots


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exponent", [*EXPONENTS, 0.3, 2.0])
@pytest.mark.parametrize("relative", [False, True])
def test_inverse_root(size: int, exponent: float, relative: bool) -> None:
    s_NDD = statistics(size)
    for got, s in zip(inverse_root(s_NDD, exponent, damping=1e-3, relative=relative), s_NDD.numpy(), strict=True):
        ridge = 1e-3 * (np.linalg.norm(s, 2) if relative else 1)
        assert error(got, plain_root(s, exponent, ridge)) < 1e-11


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("relative", [False, True])
def test_newton_root(size: int, exponent: float, relative: bool) -> None:
    s_NDD = statistics(size)
    got_NDD = inverse_root(s_NDD, exponent, damping=1e-2, relative=relative, method="newton")
    for got, s in zip(got_NDD, s_NDD.numpy(), strict=True):
        ridge = 1e-2 * (np.linalg.norm(s, 2) if relative else 1)
        assert error(got, plain_newton_root(s + ridge * np.eye(size), round(1 / exponent))) < 1e-12
        assert error(got, plain_root(s, exponent, ridge)) < 1e-5  # what a residual of 1e-6 allows


@pytest.mark.parametrize("exponent", [1 / 4, 1 / 2])
def test_newton_root_goes_on_while_single_entries_grow(exponent: float) -> None:
    """The eigenvalue 1 has all entries in its vector: on the way to 1, entries of the error grow by a third."""
    s_NDD = torch.full((1, 4, 4), 0.25, dtype=torch.float64)
    exact, newton = (inverse_root(s_NDD, exponent, damping=1e-2, method=m) for m in ("eigh", "newton"))
    assert error(newton, exact) < 1e-6


def test_qr_step_of_a_matrix_far_below_its_ridge() -> None:
    q_NDD, _ = qr_step(torch.diag(torch.tensor([1e-42, 0.0]))[None], torch.eye(2)[None], ridge=1e-10)
    assert torch.equal(q_NDD.abs(), torch.eye(2)[None])


@given(st.integers(1, 8), seeds, scales, st.sampled_from([1 / 4, 1 / 2]), st.sampled_from(["eigh", "newton"]))
def test_roots_scale(size: int, seed: int, scale: float, exponent: float, method: str) -> None:
    s_NDD = statistics(size, seed)
    kwargs = {"relative": True, "damping": 1e-3, "method": method}
    if scale >= 1e-14:  # below, the floor of the largest eigenvalue is in effect
        want_NDD = inverse_root(s_NDD, exponent, **kwargs) * scale**-exponent
        assert error(inverse_root(s_NDD * scale, exponent, **kwargs), want_NDD) < 1e-5
    want_NDD = inverse_root(s_NDD, exponent, damping=1e-3, method=method) * scale**-exponent
    assert error(inverse_root(s_NDD * scale, exponent, damping=1e-3 * scale, method=method), want_NDD) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_roots_in_float32(scale: float, method: str) -> None:
    s_NDD = (statistics(16) * scale).float()
    got_NDD = inverse_root(s_NDD, 1 / 4, damping=1e-2 * scale, method=method)
    want_NDD = np.stack([plain_root(s.double().numpy(), 1 / 4, 1e-2 * scale) for s in s_NDD])
    assert got_NDD.dtype == torch.float32
    assert error(got_NDD, want_NDD) < 1e-5
    rounded_NDD = inverse_root(s_NDD.bfloat16(), 1 / 4, damping=1e-2 * scale, method=method)
    assert rounded_NDD.dtype == torch.bfloat16
    assert rounded_NDD.isfinite().all()


@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_roots_without_full_rank(method: str) -> None:
    s_NDD = statistics(8, rank=3)
    s_NDD[1] = 0
    for got, s in zip(inverse_root(s_NDD, 1 / 4, damping=1e-4, method=method), s_NDD.numpy(), strict=True):
        assert error(got, plain_root(s, 1 / 4, 1e-4)) < 1e-5
    zero = inverse_root(s_NDD[1:2], 1 / 4, damping=1e-4, relative=True, method=method)
    assert error(zero, np.eye(8)[None] * 1e5) < 1e-6  # (1e-4 1e-16)^(-1/4)


@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_a_ridge_for_each_matrix(method: str) -> None:
    s_NDD, damping_N = statistics(5), torch.tensor([1e-3, 1e-2, 1.0], dtype=torch.float64)
    got_NDD = inverse_root(s_NDD, 1 / 2, damping=damping_N, method=method)
    for got, s, ridge in zip(got_NDD, s_NDD.numpy(), damping_N.tolist(), strict=True):
        assert error(got, plain_root(s, 1 / 2, ridge)) < 1e-6


def test_rounding_below_zero_is_clamped() -> None:
    s_NDD = torch.diag(torch.tensor([1.0, -1e-9], dtype=torch.float64)).unsqueeze(0)
    assert error(inverse_root(s_NDD, 1 / 2, damping=1e-10), torch.diag(torch.tensor([1.0, 1e5]))) < 1e-9


def test_the_largest_eigenvalue_may_be_crowded() -> None:
    w_D = torch.linspace(1.0, 1 + 1e-3, 32, dtype=torch.float64)
    q = torch.linalg.qr(matrices((32, 32))[0]).Q
    s_NDD = ((q * w_D) @ q.T).unsqueeze(0)
    got_NDD = inverse_root(s_NDD, 1.0, damping=1.0, relative=True, method="newton")
    assert error(got_NDD[0], plain_root(s_NDD[0].numpy(), 1.0, 1 + 1e-3)) < 1e-6


# Eigenbases


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eigenbasis(size: int, scale: float) -> None:
    p_NDD = statistics(size) * scale
    for q, p in zip(eigenbasis(p_NDD).numpy(), p_NDD.numpy(), strict=True):
        assert error(torch.as_tensor(q.T @ q), np.eye(size)) < 1e-12
        assert error(torch.as_tensor(q.T @ p @ q), np.diag(np.linalg.svd(p, compute_uv=False))) < 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_qr_step(size: int, scale: float) -> None:
    p_NDD, q_NDD = statistics(size) * scale, torch.linalg.qr(matrices((size, size), seed=1)).Q
    new_NDD, permutation_ND = qr_step(p_NDD, q_NDD)
    for new, permutation, p, q in zip(new_NDD, permutation_ND, p_NDD.numpy(), q_NDD.numpy(), strict=True):
        order = np.argsort(-np.diag(q.T @ p @ q), kind="stable")
        assert permutation.tolist() == order.tolist()
        want = np.linalg.qr(p @ q[:, order])[0]
        assert error(new * torch.as_tensor(np.sign((new.numpy() * want).sum(0))), want) < 1e-8
        assert error(new.T @ new, np.eye(size)) < 1e-12


def test_qr_steps_converge_to_the_eigenbasis() -> None:
    p_NDD = torch.diag(torch.tensor([1.0, 5.0, 0.2, 25.0], dtype=torch.float64)).unsqueeze(0)
    q_NDD = torch.linalg.qr(matrices((4, 4))[:1]).Q
    for _ in range(30):
        q_NDD, _ = qr_step(p_NDD, q_NDD)
    assert error(q_NDD.abs(), eigenbasis(p_NDD).abs()) < 1e-12


def test_qr_step_orders_ties_by_position_and_zeros_stay_orthogonal() -> None:
    for p in (torch.eye(4), torch.zeros(4, 4)):
        new_NDD, permutation_ND = qr_step(p.unsqueeze(0), torch.eye(4).unsqueeze(0))
        assert permutation_ND.tolist() == [[0, 1, 2, 3]]
        assert torch.equal(new_NDD.abs()[0], torch.eye(4))


# Power iteration


@given(shapes, seeds, st.integers(1, 6))
def test_power_iteration(shape: tuple[int, int], seed: int, iterations: int) -> None:
    a_NOI = matrices(shape, seed)
    a_NOI /= a_NOI.abs().amax((1, 2), keepdim=True)  # largest entry 1: the reference's 1e-10 is that of the code
    v_NO = torch.nn.functional.normalize(matrices(shape, seed + 1)[:, :, 0], dim=1)
    sigma_N, new_NO = power_iteration(a_NOI, v_NO, iterations=iterations)
    for sigma, new, a, v in zip(sigma_N, new_NO, a_NOI.mT.numpy(), v_NO.numpy(), strict=True):  # paper's layout
        for _ in range(iterations):
            y = a @ v
            z = a.T @ y
            moved = z / (np.linalg.norm(z) + 1e-10)
            v = moved if np.linalg.norm(moved) > 0.5 else v  # noqa: PLW2901
        assert float(sigma) == pytest.approx(np.linalg.norm(y), rel=1e-10)
        assert error(new, v) < 1e-10


def test_power_iteration_gives_the_papers_numbers() -> None:
    v_NO = torch.tensor([[0.60640298, -0.15521572, 0.13400558, 0.76826168]], dtype=torch.float64)
    i, j = torch.arange(1, 7, dtype=torch.float64)[None, :], torch.arange(1, 5, dtype=torch.float64)[:, None]
    seen = {}
    for t in range(1, 13):
        a_NOI = torch.sin(0.37 * i * (j + 1) * t + 0.11 * t).unsqueeze(0)  # transpose of the paper's [d_in, d_out]
        sigma_N, v_NO = power_iteration(a_NOI, v_NO, iterations=5 if t <= 3 else 1)
        u_OI = a_NOI[0] * math.sqrt(4 / 6) / (sigma_N + 1e-10)
        seen[t] = [float(u_OI.norm()), float(u_OI[0, 0]), float(u_OI[3, 5])]
    assert seen[1] == pytest.approx([1.45946555, 0.30396438, -0.39532937], abs=2e-7)
    assert seen[12] == pytest.approx([1.45949056, -0.28032072, 0.21562734], abs=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_power_iteration_converges_at_any_scale(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    a_NOI = (matrices(shape) * scale).to(dtype)
    v_NO = torch.nn.functional.normalize(matrices(shape, 1)[:, :, 0].float(), dim=1)
    sigma_N, new_NO = power_iteration(a_NOI, v_NO, iterations=400)
    want_N = np.array([np.linalg.norm(a.double().numpy(), 2) for a in a_NOI])
    assert error(sigma_N, want_N) < 1e-5
    assert (sigma_N.dtype, new_NO.dtype) == (torch.promote_types(dtype, torch.float32), torch.float32)


def test_power_iteration_keeps_its_vector_where_it_learns_nothing() -> None:
    a_NOI, v_NO = matrices((4, 3)), torch.eye(4, dtype=torch.float64)[:3]
    a_NOI[1], a_NOI[2] = 0, math.nan
    sigma_N, new_NO = power_iteration(a_NOI, v_NO)
    assert sigma_N[1] == 0
    assert sigma_N[2].isnan()
    assert torch.equal(new_NO[1:], v_NO[1:])
    assert not torch.equal(new_NO[0], v_NO[0])


# All of them

ALL: dict[str, Callable[[Tensor], Tensor]] = {
    "newton_schulz": newton_schulz,
    "polar": polar,
    "eigh": lambda x: inverse_root(x @ x.mT, 1 / 4, damping=1e-3),
    "newton": lambda x: inverse_root(x @ x.mT, 1 / 4, damping=1e-3, method="newton"),
    "newton_relative": lambda x: inverse_root(x @ x.mT, 1 / 2, damping=1e-3, relative=True, method="newton"),
    "eigenbasis": lambda x: eigenbasis(x @ x.mT),
    "qr_step": lambda x: qr_step(x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1))[0],
    "sigma": lambda x: power_iteration(x, x[:, :, 0].contiguous())[0],
    "v": lambda x: power_iteration(x, x[:, :, 0].contiguous())[1],
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (16, 48), (48, 16), (64, 64), (112, 128)])
def test_a_stack_is_its_matrices_bit_for_bit(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x_NOI = matrices(shape, dtype=dtype)
    alone_NOI = torch.cat([ALL[name](x_NOI[k : k + 1].clone()) for k in range(3)])
    assert torch.equal(ALL[name](x_NOI), alone_NOI)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(3, 7), (7, 7), (9, 20), (33, 40)])
def test_a_stack_of_odd_sizes_is_its_matrices(name: str, shape: tuple[int, int]) -> None:
    x_NOI = matrices(shape)
    alone_NOI = torch.cat([ALL[name](x_NOI[k : k + 1].clone()) for k in range(3)])
    assert error(ALL[name](x_NOI), alone_NOI) < 1e-11


@pytest.mark.parametrize("size", [3, 7, 9, 33])
def test_bases_of_odd_sizes_are_equal_bit_for_bit_too(size: int) -> None:
    p_NDD = statistics(size, rank=2)  # a null space's basis is arbitrary, hence sensitive to the last bit
    assert torch.equal(eigenbasis(p_NDD), torch.cat([eigenbasis(p[None].clone()) for p in p_NDD]))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_empty_stacks_and_untouched_inputs(name: str, shape: tuple[int, int]) -> None:
    x_NOI = matrices(shape)
    before_NOI = x_NOI.clone()
    whole = ALL[name](x_NOI)
    assert torch.equal(x_NOI, before_NOI)
    assert whole.isfinite().all()
    assert ALL[name](x_NOI[:0]).shape == (0, *whole.shape[1:])


def test_operands_are_not_written_into() -> None:
    p_NDD, damping_N = statistics(6), torch.full((3,), 1e-3, dtype=torch.float64)
    q_NDD, v_NO = torch.linalg.qr(p_NDD).Q, p_NDD[:, 0].clone()
    kept = [x.clone() for x in (p_NDD, q_NDD, v_NO, damping_N)]
    for method in ("eigh", "newton"):
        inverse_root(p_NDD, 1 / 2, damping=damping_N, relative=True, method=method)
    eigenbasis(p_NDD)
    qr_step(p_NDD, q_NDD)
    power_iteration(p_NDD, v_NO, iterations=3)
    assert all(torch.equal(a, b) for a, b in zip(kept, (p_NDD, q_NDD, v_NO, damping_N), strict=True))


# Eigendecompositions that fail


class Stubborn:
    """Stands in for ``torch.linalg.eigh``: refuses, or returns NaN, as long as it is told to."""

    def __init__(self, refuses: Callable[[Tensor], bool], raises: bool = True) -> None:
        self.real, self.refuses, self.raises = torch.linalg.eigh, refuses, raises

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor]:
        w, v = self.real(s)
        if not self.refuses(s):
            return w, v
        if self.raises:
            raise torch.linalg.LinAlgError("did not converge")
        return w * math.nan, v


REFUSALS: dict[str, Callable[[Tensor], bool]] = {
    "float32": lambda s: s.dtype == torch.float32,
    "without jitter": lambda s: bool(s[0, 0] * 8 == (s[0, 0] * 8).round()),
}


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("why", REFUSALS)
def test_a_failed_eigendecomposition_is_tried_again(why: str, raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    s_NDD = torch.stack([torch.diag(torch.tensor(d)) for d in ([4.0, 8.0, 1.0], [1.0, 2.0, 3.0])])
    want_NDD, basis_NDD = inverse_root(s_NDD, 0.3, damping=0.1), eigenbasis(s_NDD)
    monkeypatch.setattr(torch.linalg, "eigh", Stubborn(REFUSALS[why], raises))
    with pytest.warns(UserWarning, match=r"torch\.linalg\.eigh failed in a stack"):
        assert error(inverse_root(s_NDD, 0.3, damping=0.1), want_NDD) < 1e-6
    with pytest.warns(UserWarning, match=r"torch\.linalg\.eigh failed in a stack"):
        assert error(eigenbasis(s_NDD).abs(), basis_NDD.abs()) < 1e-6


def test_the_last_resort_is_newton_for_the_failed_matrix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    s_NDD = statistics(5)
    want_NDD = inverse_root(s_NDD, 1 / 4, damping=1e-2)
    newton_NDD = inverse_root(s_NDD, 1 / 4, damping=1e-2, method="newton")
    largest = s_NDD[1].abs().max()
    failing = s_NDD[1] / 2.0 ** math.floor(math.log2(largest))
    monkeypatch.setattr(torch.linalg, "eigh", Stubborn(lambda s: torch.allclose(s, failing, rtol=0, atol=1e-4)))
    with pytest.warns(UserWarning, match="tried again"):
        got_NDD = inverse_root(s_NDD, 1 / 4, damping=1e-2)
    assert torch.equal(got_NDD[1], newton_NDD[1])
    assert error(got_NDD, want_NDD) < 1e-6
    assert error(got_NDD[::2], want_NDD[::2]) < 1e-12
    with pytest.warns(UserWarning, match="tried again"):
        assert inverse_root(s_NDD, 0.3, damping=1e-2).isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_matrices_that_are_not_finite_spoil_no_others(bad: float) -> None:
    s_NDD = statistics(4)
    want_NDD, basis_NDD = inverse_root(s_NDD, 1 / 4, damping=1e-2), eigenbasis(s_NDD)
    s_NDD[1, 2, 2] = bad
    with pytest.warns(UserWarning, match="not finite"):
        got_NDD = inverse_root(s_NDD, 1 / 4, damping=1e-2)
    with pytest.warns(UserWarning, match="not finite"):
        got_basis_NDD = eigenbasis(s_NDD)
    for got, want in ((got_NDD, want_NDD), (got_basis_NDD, basis_NDD)):
        assert got[1].isnan().any()
        assert error(got[::2], want[::2]) < 1e-11


# Errors


@pytest.mark.parametrize("bad", [0.0, -0.25, math.nan])
def test_an_exponent_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=f"exponent must be positive, got {bad}"):
        inverse_root(torch.eye(2)[None], bad, damping=0.1)


def test_errors_say_what_to_do() -> None:
    eye_NDD = torch.eye(2)[None]
    with pytest.raises(ValueError, match="unknown root 'newtn'; available: eigh, newton; did you mean 'newton'"):
        inverse_root(eye_NDD, 0.5, damping=0.1, method="newtn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs an exponent 1/integer, got 0\.3; use 'eigh'"):
        inverse_root(eye_NDD, 0.3, damping=0.1, method="newton")
    with pytest.raises(ValueError, match=r"damping must be >= 0, got -1\.0"):
        inverse_root(eye_NDD, 0.5, damping=-1.0)
    with pytest.raises(ValueError, match="steps and eps must be >= 0, got steps=-1"):
        newton_schulz(eye_NDD, steps=-1)
    with pytest.raises(ValueError, match=r"v must have shape \(1, 2\) and iterations be >= 1, got \(1, 3\) and 1"):
        power_iteration(eye_NDD, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"got \(1, 2\) and 0"):
        power_iteration(eye_NDD, torch.ones(1, 2), iterations=0)


@pytest.mark.parametrize("function", [newton_schulz, polar, eigenbasis])
def test_only_stacks_of_floating_point_matrices(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be a stack .*, got \(2, 2\); one matrix is a stack of one"):
        function(torch.eye(2))
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.int64"):
        function(torch.ones(1, 2, 2, dtype=torch.int64))
