"""A method is an optimizer plus one declaration: how large its raw update naturally is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Literal, cast

import torch

from lightning_mup.core.power import Power
from lightning_mup.core.registry import collect, near
from lightning_mup.core.rules import GRADIENT, Row
from lightning_mup.core.spec import ParamSpec


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


Settings = Mapping[str, object]
"""One parameter group's settings, as ``optimizer.param_groups`` holds them."""


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer, declared.

    Args:
        name: what people call it.
        update_norm: spectral norm of its raw update (learning rate 1), where the gradient is of the size
            :data:`~lightning_mup.core.rules.GRADIENT` and of low rank; or a function of the spec that returns it.
        optimizers: the classes that the declaration speaks of; subclasses are taken to keep the update's size.
        eps: per setting name, what it is compared with; a tuple where the setting is one.
        weight_degree: power of the weight's RMS in the update (1 where the step is relative to the weight).
        decay: ``"coupled"`` where one step removes lr x weight_decay of the weight, ``"l2"`` where weight_decay x W
            is added to a gradient that is normalized afterwards.
        own_factor: the implementation's own factor on the learning rate, from (settings, fan_out, fan_in); it is
            divided out.
        build: makes the optimizer from parameter groups for ``Parametrize(method=...)``.
        reference: paper and equation.

    Examples:
        >>> print(find_method("adam").update_norm, "|", find_method("sgd").update_norm)
        fan_in^1/2 fan_out^1/2 | fan_in^1/2 fan_out^-1/2 depth^-1

    Reference:
        arXiv:2512.05620, Table 1 and App. B.7: lr x ||Q||_2 = Theta(sqrt(d_out/d_in)).
    """

    name: str
    update_norm: Power | Callable[[ParamSpec], Power]
    optimizers: tuple[type[torch.optim.Optimizer], ...] = ()
    eps: Mapping[str, Size | tuple[Size, ...]] = field(default_factory=dict, hash=False)
    weight_degree: int = 0
    decay: Literal["coupled", "l2"] = "coupled"
    own_factor: Callable[[Settings, int, int], float] | None = None
    build: Callable[..., torch.optim.Optimizer] | None = None
    reference: str = ""

    def natural(self, spec: ParamSpec, row: Row) -> Power:
        """Return the size of the raw update under one row: the declaration, at that row's gradients and weights."""
        declared = self._declared(spec)
        return declared * (row.grad_rms / GRADIENT) ** self.degree(spec) * row.init_std**self.weight_degree

    def degree(self, spec: ParamSpec) -> Fraction:
        """Return the degree of homogeneity in the gradient: 1 for SGD, 0 for everything normalized.

        Depth reaches a method only through the gradient, which the branch multiplier 1/L scales; so the power of
        depth in the declaration is minus the degree.
        """
        return -Fraction(self._declared(spec).depth)

    def fold_exponent(self, spec: ParamSpec) -> float:
        """Return ``e`` such that folding a forward multiplier ``a`` multiplies the learning rate by ``a^e``.

        With W = a w the gradient of w is a times that of W, and a step of w is a times as large in W.
        """
        return float(1 + self.degree(spec) - self.weight_degree)

    def _declared(self, spec: ParamSpec) -> Power:
        return self.update_norm if isinstance(self.update_norm, Power) else self.update_norm(spec)


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
