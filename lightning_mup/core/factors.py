"""Multipliers of one matrix by hand: what the plan does, without a model."""

from __future__ import annotations

import math

from lightning_mup.core.method import Method, find_method
from lightning_mup.core.plan import EpsValue
from lightning_mup.core.registry import near
from lightning_mup.core.rules import Rules, find_rules
from lightning_mup.core.scaling import Choices, RulesLike, Scaling
from lightning_mup.core.spec import Dim, ParamSpec, Role

_DEPTH_RULES = "complete_p"


def multipliers(
    method: str | Method,
    fan_in: tuple[int, int] = (1, 1),
    fan_out: tuple[int, int] = (1, 1),
    depth: tuple[int, int] = (1, 1),
    batch: tuple[int, int] = (1, 1),
    *,
    role: str | Role = "hidden",
    rules: RulesLike = "mup",
    **settings: object,
) -> dict[str, EpsValue]:
    """Return the factors on learning rate and epsilons of one matrix, as the plan uses them.

    ``lr = wanted / natural`` with the rules' wanted and the method's natural size of an update.

    Args:
        method: name of the optimizer.
        fan_in: (size, base): what one output sums over.
        fan_out: (size, base): number of outputs.
        depth: (size, base): residual blocks, for a matrix inside of one whose branches are multiplied by 1/L; rules
            that say nothing about depth are multiplied by ``"complete_p"``, which does.
        batch: (size, base): batch size, which moves epsilons alone.
        role: ``"input"`` or ``"embedding"``, ``"hidden"``, ``"output"`` or ``"readout"``.
        rules: parametrization by name.
        settings: settings of the method on which its rule depends (``block_size=128``, ``graft="adam"``).

    Returns:
        ``"lr"`` and one entry for each epsilon-like setting in use (``"eps"``, ``"matrix_eps"``, ``"graft_eps"``).

    Raises:
        ValueError: a name or setting is unknown, a size is not positive, or base and size are preconditioned on other
            sides.

    Examples:
        >>> multipliers("shampoo", (1024, 128), (1024, 128), (12, 3), exponent=1 / 2)["lr"]
        0.25
        >>> round(multipliers("soap", (1024, 128), (1024, 128), block_size=128)["lr"], 6)
        0.125

    Reference:
        arXiv:2512.05620, Tables 1 and 2.
    """
    found = find_method(method).for_role(Role(role))
    _check(found, settings, {"fan_in": fan_in, "fan_out": fan_out, "depth": depth, "batch": batch})
    table = find_rules(rules)
    if depth[0] != depth[1] and not table.uses_depth and _scales(table):
        table = find_rules([table, _DEPTH_RULES])
    spec = ParamSpec("matrix", Role(role), (fan_out[0], fan_in[0]), Dim(*fan_in), Dim(*fan_out), Dim(*depth))
    made = Scaling((spec,), table, Choices(batch=batch))
    row = made.param(spec, found, {**found.defaults, **settings})
    return {"lr": row.lr, **row.eps}


def _scales(table: Rules) -> bool:
    return all(row.update_norm is not None for row in table.rows.values())


def _check(method: Method, settings: dict[str, object], sizes: dict[str, tuple[int, int]]) -> None:
    unknown = next((key for key in settings if key not in method.defaults), None)
    if unknown is not None:
        known = sorted(method.defaults)
        raise ValueError(
            f"unknown setting {unknown!r} of {method.name!r}; available: {', '.join(known)}{near(unknown, known)}"
        )
    for name, pair in sizes.items():
        if len(pair) != 2 or not all(math.isfinite(size) and size > 0 for size in pair):
            raise ValueError(f"{name} must be (size, base size), both positive, got {pair!r}")
