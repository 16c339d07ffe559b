"""Initial values: the proxy's measured sizes times the plan's ratios, by rescaling or by seeded draws."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mup.core.base import Base, Measured
from lightning_mup.core.plan import ParamPlan

Initialize = Literal["scale", "draw", "keep"]


def initialize(
    parameters: Mapping[str, nn.Parameter],
    params: Mapping[str, ParamPlan],
    measured: Mapping[str, Measured],
    *,
    how: Initialize = "scale",
    seed: int = 0,
) -> None:
    """Give each parameter the root mean square ``ratio x (the proxy's)``.

    ``"scale"`` multiplies the values that the module drew itself, so that any initialization scheme keeps its shape and
    zeros stay zero. ``"draw"`` draws normal values from a generator seeded by the parameter's name alone, so that every
    rank, strategy and order of construction agrees. Where no ratio differs from 1 the values are left alone.

    Args:
        parameters: the tensors by name, sharded (DTensor) or not; the global random state is not touched.
        params: the plan's rows by name.
        measured: the proxy's mean and RMS by the target's names.
        how: see above; ``"keep"`` leaves all values alone.
        seed: seed of the draws.

    Examples:
        >>> from lightning_mup import plan
        >>> net, base = nn.Linear(256, 4), nn.Linear(64, 4)
        >>> rows = {p.spec.name: p for p in plan(net, base=base).params}
        >>> sizes = Base.of(base).measured
        >>> initialize(dict(net.named_parameters()), rows, sizes)
        >>> round(Measured.of(net.weight).rms / sizes["weight"].rms, 6)
        0.25
    """
    for name, parameter in parameters.items():
        param = params.get(name)
        if how == "keep" or param is None or _untouched(param):
            continue
        with torch.no_grad():
            if how == "scale":
                _scale(parameter, param.init * measured[name].rms)
            else:
                _draw(parameter, measured[name], param.init, f"{seed}/{name}")


def draw_normal(shape: tuple[int, ...], key: str) -> torch.Tensor:
    """Return standard-normal float32 values that depend on the key alone.

    Examples:
        >>> torch.equal(draw_normal((3,), "0/layers.0.weight"), draw_normal((3,), "0/layers.0.weight"))
        True
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _untouched(param: ParamPlan) -> bool:
    return param.init == 1 and all(ratio == 1 for ratio in param.spec.ratios.values())


def _scale(parameter: nn.Parameter, wanted: float) -> None:
    actual = Measured.of(parameter).rms
    if actual and wanted:
        parameter.mul_(wanted / actual)


def _draw(parameter: nn.Parameter, measured: Measured, ratio: float, key: str) -> None:
    deviation = max(measured.rms**2 - measured.mean**2, 0.0) ** 0.5
    full = torch.full(parameter.shape, measured.mean, device="cpu", dtype=torch.float32)
    if not measured.constant:
        full += deviation * draw_normal(tuple(parameter.shape), key)
    _copy(parameter, full * ratio)


def _copy(parameter: nn.Parameter, full: torch.Tensor) -> None:
    data = parameter.data
    if isinstance(data, DTensor):  # every rank drew the same values: each keeps its shard, nothing is sent
        full = distribute_tensor(
            full.to(data.device, data.dtype), data.device_mesh, data.placements, src_data_rank=None
        )
    parameter.copy_(full)
