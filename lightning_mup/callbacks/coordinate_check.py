"""CoordinateCheck: record how each layer's output and each update change, in any run or over a sweep of sizes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lightning_mup.analysis.coordinate import Coordinate, CoordinateReport, Kind, fit_slopes, save_coordinates
from lightning_mup.analysis.updates import Yardstick
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.callbacks.probe import Outputs, captured, seed_all, undisturbed
from lightning_mup.core.base import Base, canonical
from lightning_mup.core.infer import infer, shared_names
from lightning_mup.core.method import Method
from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.rules import find_rules
from lightning_mup.core.scaling import Choices, RulesLike

FILE = "coordinate_check.csv"
STREAM = "stream"
MODEL = "(model)"
_DEFAULT_LR = 0.01
_TOLERANCES = {"width": 0.1, "depth": 0.15}
_LOUD = ("lightning", "lightning.pytorch", "lightning.fabric")

Forward = Callable[[LightningModule, Any], object]


class CoordinateCheck(Callback):
    """Record over the first steps how much each layer's output and each parameter move.

    Before training and after each optimizer step the module is run on one fixed batch, without gradients, in eval mode
    and with its own randomness; training goes on exactly as it would have without. Recorded are, per module that owns
    parameters and per residual block, ``RMS(h_t - h_0)`` over all entries, and per parameter
    ``||W_t - W_(t-1)||_2 / (fan_out/fan_in)^1/2``, divided by what the plan's branch multipliers ask for. Under a right
    parametrization none of them grows or falls with the model's size: collect the records of several sizes and give them
    to :func:`~lightning_mup.analysis.coordinate.fit_slopes`, or let :func:`coordinate_check` do all this.

    ``records`` holds the numbers; ``coordinate_check.csv`` in the log directory, too, as soon as the steps are over.

    Args:
        steps: optimizer steps to record (>= 1); afterwards the callback does nothing.
        probe: batch to measure on, as the data loader gives them; None takes the first training batch. All outputs on
            it are kept in memory while recording.
        updates: whether to record the parameters' updates; each takes an eigenvalue decomposition per step.
        forward: how to run the module on the batch; None calls ``training_step`` with logging switched off.
        size: width or depth to write into the records.
        seed: seed to write into the records.

    Raises:
        ValueError: ``steps`` is not positive; or, when fitting starts, the module steps its optimizers itself and no
            ``forward`` is given.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> check = CoordinateCheck(steps=1)
        >>> Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[check]).fit(BoringModel())
        >>> [(r.step, r.kind, r.layer) for r in check.records]
        [(1, 'output', 'layer'), (1, 'update', 'layer.weight'), (1, 'update', 'layer.bias')]

    Reference:
        Yang et al. 2022 (arXiv:2203.03466), Appendix D.1; spectral norms: Yang et al. 2023 (arXiv:2310.17813).
    """

    def __init__(
        self,
        steps: int = 10,
        *,
        probe: object = None,
        updates: bool = True,
        forward: Forward | None = None,
        size: int = 1,
        seed: int = 0,
    ) -> None:
        if steps < 1 or size < 1:
            raise ValueError(f"steps and size must be 1 or more, got steps={steps!r}, size={size!r}")
        self.steps, self.probe, self.updates, self.forward = steps, probe, updates, forward
        self.size, self.seed = size, seed
        self.records: list[Coordinate] = []
        self._clear()

    def _clear(self) -> None:
        self._running = False
        self._batch: object = None
        self._yardsticks: dict[str, Yardstick] = {}
        self._watched: dict[str, nn.Module] = {}
        self._outputs: Outputs = {}
        self._weights: Outputs = {}

    # -- when -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready to record from the first batch on."""
        if self.forward is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"training_step of {type(pl_module).__name__} steps its optimizers itself, so a coordinate check cannot "
                f"run it; give CoordinateCheck(forward=lambda module, batch: module(batch[0])), say"
            )
        self._clear()
        self.records, self._step, self._seen = [], 0, trainer.global_step
        self._running = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Before the first step: remember all outputs and weights."""
        if self._running and self._batch is None:
            self._batch = copy.deepcopy(batch) if self.probe is None else self._on_device(trainer)
            self._yardsticks = self._read(trainer, pl_module)
            self._watched = _watched(pl_module, self._yardsticks)
            self._outputs = self._run(trainer, pl_module)
            self._drop_repeated_model_output()
            self._weights = self._copied(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """After each optimizer step: compare."""
        if not self._running or trainer.global_step == self._seen:  # gradients are still being accumulated
            return
        self._seen = trainer.global_step
        self._step += 1
        found = self._changes(trainer, pl_module) | self._updates(pl_module)
        if trainer.is_global_zero:
            self.records += [Coordinate(self.size, self.seed, self._step, *k, v, self._group(k)) for k, v in found.items()]
        if self._step == self.steps:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is, if training ends before all steps are recorded."""
        if self._running:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        self._clear()
        folder = trainer.log_dir  # type: ignore[attr-defined]  # asked on every rank, since ranks talk about it
        if folder is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_coordinates(self.records, Path(folder) / FILE)

    # -- what -----------------------------------------------------------------------------------------------------

    def _on_device(self, trainer: Trainer) -> object:
        batch = trainer.precision_plugin.convert_input(copy.deepcopy(self.probe))
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _read(self, trainer: Trainer, module: LightningModule) -> dict[str, Yardstick]:
        found = _parametrize(trainer)
        if found is not None and found.plan is not None:
            rules = find_rules(found.rules)
            return {p.spec.name: Yardstick.of(p, rules) for p in found.plan.params}
        shapes = {n: tuple(p.shape) for names, p in shared_names(module) for n in names}
        try:
            specs = infer(module, Base(shapes))
        except ValueError as error:
            rank_zero_warn(f"CoordinateCheck records outputs but no updates, since it cannot read the parameters: {error}")
            return {}
        return {spec.name: Yardstick.of(ParamPlan(spec), None) for spec in specs}

    def _run(self, trainer: Trainer, module: LightningModule) -> Outputs:
        batch = copy.deepcopy(self._batch)  # a training step may write into its batch
        with undisturbed(module), captured(self._watched) as outputs:
            if self.forward is not None:
                self.forward(module, batch)
            else:
                with trainer.precision_plugin.train_step_context():
                    _training_step(module, batch)
        return outputs

    def _drop_repeated_model_output(self) -> None:
        last = self._outputs.get(MODEL)
        others = (t for name, t in self._outputs.items() if name != MODEL)
        if last is not None and any(torch.equal(last, other) for other in others):
            del self._outputs[MODEL], self._watched[MODEL]

    def _copied(self, module: LightningModule) -> Outputs:
        named = {names[0]: p for names, p in shared_names(module)} if self.updates else {}
        return {name: _whole(named[name]) for name in self._yardsticks if name in named}

    def _changes(self, trainer: Trainer, module: LightningModule) -> dict[tuple[Kind, str], float]:
        after = self._run(trainer, module)
        lost = [n for n, start in self._outputs.items() if n not in after or after[n].shape != start.shape]
        for name in lost:
            rank_zero_warn(f"CoordinateCheck drops {name!r}: its output on the probe is not of the same shape every time")
            del self._outputs[name], self._watched[name]
        return {
            ("output", name): float((after[name] - start).square().mean().sqrt()) / self._by_design(name)
            for name, start in self._outputs.items()
        }

    def _updates(self, module: LightningModule) -> dict[tuple[Kind, str], float]:
        before, self._weights = self._weights, self._copied(module)
        return {("update", n): self._yardsticks[n].measure(self._weights[n] - before[n]) for n in before}

    def _by_design(self, layer: str) -> float:
        found = None if layer == MODEL else _main(layer, self._watched[layer], self._yardsticks, ends=True)
        return 1.0 if found is None else found.output

    def _group(self, key: tuple[Kind, str]) -> str:
        kind, layer = key
        if kind == "update":
            return self._yardsticks[layer].spec.role.value
        found = None if layer == MODEL else _main(layer, self._watched[layer], self._yardsticks)
        return STREAM if found is None else found.spec.role.value


