"""Runs by method, parametrization and size: what each size's runs say of the hyperparameter that was tuned there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_mup.analysis.drift import Drift, fit_drift
from lightning_mup.analysis.optimum import Optimum, find_optimum, repeat_variance
from lightning_mup.analysis.runs import Metric, Run, listed

Axis = Literal["width", "depth"]
Tuned = Literal["lr", "weight_decay"]
_NOISE, _TRUST = 0.002, 4.0  # expected between seeds, as a fraction of the loss, and how many runs' worth that counts
_BUDGET = ("max_steps", "tokens_per_step")
_TAILS = (2.5, 97.5)  # percent
_Points = tuple[list[float], list[float]]  # log2 of the values, losses


@dataclass(frozen=True)
class AtSize:
    """What a group's runs of one size say.

    Args:
        size: width or depth.
        optimum: the best value at this size.
        transferred: log2 of the value carried over from the base; nan where the base has none.
        loss: loss at that value: inf where it diverges, nan where no run is near.
        lost: how much higher that is than the loss at this size's own optimum, in nats.
        lost_low: lower end of its 95% interval; nan where none is known.
        lost_high: upper end.
        runs: the runs that ended, repeats included.
    """

    size: int
    optimum: Optimum
    transferred: float
    loss: float
    lost: float
    lost_low: float
    lost_high: float
    runs: tuple[Run, ...]

    @property
    def flops(self) -> float:
        """Operations that all runs of this size took."""
        return sum(run.flops for run in self.runs)

    @property
    def flops_of_one(self) -> float:
        """Operations of one run that finished; nan where none did."""
        finished = [run.flops for run in self.runs if run.status == "finished"]
        return sum(finished) / len(finished) if finished else math.nan


@dataclass(frozen=True)
class Group:
    """Runs of one method under one parametrization over sizes, with what is not tuned held.

    Args:
        label: what the group is to be called.
        method: name of the method.
        rules: name of the parametrization.
        held: the hyperparameter that is not tuned, by name.
        base: size from which values are transferred.
        sizes: what each size's runs say, smallest first.
        drift: how the optimum moves with size.
    """

    label: str
    method: str
    rules: str
    held: Mapping[str, float]
    base: int
    sizes: tuple[AtSize, ...]
    drift: Drift

    @property
    def at_base(self) -> AtSize:
        """The base's runs."""
        return next(s for s in self.sizes if s.size == self.base)

    @property
    def target(self) -> AtSize:
        """The largest size's runs."""
        return self.sizes[-1]

    @property
    def share_of_run(self) -> float:
        """Operations of tuning at the base, as a share of one run at the target; nan without target."""
        return self.at_base.flops / self.target.flops_of_one if self.target is not self.at_base else math.nan

    @property
    def share_of_tuning(self) -> float:
        """Operations of tuning at the base, as a share of as many runs at the target."""
        return self.share_of_run / len(self.at_base.runs)


def make_groups(
    runs: Sequence[Run], *, axis: Axis, tuned: Tuned, metric: Metric, tolerance: float
) -> tuple[Group, ...]:
    """Group runs that ended and find each size's optimum.

    Args:
        runs: runs whose tuned hyperparameter is positive.
        axis: which size varies.
        tuned: which hyperparameter varies at each size.
        metric: which loss is compared.
        tolerance: largest slope of the optimum that still stands (> 0).

    Raises:
        ValueError: runs of one group and size have different budgets.

    Examples:
        >>> make_groups([], axis="width", tuned="lr", metric="val_loss", tolerance=0.25)
        ()
    """
    other, held = _others(axis, tuned)
    grouped: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        key = (run.method, run.rules, getattr(run, other), run.base_width, run.base_depth, getattr(run, held))
        grouped[key].append(run)
    made = [_group(grouped[key], axis, tuned, metric=metric, tolerance=tolerance) for key in sorted(grouped, key=str)]
    return _labelled(made, other)


def _others(axis: Axis, tuned: Tuned) -> tuple[str, str]:
    """Return the size and the hyperparameter that are held."""
    return "depth" if axis == "width" else "width", "weight_decay" if tuned == "lr" else "lr"


