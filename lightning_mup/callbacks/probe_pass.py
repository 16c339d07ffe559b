"""One forward pass of a training module on a fixed batch: what its layers with matrices take in and put out.

Shapes: T tokens, I inputs (columns).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mup.callbacks.matrices import Watched
from lightning_mup.callbacks.probe import Outputs, captured, undisturbed
from lightning_mup.callbacks.watch import MODEL, Forward, run_training_step
from lightning_mup.core.base import canonical
from lightning_mup.core.spec import ParamSpec, Role

MATRIX_ROLES = (Role.INPUT, Role.HIDDEN, Role.OUTPUT)
_MULTIPLIES: dict[str, dict[str, tuple[int, ...]]] = {
    "torch.nn.modules.linear.Linear": {"weight": (0,)},
    "transformers.pytorch_utils.Conv1D": {"weight": (0,)},
    "torch.nn.modules.activation.MultiheadAttention": {
        "in_proj_weight": (0, 1, 2),
        "q_proj_weight": (0,),
        "k_proj_weight": (1,),
        "v_proj_weight": (2,),
    },
}
"""Module class (by name) -> parameter -> which of the module's inputs each of its matrices multiplies."""
_QUERY_KEY_VALUE = ("query", "key", "value")

Inputs = dict[str, list[list[Tensor]]]


@dataclass(frozen=True, slots=True)
class Pass:
    """What the layers took in and put out.

    Args:
        outputs: layers' outputs, flattened, by module name; :data:`MODEL` for the module's own.
        inputs: per call of a layer, its tensors, by module name.
    """

    outputs: Outputs
    inputs: Inputs


