"""Sizes, ranks and alignment of matrices, one value per matrix; learning rates and time scales.

Values are exact: singular values come from an SVD, in float32 or, for float64 input, in float64.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns), T tokens. One matrix is a stack of one, a vector
one column, a scalar one entry; more than three axes are stacked over all but the last two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mup.core.chains import full_precision
from lightning_mup.core.registry import near

Norm = Literal["frobenius", "spectral"]


def as_stack(matrices: Tensor) -> Tensor:
    """Return matrices as a stack in float32 at least, detached; of a sharded tensor all values.

    Shape:
        anything -> ``[N, O, I]``.

    Raises:
        TypeError: the tensor is not of a real floating-point dtype.
        ValueError: the tensor has no entries.

    Examples:
        >>> as_stack(torch.ones(4, 3)).shape, as_stack(torch.ones(4)).shape
        (torch.Size([1, 4, 3]), torch.Size([1, 4, 1]))
    """
    whole = matrices.full_tensor() if isinstance(matrices, DTensor) else matrices
    if not whole.is_floating_point():
        raise TypeError(f"matrices must be of a real floating-point dtype, got {whole.dtype}; convert them first")
    if not whole.numel():
        raise ValueError(f"matrices must have entries, got shape {tuple(whole.shape)}; leave empty ones out")
    columns = whole.reshape(-1, 1) if whole.ndim < 2 else whole
    wide = torch.promote_types(whole.dtype, torch.float32)
    return columns.detach().to(wide).reshape(-1, *columns.shape[-2:])


def root_mean_squares(matrices: Tensor) -> Tensor:
    """Return each matrix' ``RMS(A) = ||A||_F / sqrt(O I)``: 0 for zeros, nan where an entry is not finite.

    Shape:
        ``[N, O, I]`` -> ``[N]``.

    Examples:
        >>> root_mean_squares(torch.tensor([[3.0, -3.0], [3.0, 3.0]]))
        tensor([3.])
    """
    unit_NOI, scale_N = _unit(as_stack(matrices))
    return scale_N * unit_NOI.square().mean((1, 2)).sqrt()


def spectral_norms(matrices: Tensor) -> Tensor:
    """Return each matrix' largest singular value ``||A||_2``: 0 for zeros, nan where an entry is not finite.

    Shape:
        ``[N, O, I]`` -> ``[N]``.

    Examples:
        >>> spectral_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([4.])
    """
    return norms_and_ranks(matrices)[0]


def stable_ranks(matrices: Tensor) -> Tensor:
    """Return each matrix' ``||A||_F^2 / ||A||_2^2``, in [1, min(O, I)]: 0 for zeros, nan where an entry is not finite.

    Shape:
        ``[N, O, I]`` -> ``[N]``.

    Examples:
        >>> stable_ranks(torch.eye(5)), stable_ranks(torch.zeros(2, 2))
        (tensor([5.]), tensor([0.]))
    """
    return norms_and_ranks(matrices)[1]


def norms_and_ranks(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return each matrix' spectral norm and stable rank, by one SVD.

    Shape:
        ``[N, O, I]`` -> ``[N]``, ``[N]``.

    Examples:
        >>> norms_and_ranks(torch.diag(torch.tensor([2.0, 2.0])))
        (tensor([2.]), tensor([2.]))
    """
    unit_NOI, scale_N = _unit(as_stack(matrices))
    top_N = torch.linalg.svdvals(unit_NOI)[:, 0]
    ratio_N = unit_NOI.square().sum((1, 2)) / torch.where(top_N > 0, top_N, 1.0).square()
    return scale_N * top_N, torch.where(scale_N.isnan(), scale_N, ratio_N)


def relative_sizes(change: Tensor, weight: Tensor, norm: Norm = "frobenius") -> Tensor:
    """Return ``||dW|| / ||W||`` of each matrix: 0 for a zero change, else inf for a zero weight.

    Shape:
        two of ``[N, O, I]`` -> ``[N]``.

    Raises:
        ValueError: the shapes differ, or the norm is unknown.

    Examples:
        >>> relative_sizes(torch.full((2, 2), 0.5), torch.ones(2, 2))
        tensor([0.5000])
    """
    size = norm_of(norm)
    if change.shape != weight.shape:
        raise ValueError(
            f"change and weight must have one shape, got {tuple(change.shape)} and {tuple(weight.shape)}; give "
            f"W_new - W_old and W_old"
        )
    change_N, weight_N = size(change), size(weight)
    return torch.where((change_N == 0) & ~weight_N.isnan(), 0.0, change_N / weight_N)


