"""Stacks of symmetric matrices: inverse roots, and eigenbases found anew or turned a little.

Shapes: N matrices of side D. Results have the input's dtype; all is computed in float32 at least, at unit size, as in
:mod:`lightning_mup.core.linalg`. Inputs are not written into, and must be stacks (ValueError) of floating-point
matrices (TypeError). An eigendecomposition that fails is tried again, and told once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mup.core.linalg import (
    add_symmetric_product,
    check_stack,
    largest_entries,
    norms,
    unit_scale,
    widened,
)
from lightning_mup.core.registry import near

RootMethod = Literal["eigh", "newton"]
_LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_NEWTON_STEPS, _NEWTON_TOLERANCE, _NEWTON_GROWTH = 100, 1e-6, 1.2  # as in distributed Shampoo and arXiv:2512.05620
_NEWTON_NEAR = 0.1  # error below which each step squares it
_SQUARINGS, _POWERS = 8, 64  # S^(64 2^8): the largest eigenvalue comes out to 1e-5 at worst, without any gap below it
_JITTER = 1e-6  # added to the diagonal of a matrix of unit size, taken off its eigenvalues again


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
    check_stack("s_NDD", s_NDD, square=True)
    check_root(exponent, method)
    if not isinstance(damping, Tensor) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}; 1e-6 is usual")
    order, work_NDD = round(1 / exponent), widened(s_NDD)
    if method == "newton":
        return _newton_root(work_NDD, order, damping, relative).to(s_NDD.dtype)
    w_ND, v_NDD, lost_N = _eigh(work_NDD)
    ridge_N = _ridge(damping, w_ND[:, -1], relative)
    half_NDD = v_NDD * _power(w_ND.clamp_min(0) + ridge_N.unsqueeze(1), -exponent / 2).unsqueeze(1)
    root_NDD = half_NDD @ half_NDD.mT
    if lost_N is not None and _is_integer(1 / exponent) and bool(lost_N.any()):
        newton_NDD = _newton_root(work_NDD, order, damping, relative)
        root_NDD = torch.where(lost_N.view(-1, 1, 1), newton_NDD, root_NDD)
    return root_NDD.to(s_NDD.dtype)


def check_root(exponent: float, method: str) -> None:
    """Check that a method can take a root.

    Raises:
        ValueError: the exponent is none for the method, or the method is unknown.

    Examples:
        >>> check_root(0.3, "newton")
        Traceback (most recent call last):
        ValueError: root 'newton' needs an exponent 1/integer, got 0.3; use 'eigh'
    """
    if not exponent > 0:
        raise ValueError(f"exponent must be positive, got {exponent}; Shampoo uses 1/4 or 1/2")
    if method not in get_args(RootMethod):
        raise ValueError(f"unknown root {method!r}; available: eigh, newton{near(method, get_args(RootMethod))}")
    if method == "newton" and not _is_integer(1 / exponent):
        raise ValueError(f"root 'newton' needs an exponent 1/integer, got {exponent}; use 'eigh'")


def eigenbasis(p_NDD: Tensor, *, fallback: Tensor | None = None) -> Tensor:
    """Return orthonormal eigenvectors of symmetric matrices as columns, by descending eigenvalue.

    Shape:
        ``[N, D, D]`` -> ``[N, D, D]``.

    Args:
        p_NDD: the stack.
        fallback: bases of matrices that cannot be decomposed, those that are not finite among them; None gives NaN.

    Examples:
        >>> eigenbasis(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).abs().tolist()
        [[[0.0, 1.0], [1.0, 0.0]]]
    """
    check_stack("p_NDD", p_NDD, square=True)
    _, v_NDD, lost_N = _eigh(widened(p_NDD))
    basis_NDD = v_NDD.flip(-1).to(p_NDD.dtype)
    return basis_NDD if lost_N is None or fallback is None else torch.where(lost_N.view(-1, 1, 1), fallback, basis_NDD)


def qr_step(p_NDD: Tensor, q_NDD: Tensor, *, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Take one step of orthogonal iteration from a basis, sorted first: SOAP's cheap refresh of an eigenbasis.

    ``d = diag(Q^T P Q)``; sort it descending (stable), and the columns of ``Q`` alike; ``Q <- qr((P + ridge I) Q).Q``.

    Shape:
        ``[N, D, D]``, ``[N, D, D]`` -> ``[N, D, D]``, and the permutation ``[N, D]``: new column ``i`` comes from old
        column ``permutation[i]``, and so must second moments.

    Args:
        p_NDD: the matrices.
        q_NDD: the basis, as columns.
        ridge: added to the diagonal (>= 0), in the units of ``p_NDD``.

    Examples:
        >>> q, permutation = qr_step(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.eye(2).unsqueeze(0))
        >>> q.abs().tolist(), permutation.tolist()
        ([[[0.0, 1.0], [1.0, 0.0]]], [[1, 0]])

    Reference:
        SOAP, arXiv:2409.11321, Algorithm 4; arXiv:2512.05620, App. B.3.
    """
    check_stack("p_NDD", p_NDD, square=True)
    check_stack("q_NDD", q_NDD, square=True)
    work_NDD, basis_NDD = widened(p_NDD, q_NDD.dtype), widened(q_NDD, p_NDD.dtype)
    ridged_NDD = work_NDD.clone()
    ridged_NDD.diagonal(dim1=1, dim2=2).add_(ridge)
    moved_NDD = ridged_NDD.div_(unit_scale(ridged_NDD)) @ basis_NDD
    permutation_ND = (basis_NDD * moved_NDD).sum(1).sort(dim=1, descending=True, stable=True).indices
    # The columns of P Q are those of Q, each times P: to sort the product saves a second one.
    sorted_NDD = moved_NDD.gather(2, permutation_ND.unsqueeze(1).expand_as(moved_NDD))
    return _decompose(_qr, sorted_NDD)[0].to(q_NDD.dtype), permutation_ND