def _group(runs: Sequence[Run], axis: Axis, tuned: Tuned, *, metric: Metric, tolerance: float) -> Group:
    by_size: dict[int, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (getattr(run, axis), getattr(run, tuned), run.seed)):
        by_size[getattr(run, axis)].append(run)
    for size, group in by_size.items():
        _check_budget(group, f"{axis} {size}")
    points = {
        size: ([round(math.log2(getattr(r, tuned)), 6) for r in group], [r.loss(metric) for r in group])
        for size, group in by_size.items()
    }
    optima = {size: _optimum(points, size) for size in points}
    first, held = runs[0], _others(axis, tuned)[1]
    wanted = getattr(first, f"base_{axis}")
    base = wanted if wanted in optima else min(optima)
    carried = optima[base].log2_value
    return Group(
        label=f"{first.method}, {first.rules}",
        method=first.method,
        rules=first.rules,
        held={held: getattr(first, held)},
        base=base,
        sizes=tuple(
            AtSize(n, best, carried, *_cost(best, carried, points[n]), runs=tuple(by_size[n]))
            for n, best in optima.items()
        ),
        drift=fit_drift(optima, tolerance=tolerance),
    )


def _check_budget(runs: Sequence[Run], where: str) -> None:
    for name in _BUDGET:
        if len(values := sorted({getattr(run, name) for run in runs})) > 1:
            raise ValueError(
                f"runs of {runs[0].method}, {runs[0].rules} at {where} have different {name}: {listed(values)}; "
                f"their losses cannot be compared, give runs of one budget alone"
            )


def _optimum(points: Mapping[int, _Points], size: int) -> Optimum:
    """Find one size's optimum; the noise to expect is the stated one and what repeats at the other sizes show."""
    total, weight = _TRUST * _NOISE**2, _TRUST
    for other in points.keys() - {size}:
        within, freedom = repeat_variance(*points[other])
        total, weight = total + within, weight + freedom
    return find_optimum(*points[size], noise=math.sqrt(total / weight), trust=weight)


def _cost(best: Optimum, at: float, points: _Points) -> tuple[float, float, float, float]:
    """Return the loss at a value that was carried over, and how much that loses, with its interval."""
    if math.isnan(at) or math.isnan(best.log2_value):
        return (math.nan,) * 4 if math.isnan(at) else (math.inf,) * 4
    tested = sorted(set(points[0]))
    nearest = min(tested, key=lambda x: abs(x - at))
    bounds = [x for x in best.diverged if x > best.log2_value]
    if bounds and at > best.log2_value and (at >= bounds[0] or nearest in bounds):
        return (math.inf,) * 4
    gap = float(np.median(np.diff(tested))) if len(tested) > 1 else 1.0
    if best.valley is not None and best.used[0] - gap / 2 <= at <= best.used[-1] + gap / 2:
        here, there = (np.exp(best.valley.log_loss(x)) for x in (at, best.log2_value))
        low, high = np.percentile(here - there, _TAILS).tolist()
        loss = best.valley.loss(at)
        return loss, loss - best.loss, low, high
    loss = _interpolated(at, points)
    return loss, loss - best.loss, math.nan, math.nan


def _interpolated(at: float, points: _Points) -> float:
    """Return the loss between two runs, a straight line in the logarithms; nan outside of what was run."""
    sums: dict[float, list[float]] = defaultdict(list)
    for x, loss in zip(*points, strict=True):
        if math.isfinite(loss):
            sums[x].append(math.log(loss))
    xs = sorted(sums)
    ys = [sum(sums[x]) / len(sums[x]) for x in xs]
    return math.exp(float(np.interp(at, xs, ys))) if xs[0] <= at <= xs[-1] else math.nan


def _labelled(groups: Sequence[Group], other: str) -> tuple[Group, ...]:
    """Add to labels that several groups share the held values in which these differ."""
    alike: dict[str, list[dict[str, float]]] = defaultdict(list)
    for group in groups:
        alike[group.label].append(_held(group, other))
    return tuple(replace(g, label=", ".join([g.label, *_told(_held(g, other), alike[g.label])])) for g in groups)


def _held(group: Group, other: str) -> dict[str, float]:
    first = group.sizes[0].runs[0]
    return {name: getattr(first, name) for name in (*group.held, other, "base_width", "base_depth")}


def _told(held: Mapping[str, float], alike: Sequence[Mapping[str, float]]) -> list[str]:
    return [f"{name} {value:.6g}" for name, value in held.items() if len({other[name] for other in alike}) > 1]