def alignments(inputs: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return each change's alignment exponents, summed over its tokens, and how many tokens were counted.

    ``log_I( RMS(dW x) / (RMS(dW) RMS(x)) )`` per token x: 1/2 where x and dW know nothing of each other, 1 where they
    are fully aligned. A token or a change of zeros has no direction, and with one input there is no exponent: these are
    not counted.

    Shape:
        inputs ``[..., I]``, seen by all, or ``[N, T, I]`` beside ``[N, O, I]`` with N > 1; change ``[N, O, I]`` ->
        ``[N]``, ``[N]``.

    Raises:
        ValueError: the number of inputs differs.

    Examples:
        >>> total, count = alignments(torch.ones(2, 16), torch.ones(4, 16))
        >>> total / count
        tensor([1.])

    Reference:
        Everett et al. 2024 (arXiv:2407.05872); arXiv:2512.05620.
    """
    change_NOI, tokens = as_stack(change), inputs.detach()
    count, _, columns = change_NOI.shape
    if not tokens.ndim or tokens.shape[-1] != columns:
        raise ValueError(
            f"inputs must end in the change's {columns} columns, got shapes {tuple(inputs.shape)} and "
            f"{tuple(change.shape)}; give activations [tokens, inputs] and a change [outputs, inputs]"
        )
    own = count > 1 and tokens.ndim == 3 and len(tokens) == count
    tokens_NTI = tokens.to(change_NOI) if own else tokens.reshape(1, -1, columns).to(change_NOI)
    exponents_NT, counted_NT = _exponents(tokens_NTI, change_NOI)
    return torch.where(counted_NT, exponents_NT, 0.0).sum(1), counted_NT.sum(1)


def effective_learning_rate(lr: float, fraction: float) -> float:
    """Return ``sqrt(lr lambda)``, to which the relative size of normalized updates is proportional in equilibrium.

    Args:
        lr: learning rate of the step (>= 0).
        fraction: lambda, the fraction of a weight that the step removes (>= 0); for a decay that is multiplied by the
            learning rate, ``lr * weight_decay``.

    Examples:
        >>> effective_learning_rate(0.1, 1e-3)
        0.01

    Reference:
        arXiv:2512.05620.
    """
    return math.sqrt(lr * fraction)


def decay_timescale(fraction: float) -> float:
    """Return ``1 / lambda``, in how many steps a weight forgets its past; inf without decay.

    Args:
        fraction: lambda, the fraction of a weight that a step removes (>= 0).

    Examples:
        >>> decay_timescale(1e-3), decay_timescale(0.0)
        (1000.0, inf)

    Reference:
        Wang & Aitchison 2024 (arXiv:2405.13698).
    """
    return 1.0 / fraction if fraction else math.inf


def _unit(x_NOI: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices whose largest entry is 1, so that no square overflows or vanishes, and those entries."""
    scale_N = x_NOI.abs().amax((1, 2))
    scale_N = torch.where(scale_N.isfinite(), scale_N, torch.nan)
    finite_N = scale_N > 0
    unit_NOI = x_NOI / torch.where(finite_N, scale_N, 1.0)[:, None, None]
    return torch.where(finite_N[:, None, None], unit_NOI, 0.0), scale_N


def _exponents(tokens_NTI: Tensor, change_NOI: Tensor) -> tuple[Tensor, Tensor]:
    unit_NOI, scale_N = _unit(change_NOI)
    size_NT1 = tokens_NTI.abs().amax(2, keepdim=True)
    unit_NTI = tokens_NTI / torch.where(size_NT1 > 0, size_NT1, 1.0)
    with full_precision(change_NOI.device):
        out_NTO = unit_NTI @ unit_NOI.mT
    change_N1 = unit_NOI.square().mean((1, 2)).sqrt()[:, None]
    ratio_NT = out_NTO.square().mean(2).sqrt() / (change_N1 * unit_NTI.square().mean(2).sqrt())
    # What is not finite is counted, so that it shows.
    counted_NT = (scale_N[:, None] != 0) & (size_NT1[:, :, 0] != 0) & (change_NOI.shape[2] > 1)
    exponents_NT = ratio_NT.log() / math.log(max(2, change_NOI.shape[2]))
    return torch.where(scale_N[:, None].isnan(), torch.nan, exponents_NT), counted_NT


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "frobenius": root_mean_squares,  # both carry the same sqrt(O I), which cancels
    "spectral": spectral_norms,
}


def norm_of(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that measures each matrix of a stack in a norm, up to a factor that depends on shapes alone.

    Raises:
        ValueError: the norm is unknown.

    Examples:
        >>> norm_of("spectrum")
        Traceback (most recent call last):
        ValueError: unknown norm 'spectrum'; allowed: frobenius, spectral; did you mean 'spectral'?
    """
    if name not in _NORMS:
        raise ValueError(f"unknown norm {name!r}; allowed: {', '.join(get_args(Norm))}{near(str(name), _NORMS)}")
    return _NORMS[name]
