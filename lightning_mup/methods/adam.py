"""Adam, with weight decay as an L2 term in the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.method import Decay, Method, Settings, Size
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.transform import Transform
from lightning_mup.transforms.adam import Adam as AdamTransform


def _chain(settings: Settings) -> Transform:
    return AdamTransform(settings["betas"], settings["eps"])


class Adam(StackedOptimizer):
    """``U = m_hat / (sqrt(v_hat) + eps)``; weight decay is a term of the gradient, as in torch.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        betas: decay rates of the averages of gradients and of their squares, each in [0, 1).
        eps: added to ``sqrt(v_hat)`` (>= 0).
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        graft: str | None = None,
        graft_eps: float = 1e-8,
        spectral_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "l2",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, "adam", arguments(locals()))


# The batch power of epsilon is the authors' code's (sampling noise falls as 1/sqrt(batch)), not in the paper.
METHOD = Method(
    name="adam",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.Adam, Adam),
    eps={"eps": Size(grad=1, factor=Power(batch=-1 / 2))},
    decay="l2",
    chain=_chain,
    build=Adam,
    reference="Kingma & Ba 2015 (arXiv:1412.6980); arXiv:2512.05620, Table 1: 1/fan_in, epsilon 1/(L fan_out)",
)
