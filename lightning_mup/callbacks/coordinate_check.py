"""CoordinateCheck: record how each layer's output and each update change, in any run or over a sweep of sizes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_mup.analysis.coordinate import Coordinate, CoordinateReport, fit_slopes, save_coordinates
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.callbacks.probe import seed_all
from lightning_mup.callbacks.watch import Forward, Watch
from lightning_mup.core.base import Base, built
from lightning_mup.core.infer import RoleLike, infer
from lightning_mup.core.method import Method, find_method
from lightning_mup.core.scaling import Choices, RulesLike

FILE = "coordinate_check.csv"
_DEFAULT_LR = 1e-3  # what torch itself takes for Adam and SGD
_TOLERANCES = {"width": 0.1, "depth": 0.15}
_LOUD = ("lightning", "lightning.pytorch", "lightning.fabric")


class CoordinateCheck(Callback):
    """Record over the first steps how much each layer's output and each parameter move.

    Before training and after each optimizer step the module is run on one fixed batch, without gradients, in eval mode
    and with its own randomness; training goes on exactly as it would have without. Recorded are, per module that owns
    parameters and per residual block, ``RMS(h_t - h_0)`` over all entries, and per parameter
    ``||W_t - W_(t-1)||_2 / (fan_out/fan_in)^1/2``, divided by what the plan's branch multipliers ask for. Under a right
    parametrization none of them grows or falls with the model's size: collect the records of several sizes and give
    them to :func:`~lightning_mup.analysis.coordinate.fit_slopes`, or let :func:`coordinate_check` do all this.

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
        self._watch: Watch | None = None
        self._running = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready to record from the first batch on."""
        if self.forward is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"training_step of {type(pl_module).__name__} steps its optimizers itself, so a coordinate check "
                f"cannot run it; give CoordinateCheck(forward=lambda module, batch: module(batch[0])), say"
            )
        self.records, self._watch, self._running = [], None, True
        self._step, self._seen = 0, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Before the first step: remember all outputs and weights."""
        if self._running and self._watch is None:
            probe = batch if self.probe is None else self._on_device(trainer)
            self._watch = Watch(trainer, pl_module, probe, updates=self.updates, forward=self.forward)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """After each optimizer step: compare."""
        if self._watch is None or trainer.global_step == self._seen:  # gradients are still being accumulated
            return
        self._seen = trainer.global_step
        self._step += 1
        found = self._watch.outputs() | self._watch.updates()  # on every rank, since sharded ones work together
        if trainer.is_global_zero:
            here = (self.size, self.seed, self._step)
            self.records += [Coordinate(*here, *key, value, self._watch.group(key)) for key, value in found.items()]
        if self._step == self.steps:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is, if training ends before all steps are recorded."""
        if self._running:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        self._watch, self._running = None, False
        if trainer.barebones or getattr(trainer, "fast_dev_run", False):
            return
        folder = trainer.log_dir  # asked on every rank, since it is sent from the first
        if folder is not None and trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_coordinates(self.records, Path(folder) / FILE)

    def _on_device(self, trainer: Trainer) -> object:
        batch = trainer.precision_plugin.convert_input(copy.deepcopy(self.probe))
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@dataclass(frozen=True, slots=True)
class Sweep:
    """How :func:`coordinate_check` runs its trainings.

    Args:
        seeds: one training per size and seed; at least two make the intervals honest.
        data: batches to train on: a data loader or any iterable, of which the first ``steps`` batches serve all
            trainings, or a LightningDataModule; None takes the modules' own ``train_dataloader``.
        tolerance: largest slope that passes; None means 0.1 for width and 0.15 for depth.
        weight_decay: fraction of a weight removed per step at the base, for ``method``.
        options: further arguments of the optimizer of ``method``.
        choices: what else :class:`~lightning_mup.callbacks.parametrize.Parametrize` is to be told.
        updates: whether to check the updates' spectral norms, too.
        accelerator: Lightning's ``accelerator``; one device is used.
        progress: whether to show a progress bar on stderr.

    Examples:
        >>> Sweep(seeds=range(5), weight_decay=1e-5).seeds
        range(0, 5)
    """

    seeds: Sequence[int] = (0, 1, 2)
    data: object = None
    tolerance: float | None = None
    weight_decay: float = 0.0
    options: Mapping[str, object] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    updates: bool = True
    accelerator: str = "auto"
    progress: bool = True


def coordinate_check(
    factory: Callable[..., LightningModule],
    *,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    rules: RulesLike = "mup",
    method: str | Method | None = "adam",
    lr: float | None = None,
    steps: int = 10,
    sweep: Sweep | None = None,
) -> CoordinateReport:
    """Train a model at several widths or depths for a few steps and fit how each layer's changes grow with size.

    A right parametrization gives slopes near 0 everywhere. The smallest size is the base. Global random states, logging
    and the working directory are left as they were.

    Args:
        factory: builds the module: called with ``width=`` or ``depth=`` if it takes such an argument, else with the
            size alone.
        widths: two or more widths.
        depths: two or more depths, instead of widths.
        rules: parametrization by name, or several to multiply (``["mup", "complete_p"]`` for depth).
        method: name of an optimizer; ``None`` keeps the modules' own ``configure_optimizers``.
        lr: learning rate of ``method`` at the base; None means 0.001.
        steps: optimizer steps to take and to check.
        sweep: how to run the trainings: seeds, data, tolerance and so on.

    Raises:
        ValueError: not exactly one of widths and depths is given, it holds fewer than two sizes, or ``lr`` is given
            without ``method``.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from torch import nn
        >>> def factory(width: int) -> LightningModule:
        ...     module = BoringModel()
        ...     module.layer = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 2))
        ...     return module
        >>> once = Sweep(seeds=(0, 1), tolerance=0.5, accelerator="cpu", progress=False)
        >>> coordinate_check(factory, widths=[64, 128, 256], steps=2, sweep=once).passed
        True

    Reference:
        Yang et al. 2022 (arXiv:2203.03466), Appendix D.1; Dey et al. 2025 (arXiv:2505.01618), section 4 (depth).
    """
    axis, sizes = _sizes(widths, depths)
    how = sweep or Sweep()
    if method is not None and lr is None:
        lr = _DEFAULT_LR
    runs = _Runs(factory, axis, sizes, rules, method, lr, steps, how)
    tolerance = _TOLERANCES[axis] if how.tolerance is None else how.tolerance
    return fit_slopes(runs.records(), tolerance=tolerance, size=axis)


def _sizes(widths: Sequence[int] | None, depths: Sequence[int] | None) -> tuple[str, tuple[int, ...]]:
    if (widths is None) == (depths is None):
        raise ValueError(f"give either widths or depths, got widths={widths!r} and depths={depths!r}")
    axis, given = ("width", widths) if depths is None else ("depth", depths)
    sizes = tuple(sorted(set(given or ())))
    if len(sizes) < 2 or sizes[0] < 1:
        raise ValueError(f"{axis}s must hold two positive sizes or more, got {given!r}; try 64, 128, 256")
    return axis, sizes


@dataclass(frozen=True, slots=True)
class _Runs:
    factory: Callable[..., LightningModule]
    axis: str
    sizes: tuple[int, ...]
    rules: RulesLike
    method: str | Method | None
    lr: float | None
    steps: int
    sweep: Sweep

    def records(self) -> list[Coordinate]:
        todo = list(itertools.product(self.sizes, self.sweep.seeds))
        with isolate_rng(), _quiet(), tqdm(todo, "coordinate check", disable=not self.sweep.progress) as bar:
            data = self.data()
            return [record for size, seed in bar for record in self.run(size, seed, data)]

    def data(self) -> object:
        given = self.sweep.data
        if given is None or isinstance(given, LightningDataModule):
            return given
        seed_all(0)
        batches = list(itertools.islice(cast(Iterable[object], given), self.steps))
        return DataLoader(cast(Dataset[object], batches), batch_size=None)  # Lightning takes a list for many loaders

    def run(self, size: int, seed: int, data: object) -> list[Coordinate]:
        check = CoordinateCheck(self.steps, updates=self.sweep.updates, size=size, seed=seed)
        seed_all(seed)
        module = self.build(size)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator=self.sweep.accelerator,
                devices=1,
                max_steps=self.steps,
                max_epochs=-1,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
                callbacks=[self.parametrize(size), check],
            )
            seed_all(seed)  # models of all sizes see the same batches, however many numbers their construction drew
            trainer.fit(module, data)
        return check.records

    def build(self, size: int) -> LightningModule:
        parameters = inspect.signature(self.factory).parameters.values()
        named = any(p.name == self.axis or p.kind is p.VAR_KEYWORD for p in parameters)
        return self.factory(**{self.axis: size}) if named else self.factory(size)

    def parametrize(self, size: int) -> Parametrize:
        choices = self.sweep.choices
        return Parametrize(
            base="self" if size == self.sizes[0] else lambda: self.build(self.sizes[0]),
            rules=self.rules,
            method=self.method,
            lr=self.lr,
            weight_decay=self.sweep.weight_decay,
            options=self.options(),
            roles=self.roles(size),
            branches=choices.branches,
            forward=choices.forward,
            lr_multipliers=choices.lr_multipliers,
            lr_powers=choices.lr_powers,
            eps=choices.eps,
            batch=choices.batch,
            multipliers=choices.multipliers,
        )

    def options(self) -> dict[str, object]:
        method = None if self.method is None else find_method(self.method)
        # Divergence is what the check is there to show, rather than to stop at.
        shown = {"nonfinite": "ignore"} if method and "nonfinite" in method.defaults else {}
        return {**shown, **self.sweep.options}

    def roles(self, size: int) -> Mapping[str, RoleLike]:
        """At the smallest width nothing grows: what is chosen by role there needs what the next width tells."""
        given = self.sweep.choices.roles
        if self.axis == "depth" or size != self.sizes[0]:
            return given
        with isolate_rng():
            wider, base = built(self.build(self.sizes[1])), Base.of(built(self.build(size)))
        read = infer(wider, base, roles=given)
        return {spec.name: spec.role for spec in read if spec.why != "roles"} | dict(given)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from announcing itself once per training."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _LOUD)]
    for logger, _ in levels:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)  # advice on workers and on the machine
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
