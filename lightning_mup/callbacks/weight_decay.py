"""WeightDecay: one callback that decays weights independently of the learning rate, whatever the optimizer."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from lightning_mup.callbacks.companions import refuse_companions
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.core.base import doubled, resolve_base
from lightning_mup.core.decay import DecayPolicy, excluded, find_decay
from lightning_mup.core.decay_amount import Run, find_amount
from lightning_mup.core.decay_schedules import DecayScheduleLike, find_schedule
from lightning_mup.core.decay_step import DecayStep, own_decay, peak_rate, rate_now
from lightning_mup.core.infer import RoleLike, infer, shared_names
from lightning_mup.core.registry import near
from lightning_mup.core.spec import ParamSpec, Role

Takeover = Literal["zero", "refuse"]
_BY_STEP = ("linear", "cosine", "step")
_SHOWN = 4
_SAVED = "lightning_mup.peak_learning_rates"  # of a checkpoint
_ATTACHED = ("log", "log_dict")  # by Lightning, to a callback that has run; they hold the module


class WeightDecay(Callback):
    """Remove a fraction of every weight per step, independent of the learning rate: ``W <- W - lambda s(t) W``.

    ``lambda`` is the fraction at the base times the policy's power of the parameter's size ratios, ``s`` the schedule.
    Weights are multiplied once per optimizer step, after the backward pass and before the update. What the optimizer
    leaves alone does not decay: frozen parameters, those in no optimizer, those without a gradient on that step, and
    all of them where a gradient scaler skips the step. The optimizer's own decay is set to 0.

    In bfloat16 and float16, a weight times ``1 - lambda s`` is rounded back to itself where ``lambda s`` is below
    2^-9 and 2^-12; keep weights in float32 (``precision="bf16-mixed"``).

    Args:
        weight_decay: fraction removed per step at the base, in [0, 1). Give this or exactly one of the next five.
        half_life_steps: steps in which a weight halves (> 0): ``lambda = 1 - 2^(-1/h)``.
        half_life_tokens: tokens in which a weight halves (> 0); needs ``tokens_per_step``.
        decay_times_width: ``lambda`` times the width of the model (> 0), the width being what its inputs write.
        timescale: ``1 / lambda`` as a share of the run's steps (> 0), for ``policy="timescale"``.
        timescale_tokens: ``1 / lambda`` in tokens (> 0), for ``policy="timescale"``; needs ``tokens_per_step``.
        tokens_per_step: tokens in one optimizer step (> 0), for what is given in tokens.
        policy: ``"width"`` (lambda ~ 1/width), ``"constant"``, ``"sqrt"`` (1/sqrt(width), hidden matrices alone),
            ``"timescale"``, or an exponent of width (-0.75).
        schedule: ``"lr"`` follows each group's learning rate over its peak: the ``max_lr`` of a cycle, else the rate
            that the group was given. ``"constant"``, ``"linear"``, ``"cosine"``, ``"step"`` (a tenth at a half, a
            hundredth at three quarters of the run), or a function of (step, total steps), both counted in optimizer
            steps.
        exclude: roles (``"vector"``) or name patterns (``"*.bias"``) of parameters that do not decay.
        takeover: what to do about a ``weight_decay`` in the optimizer's groups: ``"zero"`` it, or ``"refuse"`` to run.
        base: the proxy, in any form that :class:`~lightning_mup.Parametrize` takes, where there is no such callback.
        roles: role or :class:`~lightning_mup.Layout` by name pattern, for what cannot be known, beside ``base``.

    Raises:
        ValueError: at once or while fitting starts: a value or a name is wrong, weights would be decayed twice, or the
            run has no length that a schedule could follow. Each message says what to write.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> decay = WeightDecay(1e-3, base="self")
        >>> Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[decay]).fit(BoringModel())
        >>> decay.rates
        {'layer.weight': 0.001, 'layer.bias': 0.001}

    Reference:
        Qiu et al. 2025 (arXiv:2512.05620), section 4; Loshchilov & Hutter 2019 (arXiv:1711.05101), Algorithm 2.
    """

    def __init__(  # noqa: PLR0913 - each argument is a decision of its own
        self,
        weight_decay: float | None = None,
        *,
        half_life_steps: float | None = None,
        half_life_tokens: float | None = None,
        decay_times_width: float | None = None,
        timescale: float | None = None,
        timescale_tokens: float | None = None,
        tokens_per_step: float | None = None,
        policy: str | float | DecayPolicy = "width",
        schedule: DecayScheduleLike = "lr",
        exclude: Sequence[str] = (),
        takeover: Takeover = "zero",
        base: object = None,
        roles: Mapping[str, RoleLike] | None = None,
    ) -> None:
        given = {
            "weight_decay": weight_decay,
            "half_life_steps": half_life_steps,
            "half_life_tokens": half_life_tokens,
            "decay_times_width": decay_times_width,
            "timescale": timescale,
            "timescale_tokens": timescale_tokens,
        }
        self.policy = find_decay(policy)
        self.amount = find_amount(given, self.policy, tokens_per_step)
        self.schedule = schedule
        self._scheduled = find_schedule(schedule)
        if isinstance(exclude, str):
            raise TypeError(f"exclude must be a list of roles and patterns, got {exclude!r}; write [{exclude!r}]")
        if takeover not in get_args(Takeover):
            allowed = get_args(Takeover)
            raise ValueError(f"takeover must be one of {allowed}, got {takeover!r}{near(str(takeover), allowed)}")
        if roles and base is None:
            raise ValueError(f"roles={dict(roles)} belong to base=...; beside Parametrize they are its argument")
        self.exclude, self.takeover, self.base, self.roles = tuple(exclude), takeover, base, dict(roles or {})
        self.rates: dict[str, float] = {}
        self._peaks: list[list[float]] | None = None
        self._saved: list[list[float]] | None = None
        self._steps: list[DecayStep] = []
        self._undo: list[tuple[Optimizer, int, float]] = []
        self._total = 0
        self._in_batch = False

    # -- when -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what decays the same weights, before anything is touched."""
        if stage != "fit":
            return
        self._give_back()
        self.rates, self._peaks, self._saved, self._in_batch = {}, None, None, False
        what, once = "the schedule that decay follows", "weights decay once a step"
        refuse_companions(trainer, WeightDecay, what=what, once=once)
        found = _parametrize_of(trainer)
        if found is None and self.base is None:
            raise ValueError(
                f"WeightDecay with policy {self.policy.name!r} must know the base's sizes; give base=..., 'self' for "
                f"the base run, or put a Parametrize callback beside it"
            )
        if found is not None and self.base is not None:
            raise ValueError(f"Parametrize has the base; leave out base={self.base!r} of WeightDecay")
        if found is not None and found.weight_decay:
            raise ValueError(
                f"Parametrize(weight_decay={found.weight_decay}) and WeightDecay would decay the same weights; leave "
                f"weight_decay out of Parametrize"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Work out the rates, and take over from the optimizers."""
        specs = self._specs(trainer, pl_module)
        self._total = self._length(trainer, pl_module)
        fraction = self.amount.fraction(Run(steps=lambda: self._total, width=lambda: _width(specs)))
        out = excluded(self.exclude, specs)
        self.rates = {s.name: 0.0 if s.name in out else fraction * self.policy.factor(s) for s in specs}
        if high := {name: rate for name, rate in self.rates.items() if rate >= 1}:
            raise ValueError(f"weight decay would remove more than there is, allowed is < 1 per step, got {high}")
        self._take_over(trainer.optimizers)
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        unheld = [names[0] for names, p in shared_names(pl_module) if p.requires_grad and id(p) not in held]
        rank_zero_info(self._summary(unheld))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start decaying, now that a checkpoint has been loaded: loading may step optimizers and set their groups."""
        self._take_over(trainer.optimizers)
        self._peaks = self._saved or [_peaks(trainer, optimizer) for optimizer in trainer.optimizers]
        rates = {id(p): self.rates.get(names[0], 0.0) for names, p in shared_names(pl_module)}
        for optimizer, peaks in zip(trainer.optimizers, self._peaks, strict=True):
            _refuse_strangers(optimizer, rates)
            follow = self._follow(trainer, optimizer, peaks)
            self._steps.append(DecayStep(optimizer, rates, follow, active=lambda: self._in_batch))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Steps from here on are the run's own."""
        self._in_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Steps from here on may be those of a checkpoint that is being written."""
        self._in_batch = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off, and give the optimizers their own decay back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off, and give the optimizers their own decay back."""
        self._give_back()

    # -- what -----------------------------------------------------------------------------------------------------

    def fractions(self, optimizer: Optimizer) -> dict[int, float]:
        """Return the fraction that an optimizer's next step will remove, by ``id`` of the parameter."""
        return {key: value for step in self._steps for key, value in step.fractions(optimizer).items()}

    def _specs(self, trainer: Trainer, module: LightningModule) -> tuple[ParamSpec, ...]:
        if (found := _parametrize_of(trainer)) is not None:
            assert found.plan is not None
            return tuple(param.spec for param in found.plan.params)
        with isolate_rng():
            base = resolve_base(self.base, module)
            return infer(module, base, wider=doubled(self.base, module), roles=self.roles)

    def _length(self, trainer: Trainer, module: LightningModule) -> int:
        """Return the number of optimizer steps of the run, 0 where nothing depends on it."""
        by_step = callable(self.schedule) or self.schedule in _BY_STEP
        if not by_step and self.amount.kind != "timescale":
            return 0
        what = f"schedule={self.schedule!r}" if by_step else f"timescale={self.amount.value}"
        if not module.automatic_optimization:
            raise ValueError(
                f"{what} needs the number of optimizer steps, which manual optimization does not tell; use "
                f"schedule='lr' or 'constant', and an amount that does not depend on it"
            )
        total = trainer.estimated_stepping_batches
        if not 1 <= total < float("inf"):
            raise ValueError(f"{what} needs the number of optimizer steps, got {total}; give the Trainer max_steps")
        return int(total)

    def _follow(self, trainer: Trainer, optimizer: Optimizer, peaks: Sequence[float]) -> Callable[[int], float]:
        if self._scheduled is not None:
            scheduled = self._scheduled
            return lambda index: scheduled(trainer.global_step, self._total)

        def over_peak(index: int) -> float:
            group = optimizer.param_groups[index]
            if not peaks[index] > 0:
                raise ValueError(
                    f"schedule='lr' follows the learning rate over its peak, which is {peaks[index]} in group "
                    f"{group.get('name', index)!r}; give schedule='constant', or the peak rate with a scheduler"
                )
            return rate_now(group) / peaks[index]

        return over_peak

    def _take_over(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if not (own := own_decay(optimizer)):
                continue
            kind, shown = type(optimizer).__name__, ", ".join(f"{value:.4g}" for value in own)
            if self.takeover == "refuse":
                raise ValueError(
                    f"{kind} decays on its own (weight_decay={shown}) beside WeightDecay; build it with "
                    f"weight_decay=0, or give takeover='zero'"
                )
            rank_zero_info(f"WeightDecay takes over from {kind}: its weight_decay was {shown} and is 0 now.")
            for index, group in enumerate(optimizer.param_groups):
                if group.get("weight_decay"):
                    self._undo.append((optimizer, index, group["weight_decay"]))
                    group["weight_decay"] = 0.0

    def _give_back(self) -> None:
        for step in self._steps:
            step.remove()
        for optimizer, index, own in self._undo:
            optimizer.param_groups[index]["weight_decay"] = own
        self._steps, self._undo, self._in_batch = [], [], False

    def _summary(self, unheld: Sequence[str]) -> str:
        decayed = sorted(rate for name, rate in self.rates.items() if rate and name not in unheld)
        kept = [name for name, rate in self.rates.items() if not rate]
        span = " to ".join(f"{rate:.4g}" for rate in sorted({*decayed[:1], *decayed[-1:]})) or "nothing"
        parts = [f"WeightDecay ({self.policy.name}) removes {span} of {len(decayed)} parameters per step at its peak."]
        if kept:
            parts.append(f"{len(kept)} do not decay: {kept[:_SHOWN]}.")
        if unheld:
            parts.append(f"{len(unheld)} are in no optimizer and do not decay: {list(unheld[:_SHOWN])}.")
        return " ".join(parts)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    # Not state_dict, of which Lightning wants one per class, before setup can say that two decay the same weights.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the peak learning rates by optimizer and group; the step is the Trainer's."""
        if self._peaks is not None:
            checkpoint[_SAVED] = self._peaks

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the peaks of the run that wrote the checkpoint."""
        self._saved = checkpoint.get(_SAVED)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a run; a lambda cannot be pickled, so the base that it builds stands for it."""
        kept = {key: value for key, value in self.__dict__.items() if key not in _ATTACHED}
        state = {**kept, "_steps": [], "_undo": [], "_in_batch": False}
        if isinstance(self.base, types.FunctionType) and "<" in self.base.__qualname__:
            state["base"] = resolve_base(self.base, nn.Module())
        return state


def _parametrize_of(trainer: Trainer) -> Parametrize | None:
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, Parametrize)), None)


def _width(specs: Sequence[ParamSpec]) -> int:
    """Return the width of the base: what the inputs write."""
    widths = sorted({spec.fan_out.base for spec in specs if spec.role is Role.INPUT})
    if len(widths) != 1:
        raise ValueError(
            f"decay_times_width needs one width, but the inputs of the base write {widths or 'nothing'}; give "
            f"weight_decay = decay_times_width / width of the base"
        )
    return widths[0]


def _peaks(trainer: Trainer, optimizer: Optimizer) -> list[float]:
    """Return the peak learning rate of each group; a cyclic schedule keeps its peaks to itself."""
    for config in trainer.lr_scheduler_configs:
        cyclic = getattr(config.scheduler, "max_lrs", None)
        if cyclic and config.scheduler.optimizer is optimizer:
            return [float(peak) for peak in cyclic]
    return [peak_rate(group) for group in optimizer.param_groups]


def _refuse_strangers(optimizer: Optimizer, rates: Mapping[int, float]) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in rates:
                raise ValueError(
                    f"{type(optimizer).__name__} holds a parameter of shape {tuple(p.shape)} that is not in the "
                    f"LightningModule, so that nobody says how it decays; make it an attribute of the module"
                )
