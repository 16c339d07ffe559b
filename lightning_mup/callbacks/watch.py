"""Measure how far a training module's outputs and parameters have moved since a moment before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_mup.analysis.coordinate import STREAM, Kind
from lightning_mup.analysis.updates import Yardstick
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.callbacks.probe import Outputs, captured, undisturbed
from lightning_mup.core.base import Base, canonical
from lightning_mup.core.infer import infer
from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.rules import find_rules

MODEL = "(model)"
"""Name of the whole model's output among the layers'."""

Forward = Callable[[LightningModule, Any], object]
Key = tuple[Kind, str]


class Watch:
    """A module's outputs on a fixed batch and its parameters, as they were when watching began.

    Args:
        trainer: the trainer that is fitting; its :class:`Parametrize` callback tells what the parameters are.
        module: the module.
        batch: the batch to measure on, on the module's device; it is not changed.
        updates: whether to watch the parameters, too.
        forward: how to run the module on the batch; None calls ``training_step``.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: object,
        *,
        updates: bool = True,
        forward: Forward | None = None,
    ) -> None:
        self._context = trainer.precision_plugin.train_step_context
        self._forward = forward or run_training_step
        self._batch = copy.deepcopy(batch)
        self._module = module
        self._yardsticks = yardsticks(trainer, module)
        self._modules = watched_modules(module, self._yardsticks)
        self._outputs = self._run()
        self._drop_repeated_model_output()
        self._weights = self._copies() if updates else {}

    def outputs(self) -> dict[Key, float]:
        """Return each layer's ``RMS(h_t - h_0)``, over the multiplier that its residual branch carries by design."""
        after = self._run()
        for name in [n for n, start in self._outputs.items() if n not in after or after[n].shape != start.shape]:
            rank_zero_warn(f"the coordinate check drops {name!r}: its output on one batch changes its shape")
            del self._outputs[name], self._modules[name]
        return {("output", name): self._distance(name, after[name]) for name in self._outputs}

    def updates(self) -> dict[Key, float]:
        """Return the spectral norm of each parameter's change since the last call, over the wanted one."""
        before, self._weights = self._weights, self._copies() if self._weights else {}
        return {("update", n): self._yardsticks[n].measure(self._weights[n] - before[n]) for n in before}

    def group(self, key: Key) -> str:
        """Return what a layer is: a role, ``"stream"``, or nothing where all its parameters are frozen."""
        kind, layer = key
        if kind == "update":
            return self._yardsticks[layer].spec.role.value
        found = main_parameter(layer, self._modules[layer], self._yardsticks)
        blocks = {y.spec.block for y in self._yardsticks.values()}
        return STREAM if layer == MODEL or layer in blocks else found.spec.role.value if found else ""

    def _run(self) -> Outputs:
        batch = copy.deepcopy(self._batch)  # a training step may write into its batch
        with undisturbed(self._module), captured(self._modules) as outputs, self._context():
            self._forward(self._module, batch)
        return outputs

    def _drop_repeated_model_output(self) -> None:
        last = self._outputs.get(MODEL)
        others = (t for name, t in self._outputs.items() if name != MODEL)
        if last is not None and any(torch.equal(last, other) for other in others):
            del self._outputs[MODEL], self._modules[MODEL]

    def _copies(self) -> Outputs:
        named = ((canonical(name), p) for name, p in self._module.named_parameters())
        return {name: whole(p) for name, p in named if name in self._yardsticks}

    def _distance(self, layer: str, after: torch.Tensor) -> float:
        found = main_parameter(layer, self._modules[layer], self._yardsticks, ends=True)
        moved = float((after - self._outputs[layer]).square().mean().sqrt())
        return moved / (1.0 if found is None else found.output)


def yardsticks(trainer: Trainer, module: LightningModule) -> dict[str, Yardstick]:
    """Return the yardstick of every trainable parameter by name: from the trainer's plan, or from the shapes alone.

    Warns:
        UserWarning: there is no plan, and a parameter cannot be read; then there are none.
    """
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    found = next((c for c in callbacks if isinstance(c, Parametrize)), None)
    if found is not None and found.plan is not None:
        rules = find_rules(found.rules)
        return {p.spec.name: Yardstick.of(p, rules) for p in found.plan.params}
    shapes = {canonical(n): tuple(p.shape) for n, p in module.named_parameters(remove_duplicate=False)}
    try:
        specs = infer(module, Base(shapes))
    except ValueError as error:
        rank_zero_warn(f"the coordinate check records outputs alone, since it cannot read the parameters: {error}")
        return {}
    return {spec.name: Yardstick.of(ParamPlan(spec), None) for spec in specs}


def watched_modules(module: nn.Module, found: Mapping[str, Yardstick]) -> dict[str, nn.Module]:
    """Return the modules that own parameters, the residual blocks and the model itself, by canonical name.

    Examples:
        >>> list(watched_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {}))
        ['(model)', '0']
    """
    blocks = {y.spec.block for y in found.values()}
    named = ((canonical(f"{name}.").strip("."), part) for name, part in module.named_modules())
    return {
        name or MODEL: part
        for name, part in named
        if not name or name in blocks or next(part.parameters(recurse=False), None) is not None
    }


def main_parameter(
    layer: str, module: nn.Module, found: Mapping[str, Yardstick], *, ends: bool = False
) -> Yardstick | None:
    """Return the yardstick of the parameter that stands for a module, or with ``ends`` of the one its output ends with.

    The two differ in torch's attention, whose ``out_proj`` is no module that is called. A module without trainable
    parameters of its own has none.
    """
    prefix = "" if layer == MODEL else f"{layer}."
    own = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
    if ends and isinstance(module, nn.MultiheadAttention):
        own = [f"{prefix}out_proj.weight"]
    shared = {name: y for y in found.values() for name in (y.spec.name, *y.spec.tied_to)}
    return next((shared[name] for name in own if name in shared), None)


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return a copy of a parameter's values, all of them where it is sharded.

    Examples:
        >>> whole(nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data.clone()


def run_training_step(module: LightningModule, batch: object) -> None:
    """Call ``training_step`` as Lightning does, with the batch's index only where it takes one."""
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    module.training_step(*((batch, 0) if indexed else (batch,)))