def _parametrize(trainer: Trainer) -> Parametrize | None:
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, Parametrize)), None)


def _watched(module: LightningModule, yardsticks: Mapping[str, Yardstick]) -> dict[str, nn.Module]:
    """Modules that own parameters, residual blocks, and the model itself, by canonical name."""
    blocks = {y.spec.block for y in yardsticks.values()}
    named = ((canonical(f"{name}.").strip("."), part) for name, part in module.named_modules())
    return {
        name or MODEL: part
        for name, part in named
        if not name or name in blocks or next(part.parameters(recurse=False), None) is not None
    }


def _main(
    layer: str, module: nn.Module, yardsticks: Mapping[str, Yardstick], *, ends: bool = False
) -> Yardstick | None:
    """Yardstick of the parameter that stands for a module: what it is, or what its output ends with."""
    own = [f"{layer}.{name}" for name, _ in module.named_parameters(recurse=False)]
    if ends and isinstance(module, nn.MultiheadAttention):  # calls its out_proj as a function
        own = [f"{layer}.out_proj.weight"]
    shared = {name: y for y in yardsticks.values() for name in (y.spec.name, *y.spec.tied_to)}
    return next((shared[name] for name in own if name in shared), None)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data.clone()


def _training_step(module: LightningModule, batch: object) -> None:
    # as Lightning itself decides it: a second argument is the batch's index, whatever its name
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    module.training_step(*((batch, 0) if indexed else (batch,)))


@dataclass(frozen=True, slots=True)
class Sweep:
    """How :func:`coordinate_check` runs its trainings.

    Args:
        seeds: one training per size and seed; at least two make the intervals honest.
        data: batches to train on: a data loader or any iterable, of which the first ``steps`` batches serve all
            trainings, or a LightningDataModule; None takes the modules' own ``train_dataloader``.
        tolerance: largest slope that passes; None means 0.1 for width and 0.15 for depth.
        weight_decay: fraction of a weight removed per step at the base, for ``method``.
        choices: what else :class:`~lightning_mup.callbacks.parametrize.Parametrize` is to be told.
        updates: whether to check the updates' spectral norms, too.
        accelerator: Lightning's ``accelerator``; one device is used.
        progress: whether to show a progress bar on stderr.
    """

    seeds: Sequence[int] = (0, 1, 2)
    data: object = None
    tolerance: float | None = None
    weight_decay: float = 0.0
    choices: Choices = field(default_factory=Choices)
    updates: bool = True
    accelerator: str = "auto"
    progress: bool = True
