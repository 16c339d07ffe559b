"""Forward multipliers by hooks, where they are not folded into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_mup.core.base import canonical
from lightning_mup.core.plan import ParamPlan

_CONV = nn.modules.conv._ConvNd
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# The outputs of these are linear in their own parameters.
_LINEAR = (nn.Linear, nn.Bilinear, _CONV, nn.Embedding, nn.EmbeddingBag, *_NORMS)


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

    def register(self, module: nn.Module) -> None:
        """Hook into a module."""
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ANN401 - whatever the module returns
        """Multiply the output."""
        self.ran = True
        if isinstance(output, tuple):
            return (output[0] * self.factor, *output[1:])
        return output * self.factor


class InputMultiplier(ForwardMultiplier):
    """A forward pre-hook that multiplies a linear module's input, and so its weight but not its bias."""

    def register(self, module: nn.Module) -> None:
        """Hook into a module."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Multiply the first input."""
        self.ran = True
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: kwargs[first] * self.factor}


def install_multipliers(model: nn.Module, params: Iterable[ParamPlan]) -> dict[str, ForwardMultiplier]:
    """Install the hooks that a plan asks for; returns them by module name. A module that has its hook keeps it.

    Raises:
        ValueError: a module multiplies its parameters by different amounts that no hook can tell apart, its output is
            not known to be linear in them, or it has a hook with another multiplier.

    Examples:
        >>> from lightning_mup import Choices, plan
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2, bias=False))
        >>> base = lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2, bias=False))
        >>> made = plan(net, base, rules="ntk", choices=Choices(multipliers="hook"))
        >>> {name: hook.factor for name, hook in install_multipliers(net, made.params).items()}
        {'1': 0.5}
    """
    modules = _modules(model)
    params = list(params)
    hooks = {n: _readout(modules[n], p.readout) for p in params if p.readout != 1 for n in p.spec.readout}
    hooks |= _own_hooks({p.spec.name: p.forward for p in params}, modules)
    return {name: _installed(name, modules[name], hook) for name, hook in hooks.items()}


def silent(model: nn.Module, hooks: Mapping[str, ForwardMultiplier]) -> list[str]:
    """Return the names of the modules whose parameters have gradients although their hook never ran.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> net[0].weight.sum().backward()
        >>> silent(net, {"0": ForwardMultiplier(2.0)})
        ['0']
    """
    waiting = [name for name, hook in hooks.items() if not hook.ran]
    if not waiting:
        return []
    modules = _modules(model)
    return [name for name in waiting if any(p.grad is not None for p in modules[name].parameters())]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {canonical(f"{name}.").strip("."): module for name, module in model.named_modules(remove_duplicate=False)}


def _installed(name: str, module: nn.Module, hook: ForwardMultiplier) -> ForwardMultiplier:
    for there in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if isinstance(there, ForwardMultiplier):
            if there.factor != hook.factor:
                raise ValueError(
                    f"module {name!r} is multiplied by {there.factor:g} already, the plan says {hook.factor:g}; give "
                    f"the base and rules of the first run, or train a new instance"
                )
            return there
    hook.register(module)
    return hook


def _own_hooks(factors: Mapping[str, float], modules: Mapping[str, nn.Module]) -> dict[str, ForwardMultiplier]:
    owned: dict[str, dict[str, float]] = {}
    for name, factor in factors.items():
        path, _, attribute = name.rpartition(".")
        owned.setdefault(path, {})[attribute] = factor
    multiplied = {path: own for path, own in owned.items() if any(factor != 1 for factor in own.values())}
    return dict(_hook(path, modules, own) for path, own in multiplied.items())


def _hook(path: str, modules: Mapping[str, nn.Module], own: Mapping[str, float]) -> tuple[str, ForwardMultiplier]:
    module, caller = modules[path], _caller(path, modules)
    factors = set(own.values())
    if len(factors) == 1 and _is_linear(module):
        return caller, ForwardMultiplier(factors.pop())
    if caller == path and _is_matrix(module) and own.keys() == {"weight", "bias"} and own["bias"] == 1:
        return path, InputMultiplier(own["weight"])
    reason = "different forward multipliers" if len(factors) > 1 else "forward multipliers"
    raise ValueError(
        f"module {path!r} ({type(module).__name__}) needs {reason} {dict(own)}, which no hook on it can apply; use "
        f"multipliers='fold'"
    )


def _readout(module: nn.Module, factor: float) -> ForwardMultiplier:
    """A readout's bias is not multiplied; of modules other than torch's, the whole output must be."""
    return InputMultiplier(factor) if _is_matrix(module) else ForwardMultiplier(factor)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, _LINEAR) or _is_matrix(module)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _CONV)) or type(module).__name__ == "Conv1D"


def _caller(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the module whose output to multiply: torch's attention calls its out_proj as a function."""
    parent = path.rpartition(".")[0]
    inside = path.endswith("out_proj") and isinstance(modules.get(parent), nn.MultiheadAttention)
    return parent if inside else path
