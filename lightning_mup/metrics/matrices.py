"""Metrics of weights and updates, as torchmetrics: means over updates and, as soon as they are computed, over ranks.

Each works by itself, in a ``MetricCollection`` and in Lightning's ``log``. States have torch's default dtype;
``metric.set_dtype(torch.float64)`` accumulates in float64.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns), T tokens. One matrix is a stack of one, a vector
one column, a scalar one entry; more than three axes are stacked over all but the last two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mup.metrics.functional import (
    Norm,
    alignments,
    effective_learning_rate,
    norm_of,
    relative_sizes,
    root_mean_squares,
    spectral_norms,
    stable_ranks,
)


class _Mean(Metric):
    """The mean of all values seen, over updates and ranks; nan where nothing was seen."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, values: Tensor, count: Tensor | int) -> None:
        self.total = self.total + values.sum().to(self.total)
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


class RMS(_Mean):
    """``RMS(A) = ||A||_F / sqrt(O I)``, the mean over all matrices seen; a matrix of zeros gives 0.

    Shape:
        ``update(matrices)`` with ``[O]``, ``[O, I]`` or ``[N, O, I]``; features are one matrix ``h.flatten(0, -2)``.

    Examples:
        >>> metric = RMS()
        >>> metric.update(torch.full((2, 2), 1.0))
        >>> metric.update(torch.full((2, 2), 3.0))
        >>> metric.compute()
        tensor(2.)
    """

    def update(self, matrices: Tensor) -> None:
        """Add each matrix' value."""
        values_N = root_mean_squares(matrices)
        self._add(values_N, len(values_N))


class SpectralNorm(_Mean):
    """``||A||_2``, the largest singular value, exact; the mean over all matrices seen. A matrix of zeros gives 0.

    Shape:
        ``update(matrices)`` with ``[O]``, ``[O, I]`` or ``[N, O, I]``.

    Examples:
        >>> metric = SpectralNorm()
        >>> metric(torch.diag(torch.tensor([1.0, 2.0])))
        tensor(2.)
    """

    def update(self, matrices: Tensor) -> None:
        """Add each matrix' value."""
        values_N = spectral_norms(matrices)
        self._add(values_N, len(values_N))


class StableRank(_Mean):
    """``||A||_F^2 / ||A||_2^2``, a rank that small singular values hardly move; the mean over all matrices seen.

    It lies in [1, min(O, I)]; a matrix of zeros gives 0.

    Shape:
        ``update(matrices)`` with ``[O]``, ``[O, I]`` or ``[N, O, I]``.

    Examples:
        >>> metric = StableRank()
        >>> metric(torch.stack([torch.eye(3), torch.ones(3, 3)]))  # 3 and 1
        tensor(2.)

    Reference:
        Rudelson & Vershynin 2007, Sampling from large matrices (J. ACM 54); arXiv:2512.05620.
    """

    def update(self, matrices: Tensor) -> None:
        """Add each matrix' value."""
        values_N = stable_ranks(matrices)
        self._add(values_N, len(values_N))


class RelativeUpdate(_Mean):
    """``||dW|| / ||W||`` in a chosen norm, the mean over all matrices seen; a zero weight gives inf, a zero change 0.

    Shape:
        ``update(change, weight)``, both of one shape ``[O]``, ``[O, I]`` or ``[N, O, I]``.

    Args:
        norm: ``"frobenius"`` (the same as the ratio of the RMS) or ``"spectral"``.

    Raises:
        ValueError: the norm is unknown.

    Examples:
        >>> metric = RelativeUpdate("spectral")
        >>> metric(0.25 * torch.eye(2), torch.eye(2))
        tensor(0.2500)
    """

    def __init__(self, norm: Norm = "frobenius") -> None:
        super().__init__()
        norm_of(norm)
        self.norm: Norm = norm

    def update(self, change: Tensor, weight: Tensor) -> None:
        """Add each matrix' value."""
        values_N = relative_sizes(change, weight, self.norm)
        self._add(values_N, len(values_N))


class Alignment(_Mean):
    """The alignment exponent ``log_I( RMS(dW x) / (RMS(dW) RMS(x)) )``, the mean over all tokens of all matrices seen.

    1/2 where tokens and change know nothing of each other, 1 where they are fully aligned. Tokens and changes of zeros,
    and matrices with one column, are not counted; the value is nan where nothing is.

    Shape:
        ``update(inputs, change)`` with ``[..., I]`` and ``[O, I]`` or ``[N, O, I]``; inputs ``[N, T, I]`` beside N > 1
        changes are each matrix' own.

    Examples:
        >>> metric = Alignment()
        >>> metric(torch.ones(8, 4), torch.ones(2, 4))
        tensor(1.)

    Reference:
        Everett et al. 2024 (arXiv:2407.05872); arXiv:2512.05620.
    """

    def update(self, inputs: Tensor, change: Tensor) -> None:
        """Add each token's exponent."""
        totals_N, counts_N = alignments(inputs, change)
        self._add(totals_N, counts_N.sum().to(self.count.device))


class EffectiveLearningRate(_Mean):
    """``sqrt(lr lambda)``, the mean over all steps seen; see :func:`effective_learning_rate`.

    Examples:
        >>> metric = EffectiveLearningRate()
        >>> metric.update(lr=0.1, fraction=1e-3)
        >>> metric.compute()
        tensor(0.0100)
    """

    def update(self, lr: float, fraction: float) -> None:
        """Add a step: its learning rate, and the fraction of a weight that it removes."""
        self._add(torch.as_tensor(effective_learning_rate(lr, fraction)), 1)


class DecayTimescale(_Mean):
    """Steps in which a weight forgets its past: steps seen over ``sum of lambda``; inf without any decay.

    Examples:
        >>> metric = DecayTimescale()
        >>> metric.update(fraction=0.5)
        >>> metric.update(fraction=0.0)  # a schedule's end
        >>> metric.compute()
        tensor(4.)
    """

    def update(self, fraction: float) -> None:
        """Add a step: the fraction of a weight that it removes."""
        self._add(torch.as_tensor(fraction), 1)

    def compute(self) -> Tensor:
        """Return the number of steps."""
        return self.count / self.total
