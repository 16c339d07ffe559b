"""Orthogonalization by Newton-Schulz, as Muon does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mup.core.linalg import newton_schulz
from lightning_mup.core.transform import ELEMENTWISE, Context, State, product_work


@dataclass(frozen=True, slots=True)
class Orthogonalize:
    """Five quintic Newton-Schulz steps from ``u / (||u||_F + eps)``: singular values near 1.

    Args:
        steps: number of iterations (>= 0).
        eps: added to the Frobenius norm.
        dtype: dtype of the iteration; None is the update's own, bfloat16 the fastest on accelerators.
        name: key of the state, of which there is none.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> u = Orthogonalize().update(torch.eye(3).expand(2, 3, 3), {}, Context(step=1))
        >>> bool((torch.linalg.matrix_norm(u, ord=2) < 1.3).all())
        True

    Reference:
        Jordan et al. 2024 (Muon); arXiv:2512.05620, equation 29 and App. B.4.
    """

    steps: int = 5
    eps: float = 1e-7
    dtype: torch.dtype | None = None
    name: str = "orthogonalize"

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.eps >= 0:
            raise ValueError(f"ns_steps and eps must be >= 0, got {self.steps} and {self.eps}; 5 and 1e-7 are usual")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return nothing: there is no state."""
        return {}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the orthogonalized stack."""
        return newton_schulz(u_NOI, steps=self.steps, eps=self.eps, dtype=self.dtype)

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix."""
        return self.steps * product_work(rows, columns) + ELEMENTWISE * rows * columns
