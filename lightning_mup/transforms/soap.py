"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_mup.core.blocking import Blocking
from lightning_mup.core.eigen import eigenbasis, qr_step
from lightning_mup.core.registry import near
from lightning_mup.core.transform import ELEMENTWISE, QR, Context, State
from lightning_mup.transforms.shampoo import add_second_moment

_RELATIVE_FLOOR = 1e-10  # as in the authors' code
_QR_STEPS = 10  # per warm-up step, where the basis is not found by eigendecomposition


@dataclass(frozen=True, slots=True)
class Soap:
    """``Q_out [ (Q_out^T m Q_in) / (sqrt(v) + eps) ] Q_in^T sqrt(1 - beta2^t) / (1 - beta1^t)``, block by block.

    ``v`` averages the squares of the gradient in the basis. The basis is renewed before the gradient is projected: in
    the first ``warmup_steps`` steps at each one, then at every ``every``-th by one QR step, which re-orders ``v``.

    Args:
        betas: decay rates of the momentum and of second moments and factors, each in [0, 1).
        eps: added to ``sqrt(v)``, which is not bias-corrected (>= 0).
        relative_eps: whether eps is in units of ``sqrt(v)``'s first entry.
        matrix_eps: ridge of the factors of which the basis is taken (>= 0).
        every: number of steps between renewals after the warm-up (>= 1).
        warmup_steps: number of first steps that renew the basis each (>= 0; step 1 always does, by a QR step if 0).
        warmup: how those find it: by eigendecomposition, or by ten QR steps.
        block_size: largest side of a block; None cuts nothing.
        max_dim: a longer side keeps its own basis; None for no limit.
        name: key of the state.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> soap = Soap((0.0, 0.0), eps=1e-12)
        >>> g = torch.diag(torch.tensor([4.0, 0.25])).double()[None]
        >>> soap.update(g, soap.init(g), Context(step=1)).diagonal(dim1=1, dim2=2).round(decimals=4)
        tensor([[1., 1.]], dtype=torch.float64)

    Reference:
        Vyas et al. 2024 (arXiv:2409.11321); arXiv:2512.05620, equations 19 to 26 and the authors' code.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    relative_eps: bool = False
    matrix_eps: float = 1e-10
    every: int = 10
    warmup_steps: int = 50
    warmup: Literal["eigh", "qr"] = "eigh"
    block_size: int | None = None
    max_dim: int | None = None
    name: str = "soap"

    def __post_init__(self) -> None:
        if self.every < 1 or self.warmup_steps < 0 or self.matrix_eps < 0 or self.eps < 0:
            raise ValueError(
                f"every must be >= 1, warmup_steps, matrix_eps and eps >= 0, got {self.every}, {self.warmup_steps}, "
                f"{self.matrix_eps}, {self.eps}"
            )

        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.warmup not in ("eigh", "qr"):
            raise ValueError(f"warmup must be 'eigh' or 'qr', got {self.warmup!r}{near(self.warmup, ('eigh', 'qr'))}")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return momentum, second moments, and factors and bases of the active sides."""
        blocking = self._blocking(param_NOI)
        v_NBPQ = torch.zeros_like(blocking.cut(param_NOI))
        # Where the basis stays for several steps, the momentum is kept in it, which saves to turn it at each.
        momentum = {"m": torch.zeros_like(param_NOI)} if self.every == 1 else {"m_turned": torch.zeros_like(v_NBPQ)}
        state = {**momentum, "v": v_NBPQ}
        number = blocking.count[0] * blocking.count[1]
        for side, size in blocking.sides.items():
            eye = torch.eye(size, dtype=param_NOI.dtype, device=param_NOI.device).repeat(len(param_NOI), number, 1, 1)
            state[f"basis_{side}"], state[f"factor_{side}"] = eye, torch.zeros_like(eye)
        return state

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return Adam's direction in the basis, turned back."""
        (beta1, beta2), t = self.betas, ctx.step
        blocking = self._blocking(u_NOI)
        u_NOI = ctx.bounded(u_NOI)
        g_NBPQ = blocking.cut(u_NOI)
        for side in blocking.sides:
            add_second_moment(state[f"factor_{side}"], g_NBPQ, side, beta2)
        if t <= max(self.warmup_steps, 1) or t % self.every == 0:
            self._renew(state, list(blocking.sides), t)
        turned_NBPQ = _turn(g_NBPQ, state)
        if "m" in state:
            m_NBPQ = _turn(blocking.cut(state["m"].lerp_(u_NOI, 1 - beta1)), state)
        else:
            m_NBPQ = state["m_turned"].lerp_(turned_NBPQ, 1 - beta1)
        root_NBPQ = state["v"].mul_(beta2).addcmul_(turned_NBPQ, turned_NBPQ, value=1 - beta2).sqrt()
        relative = root_NBPQ[..., :1, :1].clamp_min(_RELATIVE_FLOOR) if self.relative_eps else 1.0
        root_NBPQ += self.eps * relative
        out_NBPQ = torch.div(m_NBPQ, root_NBPQ, out=root_NBPQ).mul_((1 - beta2**t) ** 0.5 / (1 - beta1**t))
        return blocking.merge(_turn_back(out_NBPQ, state))

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix: factors and turns at each, a basis at every ``every``-th."""
        blocking = Blocking(rows, columns, self.block_size, self.max_dim)
        (p, q), blocks = blocking.block, blocking.count[0] * blocking.count[1]
        turns = 8.0 if self.every == 1 else 6.0  # of the factor, the gradient, the update, and the momentum where kept
        each = sum(turns * p * q * side + (QR + 2) * side**3 / self.every for side in blocking.sides.values())
        return blocks * each + ELEMENTWISE * rows * columns

    def _renew(self, state: State, sides: list[str], step: int) -> None:
        momentum = _turn_back(state["m_turned"], state) if "m_turned" in state else None
        for side in sides:
            self._renew_side(state, side, step)
        if momentum is not None:
            state["m_turned"].copy_(_turn(momentum, state))

    def _renew_side(self, state: State, side: str, step: int) -> None:
        basis, factor_BDD = state[f"basis_{side}"], state[f"factor_{side}"].flatten(0, 1)
        in_warmup = step <= self.warmup_steps
        if in_warmup and self.warmup == "eigh":
            q_BDD = eigenbasis(factor_BDD, fallback=basis.flatten(0, 1))  # which no ridge changes
            basis.copy_(q_BDD.view_as(basis))
            return
        for _ in range(_QR_STEPS if in_warmup else 1):
            q_BDD, order_BD = qr_step(factor_BDD, basis.flatten(0, 1), ridge=self.matrix_eps)
            basis.copy_(q_BDD.view_as(basis))
            _reorder(state["v"], order_BD, side)

    def _blocking(self, x_NOI: torch.Tensor) -> Blocking:
        return Blocking(x_NOI.shape[-2], x_NOI.shape[-1], self.block_size, self.max_dim)


def _reorder(v_NBPQ: torch.Tensor, order_BD: torch.Tensor, side: str) -> None:
    axis = -1 if side == "in" else -2
    order = order_BD.view(*v_NBPQ.shape[:2], -1).unsqueeze(-2 if side == "in" else -1).expand_as(v_NBPQ)
    v_NBPQ.copy_(v_NBPQ.gather(axis, order))


def _turn(x_NBPQ: torch.Tensor, state: State) -> torch.Tensor:
    if "basis_out" in state:
        x_NBPQ = state["basis_out"].mT @ x_NBPQ
    return x_NBPQ @ state["basis_in"] if "basis_in" in state else x_NBPQ


def _turn_back(x_NBPQ: torch.Tensor, state: State) -> torch.Tensor:
    if "basis_out" in state:
        x_NBPQ = state["basis_out"] @ x_NBPQ
    return x_NBPQ @ state["basis_in"].mT if "basis_in" in state else x_NBPQ
