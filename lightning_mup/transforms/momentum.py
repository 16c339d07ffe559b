"""An exponential average of the gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.sgd import sgd

from lightning_mup.core.transform import ELEMENTWISE, Context, Members, Rate, State


@dataclass(frozen=True, slots=True)
class Momentum:
    """``m <- beta m + (1 - beta) g``.

    Args:
        beta: decay rate, in [0, 1).
        debias: whether to divide by ``1 - beta^t`` (SGD and Adam do, Muon does not).
        nesterov: whether to return ``beta m + (1 - beta) g``, with the new m.
        name: key of the state.

    Raises:
        ValueError: ``beta`` is out of range.

    Examples:
        >>> momentum = Momentum(0.9, debias=True)
        >>> g = torch.ones(1, 2, 2)
        >>> torch.equal(momentum.update(g, momentum.init(g), Context(step=1)), g)
        True

    Reference:
        arXiv:2512.05620, equations 28 and App. B.4; the authors' code mixes Nesterov's way.
    """

    beta: float = 0.9
    debias: bool = False
    nesterov: bool = False
    name: str = "momentum"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}; 0 is no momentum")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return the average, zero; there is none to keep where ``beta`` is 0."""
        return {"ema": torch.zeros_like(param_NOI)} if self.beta else {}

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the average.

        Raises:
            ValueError: ``beta`` was 0 when the state was made.
        """
        if not self.beta:
            return u_NOI.clone()
        ema_NOI = self._ema(state).lerp_(u_NOI, 1 - self.beta)
        mixed_NOI = ema_NOI.lerp(u_NOI, 1 - self.beta) if self.nesterov else ema_NOI
        if self.debias:
            return mixed_NOI / (1 - self.beta**ctx.step)
        return mixed_NOI if self.nesterov else mixed_NOI.clone()

    @property
    def elementwise(self) -> bool:
        """Whether each entry goes its own way: always."""
        return True

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix."""
        return ELEMENTWISE * rows * columns

    @property
    def moves(self) -> bool:
        """Whether torch has the step; its Nesterov momentum is another."""
        return not self.nesterov

    def move(self, members: Members, ctx: Context, rate: Rate) -> None:
        """Take the step by torch's kernel, which passes over memory once."""
        params, grads, states = map(list, zip(*members, strict=True))
        if rate.decay:
            torch._foreach_mul_(params, 1 - rate.lr * rate.decay)
        sgd(
            *(params, grads, [self._ema(state) if self.beta else None for state in states]),
            fused=True,
            weight_decay=rate.l2,
            momentum=self.beta,
            lr=rate.lr / (1 - self.beta**ctx.step) if self.debias else rate.lr,  # type: ignore[arg-type]
            dampening=self.beta,
            nesterov=False,
            maximize=False,
        )

    def _ema(self, state: State) -> torch.Tensor:
        if "ema" not in state:
            raise ValueError(f"momentum was 0 when the state was made, and is {self.beta} now; start with one above 0")
        return state["ema"]
