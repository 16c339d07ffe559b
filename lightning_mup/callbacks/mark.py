"""Which parameters have got their initial values: noted on the module that owns them, so that copies know it too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from lightning_mup.core.base import Measured, canonical
from lightning_mup.core.infer import shared_names
from lightning_mup.core.plan import ParamPlan

MARK = "_lightning_mup_init"


def sizes(model: nn.Module, params: Mapping[str, ParamPlan]) -> dict[str, float]:
    """Return the root mean square of each parameter as it is now.

    Examples:
        >>> sizes(nn.Linear(2, 2), {})
        {}
    """
    return {names[0]: Measured.of(p).rms for names, p in shared_names(model) if names[0] in params and not p.is_meta}


def mark(model: nn.Module, params: Mapping[str, ParamPlan], before: Mapping[str, float] | None = None) -> None:
    """Note that these parameters have their initial values, by which factor on the base's, and their sizes before.

    Examples:
        >>> from lightning_mup import plan
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> params = {p.spec.name: p for p in plan(net, lambda: nn.Sequential(nn.Linear(2, 1))).params}
        >>> mark(net, params)
        >>> unmarked(net, params)
        {}
    """
    owners = _owners(model)
    for name, param in params.items():
        owner, attribute = owners[name]
        owner.__dict__.setdefault(MARK, {})[attribute] = (param.init, (before or {}).get(name))


def unmarked(model: nn.Module, params: Mapping[str, ParamPlan]) -> dict[str, ParamPlan]:
    """Return the parameters that have not got their initial values, or got their former ones back since.

    Raises:
        ValueError: one was initialized under another plan.
    """
    owners = _owners(model)
    found: dict[str, ParamPlan] = {}
    for name, param in params.items():
        owner, attribute = owners[name]
        factor, before = owner.__dict__.get(MARK, {}).get(attribute, (None, None))
        if factor is None or _is_back(getattr(owner, attribute), before):
            found[name] = param
        elif not math.isclose(factor, param.init):
            raise ValueError(
                f"{type(model).__name__} was parametrized before under another plan ({name!r}: initial values x "
                f"{factor:.6g}, now x {param.init:.6g}); train a new instance, or give the same base and rules"
            )
    return found


def _is_back(parameter: torch.Tensor, before: float | None) -> bool:
    """Whether a state dict from before the first initialization was loaded: training does not return to that size."""
    return bool(before) and math.isclose(Measured.of(parameter).rms, cast(float, before), rel_tol=1e-12)


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        canonical(f"{path}.{attribute}").lstrip("."): (module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, _ in module.named_parameters(recurse=False)
    }
