"""Adam's direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.adam import adam

from lightning_mup.core.transform import ELEMENTWISE, Context, Members, Rate, State


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
        # From zero, at a learning rate of -1, torch's kernel leaves the direction itself.
        out_NOI = torch.zeros_like(u_NOI)
        self.move([(out_NOI, u_NOI, state)], ctx, Rate(lr=-1.0, decay=0.0, l2=0.0))
        return out_NOI

    @property
    def elementwise(self) -> bool:
        """Whether each entry goes its own way: always."""
        return True

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix."""
        return ELEMENTWISE * rows * columns

    @property
    def moves(self) -> bool:
        """Whether torch has the step."""
        return not self.atan2

    def move(self, members: Members, ctx: Context, rate: Rate) -> None:
        """Take the step by torch's kernel, which passes over memory once."""
        params, grads, states = map(list, zip(*members, strict=True))
        m, v = ([state[key] for state in states] for key in ("m", "v"))
        steps = torch.full((len(params),), ctx.step - 1.0, device=params[0].device)
        adam(
            *(params, grads, m, v, [], list(steps.unbind())),
            fused=True,
            decoupled_weight_decay=not rate.l2,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate.lr,
            weight_decay=rate.l2 or rate.decay,
            eps=self.eps,
            maximize=False,
        )
