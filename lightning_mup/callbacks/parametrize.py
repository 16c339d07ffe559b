"""Parametrize: one callback that carries a proxy's hyperparameters over to any LightningModule."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from lightning_mup.callbacks.companions import (
    optimizers_in,
    refuse_companions,
    refuse_meta,
    save_state,
    supplied_method,
)
from lightning_mup.callbacks.mark import mark, sizes, unmarked
from lightning_mup.callbacks.patch import patch_method, unpatch_method
from lightning_mup.callbacks.record import as_state, compare, compare_forward, log_plan
from lightning_mup.core.base import Base, build_proxy, resolve_base
from lightning_mup.core.groups import GroupSplitter, check_groups
from lightning_mup.core.infer import RoleLike, shared_names
from lightning_mup.core.initialize import Initialize, frozen_twins, initialize, padding_rows
from lightning_mup.core.method import Method
from lightning_mup.core.multipliers import ForwardMultiplier, install_multipliers, silent
from lightning_mup.core.plan import ParamPlan, Plan
from lightning_mup.core.power import Power
from lightning_mup.core.scaling import Choices, Epsilons, Multipliers, RulesLike, Scaling, read
from lightning_mup.strategies.mup_ddp import say_what_is_replicated


class Parametrize(Callback):
    """Train a LightningModule with hyperparameters that were tuned on a smaller one.

    The module is not changed. Its parameters are read by name and shape against the base; its initial values are set
    to the base's measured sizes times the plan's ratios; and the parameter groups of whatever optimizer its
    ``configure_optimizers`` builds are split by multiplier while it is being constructed. Every number that you give,
    here or in the module, is the one tuned *at the base size*.

    Args:
        base: the proxy on which the hyperparameters were tuned: a factory (``lambda: LitModel(width=128)``), a dict of
            overrides for a module that called ``save_hyperparameters()`` (``{"width": 128}``), a module, a
            :class:`Base` or the path of a saved one, or ``"self"`` for the base run itself.
        rules: parametrization by name, or several to multiply (``["mup", "complete_p"]``).
        method: name of an optimizer to supply in place of the module's own; ``None`` keeps ``configure_optimizers``.
            Lightning wants that method to be there in any case; it is not called.
        lr: learning rate at the base (> 0), for ``method``.
        weight_decay: fraction of a weight removed per step at the base, independent of ``lr`` (>= 0), for ``method``.
        options: further arguments of the optimizer of ``method`` (``{"betas": (0.9, 0.95)}``).
        schedule: function from the optimizer to a torch scheduler (stepped every step) or to Lightning's scheduler
            dict, for ``method``.
        roles: role or :class:`Layout` by name pattern, for what cannot be known from module and growth.
        branches: patterns of the last matrix of each residual branch, where it cannot be found.
        forward: by name pattern, a forward multiplier that the model's own code lacks, as a :class:`Power`.
        lr_multipliers: factor on the learning rate by role or name pattern, a hyperparameter of the base. A role takes
            in all that the plan shows under it: keys and values of a fixed number of heads are outputs, too.
        lr_powers: by role or name pattern, a further :class:`Power` on the learning rate, for a rule of your own beside
            those of ``rules``: ``{"embedding": Power(fan_out=-1 / 2)}``.
        eps: whether to ``"scale"`` epsilons as the rules say, or to ``"keep"`` them.
        batch: (batch size, base batch size); changes Adam's epsilon alone.
        multipliers: ``"fold"`` forward multipliers into initialization, rate and epsilon, or apply them by ``"hook"``.
        initialize: ``"scale"`` the module's own draws, ``"draw"`` anew from a generator seeded by each parameter's
            name, or ``"keep"`` all values (fine-tuning).
        seed: seed for ``initialize="draw"`` and for parameters that were built on the meta device.
        declare: declarations of further optimizers.

    Raises:
        ValueError: while fitting starts: something cannot be read, an optimizer has no rule, the learning-rate finder
            is on, or a checkpoint was written under another plan. Each message says what to write.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> parametrize = Parametrize(base="self")
        >>> Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[parametrize]).fit(BoringModel())
        >>> parametrize.plan["layer.weight"].method
        'sgd'

    Reference:
        Qiu et al. 2025 (arXiv:2512.05620), section 3 and Tables 1 and 2; Yang et al. 2022 (arXiv:2203.03466).
    """

    def __init__(  # noqa: PLR0913 - each argument is a decision of its own
        self,
        base: object,
        *,
        rules: RulesLike = "mup",
        method: str | Method | None = None,
        lr: float | None = None,
        weight_decay: float = 0.0,
        options: Mapping[str, object] | None = None,
        schedule: Callable[[Optimizer], Any] | None = None,
        roles: Mapping[str, RoleLike] | None = None,
        branches: Sequence[str] | None = None,
        forward: Mapping[str, Power] | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        lr_powers: Mapping[str, Power] | None = None,
        eps: Epsilons = "scale",
        batch: tuple[int, int] = (1, 1),
        multipliers: Multipliers = "fold",
        initialize: Initialize = "scale",
        seed: int = 0,
        declare: Iterable[Method] = (),
    ) -> None:
        self.base = base
        self.rules = rules
        self.choices = Choices(
            roles=dict(roles or {}),
            branches=branches,
            forward=dict(forward or {}),
            lr_multipliers=dict(lr_multipliers or {}),
            lr_powers=dict(lr_powers or {}),
            eps=eps,
            batch=(batch[0], batch[1]),
            multipliers=multipliers,
        )
        self.method = None if method is None else supplied_method(method, lr, weight_decay)
        if method is None and (lr is not None or weight_decay or options or schedule):
            raise ValueError(
                f"lr={lr!r}, weight_decay={weight_decay!r}, options and schedule belong to method=...; without a "
                f"method they are the module's own configure_optimizers' business"
            )
        if taken := {"lr", "weight_decay"} & set(options or {}):
            raise ValueError(f"options hold {sorted(taken)}, each of which is an argument of its own; give it there")
        if initialize not in ("scale", "draw", "keep"):
            raise ValueError(f"initialize must be 'scale', 'draw' or 'keep', got {initialize!r}")
        self.lr, self.weight_decay = lr, weight_decay
        self.options, self.schedule = dict(options or {}), schedule
        self.initialize, self.seed = initialize, seed
        own = [method] if isinstance(method, Method) else []
        self.declare = {cls: found for found in (*own, *declare) for cls in found.optimizers}
        self.plan: Plan | None = None
        self._scaling: Scaling | None = None
        self._base: Base | None = None
        self._fitting = False
        self._pending: dict[str, ParamPlan] = {}  # on the meta device so far
        self._hooks: dict[str, ForwardMultiplier] = {}
        self._saved: dict[str, Any] | None = None

    # -- when -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the hooks of the module between which its parameters appear and its optimizer is built."""
        refuse_companions(trainer, Parametrize, what="the plan", once="a module has one plan")
        self._scaling, self._base, self._pending, self._saved = None, None, {}, None
        self._fitting = stage == "fit"
        built_in = "configure_model" if is_overridden("configure_model", pl_module) else "setup"
        patch_method(pl_module, built_in, after=self._parametrize)
        if self._fitting:
            self.plan = None
            patch_method(pl_module, "configure_optimizers", instead=self._configure_optimizers)
            rank_zero_info(
                f"Parametrize acts after {type(pl_module).__name__}.{built_in} (initial values) and around "
                f"configure_optimizers (parameter groups)."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own hooks back; forward multipliers stay, since they are part of the model."""
        for name in ("configure_model", "setup", "configure_optimizers"):
            unpatch_method(pl_module, name)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own hooks back."""
        self.teardown(trainer, pl_module, "fit")
        if any(p.is_meta for p in pl_module.parameters()):
            raise exception  # or Lightning's clean-up moves the module, which fails and hides this error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the plan once and hand it to the loggers."""
        if self.plan is not None:
            rank_zero_info(f"\n{self.plan.table()}")
            self._say_clipping(trainer)
            say_what_is_replicated(trainer)
            log_plan(trainer, self.plan)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check that nobody undid the plan."""
        check_groups(optimizer)
        if names := silent(pl_module, self._hooks):
            raise ValueError(
                f"the forward multipliers of {names} were never applied, since their module's forward is not called; "
                f"use multipliers='fold', or call the module rather than its weight"
            )

    # -- what -----------------------------------------------------------------------------------------------------

    def _parametrize(self, module: LightningModule) -> None:
        if next(module.parameters(), None) is None:
            raise ValueError(
                f"{type(module).__name__} has no parameters after setup; build them in __init__, setup or "
                f"configure_model"
            )
        if self._fitting:
            refuse_meta(module.trainer, module)
        if self._scaling is None:
            self._read(module)
        assert self._scaling is not None
        params = {spec.name: self._scaling.initial(spec) for spec in self._scaling.specs}
        if self._fitting and self.initialize == "keep":
            mark(module, params)
        elif self._fitting:
            fresh, on_meta = unmarked(module, params), {names[0] for names, p in shared_names(module) if p.is_meta}
            self._pending = {name: param for name, param in fresh.items() if name in on_meta}
            self._initialize(module, {name: param for name, param in fresh.items() if name not in on_meta})
        self._hooks = install_multipliers(module, params.values())

    def _read(self, module: LightningModule) -> None:
        materialize = self._fitting and self.initialize != "keep"
        given = self.base
        if isinstance(given, Mapping) or (callable(given) and not isinstance(given, nn.Module)):
            given = functools.partial(_proxy_beside, given, module)
        with isolate_rng():
            base = resolve_base(given, module, materialize=materialize)
            # Ranks that start from other seeds measure other values; all must scale alike.
            self._base = module.trainer.strategy.broadcast(base)
            self._scaling = read(module, self.base, self._base, self.rules, self.choices)

    def _initialize(self, module: LightningModule, params: Mapping[str, ParamPlan], *, meta: bool = False) -> None:
        assert self._base is not None
        missing = [name for name, param in params.items() if param.spec.base_name not in self._base.measured]
        if missing:
            raise ValueError(
                f"the base knows no initial values of {missing[:3]}; save it from a module that is not on the meta "
                f"device, or give initialize='keep'"
            )
        before = {} if meta else sizes(module, params)
        twins = [] if meta else frozen_twins(module, params)
        initialize(
            {names[0]: p for names, p in shared_names(module) if names[0] in params},
            params,
            {name: self._base.measured[param.spec.base_name] for name, param in params.items()},
            how="draw" if meta else self.initialize,
            seed=self.seed,
            padding=padding_rows(module),
        )
        for copy, frozen, name, original in twins:
            if params[name].forward != 1 or params[name].readout != 1:
                raise ValueError(
                    f"{copy!r} is a frozen copy of {name!r}, whose forward multiplier "
                    f"{params[name].forward * params[name].readout:.4g} is a hook that the copy lacks; use "
                    f"multipliers='fold' and an untied readout, or make the copy after trainer.fit has set up"
                )
            frozen.data.copy_(original.data)
        mark(module, params, before)

    def _configure_optimizers(self, module: LightningModule, original: Callable[[], Any]) -> Any:  # noqa: ANN401
        assert self._scaling is not None
        self._initialize_pending(module)
        names = {id(p): names[0] for names, p in shared_names(module)}
        with GroupSplitter(self._scaling, names, self.declare) as splitter:
            result = original() if self.method is None else self._supply(module)
        found = optimizers_in(result)
        unseen = [o for o in found if o not in splitter.optimizers]
        if unseen:
            raise ValueError(
                f"{type(unseen[0]).__name__} was built before configure_optimizers was called, so its groups could "
                f"not be split; build it inside configure_optimizers"
            )
        splitter.finish()
        of_found = (item for o in found for item in splitter.rows.get(o, {}).items())
        self.plan = self._complete({**splitter.params, **dict(of_found)})
        self._compare()
        return result

    def _initialize_pending(self, module: LightningModule) -> None:
        """Draw what was on the meta device and has memory by now, unless a checkpoint is about to fill it."""
        pending, self._pending = self._pending, {}
        if module.trainer.ckpt_path is None:
            self._initialize(module, pending, meta=True)
        else:
            mark(module, pending)

    def _complete(self, optimized: Mapping[str, ParamPlan]) -> Plan:
        assert self._scaling is not None
        unheld = [spec.name for spec in self._scaling.specs if spec.name not in optimized]
        if unheld:
            rank_zero_info(f"{len(unheld)} trainable parameters are in no optimizer and will not move: {unheld[:4]}")
        rows = [optimized.get(spec.name) or self._scaling.initial(spec) for spec in self._scaling.specs]
        return Plan(tuple(rows), self._scaling.rules.name)

    def _supply(self, module: LightningModule) -> Any:  # noqa: ANN401 - whatever Lightning takes
        method = cast(Method, self.method)
        assert method.build is not None
        assert self.lr is not None
        rank_zero_info(f"method={method.name!r} replaces the optimizer of {type(module).__name__}.")
        trainable = [p for p in module.parameters() if p.requires_grad]
        options: dict[str, Any] = {**method.preset, **self.options}
        if method.routes and method.chain:
            options["routes"] = {role.value: name for role, name in method.routes.items()} | options.get("routes", {})
        # Coupled optimizers remove lr x weight_decay per step.
        coupled = {**method.defaults, **options}.get("decay", method.decay) == "coupled"
        decay = self.weight_decay / self.lr if coupled else self.weight_decay
        optimizer = method.build(trainable, lr=self.lr, weight_decay=decay, **options)
        if self.schedule is None:
            return optimizer
        made = self.schedule(optimizer)
        scheduler = made if isinstance(made, dict) else {"scheduler": made, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _say_clipping(self, trainer: Trainer) -> None:
        if not trainer.gradient_clip_val or trainer.gradient_clip_algorithm == "value":
            return
        assert self.plan is not None
        folded = " It is also the one thing that can tell folded multipliers from hooked ones."
        rank_zero_info(
            f"gradient_clip_val={trainer.gradient_clip_val} clips by one norm over all gradients. That norm grows with "
            f"the model (a readout's gradient as the square root of width), so the threshold carries over only where "
            f"it seldom clips.{folded if any(p.folded != 1 for p in self.plan.params) else ''}"
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the plan as plain values, with its digest."""
        save_state(self, {} if self.plan is None else as_state(self.plan), checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the checkpoint's plan, and compare it as soon as there is one here."""
        self._saved = state_dict or None
        self._compare()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run that was not parametrized: its optimizer has other groups."""
        if self._fitting and self.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(
                f"the checkpoint (step {checkpoint.get('global_step')}) was written without Parametrize, so its "
                f"optimizer cannot be resumed under a plan; start anew from its weights "
                f"(load_from_checkpoint) with initialize='keep'"
            )

    def _compare(self) -> None:
        if self._saved is None:
            return
        if self._fitting and self.plan is not None:
            compare(self.plan, self._saved)
        elif not self._fitting and self._scaling is not None:
            initial = tuple(map(self._scaling.initial, self._scaling.specs))
            compare_forward(Plan(initial, self._scaling.rules.name), self._saved)

    def __getstate__(self) -> dict[str, Any]:
        """Let processes be spawned: a lambda cannot be pickled, so the base that it builds stands in for it."""
        state = self.__dict__.copy()
        if isinstance(self.base, types.FunctionType) and "<" in self.base.__qualname__:
            state["base"] = resolve_base(self.base, nn.Module(), materialize=self.initialize != "keep")
        return state


def _proxy_beside(given: object, module: LightningModule) -> nn.Module:
    """Build the proxy; one that shards itself in ``configure_model`` needs the target's device mesh."""
    proxy = build_proxy(given, module)
    if isinstance(proxy, LightningModule):
        proxy._device_mesh = module._device_mesh
    return proxy
