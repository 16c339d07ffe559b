"""A weight-decay policy as a table: per role, how the fraction removed per step scales."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import cast

from lightning_mup.core.power import Power
from lightning_mup.core.registry import collect, near
from lightning_mup.core.scaling import check_guesses
from lightning_mup.core.spec import ParamSpec, Role

TAKES = ("weight_decay", "half_life_steps", "half_life_tokens", "decay_times_width")


@dataclass(frozen=True, slots=True)
class DecayPolicy:
    """How independent weight decay scales: one step removes ``lambda x schedule`` of a weight, whatever its rate.

    Args:
        name: what people call it.
        powers: for every role the monomial of ``lambda``, 1 at the base; ``None`` where the role is not decayed.
        reference: paper and equation.
        takes: arguments of :class:`~lightning_mup.callbacks.weight_decay.WeightDecay` that say how much, of which it
            wants one.

    Raises:
        ValueError: a role is missing.

    Examples:
        >>> DecayPolicy("mine", {Role.HIDDEN: Power(fan_in=-1)}, reference="none")
        Traceback (most recent call last):
        ValueError: policy 'mine' says nothing about ['input', 'output', 'vector', 'scalar']; give each role ...

    Reference:
        arXiv:2512.05620, section 4: lambda ~ 1/width, independent of the learning rate.
    """

    name: str
    powers: Mapping[Role, Power | None] = field(hash=False)
    reference: str
    takes: tuple[str, ...] = TAKES

    def __post_init__(self) -> None:
        missing = [role.value for role in Role if role not in self.powers]
        if missing:
            raise ValueError(
                f"policy {self.name!r} says nothing about {missing}; give each role a Power, or None for no decay"
            )

    def factor(self, spec: ParamSpec) -> float:
        """Return ``lambda`` over that at the base, 0 where the parameter is not decayed.

        Examples:
            >>> from lightning_mup.core.spec import Dim
            >>> spec = ParamSpec("w", Role.HIDDEN, (256, 256), Dim(256, 64), Dim(256, 64))
            >>> [find_decay(name).factor(spec) for name in ("width", "sqrt", "constant")]
            [0.25, 0.5, 1.0]
        """
        power = self.powers[spec.role]
        return 0.0 if power is None else spec.evaluate(power)


def width_powers(exponent: float) -> dict[Role, Power | None]:
    """Return the table of ``width^exponent`` for every role: the width is what a parameter reads, or writes if input.

    A scalar has no dimensions, hence keeps its decay.

    Examples:
        >>> powers = width_powers(-1)
        >>> str(powers[Role.INPUT]), str(powers[Role.HIDDEN]), str(powers[Role.SCALAR])
        ('fan_out^-1', 'fan_in^-1', '1')
    """
    reads, writes = Power(fan_in=exponent), Power(fan_out=exponent)
    return {
        Role.INPUT: writes,
        Role.HIDDEN: reads,
        Role.OUTPUT: reads,
        Role.VECTOR: writes,
        Role.SCALAR: Power(),
    }


@cache
def all_decays() -> dict[str, DecayPolicy]:
    """Return every known policy by name: one file each in ``lightning_mup/decays``, and entry points.

    Examples:
        >>> sorted(all_decays())
        ['constant', 'sqrt', 'timescale', 'width']
    """
    return cast(dict[str, DecayPolicy], collect("lightning_mup.decays", DecayPolicy))


def find_decay(choice: str | float | DecayPolicy) -> DecayPolicy:
    """Return the policy of a name, that of a free exponent of width, or the policy given.

    Raises:
        ValueError: the name is unknown.
        TypeError: the choice is neither a name, a number, nor a policy.

    Examples:
        >>> find_decay(-0.75).name, find_decay("width").name
        ('width^-0.75', 'width')
        >>> find_decay("widht")
        Traceback (most recent call last):
        ValueError: unknown policy 'widht'; available: constant, ..., width, or an exponent of width such as -0.75; ...
    """
    if isinstance(choice, DecayPolicy):
        return choice
    if isinstance(choice, (int, float)) and not isinstance(choice, bool):
        return DecayPolicy(f"width^{choice:g}", width_powers(choice), reference="a free exponent")
    known = sorted(all_decays())
    allowed = f"available: {', '.join(known)}, or an exponent of width such as -0.75"
    if not isinstance(choice, str):
        raise TypeError(f"policy must be a name, a number or a DecayPolicy, got {choice!r}; {allowed}")
    if choice not in known:
        raise ValueError(f"unknown policy {choice!r}; {allowed}{near(choice, known)}")
    return all_decays()[choice]


def excluded(patterns: Sequence[str], specs: Sequence[ParamSpec]) -> set[str]:
    """Return the names of the parameters that roles or name patterns take out of decay.

    Args:
        patterns: names of roles, and shell-style patterns of parameter names; they may overlap.
        specs: all parameters.

    Raises:
        ValueError: a pattern is neither the role nor the name of any parameter, or names a role that was guessed.

    Examples:
        >>> specs = [ParamSpec("fc.weight", Role.HIDDEN, (2, 2)), ParamSpec("fc.bias", Role.VECTOR, (2,))]
        >>> excluded(["vector"], specs)
        {'fc.bias'}
        >>> excluded(["vectro"], specs)
        Traceback (most recent call last):
        ValueError: exclude: 'vectro' is no role and no name of any of the 2 parameters; did you mean 'vector'?
    """
    present = {spec.role for spec in specs}
    roles = {word: Role(word) for word in _WORDS if Role(word) in present}
    check_guesses("exclude", [roles[p] for p in patterns if p in roles], specs)
    found: set[str] = set()
    for pattern in patterns:
        hits = {s.name for s in specs if roles.get(pattern) is s.role or _is_named(s, pattern)}
        if not hits:
            known = [*roles, *(name for s in specs for name in (s.name, *s.tied_to))]
            raise ValueError(
                f"exclude: {pattern!r} is no role and no name of any of the {len(specs)} parameters"
                f"{near(pattern, known)}"
            )
        found |= hits
    return found


def _is_named(spec: ParamSpec, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (spec.name, *spec.tied_to))


_WORDS = (*(role.value for role in Role), "embedding", "readout")
