"""The points of a scaling law: what is left out and why, and whether the rest can tell what is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mup.analysis.power_terms import Array
from lightning_mup.analysis.runs import listed

_DISTINCT = 3  # sizes that tell a level, a scale and an exponent apart
_SAME = 1e-6  # sizes whose logs are this close are one size
_OWN_SPREAD = 0.05  # standard deviation of log tokens, given params, below which two terms cannot be told apart
_STEP = 4.0  # between sizes that are suggested
_EXPONENT = {"params": "a", "tokens": "b", "flops": "c"}


@dataclass(frozen=True, slots=True)
class Points:
    """Runs that can be fitted.

    Args:
        table: sizes by name, and ``"loss"``; arrays of one length.
        left_out: what was left out, and why, one line each.
        label: whose runs these are, ``""`` where there is no other.
    """

    table: Mapping[str, Array]
    left_out: tuple[str, ...]
    label: str = ""

    @property
    def count(self) -> int:
        """Number of runs."""
        return len(self.table["loss"])

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes."""
        return tuple(name for name in self.table if name != "loss")

    @property
    def whose(self) -> str:
        """Whose runs these are, for a message."""
        return f" of {self.label}" if self.label else ""


def clean(
    sizes: Mapping[str, Sequence[float]], losses: Sequence[float], leave_out: Mapping[int, str], label: str = ""
) -> Points:
    """Leave out runs that diverged, that repeat another run in every number, and those that the caller names.

    Runs of one size with different losses are repeats over seeds: all are kept.

    Args:
        sizes: sizes of the runs by name (> 0).
        losses: their losses (> 0).
        leave_out: why a run is to be left out, by its position.
        label: whose runs these are.

    Raises:
        ValueError: the lists differ in length, or a number is out of range.

    Examples:
        >>> points = clean({"flops": [1e18, 1e19, 1e19]}, [3.0, math.inf, 2.8], {})
        >>> points.table["flops"].tolist(), points.left_out
        ([1e+18, 1e+19], ('run 1 (flops 1e+19): its loss is inf',))
    """
    table = {name: np.asarray(values, dtype=np.float64) for name, values in {**sizes, "loss": losses}.items()}
    lengths = {name: values.shape for name, values in table.items()}
    if len(set(lengths.values())) > 1 or table["loss"].ndim != 1:
        raise ValueError(f"give one number per run and list, got lists of shape {lengths}; they must be as long")
    for name, values in table.items():
        wrong = values <= 0 if name == "loss" else ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(f"{name} must be positive and finite, got {values[at]:g} of run {at}; leave that run out")
    if outside := [at for at in leave_out if not 0 <= at < len(table["loss"])]:
        raise ValueError(f"leave_out names run {outside[0]}; there are runs 0 to {len(table['loss']) - 1}")
    reasons = _reasons(table, leave_out)
    kept = np.array([at for at in range(len(table["loss"])) if at not in reasons], dtype=np.int64)
    words = [f"run {at} ({_words(table, at)}): {why}" for at, why in sorted(reasons.items())]
    return Points({name: values[kept] for name, values in table.items()}, tuple(words), label)


def _reasons(table: Mapping[str, Array], leave_out: Mapping[int, str]) -> dict[int, str]:
    reasons = dict(leave_out)
    first: dict[tuple[float, ...], int] = {}
    for at, row in enumerate(zip(*(values.tolist() for values in table.values()), strict=True)):
        if at in reasons:
            continue
        if not math.isfinite(row[-1]):
            reasons[at] = f"its loss is {row[-1]}"
        elif first.setdefault(row, at) != at:
            reasons[at] = f"it repeats run {first[row]} in every number"
    return reasons


def _words(table: Mapping[str, Array], at: int) -> str:
    return ", ".join(f"{name} {values[at]:.4g}" for name, values in table.items() if name != "loss")


def check_varied(points: Points, *, parameters: int) -> None:
    """Check that there are more points than parameters, losses that differ, and three values of each size.

    Raises:
        ValueError: something is missing; the message says which runs to add.
    """
    left_out = f"; left out: {listed(points.left_out)}" if points.left_out else ""
    if points.count <= parameters:
        raise ValueError(
            f"{parameters} parameters need at least {parameters + 1} runs{points.whose}, got {points.count} that can "
            f"be fitted; run more sizes{left_out}"
        )
    losses = points.table["loss"]
    if np.ptp(losses) == 0:
        raise ValueError(
            f"all {points.count} losses{points.whose} are {losses[0]:g}, so nothing tells what they fall "
            f"with; check which loss was read{left_out}"
        )
    for name in points.sizes:
        found = distinct(points.table[name])
        if len(found) < _DISTINCT:
            more = [found[-1] * _STEP**k for k in range(1, _DISTINCT + 1 - len(found))]
            raise ValueError(
                f"{name}{points.whose} takes {len(found)} of the {_DISTINCT} values or more that tell the exponent "
                f"{_EXPONENT[name]}: {listed(f'{x:.4g}' for x in found)}; add runs at {name} "
                f"{listed(f'{x:.3g}' for x in more)}{left_out}"
            )


def check_independent(points: Points) -> None:
    """Check that tokens vary at given params, without which the two terms cannot be told apart.

    Raises:
        ValueError: tokens follow params.
    """
    log_n, log_d = np.log(points.table["params"]), np.log(points.table["tokens"])
    slope, offset = np.polyfit(log_n - log_n.mean(), log_d, 1)
    own = float((log_d - offset - slope * (log_n - log_n.mean())).std())
    if own < _OWN_SPREAD:
        n, d = float(points.table["params"].max()), float(points.table["tokens"].max())
        raise ValueError(
            f"tokens follow params (about as params^{slope:.2g}, but for {own:.1%}), so the two terms cannot be told "
            f"apart; fit_compute fits such runs, or add runs at params {n:.3g} with tokens {d / _STEP:.3g} and "
            f"{d * _STEP:.3g}, and likewise at smaller params"
        )


def distinct(values: Array) -> list[float]:
    """Return the different values, smallest first; what rounding tells apart is one.

    Examples:
        >>> distinct(np.array([2.0, 1.0, 2.0 + 1e-9]))
        [1.0, 2.0]
    """
    found: list[float] = []
    for x in np.sort(values).tolist():
        if not found or math.log(x / found[-1]) > _SAME:
            found.append(x)
    return found
