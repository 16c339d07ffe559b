"""WatchUpdates: log how large weights, updates and features are, how aligned and of which rank, every n steps."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_mup.callbacks.matrices import (
    Rates,
    Watched,
    choose,
    decays_of,
    normalized_rates_of,
    parameters_of,
    rates_of,
    read_specs,
)
from lightning_mup.callbacks.probe_pass import Pass, Probe
from lightning_mup.callbacks.quantities import (
    AFTER,
    BEFORE,
    CHEAP,
    OF_PASSES,
    Change,
    Key,
    Quantity,
    Sum,
    check_quantities,
    means,
    of_alignment,
    of_matrices,
    of_passes,
    of_rates,
    rooted,
)
from lightning_mup.callbacks.watch import Forward
from lightning_mup.core.infer import RoleLike
from lightning_mup.core.registry import near
from lightning_mup.core.spec import ParamSpec

Per = Literal["role", "matrix"]
_STEP = "trainer/global_step"  # Lightning's x-axis in W&B


class WatchUpdates(Callback):
    """Log, every n optimizer steps, what weights, updates, features and rates are like, per role or per matrix.

    Every n-th optimizer step is watched; a batch in which several optimizers step counts once. An update is what a step
    applied, ``W_new - W_old``, everything included: rate, schedule, decay, clipping. The keys are ``quantity/role``
    (``update/spectral_norm/hidden``), for a mean over the role's matrices, or ``quantity/matrix``:

    - ``weight/rms``, ``weight/spectral_norm``, ``weight/stable_rank``: of the weight after the step;
    - ``update/rms``, ``update/spectral_norm``, ``update/stable_rank``: of the update;
    - ``update/relative``: ``||dW||_F / ||W||_F``, with the weight before the step (inf for a zero weight);
    - ``update/alignment``: ``log_fan_in( RMS(dW x) / (RMS(dW) RMS(x)) )``, the mean over tokens, where x is what the
      layer takes in before the step; of linear layers and torch's attention, not of embeddings and convolutions;
    - ``feature/rms``, ``feature/change``: RMS of what the layers with matrices (modules without submodules, and torch's
      attention) put out after the step, and of its change in this one step;
    - ``logits/rms``, ``logits/change``: the same of the model's output, or where ``forward`` is not called of the last
      output layer's, tied ones included (without one, of the last layer's);
    - ``optimizer/effective_learning_rate``: ``sqrt(lr lambda)``, where lambda is the fraction of a weight that the step
      removes, and lr that at which it moves (of what SpectralNormalization normalizes, that at the base);
      ``optimizer/decay_timescale``: ``1/lambda`` steps, inf without decay.

    Roles are those of the :class:`~lightning_mup.Parametrize` callback's plan. Without one they are told from module
    types alone, by which every matrix that is not looked up is hidden; give ``roles`` for better ones. Matrices are
    those that the optimizers see: fused queries, keys and values are three, kernels are flattened, experts are stacked,
    vectors are one column, and sharded ones are whole.

    Cost: on watched steps a copy of the watched matrices, held over the step; for spectral norms and stable ranks one
    exact SVD of each, in float32 or wider; for alignment, features and logits one forward pass before and one after
    the step on one batch (each rank's own, sums taken over ranks), in eval mode and without a trace, whose inputs and
    outputs of the watched layers are held. On all other steps nothing is done.

    Args:
        every_n_steps: which optimizer steps are watched (>= 1).
        quantities: which quantities; the default takes neither an SVD nor a forward pass.
        per: ``"role"`` logs means over each role's matrices, ``"matrix"`` each by itself.
        max_matrices: how many matrices of each role are watched (>= 1), evenly spread over the model; None for all.
        probe: batch for the forward passes, as the data loader gives them; None takes the first watched step's.
        forward: how to run the module on the batch; None calls ``training_step`` with logging switched off.
        roles: role (or :class:`~lightning_mup.Layout`) by name pattern, where there is no plan.

    Raises:
        ValueError: a setting is unknown or out of range; or, when fitting starts, a parameter cannot be read, ``roles``
            are given beside a plan, or a module that steps its optimizers itself needs ``forward``.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> watch = WatchUpdates(1, quantities=["update/spectral_norm"])
        >>> trainer = Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[watch])
        >>> trainer.fit(BoringModel())
        >>> sorted(trainer.callback_metrics)
        ['update/spectral_norm/hidden', 'update/spectral_norm/vector']

    Reference:
        arXiv:2512.05620 (the same diagnostics); Everett et al. 2024 (arXiv:2407.05872) for alignment.
    """

    _old: dict[str, Tensor] | None  # the matrices before the step, from just before it
    _early: Pass | None  # the forward pass before the step
    _rates: dict[str, Rates]

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        quantities: Iterable[Quantity] = CHEAP,
        per: Per = "role",
        max_matrices: int | None = 8,
        probe: object = None,
        forward: Forward | None = None,
        roles: Mapping[str, RoleLike] | None = None,
    ) -> None:
        if every_n_steps < 1 or (max_matrices is not None and max_matrices < 1):
            raise ValueError(
                f"every_n_steps and max_matrices must be 1 or more, got {every_n_steps!r} and {max_matrices!r}; "
                f"max_matrices=None takes all"
            )
        if per not in get_args(Per):
            raise ValueError(f"per must be 'role' or 'matrix', got {per!r}{near(str(per), get_args(Per))}")
        self.every_n_steps, self.quantities, self.per = every_n_steps, check_quantities(quantities), per
        self.max_matrices, self.probe, self.forward = max_matrices, probe, forward
        self.roles = dict(roles or {})
        self._specs: tuple[ParamSpec, ...] = ()
        self._watched: tuple[Watched, ...] = ()
        self._probe: Probe | None = None
        self._defined: set[str] = set()
        self._forget()

    # -- when -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the matrices."""
        if self._wants(OF_PASSES) and self.forward is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"training_step of {type(pl_module).__name__} steps its optimizers itself, so it cannot be run for "
                f"{', '.join(q for q in self.quantities if q in OF_PASSES)}; give WatchUpdates(forward=lambda module, "
                f"batch: module(batch[0])), say"
            )
        self._specs = read_specs(trainer, pl_module, self.roles)
        self._watched = choose(self._specs, self.max_matrices)
        self._probe, self._defined, self._said = None, set(), False
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Before a step that is watched, or the first batch that is accumulated for it: see what the layers take in."""
        if not self._due(trainer) or not self._wants(OF_PASSES) or self._early is not None:
            return
        if self._probe is None:
            given = batch if self.probe is None else self._on_device(trainer)
            self._probe = Probe(
                trainer, pl_module, given, watched=self._watched, specs=self._specs, forward=self.forward
            )
        if self._wants(BEFORE):
            self._early = self._probe.run(BEFORE.intersection(self.quantities))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Before a step that is watched: copy weights and rates."""
        if not self._due(trainer):
            return
        around = decays_of(trainer, optimizer), normalized_rates_of(trainer, optimizer)
        by_id = rates_of(optimizer, *around)
        parameters = parameters_of(pl_module)
        self._rates |= {n: by_id[id(p)] for n, p in parameters.items() if id(p) in by_id}
        if self._old is None:
            self._old = {w.spec.name: w.take(parameters[w.spec.name]) for w in self._watched}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """After a step that is watched: measure and log."""
        if self._old is None:
            return
        found = self._measured(pl_module, self._old)
        shared = [key for key in found if key[0] in OF_PASSES]
        found |= dict(zip(shared, _summed(trainer, [found[key] for key in shared]), strict=True))
        metrics = means(rooted(found), self.per)
        self._forget()
        self._say_missing(metrics)
        trainer.callback_metrics.update(_tensors(trainer, metrics))
        self._log(trainer, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of everything that belongs to the module."""
        self._probe = None
        self._forget()

    # -- what -----------------------------------------------------------------------------------------------------

    def _wants(self, names: frozenset[str]) -> bool:
        return not names.isdisjoint(self.quantities)

    def _due(self, trainer: Trainer) -> bool:
        # Batches in which an optimizer stepped, over all epochs and resumed runs; what Lightning's loggers count, too.
        return (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % self.every_n_steps == 0

    def _forget(self) -> None:
        self._old, self._early, self._rates = None, None, {}

    def _measured(self, module: LightningModule, old: Mapping[str, Tensor]) -> dict[Key, Sum]:
        parameters, found = parameters_of(module), dict[Key, Sum]()
        for watched in self._watched:
            name = watched.spec.name
            change = Change.of(old[name], watched.see(parameters[name]))
            found |= of_matrices(watched, change, self.quantities)
            if name in self._rates:
                found |= of_rates(watched, self._rates[name], self.quantities)
            if self._probe and self._early and "update/alignment" in self.quantities:
                found |= of_alignment(watched, change, self._probe, self._early)
        if self._probe and self._wants(AFTER):
            passes = self._early, self._probe.run(AFTER.intersection(self.quantities))
            found |= of_passes(self._probe, passes, self.quantities)
        return found

    def _on_device(self, trainer: Trainer) -> object:
        batch = trainer.precision_plugin.convert_input(copy.deepcopy(self.probe))
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _say_missing(self, metrics: Mapping[str, float]) -> None:
        missing = [q for q in self.quantities if not any(key == q or key.startswith(f"{q}/") for key in metrics)]
        if missing and not self._said:
            self._said = True
            rank_zero_warn(
                f"WatchUpdates has nothing to log for {', '.join(missing)}: no watched matrix belongs to a layer that "
                f"is called and of which this is known"
            )

    @rank_zero_only
    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        fresh = metrics.keys() - self._defined
        self._defined |= fresh
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _define(logger, sorted(fresh))
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _define(logger: WandbLogger, keys: Iterable[str]) -> None:
    """Have W&B sum each up by its smallest and its last value; patterns (``update/*``) would not be summed up."""
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    for key in keys:
        name = f"{prefix}{key}".replace(".", r"\.")  # a bare dot would be a nested key
        logger.experiment.define_metric(name, step_metric=_STEP, step_sync=True, summary="min,last")


def _tensors(trainer: Trainer, metrics: Mapping[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, device=trainer.strategy.root_device) for key, value in metrics.items()}


def _summed(trainer: Trainer, sums: list[Sum]) -> list[Sum]:
    """Add up sums and counts over all ranks."""
    if not sums:
        return []
    device = trainer.strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
    total = trainer.strategy.reduce(torch.tensor(sums, dtype=dtype, device=device), reduce_op="sum")
    return [(float(pair[0]), float(pair[1])) for pair in total.tolist()]
