"""Each entry over its running root mean square, after orthogonalization: what AdaMuon adds to Muon."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mup.core.transform import ELEMENTWISE, Context, State

_ALIGN_EPS = 1e-10  # as in the authors' code


@dataclass(frozen=True, slots=True)
class NormalizeEntries:
    """``u / (sqrt(v / (1 - beta^t)) + eps)`` with ``v = EMA(u^2)``, optionally brought to a fixed RMS.

    Args:
        beta: decay rate of the squares' average, in [0, 1).
        eps: added to the root (>= 0).
        rms: root mean square to which each matrix is brought afterwards; None leaves it.
        name: key of the state.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> normalize = NormalizeEntries(beta=0.0, eps=0.0)
        >>> u = torch.tensor([[[3.0, -2.0]]])
        >>> normalize.update(u, normalize.init(u), Context(step=1))
        tensor([[[ 1., -1.]]])

    Reference:
        Si et al. 2025 (AdaMuon, arXiv:2507.11005); arXiv:2512.05620, App. B.5.
    """

    beta: float = 0.95
    eps: float = 1e-8
    rms: float | None = None
    name: str = "normalize_entries"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1 or not self.eps >= 0:
            raise ValueError(f"beta must be in [0, 1) and eps >= 0, got {self.beta} and {self.eps}")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return the squares' average, zero."""
        return {"v": torch.zeros_like(param_NOI)}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the normalized stack."""
        v_NOI = state["v"].mul_(self.beta).addcmul_(u_NOI, u_NOI, value=1 - self.beta)
        root_NOI = v_NOI.sqrt().mul_((1 - self.beta**ctx.step) ** -0.5).add_(self.eps)
        out_NOI = torch.div(u_NOI, root_NOI, out=root_NOI)
        if self.rms is None:
            return out_NOI
        size = self.rms * (out_NOI.shape[-2] * out_NOI.shape[-1]) ** 0.5
        norm_N11 = torch.linalg.matrix_norm(out_NOI, keepdim=True)
        return out_NOI.mul_(size / (norm_N11 + _ALIGN_EPS))

    @property
    def elementwise(self) -> bool:
        """Whether each entry goes its own way: where no matrix is brought to a size."""
        return self.rms is None

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix."""
        return ELEMENTWISE * rows * columns
