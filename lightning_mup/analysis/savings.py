"""What methods save in compute at several sizes, from runs: which of them count, and the multiplier of each method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, get_args

from lightning_mup.analysis.multiplier import Multiplier, Trial, compute_multiplier
from lightning_mup.analysis.runs import Metric, Run, check_same_data, listed, without_repeats
from lightning_mup.core.plan import aligned
from lightning_mup.core.registry import near

Cost = Literal["flops", "6nd", "seconds"]
COSTS: dict[Cost, str] = {
    "flops": "FLOPs of forward and backward passes, attention included",
    "6nd": "6 x parameters without embeddings and readout x tokens",
    "seconds": "seconds of training",
}
BASELINES = ("adamw", "adam")
"""Methods to compare with where nobody says which, first known first."""
_SIZES = 2
_ALIKE = 2.0  # tokens per parameter that differ by more are no frontier: the larger models were trained too little
_Settings = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Carried:
    """The runs of one method and parametrization with the settings that were tuned small and carried over.

    Args:
        label: method and parametrization.
        lr: learning rate at the base.
        weight_decay: fraction removed per step at the base.
        runs: the runs with these, smallest first, repeats included.
        trials: their costs and losses.
        others: number of runs with other settings, which are left out.
    """

    label: str
    lr: float
    weight_decay: float
    runs: tuple[Run, ...]
    trials: tuple[Trial, ...]
    others: int = 0

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and depth of each size."""
        return tuple(dict.fromkeys((run.width, run.depth) for run in self.runs))


@dataclass(frozen=True)
class Savings:
    """What each method saves over a baseline.

    Args:
        baseline: label of the runs that are compared with.
        data: fingerprint of the data.
        cost: what is counted.
        metric: which loss is compared.
        carried: the runs that count, by label, the baseline's included.
        multipliers: one per method that could be compared.
        refused: why a method could not be, by label.
        notes: what was left out, and why.
    """

    baseline: str
    data: str
    cost: Cost
    metric: Metric
    carried: Mapping[str, Carried]
    multipliers: Mapping[str, Multiplier]
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, object]]:
        """Return one plain dict per method and cost."""
        return [
            {
                "group": label,
                "baseline": self.baseline,
                "cost": row.cost,
                "cost_is": self.cost,
                "loss": row.loss,
                "baseline_cost": row.baseline_cost,
                "multiplier": row.multiplier,
                "low": row.low,
                "high": row.high,
                "octaves_extrapolated": row.octaves,
                "runs": row.runs,
                "note": row.note,
            }
            for label, found in self.multipliers.items()
            for row in found.rows
        ]

    def as_dict(self) -> dict[str, object]:
        """Return everything as plain values."""
        return {
            "baseline": self.baseline,
            "cost_is": self.cost,
            "methods": [self._method(label) for label in self.carried],
            "sizes": self.rows(),
            "notes": list(self.notes),
        }

    def _method(self, label: str) -> dict[str, object]:
        carried, found = self.carried[label], self.multipliers.get(label)
        row: dict[str, object] = {"group": label, "lr": carried.lr, "weight_decay": carried.weight_decay}
        if found is None:
            return row | {"multiplier": 1.0 if label == self.baseline else None, "refused": self.refused.get(label)}
        trend = found.trend
        row |= {"multiplier": found.value, "low": found.low, "high": found.high, "noise": found.noise}
        row |= {"noise_from": found.source, "trend": trend.slope, "trend_low": trend.low, "trend_high": trend.high}
        return row | {"verdict": trend.verdict, "notes": list(found.notes)}

    def summary(self) -> list[list[str]]:
        """Return a table of texts, its header first: one line per method."""
        header = ["runs of", "lr", "weight decay", "sizes", "compute multiplier [95%]", "slope with cost [95%]"]
        lines = [header]
        for label, carried in self.carried.items():
            found = self.multipliers.get(label)
            told = self.refused.get(label, "-") if found is None else _interval(found)
            told = "1 (baseline)" if label == self.baseline else told
            trend = "-" if found is None else str(found.trend)
            lines.append(
                [label, f"{carried.lr:.3g}", f"{carried.weight_decay:.3g}", str(len(carried.sizes)), told, trend]
            )
        return lines

    def table(self) -> str:
        """Return the summary as aligned text."""
        return "\n".join(aligned(self.summary()))


