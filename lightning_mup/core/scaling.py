"""Specs x rules x method -> plan: the one place where a multiplier is computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

from lightning_mup.core.base import Base, doubled, is_base_of, resolve_base
from lightning_mup.core.blocking import block_ratios
from lightning_mup.core.doubts import check_depth, check_gains, check_products, warn_about_growth, warn_about_heads
from lightning_mup.core.infer import RoleLike, infer, shared_names
from lightning_mup.core.method import Method, Settings, Size, find_method
from lightning_mup.core.patterns import T, match
from lightning_mup.core.plan import EpsValue, ParamPlan, Plan
from lightning_mup.core.power import Power
from lightning_mup.core.rules import Row, Rules, find_rules, without_depth
from lightning_mup.core.settings import routes_of, settings_of
from lightning_mup.core.spec import ParamSpec, Role, as_roles_line

RulesLike = str | Rules | Sequence[str | Rules]
Multipliers = Literal["fold", "hook"]
Epsilons = Literal["scale", "keep"]


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user may say beyond rules and base; see :class:`lightning_mup.Parametrize` for each.

    Args:
        roles: role or :class:`Layout` by name pattern.
        branches: patterns of the last matrices of residual branches.
        forward: by name pattern, a forward multiplier that the model's own code lacks, as a :class:`Power`.
        lr_multipliers: by role or name pattern, a factor on the learning rate, a hyperparameter of the base. A tied
            readout has that of its embedding.
        lr_powers: by role or name pattern, a further :class:`Power` on the learning rate, for rules of your own.
        eps: whether to ``"scale"`` epsilons or ``"keep"`` them.
        batch: batch size and base batch size.
        multipliers: whether forward multipliers are folded into init, update and epsilon, or applied by hooks.

    Raises:
        ValueError: a value makes no sense.

    Examples:
        >>> Choices(lr_multipliers={"embedding": 0.0})
        Traceback (most recent call last):
        ValueError: lr_multipliers must be positive, got {'embedding': 0.0}; freeze ...
    """

    roles: Mapping[str, RoleLike] = field(default_factory=dict)
    branches: Sequence[str] | None = None
    forward: Mapping[str, Power] = field(default_factory=dict)
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    lr_powers: Mapping[str, Power] = field(default_factory=dict)
    batch: tuple[int, int] = (1, 1)
    multipliers: Multipliers = "fold"
    eps: Epsilons = "scale"

    def __post_init__(self) -> None:
        if self.multipliers not in ("fold", "hook"):
            raise ValueError(f"multipliers must be 'fold' or 'hook', got {self.multipliers!r}")
        if self.eps not in ("scale", "keep"):
            raise ValueError(f"eps must be 'scale' or 'keep', got {self.eps!r}")
        if len(self.batch) != 2 or min(self.batch) <= 0:
            raise ValueError(f"batch must be (batch size, base batch size), both positive, got {self.batch!r}")
        bad = {key: value for key, value in self.lr_multipliers.items() if not value > 0}
        if bad:
            raise ValueError(
                f"lr_multipliers must be positive, got {bad}; freeze parameters with requires_grad_(False)"
            )


