"""Forward multipliers by hooks, where they are not folded into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_mup.core.base import canonical
from lightning_mup.core.plan import ParamPlan


class ForwardMultiplier:
    """A forward hook that multiplies a module's output, or the first of several.

    Examples:
        >>> import torch
        >>> double = ForwardMultiplier(2.0)
        >>> double(nn.Identity(), (), torch.ones(1)), double.ran
        (tensor([2.]), True)
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.ran = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ANN401 - whatever the module returns
        self.ran = True
        if isinstance(output, tuple):
            return (output[0] * self.factor, *output[1:])
        return output * self.factor


class InputMultiplier(ForwardMultiplier):
    """A forward pre-hook that multiplies a linear module's input, and so its weight but not its bias."""

    def __call__(self, module: nn.Module, args: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        self.ran = True
        return (args[0] * self.factor, *args[1:])


def install(model: nn.Module, params: Iterable[ParamPlan]) -> dict[str, ForwardMultiplier]:
    """Install the hooks that a plan asks for, once; returns them by module name.

    Raises:
        ValueError: a module multiplies its parameters by different amounts that no hook can tell apart.

    Examples:
        >>> from lightning_mup import Choices, plan
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2, bias=False))
        >>> base = lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2, bias=False))
        >>> made = plan(net, base, rules="ntk", choices=Choices(multipliers="hook"))
        >>> {name: hook.factor for name, hook in install(net, made.params).items()}
        {'1': 0.5}
    """
    modules = {canonical(f"{name}.").strip("."): module for name, module in model.named_modules(remove_duplicate=False)}
    params = list(params)
    hooks = {name: ForwardMultiplier(p.readout) for p in params if p.readout != 1 for name in p.spec.readout}
    hooks |= _own_hooks({p.spec.name: p.forward for p in params}, modules)
    for name, hook in hooks.items():
        if isinstance(hook, InputMultiplier):
            modules[name].register_forward_pre_hook(hook)
        else:
            modules[name].register_forward_hook(hook)
    return hooks


def _own_hooks(factors: Mapping[str, float], modules: Mapping[str, nn.Module]) -> dict[str, ForwardMultiplier]:
    owned: dict[str, dict[str, float]] = {}
    for name, factor in factors.items():
        path, _, attribute = name.rpartition(".")
        owned.setdefault(path, {})[attribute] = factor
    return {
        _caller(path, modules): _hook(path, modules[path], own)
        for path, own in owned.items()
        if any(factor != 1 for factor in own.values())
    }


def _hook(path: str, module: nn.Module, own: Mapping[str, float]) -> ForwardMultiplier:
    factors = set(own.values())
    if len(factors) == 1:
        return ForwardMultiplier(factors.pop())
    linear = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"
    if linear and own.keys() == {"weight", "bias"} and own["bias"] == 1:
        return InputMultiplier(own["weight"])
    raise ValueError(
        f"module {path!r} needs different forward multipliers {dict(own)}, which no hook can tell apart; use "
        f"multipliers='fold'"
    )


def _caller(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the module whose output to multiply: torch's attention calls its out_proj as a function."""
    parent = path.rpartition(".")[0]
    inside = path.endswith("out_proj") and isinstance(modules.get(parent), nn.MultiheadAttention)
    return parent if inside else path
