"""Adam with atan2 in place of division, which needs no epsilon."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.method import Decay, Method, Settings
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.transform import Transform
from lightning_mup.transforms.adam import Adam as AdamTransform


def _chain(settings: Settings) -> Transform:
    return AdamTransform(settings["betas"], atan2=True)


class AdamAtan2(StackedOptimizer):
    """``U = atan2(m_hat, sqrt(v_hat))``: bounded by pi/2, unchanged by any factor on the gradients.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        betas: decay rates of the averages of gradients and of their squares, each in [0, 1).
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = AdamAtan2([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        Everett et al. 2024 (arXiv:2407.05872), section 4.3.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        graft: str | None = None,
        graft_eps: float = 1e-8,
        spectral_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "independent",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, "adam_atan2", arguments(locals()))


METHOD = Method(
    name="adam_atan2",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(AdamAtan2,),
    decay="independent",
    chain=_chain,
    build=AdamAtan2,
    reference="Everett et al. 2024 (arXiv:2407.05872); scales as Adam",
)
