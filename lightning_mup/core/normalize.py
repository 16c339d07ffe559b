"""Updates of fixed size: spectral norm by power iteration that goes on from step to step, or root mean square."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mup.core.linalg import power_iteration
from lightning_mup.core.transform import Context, State

_EPS = 1e-10  # as in the authors' code
_WARMUP_ITERATIONS = 5


@dataclass(frozen=True, slots=True)
class SpectralNormalize:
    """``u (fan_out/fan_in)^(1/2) / sigma``, with sigma the largest singular value.

    Args:
        iterations: power iterations a step (>= 1), after the warm-up.
        warmup_steps: number of first steps that take five iterations each (>= 0).
        name: key of the state.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> normalize, u = SpectralNormalize(), torch.diag(torch.tensor([2.0, 1.0]))[None]
        >>> state = normalize.init(u)
        >>> for step in range(1, 20):
        ...     out = normalize.update(u, state, Context(step))
        >>> torch.linalg.matrix_norm(out, ord=2).round(decimals=3)
        tensor([1.])

    Reference:
        arXiv:2512.05620, App. F.
    """

    iterations: int = 1
    warmup_steps: int = 50
    name: str = "spectral_normalize"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup_steps < 0:
            raise ValueError(f"iterations must be >= 1, warmup_steps >= 0, got {self.iterations}, {self.warmup_steps}")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return the vectors on the output side, from which the iteration goes on."""
        rows = param_NOI.shape[-2]
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(rows, generator=generator, dtype=torch.float64)
        v_NO = (start / start.norm()).to(param_NOI).repeat(len(param_NOI), 1)
        return {"v": v_NO}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the stack at spectral norm ``(fan_out/fan_in)^(1/2)``."""
        iterations = _WARMUP_ITERATIONS if ctx.step <= self.warmup_steps else self.iterations
        sigma_N, v_NO = power_iteration(u_NOI, state["v"], iterations=iterations)
        state["v"].copy_(v_NO)
        wanted = (u_NOI.shape[-2] / u_NOI.shape[-1]) ** 0.5
        scale_N11: torch.Tensor = (wanted / (sigma_N + _EPS)).view(-1, 1, 1)
        return u_NOI * scale_N11


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
