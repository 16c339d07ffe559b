"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.blocking import active_sides
from lightning_mup.core.method import Decay, Method, Settings, Size
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.spec import ParamSpec
from lightning_mup.core.transform import Transform
from lightning_mup.methods.muon import VECTORS
from lightning_mup.transforms.soap import Soap


def _chain(settings: Settings) -> Transform:
    return Soap(
        settings["betas"],
        eps=settings["eps"],
        relative_eps=settings["relative_eps"],
        matrix_eps=settings["matrix_eps"],
        every=settings["precondition_every"],
        warmup_steps=settings["warmup_steps"],
        warmup=settings["warmup"],
        block_size=settings["block_size"],
        max_dim=settings["max_preconditioned_dim"],
    )


def _update_norm(spec: ParamSpec, settings: Settings) -> Power:
    on_in, on_out = active_sides(spec, settings)
    if on_in and on_out:
        return Power(blocks_in=1 / 2, blocks_out=1 / 2)
    return Power(fan_out=1 / 2, blocks_in=1 / 2) if on_in else Power(fan_in=1 / 2, blocks_out=1 / 2)


def _eps(spec: ParamSpec, settings: Settings) -> Size:
    if settings["relative_eps"]:
        return Size()
    on_in, on_out = active_sides(spec, settings)
    # In the basis, a block's gradient has one entry along each preconditioned side.
    along_in = Power(fan_in=1 / 2, blocks_in=-1 / 2) if on_in else Power()
    along_out = Power(fan_out=1 / 2, blocks_out=-1 / 2) if on_out else Power()
    return Size(grad=1, factor=along_in * along_out * Power(batch=-1 / 2))


def _matrix_eps(spec: ParamSpec, settings: Settings) -> Size:
    return Size(grad=2, factor=Power(fan_in=1, fan_out=1, blocks_in=-1, blocks_out=-1, batch=-1))


class SOAP(StackedOptimizer):
    """``U = Q_L [(Q_L^T m Q_R) / (sqrt(v) + eps)] Q_R^T``, bias-corrected, with v in the eigenbases Q.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        betas: decay rates of the momentum and of second moments and factors, each in [0, 1).
        eps: added to ``sqrt(v)`` (>= 0).
        relative_eps: whether eps is in units of ``sqrt(v)``'s first entry.
        matrix_eps: ridge of the factors whose eigenbases are taken (>= 0).
        precondition_every: number of steps between renewals of the preconditioner (>= 1).
        block_size: largest side of a block, each with its own preconditioner; None cuts nothing.
        max_preconditioned_dim: a longer side is not preconditioned; None for no limit.
        warmup_steps: number of first steps that renew the bases each (>= 0).
        warmup: how those do it: ``"eigh"``, or ten ``"qr"`` steps.
        adam: settings of Adam for what it takes over, and for ``graft="adam"`` (``{"betas": (0.9, 0.95)}``).
        routes: method by role, for groups that say their ``role``; vectors and scalars are Adam's in any case.
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = SOAP([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        Vyas et al. 2024 (arXiv:2409.11321); arXiv:2512.05620, equations 19 to 26.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        relative_eps: bool = False,
        matrix_eps: float = 1e-10,
        precondition_every: int = 10,
        block_size: int | None = None,
        max_preconditioned_dim: int | None = 10000,
        warmup_steps: int = 50,
        warmup: Literal["eigh", "qr"] = "eigh",
        adam: Mapping[str, object] | None = None,
        routes: Mapping[str, str] | None = None,
        graft: str | None = None,
        graft_eps: float = 1e-8,
        spectral_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "independent",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, "soap", arguments(locals()))


METHOD = Method(
    name="soap",
    update_norm=_update_norm,
    optimizers=(SOAP,),
    eps={"eps": _eps, "matrix_eps": _matrix_eps},
    decay="independent",
    chain=_chain,
    build=SOAP,
    routes=VECTORS,
    reference="arXiv:2512.05620, Table 1 and 2, and the authors' code for one-sided preconditioning",
)
