"""Shampoo: powers of the row and column second moments on either side of the momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_mup.core.blocking import Blocking
from lightning_mup.core.eigen import check_root, inverse_root
from lightning_mup.core.linalg import add_symmetric_product
from lightning_mup.core.transform import EIGH, ELEMENTWISE, Context, State


@dataclass(frozen=True, slots=True)
class Shampoo:
    """``out_root m_hat in_root``, block by block, with ``root = (factor_hat + ridge I)^-exponent``.

    ``factor_in`` averages ``g^T g`` and ``factor_out`` ``g g^T``, both from ``start I`` and bias-corrected; the roots
    are renewed at steps 1, 1 + every, 1 + 2 every, ... after the step's gradient has been taken in.

    Args:
        betas: decay rates of the momentum and of the factors, each in [0, 1).
        exponent: inverse exponent of each active side, or (output side, input side) (> 0; 1/4 is Shampoo, 1/2 its
            square).
        matrix_eps: the ridge, absolute or in units of the factor's largest eigenvalue.
        relative_matrix_eps: whether the ridge is relative.
        start: multiple of the identity that the factors start at; None is ``matrix_eps``, or 0 if that is
            relative.
        every: number of steps between renewals (>= 1).
        root: eigendecomposition, or the coupled Newton iteration.
        block_size: largest side of a block; None cuts nothing.
        max_dim: a longer side is not preconditioned; None for no limit.
        name: key of the state.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> shampoo = Shampoo((0.0, 0.0), matrix_eps=1e-12)
        >>> g = torch.diag(torch.tensor([4.0, 0.25])).double()[None]
        >>> shampoo.update(g, shampoo.init(g), Context(step=1)).round(decimals=4)  # the orthogonal factor
        tensor([[[1., 0.],
                 [0., 1.]]], dtype=torch.float64)

    Reference:
        Gupta et al. 2018 (arXiv:1802.09568); arXiv:2512.05620, equations 13 to 17.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    exponent: float | tuple[float, float] = 0.25
    matrix_eps: float = 1e-6
    relative_matrix_eps: bool = False
    start: float | None = None
    every: int = 10
    root: Literal["eigh", "newton"] = "eigh"
    block_size: int | None = None
    max_dim: int | None = None
    name: str = "shampoo"

    def __post_init__(self) -> None:
        if self.every < 1 or min(self._exponents.values()) <= 0 or self.matrix_eps < 0:
            raise ValueError(
                f"every must be >= 1, exponent > 0 and matrix_eps >= 0, got {self.every}, {self.exponent}, "
                f"{self.matrix_eps}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be 1 or more, got {self.block_size}; None cuts nothing")
        for exponent in self._exponents.values():
            check_root(exponent, self.root)

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return momentum, factors and, where they are kept for further steps, roots of the active sides."""
        blocking = self._blocking(param_NOI)
        number = blocking.count[0] * blocking.count[1]
        start = (0.0 if self.relative_matrix_eps else self.matrix_eps) if self.start is None else self.start
        state = {"ema": torch.zeros_like(param_NOI)} if self.betas[0] else {}
        for side, size in blocking.sides.items():
            eye = torch.eye(size, dtype=param_NOI.dtype, device=param_NOI.device).repeat(len(param_NOI), number, 1, 1)
            if self.every > 1:
                state[f"root_{side}"] = eye
            state[f"factor_{side}"] = eye * start
        return state

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the preconditioned momentum."""
        blocking = self._blocking(u_NOI)
        u_NOI = ctx.bounded(u_NOI)
        g_NBPQ = blocking.cut(u_NOI)
        roots = {}
        for side in blocking.sides:
            add_second_moment(state[f"factor_{side}"], g_NBPQ, side, self.betas[1])
            if (ctx.step - 1) % self.every == 0:
                roots[side] = self._root(state[f"factor_{side}"], self._exponents[side], ctx.step)
                if self.every > 1:
                    state[f"root_{side}"].copy_(roots[side])
            else:
                roots[side] = state[f"root_{side}"]
        m_NOI = state["ema"].lerp_(u_NOI, 1 - self.betas[0]) if "ema" in state else u_NOI
        out_NBPQ = blocking.cut(m_NOI)
        if "out" in roots:
            out_NBPQ = roots["out"] @ out_NBPQ
        if "in" in roots:
            out_NBPQ = out_NBPQ @ roots["in"]
        return blocking.merge(out_NBPQ) * (1 / (1 - self.betas[0] ** ctx.step))

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix: factors and products at each, roots at every ``every``-th."""
        blocking = Blocking(rows, columns, self.block_size, self.max_dim)
        (p, q), blocks = blocking.block, blocking.count[0] * blocking.count[1]
        each = sum(4.0 * p * q * side + (EIGH + 2) * side**3 / self.every for side in blocking.sides.values())
        return blocks * each + ELEMENTWISE * rows * columns

    @property
    def _exponents(self) -> dict[str, float]:
        out, into = self.exponent if isinstance(self.exponent, tuple) else (self.exponent, self.exponent)
        return {"in": into, "out": out}

    def _root(self, factor_NBDD: torch.Tensor, exponent: float, step: int) -> torch.Tensor:
        corrected = (factor_NBDD / (1 - self.betas[1] ** step)).flatten(0, 1)
        root = inverse_root(
            corrected, exponent, damping=self.matrix_eps, relative=self.relative_matrix_eps, method=self.root
        )
        return root.view_as(factor_NBDD)

    def _blocking(self, x_NOI: torch.Tensor) -> Blocking:
        return Blocking(x_NOI.shape[-2], x_NOI.shape[-1], self.block_size, self.max_dim)


def add_second_moment(factor_NBDD: torch.Tensor, g_NBPQ: torch.Tensor, side: str, beta: float) -> None:
    """Average ``g^T g`` (``"in"``) or ``g g^T`` (``"out"``) into a factor, in place.

    Examples:
        >>> factor = torch.zeros(1, 1, 1, 1)
        >>> add_second_moment(factor, torch.ones(1, 1, 1, 3), "out", beta=0.5)
        >>> factor.item()
        1.5
    """
    g_BPQ = g_NBPQ.flatten(0, 1)
    left, right = (g_BPQ.mT, g_BPQ) if side == "in" else (g_BPQ, g_BPQ.mT)
    add_symmetric_product(factor_NBDD.flatten(0, 1), left, right, beta=beta, alpha=1 - beta)
