"""The hyperparameters to train with, and where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mup.analysis.groups import Axis, Group, Tuned


@dataclass(frozen=True)
class Recommendation:
    """Hyperparameters at the base, ready for training, and where they come from.

    Args:
        settings: ``method``, ``rules``, ``lr`` and ``weight_decay``.
        provenance: where they come from and what to expect, one sentence each.
    """

    settings: dict[str, str | float]
    provenance: tuple[str, ...]

    def to_yaml(self) -> str:
        """Return the settings as YAML, with the provenance as comments.

        Examples:
            >>> print(Recommendation({"method": "muon", "lr": 1e-05}, ("Tuned at width 64.",)).to_yaml(), end="")
            # Tuned at width 64.
            method: "muon"
            lr: 1.0e-05
        """
        lines = [f"# {line}" for text in self.provenance for line in text.splitlines()]
        lines += [f"{key}: {_scalar(value)}" for key, value in self.settings.items()]
        return "\n".join(lines) + "\n"


def recommend(groups: Sequence[Group], *, axis: Axis, tuned: Tuned) -> Recommendation | None:
    """Return the base's best hyperparameters of the group with the lowest loss at the largest size.

    Groups whose optimum moves with size come last, and those whose base does not bracket an optimum not at all.

    Args:
        groups: the groups to choose from.
        axis: which size varies.
        tuned: which hyperparameter was tuned.

    Returns:
        The hyperparameters; None where no group is left.

    Examples:
        >>> recommend([], axis="width", tuned="lr") is None
        True
    """
    known = [g for g in groups if g.at_base.optimum.bracketed]
    if not known:
        return None
    largest = max(g.target.size for g in known)
    best = min(known, key=lambda g: (g.target.size < largest, g.drift.verdict == "moves", _rank(g.target.loss)))
    value = {tuned: float(f"{best.at_base.optimum.value:.3g}"), **best.held}
    names: dict[str, str | float] = {"method": best.method, "rules": best.rules}
    settings = {**names, "lr": value["lr"], "weight_decay": value["weight_decay"]}
    return Recommendation(settings, (*_origin(best, axis, tuned), *_expectation(best, axis)))


def _origin(group: Group, axis: Axis, tuned: Tuned) -> list[str]:
    at = group.at_base
    first, best = at.runs[0], at.optimum
    return [
        f"lr and weight_decay are those at the base: width {first.base_width}, depth {first.base_depth}.",
        f"{tuned} was tuned with {len(at.runs)} runs at {axis} {at.size}; 95% interval "
        f"{2.0**best.low:.3g} to {2.0**best.high:.3g}; loss there {best.loss:.4f}.",
        f"Data: {first.data}.",
    ]


def _expectation(group: Group, axis: Axis) -> list[str]:
    at = group.target
    if at is group.at_base:
        return [f"No other {axis} was run, so nothing tells how this transfers."]
    drift = f"Slope of the optimum against {axis}: {group.drift}."
    if math.isfinite(at.loss):
        return [drift, f"Loss to expect at {axis} {at.size}: {at.loss:.4f}, {at.lost:+.4f} against tuning there."]
    return [drift, f"At {axis} {at.size} it {'diverges' if at.loss == math.inf else 'is outside of what was run'}."]


def _rank(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _scalar(value: str | float) -> str:
    """Return a YAML scalar; a JSON string is one, a number needs a point before its exponent to be read as one."""
    if isinstance(value, str):
        return json.dumps(value)
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
