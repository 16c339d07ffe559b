"""Updates of fixed root mean square, for embeddings, whose rows are read one at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mup.core.transform import Context, State

_EPS = 1e-10  # as in the authors' code


@dataclass(frozen=True, slots=True)
class RmsNormalize:
    """``u / rms(u)``, or ``u / (sqrt(fan_in) rms(u))`` where the inputs add up.

    Args:
        over_inputs: whether to divide by ``sqrt(fan_in)``, too; embeddings, which look rows up, do not.
        name: key of the state, of which there is none.

    Examples:
        >>> RmsNormalize().update(torch.tensor([[[3.0, -3.0]]]), {}, Context(step=1))
        tensor([[[ 1., -1.]]])

    Reference:
        arXiv:2512.05620, App. F.
    """

    over_inputs: bool = False
    name: str = "rms_normalize"

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return nothing: there is no state."""
        return {}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the stack at fixed root mean square."""
        rms_N11 = u_NOI.square().mean((-2, -1), keepdim=True).sqrt() + _EPS
        return u_NOI / (rms_N11 * u_NOI.shape[-1] ** 0.5 if self.over_inputs else rms_N11)
