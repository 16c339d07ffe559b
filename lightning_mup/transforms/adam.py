"""Adam's direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.adam import adam

from lightning_mup.core.transform import Context, State


@dataclass(frozen=True, slots=True)
class Adam:
    """``m_hat / (sqrt(v_hat) + eps)``, both averages bias-corrected.

    Args:
        betas: decay rates of the gradients' and their squares' averages, each in [0, 1).
        eps: added to ``sqrt(v_hat)`` (>= 0).
        atan2: whether to take ``atan2(m_hat, sqrt(v_hat))`` instead of the quotient, without an epsilon.
        name: key of the state.

    Raises:
        ValueError: a beta or eps is out of range.

    Examples:
        >>> adam = Adam((0.0, 0.0), eps=0.0)
        >>> g = torch.tensor([[[3.0, -2.0]]])
        >>> adam.update(g, adam.init(g), Context(step=1))
        tensor([[[ 1., -1.]]])

    Reference:
        Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    atan2: bool = False
    name: str = "adam"

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps < 0:
            raise ValueError(f"betas must be in [0, 1) and eps >= 0, got betas={self.betas}, eps={self.eps}")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return both averages, zero."""
        return {"m": torch.zeros_like(param_NOI), "v": torch.zeros_like(param_NOI)}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return Adam's direction."""
        (beta1, beta2), t, u_NOI = self.betas, ctx.step, ctx.bounded(u_NOI)
        if self.atan2:
            m_NOI = state["m"].lerp_(u_NOI, 1 - beta1)
            root_NOI = state["v"].mul_(beta2).addcmul_(u_NOI, u_NOI, value=1 - beta2).sqrt()
            return torch.atan2(m_NOI, root_NOI.mul_((1 - beta1**t) * (1 - beta2**t) ** -0.5), out=root_NOI)
        # torch's kernel passes over memory once. From zero, at a learning rate of -1, it leaves the direction itself.
        out_NOI = torch.zeros_like(u_NOI)
        adam(
            *([out_NOI], [u_NOI], [state["m"]], [state["v"]], []),
            [torch.full((), t - 1.0, device=u_NOI.device)],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=-1.0,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
        return out_NOI
