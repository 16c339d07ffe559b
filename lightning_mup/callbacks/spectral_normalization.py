"""Spectral normalization of updates, for whatever optimizer trains the module."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mup.callbacks.companions import refuse_second, save_state
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.core.base import Base
from lightning_mup.core.grafted import Grafted
from lightning_mup.core.infer import RoleLike, infer, shared_names
from lightning_mup.core.method import Decay, Method
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.own_decay import decay_of
from lightning_mup.core.power import SPECTRAL
from lightning_mup.core.registry import near
from lightning_mup.core.renormalize import Matrix, Renormalized
from lightning_mup.core.renormalize_sharded import ShardedRenormalized
from lightning_mup.core.scaling import check_guesses
from lightning_mup.core.schedules import Group
from lightning_mup.core.spec import ParamSpec, Role
from lightning_mup.core.stack import Arrangement, is_vector, portions
from lightning_mup.core.step_normalizer import StepNormalizer, parameters_of

Readout = Literal["spectral", "rms", "keep"]
Normalize = SpectralNormalize | RmsNormalize
Saved = Mapping[str, Mapping[str, torch.Tensor]]
_NORMALIZED = Method("spectral_normalization", update_norm=SPECTRAL)
_DECAYS = ("coupled", "l2")
_ATTACHED = ("log", "log_dict")  # by Lightning: bound to the module


class SpectralNormalization(Callback):
    """After any optimizer's step, ``W <- W_old - lr (fan_out/fan_in)^(1/2) D/sigma(D) - decay``, ``D = W_old - W_new``.

    Each matrix' step gets the spectral norm ``lr (fan_out/fan_in)^(1/2)``, with sigma from vectors that are iterated on
    from step to step, all matrices of one shape at once. Tables that are looked up (embeddings) get the root mean
    square ``lr``. Vectors stay as the optimizer moves them. The rate is that at the base: no multiplier is needed, and
    :class:`~lightning_mup.Parametrize` multiplies what is normalized by its ``lr_multipliers`` and folded forward
    multipliers alone. The optimizer's own weight decay is kept out of the norm and applied beside the step, but for an
    L2 term, which is part of the gradient.

    A step multiplies each matrix twice with a block of vectors, and so reads it as often as with one vector. A copy of
    the weights is held. Measured over steps 50 to 150 of four layers, norms exceed the wanted one at the worst, and in
    the median, by

    ========================  ==================  ================  ===============  ==============
    of steps on               AdamW               SGD, momentum     Lion             torch's Muon
    ========================  ==================  ================  ===============  ==============
    all data, 8 vectors       0.0%, 0.0%          0.0%, 0.0%        0.1%, 0.0%       0.7%, 0.0%
    all data, 4 vectors       0.0%, 0.0%          0.0%, 0.0%        0.1%, 0.0%       1.3%, 0.1%
    all data, 1 vector        0.1%, 0.0%          0.0%, 0.0%        4.8%, 0.1%       5.5%, 0.9%
    noisy batches, 8 vectors  0.1%, 0.0%          0.0%, 0.0%        0.2%, 0.0%       3.0%, 0.2%
    noisy batches, 4 vectors  0.2%, 0.0%          0.0%, 0.0%        0.4%, 0.0%       6.8%, 1.1%
    noisy batches, 1 vector   34%, 1.6%           10%, 0.6%         24%, 2.5%        18%, 4.8%
    ========================  ==================  ================  ===============  ==============

    They are never too small by more than 0.1%. It does not go on at a step of rate 0, which hides the direction (a
    warm-up's first). Parameters in bfloat16 move by what their rounding leaves of the step.

    Args:
        readout: readouts by ``"spectral"`` norm (the paper's), by ``"rms"`` (``lr/fan_in^(1/2)``), or ``"keep"`` them
            out. On a small test, ``lr_multipliers`` of vectors and readout tuned at the base, log2 of the best
            rate moves by 0.011 +- 0.010 per doubling of width (64 to 512) with the spectral norm, and by 0.101 +- 0.019
            for AdamW under muP alone; untuned by 0.133 +- 0.007 and 0.112 +- 0.007. With ``"rms"`` it is -0.008 +-
            0.012 untuned, but then what a step changes in the readout's outputs grows with width: as width^0.2 on
            another test, steps 1 to 10, where the spectral norm has width^0.02.
        iterations: iterations a step (>= 1), after the warm-up.
        warmup_steps: number of first steps that take five iterations each (>= 0).
        vectors: how many vectors are iterated together (>= 1): 1 is the paper's estimate, 8 follow noisy steps closer,
            for a training step that takes one percent longer.
        roles: role or :class:`~lightning_mup.Layout` by name pattern, where there is no Parametrize beside.
        decay: what the ``weight_decay`` of an optimizer that nobody declared means, ``"coupled"`` or ``"l2"``.

    Raises:
        ValueError: a setting is out of range; or, while fitting starts, an optimizer normalizes on its own, is
            grafted, or decays nobody knows how.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> before = model.layer.weight.detach().clone()
        >>> spectral = SpectralNormalization()
        >>> Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[spectral]).fit(model)
        >>> (torch.linalg.matrix_norm(model.layer.weight - before, ord=2) / (0.1 * (2 / 32) ** 0.5)).round(decimals=2)
        tensor(1., grad_fn=<RoundBackward1>)

    Reference:
        arXiv:2512.05620, App. F.
    """

    def __init__(
        self,
        *,
        readout: Readout = "spectral",
        iterations: int = 1,
        warmup_steps: int = 50,
        vectors: int = 4,
        roles: Mapping[str, RoleLike] | None = None,
        decay: Decay | None = None,
    ) -> None:
        for key, value, allowed in (("readout", readout, get_args(Readout)), ("decay", decay, (None, *_DECAYS))):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {allowed}, got {value!r}{near(str(value), map(str, allowed))}")
        self.readout, self.decay, self.roles = readout, decay, dict(roles or {})
        self._spectral = SpectralNormalize(iterations, warmup_steps, vectors)
        self._steps: list[StepNormalizer] = []
        self._saved: Saved = {}
        self._in_batch = False

    # -- when -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second one, and forget an earlier run."""
        if stage != "fit":
            return
        self._detach()
        self._saved = {}
        refuse_second(trainer, SpectralNormalization, "a step has one size")
        if self.roles and _parametrize_of(trainer) is not None:
            raise ValueError(f"Parametrize has the roles; give roles={self.roles} there")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start, at the first batch: by now a checkpoint is loaded, and what decays weights has its hooks."""
        if not self._steps and trainer.optimizers:
            self._attach(trainer, pl_module)
        self._in_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Steps from here on may be those of a checkpoint that is being written."""
        self._in_batch = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the vectors for whoever saves after training, and take the hooks off."""
        self._saved = self.state()
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the vectors for whoever saves after an interrupt, and take the hooks off."""
        self._saved = self.state()
        self._detach()

    # -- what -----------------------------------------------------------------------------------------------------

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        specs, found = self._specs(trainer, module), _parametrize_of(trainer)
        if self.readout != "spectral" and not any(s.role is Role.OUTPUT and s.certain for s in specs.values()):
            check_guesses(f"readout={self.readout!r} does", [Role.OUTPUT], specs.values())
        scaling = None if found is None else found._scaling
        factors = {name: 1.0 if scaling is None else scaling.param(s, _NORMALIZED, {}).lr for name, s in specs.items()}
        names = {id(p): names[0] for names, p in shared_names(module)}
        for optimizer in trainer.optimizers:
            _check(optimizer, names)
            decays = [self._decay_of(optimizer, group, found) for group in optimizer.param_groups]
            stacks = [
                (index, stack)
                for index, group in enumerate(optimizer.param_groups)
                for stack in self._stacks(group, names, specs, factors)
            ]
            self._steps.append(StepNormalizer(optimizer, stacks, decays, active=lambda: self._in_batch))
        for _, stack in self._stacks_of_all():
            stack.load_state_dict(self._saved)
        rank_zero_info(self._summary())

    def rates(self, optimizer: Optimizer) -> dict[int, float]:
        """Return the learning rates at which an optimizer's next step will move what is normalized, by ``id``."""
        return {key: value for step in self._steps for key, value in step.rates(optimizer).items()}

    def _specs(self, trainer: Trainer, module: LightningModule) -> dict[str, ParamSpec]:
        if (found := _parametrize_of(trainer)) is not None:
            assert found.plan is not None
            return {param.spec.name: param.spec for param in found.plan.params}
        shapes = {name: tuple(p.shape) for names, p in shared_names(module) for name in names}
        return {spec.name: spec for spec in infer(module, Base(shapes), roles=self.roles)}

    def _stacks(
        self, group: Group, names: Mapping[int, str], specs: Mapping[str, ParamSpec], factors: Mapping[str, float]
    ) -> list[Renormalized]:
        parts: dict[tuple[object, ...], list[Matrix]] = {}
        kinds: dict[tuple[object, ...], Normalize] = {}
        for p in group["params"]:
            spec = specs.get(names[id(p)])  # frozen parameters have none
            normalize = None if spec is None or not p.numel() or is_vector(p) else self._normalize(spec)
            if spec is None or normalize is None:
                continue
            arrangement = Arrangement.of(p, {"axes": spec.axes, "split": spec.split})
            sharded = isinstance(p, DTensor)
            key: tuple[object, ...] = (normalize, arrangement.rows, arrangement.columns, p.dtype, p.device, sharded)
            kinds[key] = normalize
            parts.setdefault(key, []).append(Matrix(spec.name, p, arrangement, factors[spec.name]))
        made: list[Renormalized] = []
        for key, matrices in parts.items():
            by_param = {id(matrix.param): matrix for matrix in matrices}
            for i, params in enumerate(portions([matrix.param for matrix in matrices])):
                members = [by_param[id(p)] for p in params]
                kind = functools.partial(ShardedRenormalized, first=i) if key[-1] else Renormalized
                made.append(kind(members, kinds[key]))
        return made

    def _normalize(self, spec: ParamSpec) -> Normalize | None:
        if spec.role in (Role.VECTOR, Role.SCALAR):
            return None
        if spec.lookup:
            return RmsNormalize()
        if spec.role is Role.OUTPUT and self.readout != "spectral":
            return RmsNormalize(over_inputs=True) if self.readout == "rms" else None
        return self._spectral

    def _decay_of(self, optimizer: Optimizer, group: Group, found: Parametrize | None) -> Decay | None:
        declared = decay_of(optimizer, group, found.declare if found else None) or self.decay
        if declared is None and group.get("weight_decay"):
            raise ValueError(
                f"{type(optimizer).__name__} has weight_decay={group['weight_decay']}, and nobody declared whether it "
                f"removes lr x weight_decay of the weights or adds to the gradient; give decay='coupled' or 'l2', or "
                f"weight_decay=0"
            )
        return declared

    def _stacks_of_all(self) -> list[tuple[int, Renormalized]]:
        return [pair for step in self._steps for pair in step.stacks]

    def _summary(self) -> str:
        kinds: dict[str, int] = {}
        for _, stack in self._stacks_of_all():
            count = sum(matrix.arrangement.count for matrix in stack.matrices)
            kinds[stack.normalize.name] = kinds.get(stack.normalize.name, 0) + count
        said = ", ".join(f"{count} by {name}" for name, count in kinds.items()) or "none"
        return f"SpectralNormalization of the matrices' steps: {said}; everything else moves as its optimizer has it."

    def _detach(self) -> None:
        for step in self._steps:
            step.remove()
        self._steps, self._in_batch = [], False

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the vectors and numbers of steps by parameter name."""
        if not self._steps:
            return dict(self._saved)
        return {name: state for _, stack in self._stacks_of_all() for name, state in stack.state_dict().items()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the vectors and numbers of steps."""
        save_state(self, self.state(), checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the vectors until there is something to go on with."""
        self._saved = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a run."""
        kept = {key: value for key, value in self.__dict__.items() if key not in _ATTACHED}
        return {**kept, "_steps": [], "_saved": self.state(), "_in_batch": False}


def _check(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, Grafted):
        raise ValueError(f"{kind} gives steps a length, which SpectralNormalization replaces; leave out one of the two")
    if own := [group.get("name", i) for i, group in enumerate(optimizer.param_groups) if group.get("spectral_norm")]:
        raise ValueError(
            f"{kind} normalizes its groups {own} on its own (spectral_norm=True); leave out one of the two"
        )
    for p in parameters_of(optimizer):
        if id(p) not in names:
            raise ValueError(
                f"{kind} holds a parameter of shape {tuple(p.shape)} that is not in the LightningModule; make it an "
                f"attribute of the module"
            )


def _parametrize_of(trainer: Trainer) -> Parametrize | None:
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, Parametrize)), None)
