"""A parametrization as a table: per role, how large weights, updates, gradients and decay should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import cast

from lightning_mup.core.power import Power
from lightning_mup.core.registry import collect, near
from lightning_mup.core.spec import Role

GRADIENT = Power(fan_out=-1, depth=-1)
"""Natural RMS of a gradient entry under mup with 1/L branches (arXiv:2512.05620, section 3.1): 1/(L fan_out)."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a parametrization says of one role; each entry is a monomial, 1 at the base.

    A weight may carry a forward multiplier ``a`` (``y = a W x``). All entries then speak of the bare ``W``.

    Args:
        init_std: standard deviation of the entries at initialization.
        update_norm: wanted spectral norm of one update; ``None`` leaves learning rate and epsilon to the optimizer,
            as standard training does.
        weight_decay: independent weight decay, the fraction removed per step.
        grad_rms: RMS of the gradient's entries, from which epsilon and an unnormalized optimizer's rate follow.
        forward: the forward multiplier ``a``. Its power of ``depth`` belongs to the residual branch, hence applies to
            the branch's last matrix (and its bias) only.

    Examples:
        >>> row = Row(init_std=Power(fan_in=-1 / 2), update_norm=Power(fan_in=-1 / 2, fan_out=1 / 2))
        >>> print(row.init_std, "|", row.forward)
        fan_in^-1/2 | 1
    """

    init_std: Power = Power()
    update_norm: Power | None = Power()
    weight_decay: Power = Power()
    grad_rms: Power = Power()
    forward: Power = Power()

    def __mul__(self, other: Row) -> Row:
        """Multiply two rows entry by entry."""
        wanted = None
        if self.update_norm is not None and other.update_norm is not None:
            wanted = self.update_norm * other.update_norm
        return Row(
            init_std=self.init_std * other.init_std,
            update_norm=wanted,
            weight_decay=self.weight_decay * other.weight_decay,
            grad_rms=self.grad_rms * other.grad_rms,
            forward=self.forward * other.forward,
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """A complete parametrization: one :class:`Row` for every :class:`Role`.

    Args:
        name: what people call it.
        rows: the table; a role without a row does not load.
        reference: paper and equation.
        tied_readout: forward multiplier of a readout that shares the embedding's matrix, in the matrix's own
            dimensions as an embedding (``fan_out`` is the width).
        onto: name of the width rules that these are multiplied onto when none are named; ``None`` for width rules.

    Raises:
        ValueError: a role is missing.

    Examples:
        >>> Rules("mine", {Role.HIDDEN: Row()}, reference="none")
        Traceback (most recent call last):
        ValueError: rules 'mine' say nothing about ['input', 'output', 'vector', 'scalar']; give each role a Row

    Reference:
        The size conditions per role are those of arXiv:2310.17813 and arXiv:2512.05620, section 3.
    """

    name: str
    rows: Mapping[Role, Row] = field(hash=False)
    reference: str
    tied_readout: Power = Power()
    onto: str | None = None

    def __post_init__(self) -> None:
        missing = [role.value for role in Role if role not in self.rows]
        if missing:
            raise ValueError(f"rules {self.name!r} say nothing about {missing}; give each role a Row")

    def __mul__(self, other: Rules) -> Rules:
        """Multiply two tables row by row, as a depth rule onto a width rule.

        Raises:
            ValueError: one of the two leaves the learning rate to the optimizer, so the other's rule has no hold.
        """
        silent = [r.name for r in (self, other) if any(row.update_norm is None for row in r.rows.values())]
        if silent:
            raise ValueError(
                f"rules {silent} leave the learning rate to the optimizer, so {self.name!r} and {other.name!r} cannot "
                f"be multiplied; use 'mup' or 'sp_per_layer' as the width rule"
            )
        return Rules(
            name=f"{self.name} x {other.name}",
            rows={role: self.rows[role] * other.rows[role] for role in Role},
            reference=f"{self.reference}; {other.reference}",
            tied_readout=self.tied_readout * other.tied_readout,
            onto=self.onto and other.onto,
        )

    @property
    def uses_depth(self) -> bool:
        """Whether any entry depends on depth."""
        entries = (p for row in self.rows.values() for p in (row.update_norm, row.forward, row.grad_rms))
        return any(power is not None and power.depth for power in entries)


@cache
def all_rules() -> dict[str, Rules]:
    """Return every known parametrization by name: one file each in ``lightning_mup/rules``, and entry points.

    Examples:
        >>> sorted(all_rules())[:3]
        ['complete_p', 'depth_mup', 'mean_field']
    """
    return cast(dict[str, Rules], collect("lightning_mup.rules", Rules))


def find_rules(choice: str | Rules | Sequence[str | Rules]) -> Rules:
    """Return the rules of a name, of several names multiplied together, or the rules given.

    A depth rule alone is multiplied onto the width rules that it names itself (``onto``).

    Raises:
        ValueError: the name is unknown, or the rules cannot be multiplied.
        TypeError: the choice is neither a name, rules, nor a sequence of them.

    Examples:
        >>> find_rules("mup").name, find_rules("complete_p").name, find_rules(["mup", "depth_mup"]).name
        ('mup', 'mup x complete_p', 'mup x depth_mup')
        >>> find_rules("mupp")
        Traceback (most recent call last):
        ValueError: unknown rules 'mupp'; available: complete_p, ..., sp_per_layer; did you mean 'mup'?
    """
    parts = [choice] if isinstance(choice, (str, Rules)) else list(choice)
    if not parts:
        raise ValueError(f"rules must name at least one parametrization, got {choice!r}; try 'mup'")
    found = [_one(part) for part in parts]
    product = found[0]
    for other in found[1:]:
        product = product * other
    return product if product.onto is None else _one(product.onto) * product


def _one(part: str | Rules) -> Rules:
    if isinstance(part, Rules):
        return part
    if not isinstance(part, str):
        raise TypeError(f"rules must be a name or Rules, got {part!r}; available: {', '.join(sorted(all_rules()))}")
    if part not in all_rules():
        known = sorted(all_rules())
        raise ValueError(f"unknown rules {part!r}; available: {', '.join(known)}{near(part, known)}")
    return all_rules()[part]


def depth_rows(alpha: float) -> dict[Role, Row]:
    """Return the rows of a depth rule with branch multiplier ``L^-alpha``, to be multiplied onto width rules.

    A branch ``L^-alpha f(x)`` has gradients of size ``L^-alpha``; for the ``L`` branches together to move the stream
    by ``Theta(1)``, each branch's function must move by ``L^(alpha-1)``.

    Examples:
        >>> print(depth_rows(0.5)[Role.HIDDEN].update_norm)
        depth^-1/2

    Reference:
        arXiv:2505.01618, section 3 (alpha in [1/2, 1]); arXiv:2310.02244 (alpha = 1/2).
    """
    row = Row(
        update_norm=Power(depth=alpha - 1),
        grad_rms=Power(depth=-alpha),
        forward=Power(depth=-alpha),
    )
    return dict.fromkeys(Role, row)


def without_depth(power: Power) -> Power:
    """Return the monomial with the power of depth dropped.

    Examples:
        >>> print(without_depth(Power(fan_in=-1, depth=-1)))
        fan_in^-1
    """
    return replace(power, depth=0)