class Probe:
    """Runs a module on one batch, the same each time, without leaving a trace.

    Args:
        trainer: the trainer that is fitting.
        module: the module.
        batch: the batch, on the module's device; it is not changed.
        watched: the matrices that are watched.
        specs: all trainable parameters, among whose layers is the last one.
        forward: how to run the module on the batch; None calls ``training_step``.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: object,
        *,
        watched: Sequence[Watched],
        specs: Sequence[ParamSpec],
        forward: Forward | None = None,
    ) -> None:
        self._context = trainer.precision_plugin.train_step_context
        self._forward, self._batch, self._module = forward or run_training_step, copy.deepcopy(batch), module
        parts = {canonical(f"{name}.").strip(".") or MODEL: part for name, part in module.named_modules()}
        matrices = [w for w in watched if w.spec.role in MATRIX_ROLES and is_layer(parts[owner_of(w.spec)])]
        self.layers = {owner: parts[owner] for owner in dict.fromkeys(owner_of(w.spec) for w in matrices)}
        self.roles = {owner_of(w.spec): w.spec.role for w in matrices}
        self.factors = {
            w.spec.name: found for w in matrices if (found := multiplied(w, self.layers[owner_of(w.spec)])) is not None
        }
        self.ends = {name: parts[name] for name in ends_of(specs)}

    def run(self, wanted: Iterable[str]) -> Pass:
        """Run the module and return what is needed for these quantities."""
        batch = copy.deepcopy(self._batch)  # a training step may write into its batch
        kinds = {name.partition("/")[0] for name in wanted}
        owners = [name.rpartition(".")[0] or MODEL for name in self.factors] if "update" in kinds else []
        taking = {name: self.layers[name] for name in owners}
        layers = (self.layers if "feature" in kinds else {}) | (self.ends if "logits" in kinds else {})
        with undisturbed(self._module), captured(layers) as outputs, taken_in(taking) as found, self._context():
            self._forward(self._module, batch)
        return Pass(outputs, found)

    def inputs_of(self, watched: Watched, found: Pass) -> list[Tensor] | None:
        """Return what each watched matrix of a parameter multiplied, [T, I]; None where that is not known."""
        which, calls = self.factors.get(watched.spec.name), found.inputs.get(owner_of(watched.spec))
        if which is None or not calls:
            return None
        return [_joined([call[which[i % len(which)]] for call in calls]) for i in watched.indices]

    def logits_of(self, outputs: Outputs) -> Tensor | None:
        """Return the module's own output, or where ``forward`` is not called the last output layer's."""
        return next((outputs[name] for name in self.ends if name in outputs), None)


def ends_of(specs: Sequence[ParamSpec]) -> list[str]:
    """Return the modules whose output may be the logits, the likeliest first: the model, output layers, the last layer.

    Examples:
        >>> specs = [ParamSpec(f"{name}.weight", Role.HIDDEN, (2, 2)) for name in "abc"]
        >>> ends_of([ParamSpec("embedding.weight", Role.INPUT, (2, 2), readout=("readout",)), *specs])
        ['(model)', 'readout', 'c']
    """
    matrices = [spec for spec in specs if spec.role in MATRIX_ROLES]
    outputs = [name for s in matrices for name in (s.readout if s.role is not Role.OUTPUT else (owner_of(s),))]
    return list(dict.fromkeys([MODEL, *reversed(outputs), *map(owner_of, matrices[-1:])]))


def owner_of(spec: ParamSpec) -> str:
    """Return the name of the module that a parameter belongs to, :data:`MODEL` for the training module itself.

    Examples:
        >>> owner_of(ParamSpec("net.0.weight", Role.HIDDEN, (2, 2)))
        'net.0'
    """
    return spec.name.rpartition(".")[0] or MODEL


def is_layer(module: nn.Module) -> bool:
    """Whether what a module puts out is its own matrices' work: it has no submodules, or is torch's attention.

    Examples:
        >>> is_layer(nn.Linear(2, 2)), is_layer(nn.MultiheadAttention(2, 1)), is_layer(nn.Sequential(nn.Linear(2, 2)))
        (True, True, False)
    """
    return isinstance(module, nn.MultiheadAttention) or next(module.children(), None) is None


def multiplied(watched: Watched, module: nn.Module) -> tuple[int, ...] | None:
    """Return which of its module's inputs each matrix of a parameter multiplies; None where that is not known.

    Examples:
        >>> multiplied(Watched.of(ParamSpec("weight", Role.HIDDEN, (2, 2))), nn.Linear(2, 2))
        (0,)
    """
    attribute = watched.spec.name.rpartition(".")[2]
    known = (_MULTIPLIES.get(f"{cls.__module__}.{cls.__qualname__}", {}) for cls in type(module).__mro__)
    return next((found[attribute] for found in known if attribute in found), None)


@contextlib.contextmanager
def taken_in(modules: Mapping[str, nn.Module]) -> Iterator[Inputs]:
    """Inside, collect the tensors that each module is called with, by call.

    Examples:
        >>> layer = nn.Linear(2, 3)
        >>> with taken_in({"fc": layer}) as inputs:
        ...     _ = layer(torch.ones(5, 2))
        >>> inputs["fc"][0][0].shape
        torch.Size([5, 2])
    """
    found: Inputs = {}
    handles = [m.register_forward_pre_hook(_keep(found, name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: Inputs, name: str) -> Any:  # noqa: ANN401 - a hook
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named: dict[str, Any] = dict(zip(_QUERY_KEY_VALUE, args, strict=False)) | kwargs
        # Attention may be called by keyword in any order; other layers have one input.
        given = [named[key] for key in _QUERY_KEY_VALUE if key in named] or list(kwargs.values())
        tensors = [value for value in given if isinstance(value, Tensor)]
        copies = {id(t): t.detach().clone() for t in tensors}  # query, key and value are mostly one
        found.setdefault(name, []).append([copies[id(t)] for t in tensors])

    return hook


def _joined(calls: Sequence[Tensor]) -> Tensor:
    flat = [call.reshape(-1, call.shape[-1]) for call in calls]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
