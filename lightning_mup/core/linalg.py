"""Batched linear algebra on stacks of matrices: orthogonal factors, inverse roots, eigenbases, power iteration.

Shapes: N matrices, O rows, I columns (``nn.Linear`` layout); D is the side of a square matrix. Results have the input's
dtype; eigenvalues, roots, QR and norms are computed in float32 at least. Inputs are never written into, and must be
stacks (ValueError) of floating-point matrices (TypeError). Stacks are first brought to unit size by exact powers of
two, so that 1e-30 and 1e30 are entries like any other. A matrix gives the same numbers whatever it is stacked with: bit
for bit for eigenbases and where rows are whole 64-byte lines, to the last digits elsewhere: BLAS looks at alignment.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mup.core.registry import near

RootMethod = Literal["eigh", "newton"]
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients of Muon (Jordan et al. 2024): steep at 0, so that five steps are enough."""
_LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_NEWTON_STEPS, _NEWTON_TOLERANCE, _NEWTON_GROWTH = 100, 1e-6, 1.2  # as in distributed Shampoo and arXiv:2512.05620
_SQUARINGS = 30  # in S^(2^30), an eigenvalue 1e-7 below the largest has no weight left
_JITTER = 1e-6  # added to the diagonal of a matrix of unit size, taken off its eigenvalues again
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
    _check("x_NOI", x_NOI)
    if steps < 0 or not eps >= 0:
        raise ValueError(f"steps and eps must be >= 0, got steps={steps}, eps={eps}; the usual ones are 5 and 1e-7")
    a, b, c = coefficients
    scale_N11 = _scale(x_NOI)
    unit_NOI = x_NOI / scale_N11
    # The largest entry is at least 1, hence so is the norm: the clamp only saves zero matrices when eps is 0.
    unit_NOI /= (_norm(unit_NOI) + eps / scale_N11).clamp_min(1.0)
    y_NOI = unit_NOI.to(dtype or x_NOI.dtype)
    tall = y_NOI.shape[1] > y_NOI.shape[2]
    for _ in range(steps):
        gram_NDD = y_NOI.mT @ y_NOI if tall else y_NOI @ y_NOI.mT
        poly_NDD = torch.baddbmm(gram_NDD, gram_NDD, gram_NDD, beta=b, alpha=c)
        first, second = (y_NOI, poly_NDD) if tall else (poly_NDD, y_NOI)
        y_NOI = torch.baddbmm(y_NOI, first, second, beta=a)
    return y_NOI.to(x_NOI.dtype)


def polar(x_NOI: Tensor) -> Tensor:
    """Return exact orthogonal factors, ``U V^T`` over the singular values that are not zero: unique at any rank.

    Shape:
        ``[N, O, I]`` -> ``[N, O, I]``.

    Examples:
        >>> polar(torch.tensor([[[3.0, 0.0], [0.0, -1e-3]], [[0.0, 0.0], [0.0, 0.0]]])).abs().sum((1, 2))
        tensor([2., 0.])
    """
    _check("x_NOI", x_NOI)
    u_NOK, s_NK, v_NKI = torch.linalg.svd(x_NOI / _scale(x_NOI), full_matrices=False)
    floor_N1 = torch.finfo(s_NK.dtype).eps * max(x_NOI.shape[1:]) * s_NK[:, :1]
    factor_NOI: Tensor = (u_NOK * (s_NK > floor_N1).unsqueeze(1)) @ v_NKI
    return factor_NOI.to(x_NOI.dtype)