@dataclass(frozen=True, slots=True)
class Scaling:
    """A model that has been read, under rules: gives each parameter's row for any method.

    Args:
        specs: every trainable parameter.
        rules: the parametrization.
        choices: what the user said beyond.
        forward: forward multipliers by parameter name, beyond the rules'.
        lr_multipliers: factors on the learning rate by parameter name.
        lr_powers: monomials on the learning rate by parameter name, beside the rules'.
    """

    specs: tuple[ParamSpec, ...]
    rules: Rules
    choices: Choices
    forward: Mapping[str, Power] = field(default_factory=dict)
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    lr_powers: Mapping[str, Power] = field(default_factory=dict)

    @classmethod
    def read(
        cls, model: nn.Module, base: Base, rules: RulesLike, choices: Choices, wider: Base | None = None
    ) -> Scaling:
        """Read a model against a base.

        Raises:
            ValueError: see :func:`lightning_mup.core.infer.infer`; or a depth rule meets blocks whose branches end
                nobody knows where.
        """
        found = find_rules(rules)
        specs = infer(model, base, wider=wider, roles=choices.roles, branches=choices.branches)
        check_depth(model, specs, found)
        check_products(model, specs, found)
        names = [[s.name, *s.tied_to] for s in specs]
        made = cls(
            specs=specs,
            rules=found,
            choices=choices,
            forward=match(choices.forward, names, "forward"),
            lr_multipliers=_by_role_or_name(choices.lr_multipliers, specs, names, "lr_multipliers"),
            lr_powers=_by_role_or_name(choices.lr_powers, specs, names, "lr_powers"),
        )
        if choices.multipliers == "fold":
            check_gains(specs, {spec.name: made.multiplier(spec) for spec in specs}, base)
        return made

    def multiplier(self, spec: ParamSpec) -> float:
        """Return the forward multiplier ``a`` of a parameter, whether folded or hooked."""
        row = self._row(spec)
        power = row.forward if spec.branch else without_depth(row.forward)
        return spec.evaluate(power * self.forward.get(spec.name, Power()))

    def initial(self, spec: ParamSpec) -> ParamPlan:
        """Return the part of a parameter's row that does not depend on the method."""
        a, fold = self.multiplier(spec), self.choices.multipliers == "fold"
        return ParamPlan(
            spec=spec,
            init=spec.evaluate(self._row(spec).init_std) * (a if fold else 1.0),
            weight_decay=spec.evaluate(self._row(spec).weight_decay),
            folded=a if fold else 1.0,
            forward=1.0 if fold else a,
            readout=spec.evaluate(self.rules.tied_readout) if spec.readout else 1.0,
        )

    def param(self, spec: ParamSpec, method: Method, settings: Settings) -> ParamPlan:
        """Return the whole row of a parameter under a method with its settings (one parameter group's)."""
        start, row = self.initial(spec), self._row(spec)
        lr: float = start.folded ** method.fold_exponent(spec, settings) * self.lr_multipliers.get(spec.name, 1.0)
        lr *= spec.evaluate(self.lr_powers.get(spec.name, Power()))
        blocks = block_ratios(spec, settings)
        if row.update_norm is not None:
            wanted = row.update_norm / method.natural(spec, row, settings)
            lr *= spec.evaluate(wanted, blocks=blocks) * _own_factor(method, spec, settings)
        size, base_size = self.choices.batch
        ratios = Ratios(size / base_size, blocks)
        scaled = None if row.update_norm is None or self.choices.eps == "keep" else row
        eps = {
            key: _eps(size_of, spec, scaled, start.folded, ratios)
            for key, size_of in method.sizes(spec, settings).items()
            if method.value(settings, key) is not None
        }
        decay = self._group_decay(spec, row, method, settings, start, lr)
        return ParamPlan(
            spec=spec,
            method=method.name,
            init=start.init,
            lr=lr,
            eps=eps,
            weight_decay=start.weight_decay,
            group_weight_decay=decay,
            folded=start.folded,
            forward=start.forward,
            readout=start.readout,
        )

    def _group_decay(
        self, spec: ParamSpec, row: Row, method: Method, settings: Settings, start: ParamPlan, lr: float
    ) -> float:
        decay = "coupled" if settings.get("decoupled_weight_decay") else settings.get("decay", method.decay)
        if decay == "independent":
            return start.weight_decay
        if decay == "coupled":
            return start.weight_decay / lr  # one step removes lr x weight_decay: undo what was done to lr
        if row.update_norm is None:
            return float(start.folded**-2.0)
        # An L2 term must keep its proportion to the gradient that it is added to.
        return float(spec.evaluate(row.grad_rms / row.init_std) * start.folded**-2.0)

    def _row(self, spec: ParamSpec) -> Row:
        return self.rules.rows[spec.role]


def plan(
    model: nn.Module,
    base: object,
    *,
    rules: RulesLike = "mup",
    method: str | Method = "adam",
    settings: Mapping[str, object] | None = None,
    choices: Choices | None = None,
) -> Plan:
    """Return what would be done to every parameter of a model, without doing it.

    Args:
        model: the target; ``torch.device("meta")`` is enough.
        base: the proxy, in any form that :class:`lightning_mup.Parametrize` takes.
        rules: name of the parametrization, or several names to multiply.
        method: name of the optimizer.
        settings: the optimizer's settings, where they matter (``block_size``; torch Muon's ``adjust_lr_fn``;
            ``decay="coupled"`` for torch's SGD and AdamW).
        choices: what is to be said beyond.

    Raises:
        ValueError: the model cannot be read, or a name is unknown; the message says what to write.

    Warns:
        UserWarning: every ratio is 1 although the run is not declared to be the base run; or depth grows under rules
            that say nothing about depth.

    Examples:
        >>> net = lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> print(plan(net(64), base=lambda: net(16), method="sgd"))
        rules=mup  params=4  factors on the values at the base
        role    n  fan_out  fan_in  method  init  lr    wd    because  example
        input   1  64/16    8/8     sgd     1     4     0.25  Linear   0.weight
        vector  1  64/16    1/1     sgd     1     4     0.25  1-D      0.bias
        output  1  2/2      64/16   sgd     0.25  0.25  0.25  Linear   2.weight
        vector  1  2/2      1/1     sgd     1     1     1     1-D      2.bias
    """
    found = find_method(method)
    scaling = read(model, base, resolve_base(base, model), rules, choices or Choices())
    check_guesses(f"the routes of method {found.name!r}", routes_of(found, dict(settings or {})), scaling.specs)
    rows = tuple(_planned(scaling, spec, found, settings or {}) for spec in scaling.specs)
    return Plan(rows, scaling.rules.name)


