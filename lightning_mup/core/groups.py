"""Split an optimizer's parameter groups by multiplier while it is being constructed, and keep schedules true."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_mup.core.method import Method, method_of
from lightning_mup.core.plan import EpsValue, ParamPlan
from lightning_mup.core.scaling import Scaling

Group = dict[str, Any]
LR_AT_BASE = "lr_at_base"
LR_MULT = "lr_mult"
_at_base: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class GroupSplitter:
    """While entered, every torch optimizer that is constructed gets its groups split by the plan.

    Inside, the groups carry the learning rates that the user gave, those at the base, so that schedulers built beside
    the optimizer read them; :meth:`finish` then multiplies, and lets each scheduler go on computing at the base.

    Args:
        scaling: the model, read under rules.
        names: canonical name of every parameter by ``id``, trainable or not.
        declare: declarations of optimizers beyond the known ones, by class.

    Examples:
        >>> from lightning_mup.core.base import Base
        >>> from lightning_mup.core.scaling import Choices
        >>> net, base = torch.nn.Linear(64, 2), Base.of(torch.nn.Linear(16, 2))
        >>> names = {id(p): n for n, p in net.named_parameters()}
        >>> with GroupSplitter(Scaling.read(net, base, "mup", Choices()), names) as splitter:
        ...     optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        >>> splitter.finish()
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('output x0.25', 0.025), ('vector', 0.1)]
    """

    def __init__(
        self, scaling: Scaling, names: Mapping[int, str], declare: Mapping[type[Optimizer], Method] | None = None
    ) -> None:
        self._scaling = scaling
        self._names = names
        self._declare = dict(declare or {})
        self._specs = {spec.name: spec for spec in scaling.specs}
        self._undo = contextlib.ExitStack()
        self.optimizers: list[Optimizer] = []
        self.schedulers: list[LRScheduler] = []
        self.params: dict[str, ParamPlan] = {}

    def __enter__(self) -> GroupSplitter:
        """Start watching optimizers and schedulers."""
        self._replace(Optimizer, "add_param_group", self._adding)
        for kind in (LRScheduler, ReduceLROnPlateau):
            self._replace(kind, "__init__", self._noting)
        return self

    def __exit__(self, *args: object) -> None:
        """Stop watching."""
        self._undo.close()

    def finish(self) -> None:
        """Multiply the learning rates of all groups, and make the schedulers compute at the base."""
        for optimizer in self.optimizers:
            _multiply(optimizer.param_groups)
        for scheduler in self.schedulers:
            _schedule_at_base(scheduler)

    def _replace(self, owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._undo.callback(setattr, owner, name, original)

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(scheduler: LRScheduler, *args: object, **kwargs: object) -> None:
            if scheduler not in self.schedulers:
                self.schedulers.append(scheduler)
            original(scheduler, *args, **kwargs)

        return init

    def _adding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def add_param_group(optimizer: Optimizer, param_group: Group) -> None:
            if optimizer not in self.optimizers:
                self.optimizers.append(optimizer)
            taken = {str(group.get("name")) for group in optimizer.param_groups}
            for group in self._split(optimizer, dict(param_group), taken):
                original(optimizer, group)

        return add_param_group

    def _split(self, optimizer: Optimizer, group: Group, taken: set[str]) -> Iterable[Group]:
        method = self._declare.get(type(optimizer)) or method_of(optimizer)
        settings = {**optimizer.defaults, **{k: v for k, v in group.items() if k != "params"}}
        parts: dict[tuple[object, ...], Group] = {}
        for entry in _as_list(group["params"]):
            param = self._plan_of(entry[1] if isinstance(entry, tuple) else entry, method, settings, optimizer)
            if _key(param) not in parts:
                parts[_key(param)] = part = _part(group, settings, param, taken)
                taken.add(part["name"])
            parts[_key(param)]["params"].append(entry)
        return parts.values()

    def _plan_of(
        self, parameter: torch.Tensor, method: Method, settings: Group, optimizer: Optimizer
    ) -> ParamPlan | None:
        name = self._names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"{type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is not in the "
                f"LightningModule; make it an attribute of the module, so that it can be planned"
            )
        if name not in self._specs:  # frozen: it has no row and keeps its settings
            return None
        self.params[name] = self._scaling.param(self._specs[name], method, settings)
        return self.params[name]


def check_groups(optimizer: Optimizer) -> None:
    """Check that every group still stands at its multiple of the rate at the base.

    All groups may have been moved by one common factor (a warm-up by hand); then the rates at the base follow.

    Raises:
        ValueError: a group was added later, a frozen parameter was freed, or the groups were set to other ratios.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> check_groups(optimizer)
        Traceback (most recent call last):
        ValueError: a parameter group of SGD (lr 0.1, 1 tensors) was added after configure_optimizers, so ...
    """
    kind = type(optimizer).__name__
    ratios: set[float] = set()
    for group in optimizer.param_groups:
        if LR_AT_BASE not in group:
            raise ValueError(
                f"a parameter group of {kind} (lr {group['lr']}, {len(group['params'])} tensors) was added after "
                f"configure_optimizers, so no plan covers it; pass all parameters in configure_optimizers"
            )
        if group["name"].startswith("frozen") and any(p.requires_grad for p in group["params"]):
            raise ValueError(
                f"group {group['name']!r} of {kind} was frozen when the plan was made and now trains; set "
                f"requires_grad before trainer.fit"
            )
        planned = group[LR_AT_BASE] * group[LR_MULT]
        if not isinstance(group["lr"], torch.Tensor) and planned:  # comparing a tensor would wait for the device
            ratios.add(round(group["lr"] / planned, 9))
    if ratios and ratios != {1.0}:
        _follow(optimizer, ratios)


def _follow(optimizer: Optimizer, ratios: set[float]) -> None:
    if len(ratios) > 1:
        rates = [group["lr"] for group in optimizer.param_groups]
        raise ValueError(
            f"the learning rates of {type(optimizer).__name__} were set to {rates} outside of a torch scheduler, which "
            f"undoes the plan; set group['lr'] = rate * group['lr_mult'] instead"
        )
    for group in optimizer.param_groups:
        group[LR_AT_BASE] = group["lr"] / group[LR_MULT]


@contextlib.contextmanager
def rates_at_base(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the groups carry the learning rates at the base; afterwards each is multiplied again.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> optimizer.param_groups[0].update(lr_mult=0.5, lr_at_base=0.1, lr=0.05)
        >>> with rates_at_base(optimizer):
        ...     optimizer.param_groups[0]["lr"] *= 2
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    if optimizer in _at_base:  # a scheduler of schedulers
        yield
        return
    for group in optimizer.param_groups:
        group["lr"] = group[LR_AT_BASE]
    _at_base.add(optimizer)
    try:
        yield
    finally:
        _at_base.discard(optimizer)
        _multiply(optimizer.param_groups)


class _AtBase:
    """Mixed into a scheduler's class, so that every schedule, additive ones too, runs at the base's rates."""

    optimizer: Optimizer
    _last_lr: list[float | torch.Tensor]

    def step(self, *args: object, **kwargs: object) -> None:
        with rates_at_base(self.optimizer):
            super().step(*args, **kwargs)  # type: ignore[misc]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _schedule_at_base(scheduler: LRScheduler) -> None:
    cls = type(scheduler)
    if not issubclass(cls, _AtBase):
        scheduler.__class__ = type(cls.__name__, (_AtBase, cls), {})
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _multiply(groups: Iterable[Group]) -> None:
    for group in groups:
        group[LR_AT_BASE] = group["lr"]
        group["lr"] = group["lr"] * group[LR_MULT]


def _key(param: ParamPlan | None) -> tuple[object, ...]:
    if param is None:
        return ()
    return (param.spec.role, param.lr, param.group_weight_decay, *param.eps.values())


def _part(group: Group, settings: Group, param: ParamPlan | None, taken: set[str]) -> Group:
    part = {**group, "params": [], LR_MULT: 1.0 if param is None else param.lr}
    part["name"] = _unique(_label(group.get("name"), param), taken)
    if param is not None:
        part |= {key: _scaled(settings[key], factor) for key, factor in param.eps.items()}
        if settings.get("weight_decay"):
            part["weight_decay"] = settings["weight_decay"] * param.group_weight_decay
    return part


def _label(given: object, param: ParamPlan | None) -> str:
    own = "frozen" if param is None else param.spec.role.value
    times = "" if param is None or param.lr == 1 else f" x{param.lr:.4g}"
    return f"{own}{times}" if given is None else f"{given}: {own}{times}"


def _unique(label: str, taken: set[str]) -> str:
    numbered = (f"{label} ({i})" for i in range(2, len(taken) + 3))
    return label if label not in taken else next(name for name in numbered if name not in taken)


def _scaled(value: Any, factor: EpsValue) -> Any:  # noqa: ANN401 - an optimizer's setting may be anything
    if isinstance(factor, tuple):
        return tuple(None if v is None else v * f for v, f in zip(value, factor, strict=True))
    return value * factor


def _as_list(params: Any) -> list[Any]:  # noqa: ANN401
    return [params] if isinstance(params, torch.Tensor) else list(params)
