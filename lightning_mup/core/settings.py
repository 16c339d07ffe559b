"""Settings of parameter groups: whose they are, what they may be, and what decay they mean."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from lightning_mup.core.layout import as_role
from lightning_mup.core.method import Decay, Method, find_method
from lightning_mup.core.registry import near
from lightning_mup.core.spec import Role

Group = dict[str, Any]
NonFinite = Literal["raise", "skip", "ignore"]
COMMON = ("lr", "weight_decay", "decay", "nonfinite", "graft", "graft_eps", "spectral_norm")
"""Settings that every method of this package has."""
_FRACTION = 0.01  # removed per step, it halves a weight every 69 steps: nobody means that


def arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among a constructor's ``locals()``.

    Examples:
        >>> arguments({"self": None, "params": [], "lr": 0.1})
        {'lr': 0.1}
    """
    return {key: value for key, value in names.items() if key not in ("self", "params", "__class__")}


def settings_of(group: Group, name: str) -> Group:
    """Return the settings of a method in a group: the group's own, or, where it is routed to, those named after it."""
    if name == group["method"]:
        return group
    common = {key: group[key] for key in (*COMMON, "lookup") if key in group}
    return {**find_method(name).defaults, **common, "graft": None, **(group.get(name) or {})}


def routes_of(method: Method, group: Group) -> dict[Role, str]:
    """Return the name of the method that takes over each role: a group's routes go before the method's own.

    Raises:
        ValueError: there is no such role.
    """
    return {**method.routes, **{as_role(role): name for role, name in (group.get("routes") or {}).items()}}


def decay_per_lr(group: Group) -> float:
    """Return what is removed per unit of learning rate: the coupled weight decay that does what the group says.

    Examples:
        >>> decay_per_lr({"decay": "independent", "weight_decay": 1e-3, "lr": 0.05, "lr_scheduled_from": 0.1})
        0.01
    """
    if not group["weight_decay"] or group["decay"] == "l2":
        return 0.0
    # OneCycleLR has a peak of its own, whatever the optimizer was given.
    peak = group.get("max_lr", group["lr_scheduled_from"]) * group.get("lr_mult", 1.0)
    return float(group["weight_decay"] / (peak if group["decay"] == "independent" else 1.0))


def check_names(group: Group, known: Mapping[str, Any], method: Method) -> None:
    """Check that a group holds no setting that nobody reads.

    Raises:
        ValueError: a name is unknown; a near match is named.
    """
    routes = routes_of(method, group)
    if (role := group.get("role")) not in (None, "frozen", "empty"):
        as_role(role)
    allowed = {*known, "params", "param_names", "name", "initial_lr", "method", "role", "routes", "axes", "split"}
    allowed |= {"lookup", "lr_at_base", "lr_mult", "lr_given", "given_group", "lr_scheduled_from", *routes.values()}
    _refuse_others(group, allowed, sorted(known), method.name)
    for name in {*routes.values(), str(group.get("graft"))} & group.keys():
        theirs = find_method(name).defaults.keys() - set(COMMON)
        _refuse_others(group[name] or {}, theirs, sorted(theirs), name)


def _refuse_others(settings: Mapping[str, Any], allowed: Collection[str], known: Sequence[str], method: str) -> None:
    for key in settings:
        if key not in allowed:
            raise ValueError(
                f"unknown setting {key!r} of method {method!r}; available: {', '.join(known)}"
                f"{near(str(key), sorted(allowed))}"
            )


def check_values(group: Group) -> None:
    """Check the settings that all methods have, and the parameters.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a parameter is not of a floating-point dtype.
    """
    for key, allowed in (("decay", get_args(Decay)), ("nonfinite", get_args(NonFinite))):
        if group[key] not in allowed:
            raise ValueError(f"{key} must be one of {allowed}, got {group[key]!r}{near(str(group[key]), allowed)}")
    if not float(group["lr"]) >= 0 or not group["weight_decay"] >= 0:
        raise ValueError(f"lr and weight_decay must be >= 0, got {group['lr']} and {group['weight_decay']}")
    if group["decay"] == "independent" and group["weight_decay"] and not group["lr_scheduled_from"]:
        raise ValueError(
            f"independent weight decay follows lr / (the lr that the group was given), which is 0, got weight_decay="
            f"{group['weight_decay']}; give the peak learning rate and let a scheduler lower it"
        )
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"parameters must be of a floating-point dtype, got {p.dtype}; leave such ones out")
    _warn_about_decay(group["weight_decay"], group["decay"], float(group["lr"]))


def _warn_about_decay(weight_decay: float, decay: str, lr: float) -> None:
    """Warn where a weight decay looks like torch's, which is multiplied by the learning rate."""
    if decay == "independent" and weight_decay >= _FRACTION:
        warnings.warn(
            f"weight_decay={weight_decay} removes {weight_decay:.0%} of every weight at each step, since it is "
            f"independent of the learning rate; for torch's convention give decay='coupled', or "
            f"weight_decay={weight_decay * lr:.2g}",
            stacklevel=5,
        )
