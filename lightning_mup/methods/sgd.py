"""Stochastic gradient descent, with or without momentum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.method import Decay, Method, Settings
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.transform import Transform
from lightning_mup.transforms.momentum import Momentum


def _chain(settings: Settings) -> Transform:
    return Momentum(settings["momentum"], debias=settings["debias"])


class SGD(StackedOptimizer):
    """``U = m / (1 - momentum^t)`` with ``m <- momentum m + (1 - momentum) G``.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        momentum: decay rate of the gradients' average, in [0, 1); torch's sum is this over ``1 - momentum``.
        debias: whether to divide by ``1 - momentum^t``.
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = SGD([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        arXiv:2512.05620, Table 1: learning rate L fan_out/fan_in.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        debias: bool = True,
        graft: str | None = None,
        graft_eps: float = 1e-8,
        spectral_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "independent",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, "sgd", arguments(locals()))


METHOD = Method(
    name="sgd",
    update_norm=Power(fan_in=1 / 2, fan_out=-1 / 2, depth=-1),
    optimizers=(torch.optim.SGD, SGD),
    chain=_chain,
    build=SGD,
    reference="Yang et al. 2022 (arXiv:2203.03466), Table 3; arXiv:2512.05620, Table 1: L fan_out/fan_in",
)
