"""AdaMuon: Muon whose entries are normalized by their running root mean squares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.method import Decay, Method, Settings, Size
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.transform import Transform, chain
from lightning_mup.methods.muon import VECTORS
from lightning_mup.transforms.momentum import Momentum
from lightning_mup.transforms.normalize_entries import NormalizeEntries
from lightning_mup.transforms.orthogonalize import Orthogonalize

ALIGNED_RMS = 0.2  # Liu et al. 2025 (arXiv:2502.16982), section 2.2


def _chain(settings: Settings) -> Transform:
    momentum = Momentum(settings["momentum"], nesterov=settings["nesterov"])
    orthogonalize = Orthogonalize(settings["ns_steps"], settings["eps"], settings["ns_dtype"])
    rms = ALIGNED_RMS if settings["rms_align"] else None
    return chain(momentum, orthogonalize, NormalizeEntries(settings["beta2"], settings["entry_eps"], rms=rms))


class AdaMuon(StackedOptimizer):
    """``U = o / (sqrt(v_hat) + entry_eps)`` with Muon's update ``o`` and ``v <- beta2 v + (1 - beta2) o^2``.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        momentum: decay rate of the gradients' average, in [0, 1).
        nesterov: whether the average is mixed once more with the gradient.
        eps: added to the Frobenius norm that the average is divided by (>= 0).
        ns_steps: number of Newton-Schulz iterations (>= 0).
        ns_dtype: dtype of the iteration; None for the state's, ``torch.bfloat16`` for speed.
        beta2: decay rate of the squares' average, in [0, 1).
        entry_eps: added to the root of that average (>= 0).
        rms_align: whether each matrix is brought to RMS 0.2 afterwards.
        adam: settings of Adam for what it takes over, and for ``graft="adam"`` (``{"betas": (0.9, 0.95)}``).
        routes: method by role, for groups that say their ``role``; vectors and scalars are Adam's in any case.
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = AdaMuon([weight], lr=0.1, momentum=0.0)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        Si et al. 2025 (arXiv:2507.11005); arXiv:2512.05620, App. B.5.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-7,
        entry_eps: float = 1e-8,
        rms_align: bool = False,
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
        super().__init__(params, "adamuon", arguments(locals()))


METHOD = Method(
    name="adamuon",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(AdaMuon,),
    eps={
        "eps": Size(grad=1, factor=Power(fan_in=1 / 2, fan_out=1 / 2)),
        "entry_eps": Size(factor=Power(fan_in=-1 / 2, fan_out=-1 / 2)),  # entries of an orthogonal matrix
    },
    decay="independent",
    chain=_chain,
    build=AdaMuon,
    routes=VECTORS,
    reference="Si et al. 2025 (arXiv:2507.11005); arXiv:2512.05620, Table 1: 1/fan_in, epsilon 1/sqrt(fan_in fan_out)",
)