def find_savings(
    runs: Iterable[Run], *, baseline: str | None = None, cost: Cost = "flops", metric: Metric = "val_loss"
) -> Savings:
    """Find how much compute each method saves over a baseline, at the settings that were carried over.

    Of each method and parametrization one learning rate and weight decay counts at all sizes: the pair that was run at
    the most of them and, of several, the one with the lowest mean loss at the smallest. So a sweep at every size is
    read as tuned at its smallest, and never as tuned at the target.

    Args:
        runs: runs on the same data, any number of methods; unfinished ones are left out.
        baseline: label, such as ``"adamw, mup"``, or method of the runs to compare with; None for AdamW's or Adam's.
        cost: what is counted, see :data:`COSTS`.
        metric: which loss is compared.

    Raises:
        ValueError: there is no baseline, or no run that ended; the runs are of different data; an option is unknown.

    Examples:
        >>> find_savings([])
        Traceback (most recent call last):
        ...
        ValueError: none of the 0 runs has ended; savings need runs with a result.json

    Reference:
        arXiv:2512.05620, Section 4 and Figure 6.
    """
    for name, value, allowed in (("cost", cost, get_args(Cost)), ("metric", metric, get_args(Metric))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{near(value, allowed)}")
    kept, notes = without_repeats(runs)
    ended = [run for run in kept if run.status != "unfinished"]
    if not ended:
        raise ValueError(f"none of the {len(kept)} runs has ended; savings need runs with a result.json")
    data = check_same_data(ended)
    if unfinished := len(kept) - len(ended):
        notes.append(f"left out, because they are unfinished: {unfinished} runs")
    carried = _carried(ended, cost, metric)
    chosen = _baseline(carried, baseline)
    multipliers, refused = {}, {}
    for label in carried.keys() - {chosen}:
        try:
            multipliers[label] = compute_multiplier(carried[chosen].trials, carried[label].trials)
        except ValueError as error:
            refused[label] = str(error)
    order = [chosen, *(label for label in carried if label != chosen)]
    return Savings(
        baseline=chosen,
        data=data,
        cost=cost,
        metric=metric,
        carried={label: carried[label] for label in order},
        multipliers={label: multipliers[label] for label in order if label in multipliers},
        refused=refused,
        notes=tuple([*notes, *_uneven(carried[chosen]), *_left_out(carried.values())]),
    )


def can_compare(runs: Iterable[Run]) -> bool:
    """Return whether runs are meant to show savings: a baseline at two sizes, other methods, tokens as sizes grow.

    Examples:
        >>> can_compare([])
        False
    """
    ratios: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.status != "unfinished":
            ratios[_label(run)][run.params] = run.max_steps * run.tokens_per_step / run.params
    chosen = _named(list(ratios), None)
    if chosen is None or len(ratios) == 1 or len(ratios[chosen]) < _SIZES:
        return False
    return _spread(ratios[chosen].values()) <= _ALIKE


def _spread(ratios: Iterable[float]) -> float:
    ratios = list(ratios)
    return max(ratios) / min(ratios)


def _label(run: Run) -> str:
    return f"{run.method}, {run.rules}"


def _carried(runs: Sequence[Run], cost: Cost, metric: Metric) -> dict[str, Carried]:
    grouped: dict[str, dict[_Settings, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.params, run.max_steps, run.seed)):
        grouped[_label(run)][run.lr, run.weight_decay].append(run)
    found = {}
    for label, by_settings in sorted(grouped.items()):
        (lr, decay), chosen = min(by_settings.items(), key=lambda item: _order(item[1], metric))
        total = sum(len(group) for group in by_settings.values())
        trials = tuple(_trials(chosen, cost, metric))
        found[label] = Carried(label, lr, decay, tuple(chosen), trials, total - len(chosen))
    return found


def _order(runs: Sequence[Run], metric: Metric) -> tuple[int, float]:
    """Most sizes first, then the lowest mean log loss at the smallest."""
    smallest = [run.loss(metric) for run in runs if run.params == runs[0].params]
    return -len({run.params for run in runs}), sum(map(math.log, smallest)) / len(smallest)


def _baseline(carried: Mapping[str, Carried], wanted: str | None) -> str:
    found = _named(list(carried), wanted)
    if found is None:
        asked = f"no runs of {wanted!r}" if wanted else f"no runs of {' or '.join(BASELINES)}"
        raise ValueError(
            f"{asked} to compare with; there are {listed(carried)}: name one as baseline{near(wanted or '', carried)}"
        )
    return found


def _named(labels: Sequence[str], wanted: str | None) -> str | None:
    """Return the label that is meant: as it is, or the first of a method, with ``mup`` before other rules."""
    if wanted in labels:
        return wanted
    for method in (wanted,) if wanted else BASELINES:
        mine = sorted(
            (label for label in labels if label.split(", ")[0] == method), key=lambda x: (", mup" not in x, x)
        )
        if mine:
            return mine[0]
    return None


def _trials(runs: Sequence[Run], cost: Cost, metric: Metric) -> list[Trial]:
    """Return runs by cost; repeats have one cost, so that of seconds is the median."""
    costs: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run in runs:
        costs[run.params, run.max_steps].append(_cost_of(run, cost))
    return [
        Trial(median(costs[run.params, run.max_steps]), run.loss(metric), run.seed, run.folder.name) for run in runs
    ]


def _cost_of(run: Run, cost: Cost) -> float:
    """Return what a run takes; one that diverged is counted in full, but for its seconds."""
    if cost == "seconds":
        return run.result.seconds if run.result else math.nan
    each = run.flops_per_token if cost == "flops" else 6.0 * run.non_embedding_params
    return run.max_steps * run.tokens_per_step * each


def _uneven(carried: Carried) -> list[str]:
    ratio = _spread(run.max_steps * run.tokens_per_step / run.params for run in carried.runs)
    if ratio <= _ALIKE:
        return []
    what = f"{carried.label}: tokens per parameter differ by a factor of {ratio:.2g}"
    return [f"{what}, so that its larger models are not what their compute can reach"]


def _left_out(carried: Iterable[Carried]) -> list[str]:
    return [
        f"{found.label}: {found.others} runs with other settings than lr {found.lr:.3g}, weight decay "
        f"{found.weight_decay:.3g} are left out"
        for found in carried
        if found.others
    ]


def _interval(found: Multiplier) -> str:
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"