def _planned(scaling: Scaling, spec: ParamSpec, method: Method, settings: Mapping[str, object]) -> ParamPlan:
    group = {**method.defaults, **settings, "method": method.name}
    name = routes_of(method, group).get(spec.role, method.name)
    routed = method if name == method.name else find_method(name)
    own = group if routed is method else settings_of(group, name)
    return scaling.param(spec, routed, {**{key: 1.0 for key in routed.eps}, **own})


def read(model: nn.Module, given: object, base: Base, rules: RulesLike, choices: Choices) -> Scaling:
    """Read a model against a resolved base, and warn where nothing would be carried over or heads grow."""
    wider = None if _is_wider(model, base) else doubled(given, model)
    scaling = Scaling.read(model, base, rules, choices, wider)
    if not is_base_of(given, model) and all(r == 1 for s in scaling.specs for r in s.ratios.values()):
        warnings.warn(
            f"every parameter of {type(model).__name__} has the base's shape, so nothing is carried over; if this is "
            f"the base run, say base='self', else give a smaller base",
            stacklevel=2,
        )
    warn_about_heads(model, base)
    warn_about_growth(scaling.specs)
    return scaling


def _is_wider(model: nn.Module, base: Base) -> bool:
    shapes = ((names[0], tuple(p.shape)) for names, p in shared_names(model))
    return any(base.shapes.get(name, shape) != shape for name, shape in shapes)


def _own_factor(method: Method, spec: ParamSpec, settings: Settings) -> float:
    if method.own_factor is None:
        return 1.0
    here = method.own_factor(settings, spec.fan_out.size * spec.split, spec.fan_in.size)
    return method.own_factor(settings, spec.fan_out.base * spec.split, spec.fan_in.base) / here


class Ratios(NamedTuple):
    """Ratios against the base beyond a parameter's own dimensions: of batch sizes, and of (in, out) block counts."""

    batch: float
    blocks: tuple[float, float]


def _eps(size: Size | tuple[Size, ...], spec: ParamSpec, row: Row | None, folded: float, ratios: Ratios) -> EpsValue:
    if isinstance(size, tuple):
        return tuple(_one_eps(part, spec, row, folded, ratios) for part in size)
    return _one_eps(size, spec, row, folded, ratios)


def _one_eps(size: Size, spec: ParamSpec, row: Row | None, folded: float, ratios: Ratios) -> float:
    scaled = 1.0 if row is None else spec.evaluate(size.power(row), batch=ratios.batch, blocks=ratios.blocks)
    return scaled * size.folded(folded)


def check_guesses(what: str, roles: Iterable[Role], specs: Iterable[ParamSpec]) -> None:
    """Check that roles which a choice names can be told.

    Raises:
        ValueError: some role is of matrices, and nothing grows against the base, so that these roles are guesses.
    """
    guessed = [spec for spec in specs if not spec.certain]
    if guessed and {Role.INPUT, Role.HIDDEN, Role.OUTPUT} & set(roles):
        raise ValueError(
            f"{what} name roles, but nothing grows against the base, so the roles of {len(guessed)} matrices are "
            f"guesses; name them: {as_roles_line(guessed)}, or give base={{...}} as hyperparameter overrides"
        )


def _by_role_or_name(
    given: Mapping[str, T], specs: Sequence[ParamSpec], names: Sequence[Sequence[str]], what: str
) -> dict[str, T]:
    roles = {Role(key): value for key, value in given.items() if key in _ROLE_WORDS}
    check_guesses(what, roles, specs)
    known = {s.role for s in specs} | ({Role.OUTPUT} if any(s.readout for s in specs) else set())
    unused = [role.value for role in roles if role not in known]
    if unused:
        raise ValueError(f"{what} name {unused}, but the model has only {sorted({s.role.value for s in specs})}")
    found = {s.name: roles[s.role] for s in specs if s.role in roles}
    by_name = match({k: v for k, v in given.items() if k not in _ROLE_WORDS}, names, what)
    twice = sorted(found.keys() & by_name.keys())
    if twice:
        raise ValueError(f"{what} name {twice} by role and by pattern; name each parameter once")
    return found | by_name


_ROLE_WORDS = (*(role.value for role in Role), "embedding", "readout")
