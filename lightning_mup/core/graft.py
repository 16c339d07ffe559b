"""One transform's direction with another one's length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mup.core.transform import ELEMENTWISE, Context, State, Transform, part, work_of


@dataclass(frozen=True, slots=True)
class Graft:
    """``||a||_F / (||u||_F + eps) u`` per matrix, with a the magnitude's update and u the direction's.

    Args:
        magnitude: gives the length; its learning-rate rule becomes the whole's.
        direction: gives the direction.
        eps: added to the direction's norm (>= 0).
        name: key of the state.

    Raises:
        ValueError: ``eps`` is negative.

    Examples:
        >>> from lightning_mup.transforms.adam import Adam
        >>> from lightning_mup.transforms.momentum import Momentum
        >>> graft = Graft(magnitude=Adam(), direction=Momentum())
        >>> g = torch.tensor([[[3.0, 4.0]]])
        >>> torch.linalg.matrix_norm(graft.update(g, graft.init(g), Context(step=1)))
        tensor([1.4142])

    Reference:
        arXiv:2512.05620, equation 31 (Q1#Q2: norm of Q1, direction of Q2); Agarwal et al. 2020 (arXiv:2002.11803).
    """

    magnitude: Transform
    direction: Transform
    eps: float = 1e-8
    name: str = "graft"

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"graft_eps must be >= 0, got {self.eps}; 1e-8 is usual")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return both states, under ``magnitude/`` and ``direction/``."""
        both = {"magnitude": self.magnitude, "direction": self.direction}
        return {f"{role}/{key}": value for role, t in both.items() for key, value in t.init(param_NOI).items()}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the direction's update at the magnitude's length."""
        u_NOI = ctx.bounded(u_NOI)
        length_NOI = self.magnitude.update(u_NOI, part(state, "magnitude"), ctx)
        out_NOI = self.direction.update(u_NOI, part(state, "direction"), ctx)
        length_N11, own_N11 = (torch.linalg.matrix_norm(x, keepdim=True) for x in (length_NOI, out_NOI))
        return out_NOI.mul_(length_N11 / (own_N11 + self.eps))

    def work(self, rows: int, columns: int) -> float:
        """Return both transforms' operations and those of the norms."""
        both = sum(work_of(t, rows, columns) for t in (self.magnitude, self.direction))
        return both + ELEMENTWISE * rows * columns
