"""Batched linear algebra on stacks of matrices: orthogonal factors, symmetric products, power iteration.

Shapes: N matrices, O rows, I columns (``nn.Linear`` layout); D is the side of a square matrix. Results have the input's
dtype; norms are computed in float32 at least. Inputs are not written into, and must be stacks (ValueError) of
floating-point matrices (TypeError). Stacks are first brought to unit size by exact powers of two, so that 1e-30 and
1e30 are entries like any other. A matrix gives the same numbers whatever it is stacked with: bit for bit where rows are
whole 64-byte lines, to the last digits elsewhere: BLAS looks at alignment.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients of Muon (Jordan et al. 2024): steep at 0, so that five steps are enough."""
_HALVED_FROM = {2: 512, 4: 256, 8: 256}  # bytes per entry -> side; measured on AVX-512, where smaller ones lose
_ACCEPTED = 0.5  # norm above which a power-iteration vector is accepted


def newton_schulz(
    x_NOI: Tensor,
    *,
    steps: int = 5,
    eps: float = 1e-7,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return approximately orthogonal factors: the same singular vectors, singular values of about 0.7 to 1.2.

    ``X <- X/(||X||_F + eps)``, then ``steps`` times ``A = X X^T``, ``X <- a X + (b A + c A A) X``, on the short side.

    Shape:
        ``[N, O, I]`` -> ``[N, O, I]``; a zero matrix stays zero.

    Args:
        x_NOI: the stack.
        steps: number of iterations (>= 0).
        eps: added to the Frobenius norm (>= 0), in the units of ``x_NOI``.
        coefficients: ``(a, b, c)``.
        dtype: dtype of the iteration: ``None`` for the input's, ``torch.bfloat16`` for speed.

    Raises:
        ValueError: ``steps`` or ``eps`` is negative.

    Examples:
        >>> newton_schulz(torch.tensor([[[3e-30, 0.0, 0.0]]]), eps=0.0, coefficients=(1.5, -0.5, 0.0))
        tensor([[[1., 0., 0.]]])

    Reference:
        Jordan et al. 2024 (Muon); arXiv:2512.05620, App. B.4.
    """
    check_stack("x_NOI", x_NOI)
    if steps < 0 or not eps >= 0:
        raise ValueError(f"steps and eps must be >= 0, got steps={steps}, eps={eps}; the usual ones are 5 and 1e-7")
    a, b, c = coefficients
    scale_N11 = unit_scale(x_NOI)
    unit_NOI = x_NOI / scale_N11
    # The largest entry is at least 1, hence so is the norm: the clamp only saves zero matrices when eps is 0.
    unit_NOI /= (norms(unit_NOI) + eps / scale_N11).clamp_min(1.0)
    y_NOI = unit_NOI.to(dtype or x_NOI.dtype)
    tall = y_NOI.shape[1] > y_NOI.shape[2]
    side = min(y_NOI.shape[1:])
    gram_NDD, poly_NDD = (y_NOI.new_empty(len(y_NOI), side, side) for _ in range(2))
    other_NOI = torch.empty_like(y_NOI)
    for _ in range(steps):
        left, right = (y_NOI.mT, y_NOI) if tall else (y_NOI, y_NOI.mT)
        add_symmetric_product(gram_NDD, left, right, beta=0.0, alpha=1.0)
        add_symmetric_product(poly_NDD.copy_(gram_NDD), gram_NDD, gram_NDD, beta=b, alpha=c)
        first, second = (y_NOI, poly_NDD) if tall else (poly_NDD, y_NOI)
        y_NOI, other_NOI = torch.baddbmm(y_NOI, first, second, beta=a, out=other_NOI), y_NOI
    return y_NOI.to(x_NOI.dtype)


def add_symmetric_product(s_NDD: Tensor, left_NDK: Tensor, right_NKD: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Set ``S <- beta S + alpha A B`` in place, where S and A B are symmetric, and return S.

    Large products on a CPU are computed but for the upper right quarter, which is mirrored: a fifth of the time less.

    Shape:
        ``[N, D, D]``, ``[N, D, K]``, ``[N, K, D]`` -> ``[N, D, D]``.

    Args:
        s_NDD: the stack that is written into; what it holds is ignored if ``beta`` is 0.
        left_NDK: A.
        right_NKD: B.
        beta: factor on S.
        alpha: factor on A B.

    Examples:
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> add_symmetric_product(torch.ones(1, 2, 2), x, x.mT, beta=1.0, alpha=2.0)
        tensor([[[11., 23.],
                 [23., 51.]]])
    """
    side = s_NDD.shape[-1]
    if s_NDD.device.type != "cpu" or side < _HALVED_FROM[s_NDD.itemsize]:
        return s_NDD.baddbmm_(left_NDK, right_NKD, beta=beta, alpha=alpha)
    half = side // 2
    # A CPU multiplies one matrix after the other anyway, and parts of a stack more slowly than parts of a matrix.
    for s_DD, left_DK, right_KD in zip(s_NDD, left_NDK, right_NKD, strict=True):
        s_DD[half:].addmm_(left_DK[half:], right_KD, beta=beta, alpha=alpha)
        s_DD[:half, :half].addmm_(left_DK[:half], right_KD[:, :half], beta=beta, alpha=alpha)
        # torch transposes whole contiguous matrices two to three times as fast as parts of one.
        corner_DD = s_DD[half:, :half].contiguous()
        s_DD[:half, half:] = corner_DD.new_empty(half, side - half).copy_(corner_DD.mT)
    return s_NDD


def polar(x_NOI: Tensor) -> Tensor:
    """Return exact orthogonal factors, ``U V^T`` over the singular values that are not zero: unique at any rank.

    Shape:
        ``[N, O, I]`` -> ``[N, O, I]``.

    Examples:
        >>> polar(torch.tensor([[[3.0, 0.0], [0.0, -1e-3]], [[0.0, 0.0], [0.0, 0.0]]])).abs().sum((1, 2))
        tensor([2., 0.])
    """
    check_stack("x_NOI", x_NOI)
    u_NOK, s_NK, v_NKI = torch.linalg.svd(x_NOI / unit_scale(x_NOI), full_matrices=False)
    floor_N1 = torch.finfo(s_NK.dtype).eps * max(x_NOI.shape[1:]) * s_NK[:, :1]
    factor_NOI: Tensor = (u_NOK * (s_NK > floor_N1).unsqueeze(1)) @ v_NKI
    return factor_NOI.to(x_NOI.dtype)


def power_iteration(a_NOI: Tensor, v_NO: Tensor, *, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Estimate the largest singular values, and turn the vectors that the estimates come from towards theirs.

    ``y = A^T v; sigma = ||y||; z = A y; v <- z/(||z|| + 1e-10)`` if its norm exceeds 0.5 (not for A = 0 or NaN).
    ``sigma`` is that of ``v`` before its last update, hence too small until ``v`` has settled. The 1e-10 is in units of
    A's largest entry squared, in the reference absolute: there, updates below 1e-5 never settle.

    Shape:
        ``[N, O, I]``, ``[N, O]`` -> sigma ``[N]`` in float32 at least, v ``[N, O]``. It lives on the output side, as
        in the paper, whose kernels ``[d_in, d_out]`` are the transposes of ours.

    Args:
        a_NOI: the stack.
        v_NO: unit vectors, kept from call to call; random at the start.
        iterations: number of updates of ``v`` (>= 1).

    Raises:
        ValueError: ``v_NO`` does not fit ``a_NOI``, or there are no iterations.

    Examples:
        >>> power_iteration(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]]), torch.tensor([[0.0, 1.0]]))
        (tensor([4.]), tensor([[0., 1.]]))

    Reference:
        arXiv:2512.05620, App. F.
    """
    check_stack("a_NOI", a_NOI)
    wanted, got = tuple(a_NOI.shape[:2]), tuple(v_NO.shape)
    if got != wanted or iterations < 1:
        raise ValueError(f"v must have shape {wanted} and iterations be >= 1, got {got} and {iterations}")
    work_NOI, v_N1O = widened(a_NOI, v_NO.dtype), widened(v_NO, a_NOI.dtype).unsqueeze(1)
    scale_N11 = unit_scale(work_NOI)
    for _ in range(iterations):
        y_N1I = (v_N1O @ work_NOI) / scale_N11  # scaling vectors costs nothing, scaling A a pass over memory
        z_N1O = (y_N1I @ work_NOI.mT) / scale_N11
        new_N1O = z_N1O / (norms(z_N1O) + 1e-10)
        v_N1O = torch.where(norms(new_N1O) > _ACCEPTED, new_N1O, v_N1O)
    return (norms(y_N1I) * scale_N11).view(-1), v_N1O.squeeze(1).to(v_NO.dtype)


def unit_scale(x_NOI: Tensor) -> Tensor:
    """Return per matrix the power of two that brings its largest entry to [1, 2)."""
    largest_N11 = largest_entries(x_NOI)
    return torch.ldexp(torch.ones_like(largest_N11), torch.frexp(largest_N11).exponent - 1)


def largest_entries(x_NOI: Tensor) -> Tensor:
    """Return per matrix the largest absolute entry, in float32 at least."""
    # Twenty times as fast on a CPU as a norm of order infinity, and no copy is made.
    top_N11, bottom_N11 = x_NOI.amax((1, 2), keepdim=True), x_NOI.amin((1, 2), keepdim=True)
    return widened(torch.maximum(top_N11, bottom_N11.neg_()))


def norms(x_NOI: Tensor) -> Tensor:
    """Return per matrix the Frobenius norm, in float32 at least."""
    wide = torch.promote_types(x_NOI.dtype, torch.float32)
    norm_N11: Tensor = torch.linalg.vector_norm(x_NOI, dim=(1, 2), keepdim=True, dtype=wide)
    return norm_N11


def widened(x: Tensor, other: torch.dtype = torch.float32) -> Tensor:
    """Return the tensor in the widest of its dtype, the other and float32."""
    return x.to(torch.promote_types(torch.promote_types(x.dtype, other), torch.float32))


def check_stack(name: str, x: Tensor, *, square: bool = False) -> None:
    """Check that a tensor is a stack of matrices.

    Raises:
        TypeError: it is not floating point.
        ValueError: it has other axes, or its matrices are not square and must be.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it first")
    if x.ndim != 3 or (square and x.shape[1] != x.shape[2]):
        shape = "[N, D, D]" if square else "[N, O, I]"
        raise ValueError(f"{name} must be a stack {shape}, got {tuple(x.shape)}; one matrix is a stack of one, x[None]")
