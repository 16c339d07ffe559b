"""Muon: orthogonalized momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.method import Decay, Method, Settings, Size
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.spec import Role
from lightning_mup.core.transform import Transform, chain
from lightning_mup.transforms.momentum import Momentum
from lightning_mup.transforms.orthogonalize import Orthogonalize


def _chain(settings: Settings) -> Transform:
    momentum = Momentum(settings["momentum"], nesterov=settings["nesterov"])
    return chain(momentum, Orthogonalize(settings["ns_steps"], settings["eps"], settings["ns_dtype"]))


def _shape_factor(settings: Settings, fan_out: int, fan_in: int) -> float:
    if "adjust_lr_fn" not in settings:  # ours has none
        return 1.0
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(fan_out, fan_in))  # arXiv:2502.16982, equation 4
    return math.sqrt(max(1.0, fan_out / fan_in))


class Muon(StackedOptimizer):
    """``U = Newton-Schulz(momentum m + (1 - momentum) G)``: singular values near 1, no shape factor.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        momentum: decay rate of the gradients' average, in [0, 1).
        nesterov: whether the average is mixed once more with the gradient.
        eps: added to the Frobenius norm that the average is divided by (>= 0).
        ns_steps: number of Newton-Schulz iterations (>= 0).
        ns_dtype: dtype of the iteration; None for the state's, ``torch.bfloat16`` for speed.
        adam: settings of Adam for what it takes over, and for ``graft="adam"`` (``{"betas": (0.9, 0.95)}``).
        routes: method by role, for groups that say their ``role``; vectors and scalars are Adam's in any case.
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = Muon([weight], lr=0.1, momentum=0.0)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        Jordan et al. 2024; arXiv:2512.05620, equations 28 and 29.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-7,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        adam: Mapping[str, object] | None = None,
        routes: Mapping[str, str] | None = None,
        graft: str | None = None,
        graft_eps: float = 1e-8,
        spectral_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "independent",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, "muon", arguments(locals()))


VECTORS = {Role.VECTOR: "adam", Role.SCALAR: "adam"}
"""Roles without a matrix, which methods for matrices leave to Adam."""

MUON = Method(
    name="muon",
    update_norm=Power(),
    optimizers=(torch.optim.Muon, Muon),
    # The gradient is divided by its Frobenius norm, which epsilon bounds from below.
    eps={"eps": Size(grad=1, factor=Power(fan_in=1 / 2, fan_out=1 / 2))},
    own_factor=_shape_factor,
    chain=_chain,
    build=Muon,
    routes=VECTORS,
    reference="Jordan et al. 2024; arXiv:2512.05620, Table 1: sqrt(fan_out/fan_in), epsilon sqrt(fan_in/fan_out)/L",
)
MUON_ADAM = replace(
    MUON,
    name="muon_adam",
    optimizers=(),
    routes={**VECTORS, Role.INPUT: "adam", Role.OUTPUT: "adam"},
    reference="arXiv:2512.05620, section 4: Adam for embeddings and readout",
)
