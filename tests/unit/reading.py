"""What the tests of inference share: reading a model against a base, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from lightning_mup import Base, ParamSpec
from lightning_mup.core.infer import RoleLike, infer


def read(
    model: nn.Module,
    base: nn.Module,
    roles: Mapping[str, RoleLike] | None = None,
    branches: Sequence[str] | None = None,
    wider: nn.Module | None = None,
) -> dict[str, ParamSpec]:
    grown = None if wider is None else Base.of(wider)
    specs = infer(model, Base.of(base), roles=roles, branches=branches, wider=grown)
    return {spec.name: spec for spec in specs}


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def facts(spec: ParamSpec) -> tuple[str, str, str, int]:
    return spec.role.value, str(spec.fan_out), str(spec.fan_in), spec.split


class Bare(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(shape, device="meta"))
