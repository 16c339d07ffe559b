"""Shampoo: inverse roots of second moments on either side of the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_mup.core.blocking import active_sides
from lightning_mup.core.eigen import RootMethod
from lightning_mup.core.method import Decay, Method, Settings, Size
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.power import Power
from lightning_mup.core.settings import NonFinite, arguments
from lightning_mup.core.spec import ParamSpec
from lightning_mup.core.transform import Transform
from lightning_mup.methods.muon import VECTORS
from lightning_mup.transforms.shampoo import Shampoo as ShampooTransform


def _chain(settings: Settings) -> Transform:
    return ShampooTransform(
        settings["betas"],
        exponent=settings["exponent"],
        matrix_eps=settings["matrix_eps"],
        relative_matrix_eps=settings["relative_matrix_eps"],
        start=settings["initial_factor"],
        every=settings["precondition_every"],
        root=settings["root"],
        block_size=settings["block_size"],
        max_dim=settings["max_preconditioned_dim"],
    )


def _update_norm(spec: ParamSpec, settings: Settings) -> Power:
    given = settings["exponent"]
    out, into = given if isinstance(given, tuple) else (given, given)
    on_in, on_out = active_sides(spec, settings)
    total = Fraction(into * on_in + out * on_out).limit_denominator(1000)
    half = total - Fraction(1, 2)
    return Power(fan_in=-half, fan_out=half, depth=2 * half, blocks_in=total, blocks_out=total)


def _matrix_eps(spec: ParamSpec, settings: Settings) -> Size:
    if settings["relative_matrix_eps"]:
        return Size()
    # The largest eigenvalue of a block's factor: entries squared, summed over the block.
    return Size(grad=2, factor=Power(fan_in=1, fan_out=1, blocks_in=-1, blocks_out=-1, batch=-1))


class Shampoo(StackedOptimizer):
    """``U = (L + ridge)^-k m_hat (R + ridge)^-k`` with averages L of ``G G^T`` and R of ``G^T G``, bias-corrected.

    Args:
        params: parameters, ``named_parameters()``, or groups; see :class:`~lightning_mup.StackedOptimizer`.
        lr: learning rate (>= 0).
        betas: decay rates of the momentum and of L and R, each in [0, 1).
        exponent: k of both sides, or (output side, input side): 1/4 is Shampoo, 1/2 is "Shampoo2" (> 0).
        matrix_eps: the ridge (>= 0).
        relative_matrix_eps: whether the ridge is in units of the largest eigenvalue.
        initial_factor: multiple of the identity that L and R start at; None is ``matrix_eps``, or 0 where that is
            relative.
        root: ``"eigh"`` or ``"newton"``; see :func:`~lightning_mup.core.eigen.inverse_root`.
        precondition_every: number of steps between renewals of the preconditioner (>= 1).
        block_size: largest side of a block, each with its own preconditioner; None cuts nothing.
        max_preconditioned_dim: a longer side is not preconditioned; None for no limit.
        eps: epsilon of ``graft="adam"`` (>= 0).
        adam: settings of Adam for what it takes over, and for ``graft="adam"`` (``{"betas": (0.9, 0.95)}``).
        routes: method by role, for groups that say their ``role``; vectors and scalars are Adam's in any case.
        graft, graft_eps, spectral_norm, weight_decay, decay, nonfinite: see
            :class:`~lightning_mup.StackedOptimizer`.

    Raises:
        ValueError: a setting is unknown or out of range.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = Shampoo([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True

    Reference:
        Gupta et al. 2018 (arXiv:1802.09568); arXiv:2512.05620, equations 13 to 17.
    """

    def __init__(  # noqa: PLR0913 - the field's settings
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        exponent: float | tuple[float, float] = 0.25,
        matrix_eps: float = 1e-6,
        relative_matrix_eps: bool = True,
        initial_factor: float | None = None,
        root: RootMethod = "eigh",
        precondition_every: int = 10,
        block_size: int | None = None,
        max_preconditioned_dim: int | None = 10000,
        eps: float = 1e-8,
        adam: Mapping[str, object] | None = None,
        routes: Mapping[str, str] | None = None,
        graft: str | None = None,
        graft_eps: float = 1e-8,
        spectral_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "independent",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, "shampoo", arguments(locals()))


SHAMPOO = Method(
    name="shampoo",
    update_norm=_update_norm,
    optimizers=(Shampoo,),
    eps={"matrix_eps": _matrix_eps, "initial_factor": _matrix_eps},
    decay="independent",
    chain=_chain,
    build=Shampoo,
    routes=VECTORS,
    reference="arXiv:2512.05620, Table 1 and 2: L^(1-2E) (fan_out/fan_in)^(1-E) blocks^-E with E the sum of exponents",
)
SHAMPOO2 = replace(SHAMPOO, name="shampoo2", optimizers=(), preset={"exponent": 0.5})
