"""Split an optimizer's parameter groups by multiplier while it is being constructed, and keep schedules true."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_mup.core.method import Method, find_method, method_of
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.plan import EpsValue, ParamPlan
from lightning_mup.core.scaling import Scaling, check_guesses
from lightning_mup.core.schedules import (
    GIVEN,
    LR_AT_BASE,
    LR_GIVEN,
    LR_MULT,
    PER_GROUP,
    Group,
    multiply,
    per_given_group,
    schedule_at_base,
)
from lightning_mup.core.settings import settings_of
from lightning_mup.core.spec import Role

ROLE = "role"
"""Key of a parameter group that holds the role of its parameters, :data:`FROZEN` or, without any, :data:`EMPTY`."""
FROZEN, EMPTY = "frozen", "empty"
_TOLERANCE = 1e-6  # rates set by hand may be rounded


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
        self.rows: dict[Optimizer, dict[str, ParamPlan]] = {}

    def __enter__(self) -> GroupSplitter:
        """Start watching optimizers and schedulers."""
        self._replace(Optimizer, "add_param_group", self._adding)
        for root in (LRScheduler, ReduceLROnPlateau):
            self._replace(root, "__init__", self._noting)
        for kind, keys in PER_GROUP.items():
            self._replace(kind, "__init__", functools.partial(per_given_group, keys=keys))
        return self

    def __exit__(self, *args: object) -> None:
        """Stop watching."""
        self._undo.close()

    def finish(self) -> None:
        """Multiply the learning rates of all groups, and make the schedulers compute at the base."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], torch.Tensor):
                    group[LR_GIVEN] = group.get("initial_lr", group["lr"])
            multiply(optimizer.param_groups)
        for scheduler in self.schedulers:
            schedule_at_base(scheduler)

    def _replace(self, owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._undo.callback(setattr, owner, name, original)

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(scheduler: LRScheduler, *args: object, **kwargs: object) -> None:
            if scheduler not in self.schedulers:
                self.schedulers.append(scheduler)
            original(scheduler, *args, **kwargs)

        return init

    def _adding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_param_group(optimizer: Optimizer, param_group: Group) -> None:
            if optimizer not in self.optimizers:
                self.optimizers.append(optimizer)
            if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
                for group in self._split(optimizer, param_group):
                    original(optimizer, group)
            else:  # torch says what is wrong
                original(optimizer, param_group)

        return add_param_group

    def _split(self, optimizer: Optimizer, group: Group) -> Iterable[Group]:
        method = self._method(optimizer)
        settings = {**optimizer.defaults, **{k: v for k, v in group.items() if k != "params"}}
        parts: dict[tuple[object, ...], list[Any]] = {}
        params: dict[tuple[object, ...], ParamPlan | None] = {}
        own: dict[tuple[object, ...], tuple[Method, Group]] = {}
        for entry in _as_list(group["params"]):
            parameter = entry[1] if isinstance(entry, tuple) else entry
            found = self._routed(parameter, method, settings, optimizer)
            param = self._plan_of(parameter, *found, optimizer)
            key = _key(param, stacked=isinstance(optimizer, StackedOptimizer))
            params[key], own[key] = param, found
            parts.setdefault(key, []).append(entry)
        taken = {str(other["name"]) for other in optimizer.param_groups}
        given = 1 + max((int(other[GIVEN]) for other in optimizer.param_groups), default=-1)
        made = [
            {
                **group,
                **_arranged(optimizer, own[key][1]),
                **_changes(*own[key], params[key]),
                "params": entries,
                GIVEN: given,
            }
            for key, entries in parts.items()
        ]
        for part in made or [{**group, LR_MULT: 1.0, ROLE: EMPTY, "params": [], GIVEN: given}]:
            part["name"] = _name(group.get("name"), part, taken)
            taken.add(part["name"])
            yield part

    def _routed(
        self, parameter: torch.Tensor, method: Method, settings: Group, optimizer: Optimizer
    ) -> tuple[Method, Group]:
        """Return the method that moves a parameter, and its settings: in our own optimizers, a group may name one."""
        spec = self._specs.get(self._names.get(id(parameter), ""))
        if spec is None or not isinstance(optimizer, StackedOptimizer):
            return method, settings
        # A declaration that was given goes before the registered one of that name.
        stated = method if settings["method"] == optimizer.method else optimizer.find(settings["method"])
        routes = {**stated.routes, **{Role(role): name for role, name in (settings.get("routes") or {}).items()}}
        arranged = {"axes": spec.axes, "split": spec.split, "lookup": spec.lookup}
        check_guesses(f"the routes of method {stated.name!r}", routes, self._scaling.specs)
        if spec.role not in routes:
            return stated, {**settings, **arranged}
        routed = find_method(routes[spec.role])
        return routed, {**settings_of(settings, routed.name), **arranged, "method": routed.name}

    def _method(self, optimizer: Optimizer) -> Method:
        own = (self._declare[cls] for cls in type(optimizer).__mro__ if cls in self._declare)
        return next(own, None) or method_of(optimizer)

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
        self.rows.setdefault(optimizer, {})[name] = self.params[name]
        return self.params[name]


_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def check_groups(optimizer: Optimizer) -> None:
    """Check that every group still stands at its multiple of the rate at the base.

    Rates that were set by hand are taken over where each is ``rate * group["lr_mult"]``, with one rate for all groups
    that were split off one group of the user's.

    Raises:
        ValueError: a group was added later, a frozen parameter was freed, or the groups were set to other ratios.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> check_groups(optimizer)
        Traceback (most recent call last):
        ValueError: a parameter group of SGD (lr 0.1, 1 tensors) was added after configure_optimizers, so ...
    """
    for group in optimizer.param_groups:
        _check_group(group, type(optimizer).__name__)
    # Comparing a tensor would wait for the device.
    known = [group for group in optimizer.param_groups if not isinstance(group["lr"], torch.Tensor)]
    if any(group["lr"] != group[LR_AT_BASE] * group[LR_MULT] for group in known):
        _take_over(known, type(optimizer).__name__)
        if optimizer not in _told:
            _told.add(optimizer)
            warnings.warn(
                f"the learning rates of {type(optimizer).__name__} were set outside of a torch scheduler; they are "
                f"taken for rate * group['lr_mult'], so make sure that yours are",
                stacklevel=2,
            )


def _check_group(group: Group, kind: str) -> None:
    if LR_AT_BASE not in group:
        raise ValueError(
            f"a parameter group of {kind} (lr {group['lr']}, {len(group['params'])} tensors) was added after "
            f"configure_optimizers, so no plan covers it; pass all parameters in configure_optimizers"
        )
    if group[ROLE] == FROZEN and any(p.requires_grad for p in group["params"]):
        raise ValueError(
            f"group {group['name']!r} of {kind} was frozen when the plan was made and now trains; set requires_grad "
            f"before trainer.fit"
        )


def _take_over(groups: list[Group], kind: str) -> None:
    rates: dict[int, list[float]] = {}
    for group in groups:
        rates.setdefault(group[GIVEN], []).append(group["lr"] / group[LR_MULT])
    torn = any(max(found) - min(found) > _TOLERANCE * max(found) for found in rates.values())
    was_flat = len({group[LR_AT_BASE] * group[LR_MULT] for group in groups}) == 1
    is_flat = len({group["lr"] for group in groups}) == 1 and groups[0]["lr"] != 0
    if torn or (is_flat and not was_flat) or _unmultiplied(groups):
        found = {group["name"]: group["lr"] for group in groups}
        raise ValueError(
            f"the learning rates of {kind} were set to {found} outside of a torch scheduler, which undoes the plan; "
            f"set group['lr'] = rate * group['lr_mult'] instead"
        )
    for group in groups:
        group[LR_AT_BASE] = group["lr"] / group[LR_MULT]


def _unmultiplied(groups: list[Group]) -> bool:
    """Whether the rates are those that the user gave, times one factor, as if there were no multipliers."""
    scaled = [group for group in groups if group.get(LR_GIVEN) and group["lr"]]
    factors = [group["lr"] / group[LR_GIVEN] for group in scaled]
    multipliers = {group[LR_MULT] for group in scaled}
    if multipliers <= {1.0} or max(factors) > min(factors) * (1 + _TOLERANCE):
        return False
    return len(multipliers) > 1 or math.isclose(factors[0], 1.0)


def _key(param: ParamPlan | None, *, stacked: bool) -> tuple[object, ...]:
    if param is None:
        return ()
    spec = param.spec
    own = (param.method, spec.axes, spec.split, spec.lookup) if stacked else ()
    return (spec.role, param.lr, param.group_weight_decay, *param.eps.values(), *own)


def _arranged(optimizer: Optimizer, settings: Group) -> Group:
    return dict(settings) if isinstance(optimizer, StackedOptimizer) else {}


def _changes(method: Method, settings: Group, param: ParamPlan | None) -> Group:
    rate = settings["lr"]
    own: Group = {"lr": rate.clone()} if isinstance(rate, torch.Tensor) else {}  # the parts must not share one tensor
    if param is None:
        return own | {LR_MULT: 1.0, ROLE: FROZEN}
    own |= {LR_MULT: param.lr, ROLE: param.spec.role.value}
    for key, factor in param.eps.items():
        donor, _, name = key.rpartition(".")
        scaled = _scaled(method.value(settings, key), factor)
        own |= {donor: {**(settings.get(donor) or {}), name: scaled}} if donor else {key: scaled}
    if settings.get("weight_decay"):
        own["weight_decay"] = settings["weight_decay"] * param.group_weight_decay
    return own


def _name(given: object, part: Group, taken: set[str]) -> str:
    times = "" if part[LR_MULT] == 1 else f" x{part[LR_MULT]:.4g}"
    label = f"{part[ROLE]}{times}" if given is None else f"{given}: {part[ROLE]}{times}"
    numbered = (f"{label} ({i})" for i in range(2, len(taken) + 3))
    return label if label not in taken else next(name for name in numbered if name not in taken)


def _scaled(value: Any, factor: EpsValue) -> Any:  # noqa: ANN401 - an optimizer's setting may be anything
    if isinstance(factor, tuple):
        return tuple(None if v is None else v * f for v, f in zip(value, factor, strict=True))
    return value * factor


def _as_list(params: Any) -> list[Any]:  # noqa: ANN401
    return [params] if isinstance(params, torch.Tensor) else list(params)