def _eigh(s_NDD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ascending eigenvalues, eigenvectors, and, after a failure, which matrices have none: they are NaN."""
    scale_N11 = unit_scale(s_NDD)
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
    return (w, v) if bool((w.sum() + v.sum()).isfinite()) else None  # of unit size, they cannot overflow


def _qr(s: Tensor) -> tuple[Tensor, ...]:
    """Return the orthonormal factor alone: ``torch.linalg.qr`` takes a fifth longer to cut R out, too."""
    return (torch.linalg.householder_product(*torch.geqrf(s)),)


def _decompose(function: Callable[[Tensor], tuple[Tensor, ...]], s: Tensor) -> tuple[Tensor, ...]:
    # LAPACK takes one matrix after the other anyway; copied each to memory of its own, they are aligned alike.
    if s.device.type != "cpu" or s.ndim == 2 or len(s) == 0:
        return function(s)
    return tuple(torch.stack(parts) for parts in zip(*map(function, s), strict=True))


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
    scale_N11 = unit_scale(a_NDD)
    unit_NDD = a_NDD / scale_N11
    z_N11 = (1 + order) / (2 * norms(unit_NDD))
    m_NDD, h_NDD = z_N11 * unit_NDD, _power(z_N11, 1 / order) * identity_DD
    error_N11, active_N11 = norms(m_NDD - identity_DD), largest_entries(m_NDD - identity_DD) > _NEWTON_TOLERANCE
    for step in range(_NEWTON_STEPS):
        # To ask an accelerator is to wait for it, and its further steps change nothing.
        if (step % 4 == 0 or s_NDD.device.type == "cpu") and not bool(active_N11.any()):
            break
        t_NDD = (1 + 1 / order) * identity_DD - m_NDD / order
        next_NDD = _symmetric_product(_symmetric_power(t_NDD, order), m_NDD)  # polynomials in A commute
        off_NDD = next_NDD - identity_DD
        # Each eigenvalue comes closer, hence this norm falls, until rounding is all that is left; no entry need do so.
        next_N11 = norms(off_NDD)
        active_N11 = active_N11 & (next_N11 <= error_N11 * torch.where(error_N11 < _NEWTON_NEAR, 1.0, _NEWTON_GROWTH))
        h_NDD = torch.where(active_N11, _symmetric_product(h_NDD, t_NDD), h_NDD)
        m_NDD = torch.where(active_N11, next_NDD, m_NDD)
        error_N11 = torch.where(active_N11, next_N11, error_N11)
        active_N11 = active_N11 & (largest_entries(off_NDD) > _NEWTON_TOLERANCE)
    return torch.where(error_N11.isfinite(), h_NDD * _power(scale_N11, -1 / order), torch.nan)


def _is_integer(number: float) -> bool:
    return abs(number - round(number)) < 1e-9  # noqa: PLR2004


def _symmetric_product(a_NDD: Tensor, b_NDD: Tensor) -> Tensor:
    return add_symmetric_product(torch.empty_like(a_NDD), a_NDD, b_NDD, beta=0.0, alpha=1.0)


def _symmetric_power(t_NDD: Tensor, order: int) -> Tensor:
    if order == 1:
        return t_NDD
    root_NDD = _symmetric_power(t_NDD, order // 2)
    square_NDD = _symmetric_product(root_NDD, root_NDD)
    return _symmetric_product(square_NDD, t_NDD) if order % 2 else square_NDD


def _ridge(damping: float | Tensor, largest_N: Tensor, relative: bool) -> Tensor:
    damping_N = torch.as_tensor(damping, dtype=largest_N.dtype, device=largest_N.device).expand_as(largest_N)
    return damping_N * largest_N.clamp_min(1e-16) if relative else damping_N


def _largest_eigenvalue(s_NDD: Tensor) -> Tensor:
    """Return Rayleigh quotients after a power iteration with ``S^(2^8)``, whose longest column is the start vector."""
    scale_N11 = unit_scale(s_NDD)
    tiny = torch.finfo(s_NDD.dtype).tiny  # for zero matrices
    unit_NDD = power_NDD = s_NDD / scale_N11
    for _ in range(_SQUARINGS):
        power_NDD = power_NDD / norms(power_NDD).clamp_min(tiny)
        power_NDD = _symmetric_product(power_NDD, power_NDD)
    longest_N11 = power_NDD.square().sum(1).argmax(1).view(-1, 1, 1)
    v_ND1 = power_NDD.take_along_dim(longest_N11, 2)
    for _ in range(_POWERS):
        v_ND1 = power_NDD @ (v_ND1 / norms(v_ND1).clamp_min(tiny))
    v_ND1 = v_ND1 / norms(v_ND1).clamp_min(tiny)
    return (v_ND1.mT @ unit_NDD @ v_ND1).view(-1) * scale_N11.view(-1)


def _power(x: Tensor, exponent: float) -> Tensor:
    # Unlike pow, log and exp give an entry the same bits at any place of a tensor; float64 hides their rounding.
    return (x.double().log() * exponent).exp().to(x.dtype)
