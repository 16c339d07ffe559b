"""Which parameters have got their initial values: noted on the module that owns them, so that copies know it too."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lightning_mup.core.base import canonical
from lightning_mup.core.plan import ParamPlan

MARK = "_lightning_mup_init"


def mark(model: nn.Module, params: Mapping[str, ParamPlan]) -> None:
    """Note that these parameters have their initial values, and by which factor on the base's.

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
        owner.__dict__.setdefault(MARK, {})[attribute] = param.init


def unmarked(model: nn.Module, params: Mapping[str, ParamPlan]) -> dict[str, ParamPlan]:
    """Return the parameters that have not got their initial values.

    Raises:
        ValueError: one was initialized under another plan.
    """
    owners = _owners(model)
    found: dict[str, ParamPlan] = {}
    for name, param in params.items():
        owner, attribute = owners[name]
        factor = owner.__dict__.get(MARK, {}).get(attribute)
        if factor is None:
            found[name] = param
        elif not math.isclose(factor, param.init):
            raise ValueError(
                f"{type(model).__name__} was parametrized before under another plan ({name!r}: initial values x "
                f"{factor:.6g}, now x {param.init:.6g}); train a new instance, or give the same base and rules"
            )
    return found


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        canonical(f"{path}.{attribute}").lstrip("."): (module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, _ in module.named_parameters(recurse=False)
    }