def inverse_root(
    s_NDD: Tensor, exponent: float, *, damping: float | Tensor, relative: bool = False, method: RootMethod = "eigh"
) -> Tensor:
    """Return ``(S + ridge I)^(-exponent)`` of symmetric positive semidefinite matrices.

    ``eigh``: ``V (max(w, 0) + ridge)^(-k) V^T``. ``newton``: coupled Newton for ``p = 1/k``, matrix products only, to a
    residual of 1e-6. In float32 both lose digits with the condition number: at 1e6, errors reach 4e-2 and 3e-3.
    What ``eigh`` cannot do goes to ``newton``; a matrix whose entries are not finite gives NaN.

    Shape:
        ``[N, D, D]`` -> ``[N, D, D]``.

    Args:
        s_NDD: the stack.
        exponent: k > 0; for ``newton`` one over an integer.
        damping: ridge (>= 0, positive without full rank) in the units of ``s_NDD``; one for all, or a tensor ``[N]``.
        relative: the ridge is ``damping max(lambda_max, 1e-16)`` instead.
        method: ``"eigh"`` or ``"newton"``.

    Raises:
        ValueError: the exponent is none for the method, the damping is negative, the method is unknown.

    Examples:
        >>> inverse_root(torch.tensor([[[15.0, 0.0], [0.0, 80.0]]]), 1 / 4, damping=1.0)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.3333]]])

    Reference:
        arXiv:2512.05620, App. B.2; coupled Newton: Higham 2008, section 7.3; arXiv:2002.09018.
    """
    _check("s_NDD", s_NDD, square=True)
    if not exponent > 0:
        raise ValueError(f"exponent must be positive, got {exponent}; Shampoo uses 1/4 or 1/2")
    if method not in get_args(RootMethod):
        raise ValueError(f"unknown method {method!r}; available: eigh, newton{near(method, get_args(RootMethod))}")
    if not isinstance(damping, Tensor) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}; 1e-6 is usual")
    order = round(1 / exponent)
    integer = abs(order * exponent - 1) < 1e-9  # noqa: PLR2004
    work_NDD = _widened(s_NDD)
    if method == "newton":
        if not integer:
            raise ValueError(f"method 'newton' needs an exponent 1/integer, got {exponent}; use method='eigh'")
        return _newton_root(work_NDD, order, damping, relative).to(s_NDD.dtype)
    w_ND, v_NDD, lost_N = _eigh(work_NDD)
    ridge_N = _ridge(damping, w_ND[:, -1], relative)
    half_NDD = v_NDD * _power(w_ND.clamp_min(0) + ridge_N.unsqueeze(1), -exponent / 2).unsqueeze(1)
    root_NDD = half_NDD @ half_NDD.mT
    if lost_N is not None and integer and bool(lost_N.any()):
        newton_NDD = _newton_root(work_NDD, order, damping, relative)
        root_NDD = torch.where(lost_N.view(-1, 1, 1), newton_NDD, root_NDD)
    return root_NDD.to(s_NDD.dtype)


def eigenbasis(p_NDD: Tensor) -> Tensor:
    """Return orthonormal eigenvectors of symmetric matrices as columns, by descending eigenvalue; NaN if not finite.

    Shape:
        ``[N, D, D]`` -> ``[N, D, D]``.

    Examples:
        >>> eigenbasis(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).abs().tolist()
        [[[0.0, 1.0], [1.0, 0.0]]]
    """
    _check("p_NDD", p_NDD, square=True)
    return _eigh(_widened(p_NDD))[1].flip(-1).to(p_NDD.dtype)


