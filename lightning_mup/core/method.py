"""A method is an optimizer plus one declaration: how large its raw update naturally is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, Literal, cast

import torch

from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.registry import collect, near
from lightning_mup.core.rules import GRADIENT, Row
from lightning_mup.core.spec import ParamSpec, Role
from lightning_mup.core.transform import Transform


@dataclass(frozen=True, slots=True)
class Size:
    """What a setting is compared with: ``gradient^grad weight^weight`` times a monomial.

    Args:
        grad: power of the RMS of the gradient's entries (an epsilon beside ``sqrt(v)``: 1; beside ``v``: 2).
        weight: power of the RMS of the weight's entries.
        factor: a further monomial (the batch size, or the matrix' dimensions where a norm is meant).

    Examples:
        >>> print(Size(grad=1).power(Row(grad_rms=Power(fan_out=-1))))
        fan_out^-1
    """

    grad: Fraction | float = 0
    weight: Fraction | float = 0
    factor: Power = Power()

    def power(self, row: Row) -> Power:
        """Return the setting's monomial under one row of a parametrization."""
        return row.grad_rms**self.grad * row.init_std**self.weight * self.factor

    def folded(self, multiplier: float) -> float:
        """Return what folding a forward multiplier ``a`` into the weight does: gradient / a, weight x a."""
        return float(multiplier ** (float(self.weight) - float(self.grad)))


Settings = Mapping[str, Any]
"""One parameter group's settings, as ``optimizer.param_groups`` holds them."""
Decay = Literal["independent", "coupled", "l2"]
"""What ``weight_decay`` means: a fraction of W per step (x schedule), lr x weight_decay of W, or in the gradient."""


Eps = Size | tuple[Size, ...] | Callable[[ParamSpec, Settings], Size]
"""What an epsilon-like setting is compared with."""


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer, declared.

    Args:
        name: what people call it.
        update_norm: spectral norm of its raw update (learning rate 1), where the gradient is of the size
            :data:`~lightning_mup.core.rules.GRADIENT` and of low rank; or a function of (spec, settings).
        optimizers: the classes that the declaration speaks of; subclasses are taken to keep the update's size.
        eps: per setting name, what it is compared with; a tuple where the setting is one, or a function of
            (spec, settings).
        weight_degree: power of the weight's RMS in the update (1 where the step is relative to the weight).
        decay: ``"coupled"`` where one step removes lr x weight_decay of the weight, ``"independent"`` where it is
            weight_decay x schedule, ``"l2"`` where weight_decay x W is added to a gradient that is normalized
            afterwards. A setting ``decay`` of the optimizer's own goes first.
        own_factor: the implementation's own factor on the learning rate, from (settings, fan_out, fan_in); it is
            divided out.
        build: makes the optimizer from parameter groups for ``Parametrize(method=...)``.
        chain: makes the update's transform from settings, for a :class:`~lightning_mup.StackedOptimizer`.
        preset: settings of ``build`` that this name stands for.
        routes: the method of another name that takes over a role.
        reference: paper and equation.

    Examples:
        >>> print(find_method("adam").update_norm, "|", find_method("sgd").update_norm)
        fan_in^1/2 fan_out^1/2 | fan_in^1/2 fan_out^-1/2 depth^-1

    Reference:
        arXiv:2512.05620, Table 1 and App. B.7: lr x ||Q||_2 = Theta(sqrt(d_out/d_in)).
    """

    name: str
    update_norm: Power | Callable[[ParamSpec, Settings], Power]
    optimizers: tuple[type[torch.optim.Optimizer], ...] = ()
    eps: Mapping[str, Eps] = field(default_factory=dict, hash=False)
    weight_degree: int = 0
    decay: Decay = "coupled"
    own_factor: Callable[[Settings, int, int], float] | None = None
    build: Callable[..., torch.optim.Optimizer] | None = None
    chain: Callable[[Settings], Transform] | None = None
    preset: Settings = field(default_factory=dict, hash=False)
    routes: Mapping[Role, str] = field(default_factory=dict, hash=False)
    reference: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of the optimizer that ``build`` makes, where they have a default, with the preset's values."""
        return {**(_defaults(self.build) if self.build else {}), **self.preset}

    def for_role(self, role: Role) -> Method:
        """Return the method that takes care of a role: this one, or the one that it is routed to.

        Examples:
            >>> find_method("muon_adam").for_role(Role.OUTPUT).name
            'adam'
        """
        return find_method(self.routes[role]) if role in self.routes else self

    def natural(self, spec: ParamSpec, row: Row, settings: Settings) -> Power:
        """Return the size of the raw update under one row: the declaration, at that row's gradients and weights."""
        declared = self.declared(spec, settings)
        degree = self.degree(spec, settings)
        return declared * (row.grad_rms / GRADIENT) ** degree * row.init_std**self.weight_degree

    def degree(self, spec: ParamSpec, settings: Settings) -> Fraction:
        """Return the degree of homogeneity in the gradient: 1 for SGD, 0 for everything normalized.

        Depth reaches a method only through the gradient, which the branch multiplier 1/L scales; so the power of
        depth in the declaration is minus the degree.
        """
        return -Fraction(self.declared(spec, settings).depth)

    def fold_exponent(self, spec: ParamSpec, settings: Settings) -> float:
        """Return ``e`` such that folding a forward multiplier ``a`` multiplies the learning rate by ``a^e``.

        With W = a w the gradient of w is a times that of W, and a step of w is a times as large in W.
        """
        return float(1 + self.degree(spec, settings) - self.weight_degree)

    def declared(self, spec: ParamSpec, settings: Settings) -> Power:
        """Return the update's size under settings: normalized, that of a graft's donor, or the method's own."""
        if settings.get("spectral_norm"):
            return SPECTRAL
        if settings.get("graft"):
            return find_method(settings["graft"]).declared(spec, {**settings, "graft": None})
        return self._own(spec, settings)

    def sizes(self, spec: ParamSpec, settings: Settings) -> dict[str, Size | tuple[Size, ...]]:
        """Return per epsilon what it is compared with; where a donor's length is grafted on, the donor's, too."""
        found = dict(self.eps)
        if settings.get("graft"):
            own = self._own(spec, settings)
            degree = -Fraction(own.depth)
            # The direction's norm, over which the graft divides; the batch power is that of the authors' code.
            factor = own / GRADIENT**degree * Power(batch=-(degree + 1) / 2)
            donor = find_method(settings["graft"])
            theirs = {f"{donor.name}.{key}" if key in self.eps else key: size for key, size in donor.eps.items()}
            found = {**theirs, **found, "graft_eps": Size(grad=degree, factor=factor)}
        full = {**self.defaults, **settings}
        return {key: size(spec, full) if callable(size) else size for key, size in found.items()}

    def donor_settings(self, settings: Settings) -> dict[str, Any]:
        """Return the settings of the method whose length is grafted on: those under its name, and shared ones.

        An epsilon of this method's own is not shared, since it is compared with something else.

        Examples:
            >>> settings = {"graft": "adam", "eps": 0.1, "adam": {"betas": (0.8, 0.9)}}
            >>> found = find_method("muon").donor_settings(settings)
            >>> found["eps"], found["betas"]
            (1e-08, (0.8, 0.9))
        """
        donor = find_method(settings["graft"])
        shared = {key: settings[key] for key in donor.defaults if key in settings and key not in self.eps}
        return {**donor.defaults, **shared, **(settings.get(donor.name) or {})}

    def value(self, settings: Settings, key: str) -> Any:  # noqa: ANN401 - a setting may be anything
        """Return a setting by a name of :meth:`sizes`; None where there is none."""
        donor, _, name = key.rpartition(".")
        return self.donor_settings(settings).get(name) if donor else settings.get(key)

    def _own(self, spec: ParamSpec, settings: Settings) -> Power:
        if isinstance(self.update_norm, Power):
            return self.update_norm
        return self.update_norm(spec, {**self.defaults, **settings})


@cache
def _defaults(build: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@cache
def all_methods() -> dict[str, Method]:
    """Return every declared method by name: one file each in ``lightning_mup/methods``, and entry points.

    Examples:
        >>> {"sgd", "adam", "adamw"} <= set(all_methods())
        True
    """
    return cast(dict[str, Method], collect("lightning_mup.methods", Method))


def find_method(choice: str | Method) -> Method:
    """Return the method of a name, or the method given.

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> find_method("adamm")
        Traceback (most recent call last):
        ValueError: unknown method 'adamm'; available: adafactor, adagrad, adam, ...; did you mean 'adam'?
    """
    if isinstance(choice, Method):
        return choice
    if choice not in all_methods():
        known = sorted(all_methods())
        raise ValueError(f"unknown method {choice!r}; available: {', '.join(known)}{near(str(choice), known)}")
    return all_methods()[choice]


def method_of(optimizer: torch.optim.Optimizer) -> Method:
    """Return the declaration of an optimizer's class or of its nearest declared base class.

    Raises:
        ValueError: no rule is declared for it.

    Examples:
        >>> method_of(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).name
        'adamw'
    """
    optimizer = getattr(optimizer, "magnitude", optimizer)  # the rule of a graft is that of its length
    declared = {cls: method for method in all_methods().values() for cls in method.optimizers}
    for cls in type(optimizer).__mro__:
        if cls in declared:
            return declared[cls]
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    raise ValueError(
        f"no scaling rule is declared for the optimizer {kind}; declared: {', '.join(sorted(all_methods()))}. Measure "
        f"its update with lightning_mup.measure(lambda params: {type(optimizer).__name__}(params, ...)) and pass the "
        f"result as Parametrize(declare=[...]), or write a Method yourself"
    )
