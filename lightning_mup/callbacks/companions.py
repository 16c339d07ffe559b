"""What can stand beside Parametrize and what cannot: refusals come before anything is touched, and say what to use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_mup.core.grafted import Grafted
from lightning_mup.core.method import Method, all_methods, find_method

_CALLBACKS = {  # of what undoes what a callback is there for
    LearningRateFinder: "sets one learning rate for all groups, which undoes {what}; run it on the base model "
    "without {kind}, and give the rate that it finds here",
    BaseFinetuning: "adds groups of parameters while training, which {what} does not cover; set requires_grad before "
    "trainer.fit, and keep pretrained values by Parametrize(initialize='keep')",
    StochasticWeightAveraging: "anneals all groups to one learning rate, which undoes {what}; use "
    "lightning.pytorch.callbacks.WeightAveraging, which leaves the rates alone",
}
_STRATEGIES = {
    FSDPStrategy: "flattens parameters, so that their shapes are lost",
    DeepSpeedStrategy: "partitions parameters and optimizer by itself, so that their shapes and groups are lost",
}


def refuse_companions(trainer: Trainer, kind: type[Callback], *, what: str, once: str) -> None:
    """Refuse callbacks and strategies under which what a callback sets cannot hold.

    Args:
        trainer: the Trainer that is about to run.
        kind: the callback of which there may be only one.
        what: what it sets, in words.
        once: why there may be only one, in words.

    Raises:
        ValueError: one of them is there, or a second ``kind``.

    Examples:
        >>> trainer = Trainer(barebones=True, accelerator="cpu", callbacks=[LearningRateFinder()])
        >>> refuse_companions(trainer, Callback, what="the plan", once="a module has one plan")
        Traceback (most recent call last):
        ValueError: Callback cannot run beside LearningRateFinder: it sets one learning rate for all groups, ...
    """
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    for companion in callbacks:
        for refused, reason in _CALLBACKS.items():
            if isinstance(companion, refused):
                said = reason.format(what=what, kind=kind.__name__)
                raise ValueError(f"{kind.__name__} cannot run beside {type(companion).__name__}: it {said}")
    for strategy, reason in _STRATEGIES.items():
        if isinstance(trainer.strategy, strategy):
            raise ValueError(
                f"{kind.__name__} cannot run under {type(trainer.strategy).__name__}: it {reason}; use "
                f"strategy='mup_fsdp' (FSDP2, HSDP) or 'mup_ddp'"
            )
    refuse_second(trainer, kind, once)


def refuse_second(trainer: Trainer, kind: type[Callback], once: str) -> None:
    """Refuse a second callback of a kind.

    Args:
        trainer: the Trainer that is about to run.
        kind: the callback of which there may be only one.
        once: why, in words.

    Raises:
        ValueError: there are several.

    Examples:
        >>> twice = [LearningRateFinder(), LearningRateFinder()]
        >>> refuse_second(Trainer(barebones=True, accelerator="cpu", callbacks=twice), Callback, "a run has one rate")
        Traceback (most recent call last):
        ValueError: there are 2 Callback callbacks; a run has one rate, keep one
    """
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    if (count := sum(isinstance(c, kind) for c in callbacks)) > 1:
        raise ValueError(f"there are {count} {kind.__name__} callbacks; {once}, keep one")


def save_state(callback: Callback, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put a callback's state into a checkpoint, where Lightning looks for what ``load_state_dict`` takes.

    Lightning itself does so for callbacks that have a ``state_dict``, but of these it refuses a second one of a class
    as soon as the Trainer is built, before ``setup`` could say why there may be only one.

    Examples:
        >>> checkpoint = {"callbacks": {}}
        >>> save_state(Callback(), {"step": 3}, checkpoint)
        >>> checkpoint
        {'callbacks': {'Callback': {'step': 3}}}
    """
    if state:
        checkpoint.setdefault("callbacks", {})[callback.state_key] = dict(state)


def refuse_meta(trainer: Trainer, module: LightningModule) -> None:
    """Refuse parameters on the meta device where nobody will give them memory.

    Raises:
        ValueError: the strategy does not materialize parameters.

    Examples:
        >>> from torch import device, nn
        >>> module = LightningModule()
        >>> with device("meta"):
        ...     module.net = nn.Linear(2, 2)
        >>> refuse_meta(Trainer(barebones=True, accelerator="cpu"), module)
        Traceback (most recent call last):
        ValueError: 'net.weight' is on the meta device, and SingleDeviceStrategy does not materialize parameters; ...
    """
    name = next((name for name, p in module.named_parameters() if p.is_meta), None)
    if name is not None and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"{name!r} is on the meta device, and {type(trainer.strategy).__name__} does not materialize parameters; "
            f"build the module without torch.device('meta'), or use strategy='mup_fsdp'"
        )


def optimizers_in(result: Any) -> list[Optimizer]:  # noqa: ANN401 - whatever configure_optimizers may return
    """Return the optimizers in what ``configure_optimizers`` returned: of a graft both, the length's last.

    Raises:
        TypeError: an optimizer is not a :class:`torch.optim.Optimizer`, so its groups were not seen.

    Examples:
        >>> optimizers_in(([], [{"scheduler": None}])), optimizers_in(None)
        ([], [])
    """
    if isinstance(result, Grafted):
        return [result.direction, result.magnitude]
    if isinstance(result, Optimizer):
        return [result]
    if isinstance(result, dict):
        return optimizers_in(result.get("optimizer"))
    if isinstance(result, (list, tuple)):
        return [found for part in result for found in optimizers_in(part)]
    if hasattr(result, "param_groups"):
        raise TypeError(
            f"configure_optimizers returned {type(result).__name__}, which is not a torch.optim.Optimizer, so its "
            f"groups could not be split; subclass torch.optim.Optimizer"
        )
    return []


def supplied_method(method: str | Method, lr: float | None, weight_decay: float) -> Method:
    """Return the method that ``Parametrize(method=...)`` is to supply.

    Raises:
        ValueError: there is none of the name, it cannot be built here, or a number makes no sense for it.

    Examples:
        >>> supplied_method("adamw", 1e-3, 1e-4).name
        'adamw'
    """
    found = find_method(method)
    if found.build is None:
        buildable = sorted(name for name, m in all_methods().items() if m.build is not None)
        raise ValueError(
            f"method {found.name!r} cannot be supplied here; available: {', '.join(buildable)}; build the optimizer in "
            f"configure_optimizers and leave method out"
        )
    if lr is None or not lr > 0:
        raise ValueError(f"method={found.name!r} needs lr > 0, the rate tuned at the base, got {lr!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is the fraction removed per step, >= 0, got {weight_decay!r}")
    if weight_decay and found.defaults.get("decay", found.decay) == "l2":
        raise ValueError(
            f"weight_decay={weight_decay!r} is the fraction removed per step, but {found.name} adds it to the gradient "
            f"before normalizing; use method='adamw'"
        )
    return found