def qr_step(p_NDD: Tensor, q_NDD: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of orthogonal iteration from a basis, sorted first: SOAP's cheap refresh of an eigenbasis.

    ``d = diag(Q^T P Q)``; sort ``d`` descending (stable) and the columns of ``Q`` alike; ``Q <- qr(P Q).Q``.

    Shape:
        ``[N, D, D]``, ``[N, D, D]`` -> ``[N, D, D]``, and the permutation ``[N, D]``: new column ``i`` comes from old
        column ``permutation[i]``, and so must second moments.

    Examples:
        >>> q, permutation = qr_step(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.eye(2).unsqueeze(0))
        >>> q.abs().tolist(), permutation.tolist()
        ([[[0.0, 1.0], [1.0, 0.0]]], [[1, 0]])

    Reference:
        SOAP, arXiv:2409.11321, Algorithm 4; arXiv:2512.05620, App. B.3.
    """
    _check("p_NDD", p_NDD, square=True)
    _check("q_NDD", q_NDD, square=True)
    work_NDD, basis_NDD = _widened(p_NDD, q_NDD.dtype), _widened(q_NDD, p_NDD.dtype)
    moved_NDD = (work_NDD / _scale(work_NDD)) @ basis_NDD
    permutation_ND = (basis_NDD * moved_NDD).sum(1).sort(dim=1, descending=True, stable=True).indices
    # The columns of P Q are those of Q, each times P: to sort the product saves a second one.
    sorted_NDD = moved_NDD.gather(2, permutation_ND.unsqueeze(1).expand_as(moved_NDD))
    return _decompose(torch.linalg.qr, sorted_NDD)[0].to(q_NDD.dtype), permutation_ND


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
    _check("a_NOI", a_NOI)
    wanted, got = tuple(a_NOI.shape[:2]), tuple(v_NO.shape)
    if got != wanted or iterations < 1:
        raise ValueError(f"v must have shape {wanted} and iterations be >= 1, got {got} and {iterations}")
    work_NOI, v_N1O = _widened(a_NOI, v_NO.dtype), _widened(v_NO, a_NOI.dtype).unsqueeze(1)
    scale_N11 = _scale(work_NOI)
    for _ in range(iterations):
        y_N1I = (v_N1O @ work_NOI) / scale_N11  # scaling vectors costs nothing, scaling A a pass over memory
        z_N1O = (y_N1I @ work_NOI.mT) / scale_N11
        new_N1O = z_N1O / (_norm(z_N1O) + 1e-10)
        v_N1O = torch.where(_norm(new_N1O) > _ACCEPTED, new_N1O, v_N1O)
    return (_norm(y_N1I) * scale_N11).view(-1), v_N1O.squeeze(1).to(v_NO.dtype)


def _eigh(s_NDD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ascending eigenvalues, eigenvectors, and, after a failure, which matrices have none: they are NaN."""
    scale_N11 = _scale(s_NDD)
    unit_NDD = s_NDD / scale_N11
    found = _try_eigh(unit_NDD)
    if found is not None:
        return found[0] * scale_N11.squeeze(2), found[1], None
    text = "torch.linalg.eigh failed in a stack; each matrix is tried again alone, in float64, and with a jitter; "
    # Always the same line and text, so that Python's own filter tells it once.
    warnings.warn(text + "if this repeats, look for gradients that are not finite, or raise the damping", stacklevel=1)
    w_ND, v_NDD = (torch.stack(parts) for parts in zip(*map(_eigh_alone, unit_NDD), strict=True))
    return w_ND * scale_N11.squeeze(2), v_NDD, w_ND.isnan().any(1)


def _try_eigh(s: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        w, v = _decompose(torch.linalg.eigh, s)
    except _LinAlgError:
        return None
    return (w, v) if bool(w.isfinite().all() & v.isfinite().all()) else None


def _decompose(function: Callable[[Tensor], tuple[Tensor, Tensor]], s: Tensor) -> tuple[Tensor, Tensor]:
    # LAPACK takes one matrix after the other anyway; copied each to memory of its own, they are aligned alike.
    if s.device.type != "cpu" or s.ndim == 2 or len(s) == 0:
        return function(s)
    first, second = zip(*map(function, s), strict=True)
    return torch.stack(first), torch.stack(second)


def _eigh_alone(unit_DD: Tensor) -> tuple[Tensor, Tensor]:
    for dtype, jitter in ((unit_DD.dtype, 0.0), (torch.float64, 0.0), (torch.float64, _JITTER)):
        found = _try_eigh(unit_DD.to(dtype) + jitter * torch.eye(len(unit_DD), dtype=dtype, device=unit_DD.device))
        if found is not None:
            return (found[0] - jitter).to(unit_DD), found[1].to(unit_DD)
    return torch.full_like(unit_DD[0], torch.nan), torch.full_like(unit_DD, torch.nan)


def _newton_root(s_NDD: Tensor, order: int, damping: float | Tensor, relative: bool) -> Tensor:
    """Return ``A^(-1/p)`` by coupled Newton: ``M = z A -> I`` while ``H = z^(1/p) I -> A^(-1/p)``."""
    identity_DD = torch.eye(s_NDD.shape[-1], dtype=s_NDD.dtype, device=s_NDD.device)
    largest_N = _largest_eigenvalue(s_NDD) if relative else s_NDD[:, 0, 0]  # not used, but for its dtype
    a_NDD = s_NDD + _ridge(damping, largest_N, relative).view(-1, 1, 1) * identity_DD
    scale_N11 = _scale(a_NDD)
    unit_NDD = a_NDD / scale_N11
    z_N11 = (1 + order) / (2 * _norm(unit_NDD))
    m_NDD, h_NDD = z_N11 * unit_NDD, _power(z_N11, 1 / order) * identity_DD
    error_N11 = _norm(m_NDD - identity_DD, torch.inf)
    active_N11 = error_N11 > _NEWTON_TOLERANCE
    for step in range(_NEWTON_STEPS):
        if step % 4 == 0 and not bool(active_N11.any()):  # to ask is to wait for the device
            break
        t_NDD = (1 + 1 / order) * identity_DD - m_NDD / order
        next_NDD = torch.linalg.matrix_power(t_NDD, order) @ m_NDD
        next_N11 = _norm(next_NDD - identity_DD, torch.inf)
        active_N11 = active_N11 & (next_N11 <= _NEWTON_GROWTH * error_N11)
        h_NDD = torch.where(active_N11, h_NDD @ t_NDD, h_NDD)
        m_NDD = torch.where(active_N11, next_NDD, m_NDD)
        error_N11 = torch.where(active_N11, next_N11, error_N11)
        active_N11 = active_N11 & (next_N11 > _NEWTON_TOLERANCE)
    return torch.where(error_N11.isfinite(), h_NDD * _power(scale_N11, -1 / order), torch.nan)


def _ridge(damping: float | Tensor, largest_N: Tensor, relative: bool) -> Tensor:
    damping_N = torch.as_tensor(damping, dtype=largest_N.dtype, device=largest_N.device).expand_as(largest_N)
    return damping_N * largest_N.clamp_min(1e-16) if relative else damping_N


def _largest_eigenvalue(s_NDD: Tensor) -> Tensor:
    """Return ``tr(S B)/tr(B)`` for ``B = S^(2^30)``: relatively exact at any size, and no start vector."""
    scale_N11 = _scale(s_NDD)
    unit_NDD = power_NDD = s_NDD / scale_N11
    for _ in range(_SQUARINGS):
        power_NDD = power_NDD / _norm(power_NDD).clamp_min(torch.finfo(s_NDD.dtype).tiny)
        power_NDD = power_NDD @ power_NDD
    trace_N = power_NDD.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(s_NDD.dtype).tiny)  # for zero matrices
    return (unit_NDD * power_NDD).sum((1, 2)) / trace_N * scale_N11.view(-1)


def _power(x: Tensor, exponent: float) -> Tensor:
    # Unlike pow, log and exp give an entry the same bits at any place of a tensor; float64 hides their rounding.
    return (x.double().log() * exponent).exp().to(x.dtype)


def _scale(x_NOI: Tensor) -> Tensor:
    """Return per matrix the power of two that brings its largest entry to [1, 2)."""
    largest_N11 = _norm(x_NOI, torch.inf)
    return torch.ldexp(torch.ones_like(largest_N11), torch.frexp(largest_N11).exponent - 1)


def _norm(x_NOI: Tensor, order: float = 2.0) -> Tensor:
    wide = torch.promote_types(x_NOI.dtype, torch.float32)
    norm_N11: Tensor = torch.linalg.vector_norm(x_NOI, ord=order, dim=(1, 2), keepdim=True, dtype=wide)
    return norm_N11


def _widened(x: Tensor, other: torch.dtype = torch.float32) -> Tensor:
    """Return the tensor in the widest of its dtype, the other and float32."""
    return x.to(torch.promote_types(torch.promote_types(x.dtype, other), torch.float32))


def _check(name: str, x: Tensor, *, square: bool = False) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it first")
    if x.ndim != 3 or (square and x.shape[1] != x.shape[2]):
        shape = "[N, D, D]" if square else "[N, O, I]"
        raise ValueError(f"{name} must be a stack {shape}, got {tuple(x.shape)}; one matrix is a stack of one, x[None]")
