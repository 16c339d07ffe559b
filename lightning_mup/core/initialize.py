"""Initial values: the proxy's measured sizes times the plan's ratios, by rescaling or by seeded draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mup.core.base import Measured, canonical
from lightning_mup.core.plan import ParamPlan

Initialize = Literal["scale", "draw", "keep"]


def initialize(
    parameters: Mapping[str, nn.Parameter],
    params: Mapping[str, ParamPlan],
    measured: Mapping[str, Measured],
    *,
    how: Initialize = "scale",
    seed: int = 0,
    padding: Mapping[str, int] | None = None,
) -> None:
    """Give each parameter the root mean square ``ratio x (the proxy's)``.

    ``"scale"`` multiplies the values that the module drew itself, so that any initialization scheme keeps its shape and
    zeros stay zero; at the base, where no ratio differs from 1, all values are left alone. ``"draw"`` draws normal
    values from a generator seeded by the parameter's name alone, so that every rank, strategy and order of construction
    agrees.

    Args:
        parameters: the tensors by name, sharded (DTensor) or not; the global random state is not touched.
        params: the plan's rows by name; what has none is left alone.
        measured: the proxy's mean and RMS by the target's names.
        how: see above; ``"keep"`` leaves all values alone.
        seed: seed of the draws.
        padding: by name, a row of an embedding that stays zero, for ``"draw"``; see :func:`padding_rows`.

    Examples:
        >>> from lightning_mup import Base, plan
        >>> net, base = nn.Linear(256, 4), nn.Linear(64, 4)
        >>> rows = {p.spec.name: p for p in plan(net, base=base).params}
        >>> sizes = Base.of(base).measured
        >>> initialize(dict(net.named_parameters()), rows, sizes)
        >>> round(Measured.of(net.weight).rms / sizes["weight"].rms, 6)
        0.25
    """
    if how == "keep" or (how == "scale" and all(map(_untouched, params.values()))):
        return
    for name, parameter in parameters.items():
        param = params.get(name)
        if param is None:
            continue
        with torch.no_grad():
            if how == "scale":
                _scale(parameter, param.init * measured[name].rms)
            else:
                _draw(parameter, measured[name], param.init, f"{seed}/{name}", (padding or {}).get(name))


def frozen_twins(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Parameter, str, nn.Parameter]]:
    """Return frozen parameters that are copies of trainable ones: EMA teachers, target networks.

    Returns:
        Name and tensor of the copy, name and tensor of what it copies; constants (gains of 1) are left out.

    Examples:
        >>> net = nn.ModuleDict({"student": nn.Linear(4, 4), "teacher": nn.Linear(4, 4).requires_grad_(False)})
        >>> _ = net["teacher"].load_state_dict(net["student"].state_dict())
        >>> [(copy, of) for copy, _, of, _ in frozen_twins(net, ["student.weight"])]
        [('teacher.weight', 'student.weight')]
    """
    named = {canonical(n): p for n, p in model.named_parameters()}
    frozen = [(n, p) for n, p in named.items() if not p.requires_grad and not p.is_meta]
    originals = [(n, named[n]) for n in names if frozen]
    return [
        (copy, p, name, original)
        for copy, p in frozen
        for name, original in originals
        if p.shape == original.shape
        and p.numel() > 1
        and torch.equal(p, original)
        and bool((p != p.flatten()[0]).any())
    ]


def _is_copy(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other) and not Measured.of(one).constant


def padding_rows(model: nn.Module) -> dict[str, int]:
    """Return the row that each embedding keeps at zero, by canonical name of its weight.

    Examples:
        >>> padding_rows(nn.Sequential(nn.Embedding(8, 4, padding_idx=-1), nn.Linear(4, 2)))
        {'0.weight': 7}
    """
    tables = ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    return {canonical(f"{n}.weight").lstrip("."): m.padding_idx for n, m in tables if m.padding_idx is not None}


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


def _scale(parameter: torch.Tensor, wanted: float) -> None:
    actual = Measured.of(parameter).rms
    if actual:
        parameter.mul_(wanted / actual)


def _draw(parameter: nn.Parameter, measured: Measured, ratio: float, key: str, padding: int | None) -> None:
    deviation = max(measured.rms**2 - measured.mean**2, 0.0) ** 0.5
    full = torch.full(parameter.shape, measured.mean, device="cpu", dtype=torch.float32)
    if not measured.constant:
        full += deviation * draw_normal(tuple(parameter.shape), key)
    if padding is not None:
        full[padding] = 0
    _scale(full, ratio * measured.rms)
    _copy(parameter, full)


def _copy(parameter: nn.Parameter, full: torch.Tensor) -> None:
    data = parameter.data
    if isinstance(data, DTensor):  # every rank drew the same values: each keeps its shard, nothing is sent
        full = distribute_tensor(
            full.to(data.device, data.dtype), data.device_mesh, data.placements, src_data_rank=None
        )
    parameter.copy_(full)
