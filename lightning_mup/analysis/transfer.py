"""Does what was tuned at the base still fit at other sizes? Optima, drift, and the loss that transferring costs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from lightning_mup.analysis.drift import TOLERANCE
from lightning_mup.analysis.groups import AtSize, Axis, Group, Tuned, make_groups
from lightning_mup.analysis.quality import TransferQuality, transfer_quality
from lightning_mup.analysis.recommend import Recommendation, recommend
from lightning_mup.analysis.runs import Metric, Run, check_same_data, listed, without_repeats
from lightning_mup.core.plan import aligned
from lightning_mup.core.registry import near

_TINY = 5e-5  # rounds to zero in a table
WORDS: dict[Tuned, str] = {"lr": "learning rate", "weight_decay": "weight decay"}


@dataclass(frozen=True)
class TransferReport:
    """What a set of runs says about transfer.

    Args:
        groups: one per method, parametrization and held values.
        axis: what varies in size.
        tuned: which hyperparameter was tuned.
        metric: which loss is compared.
        data: fingerprint of the data.
        unfinished: runs without a result, which no number includes.
        diverged: runs that diverged, which bound the optima.
        notes: what else was left out, and why.
    """

    groups: tuple[Group, ...]
    axis: Axis
    tuned: Tuned
    metric: Metric
    data: str
    unfinished: tuple[Run, ...] = ()
    diverged: tuple[Run, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, object]]:
        """Return one plain dict per group and size; log2 values are of the tuned hyperparameter at the base."""
        return [self._row(group, at) for group in self.groups for at in group.sizes]

    def table(self) -> str:
        """Return the verdicts and an aligned table, one line per group and size."""
        lines = [cells(group, at) for group in self.groups for at in group.sizes]
        return "\n".join([*self.verdicts(), "", *aligned([self.header(), *lines])])

    def header(self) -> list[str]:
        """Return the names of the table's columns."""
        losses = ["loss there", "loss at base's best", "lost [95%]", "runs (diverged)", f"{self.tuned} to add"]
        return ["runs of", self.axis, f"best {self.tuned}", "log2 [95%]", *losses]

    def __str__(self) -> str:
        """Print the table."""
        return self.table()

    def verdicts(self) -> list[str]:
        """Return one line per group: how its optimum moves with size."""
        return [f"{g.label}: best {WORDS[self.tuned]} against {self.axis}: slope {g.drift}" for g in self.groups]

    @cached_property
    def qualities(self) -> list[tuple[Group, TransferQuality]]:
        """Each group with its :class:`~lightning_mup.analysis.quality.TransferQuality`."""
        return [(group, transfer_quality(group)) for group in self.groups]

    def name_of(self, run: Run) -> str:
        """Return a run's folder, relative to the one that holds all runs."""
        runs = [run for group in self.groups for at in group.sizes for run in at.runs]
        folders = [str(r.folder.parent) for r in (*runs, *self.unfinished, *self.diverged)]
        return Path(os.path.relpath(run.folder, os.path.commonpath(folders))).as_posix()

    def to_json(self) -> str:
        """Return everything as JSON; numbers that are not finite become the strings "nan", "inf" and "-inf"."""
        chosen = self.recommended()
        found = {
            "axis": self.axis,
            "tuned": self.tuned,
            "metric": self.metric,
            "data": self.data,
            "groups": [_drift_row(group) | _quality_row(quality) for group, quality in self.qualities],
            "sizes": self.rows(),
            "recommended": chosen.settings if chosen else None,
            "unfinished": [self.name_of(run) for run in self.unfinished],
            "diverged": [self.name_of(run) for run in self.diverged],
            "notes": list(self.notes),
        }
        return json.dumps(plain(found), indent=1, allow_nan=False)

    def recommended(self) -> Recommendation | None:
        """Return what to train with, see :func:`~lightning_mup.analysis.recommend.recommend`."""
        return recommend(self.groups, axis=self.axis, tuned=self.tuned)

    def _row(self, group: Group, at: AtSize) -> dict[str, object]:
        best = at.optimum
        return {
            "group": group.label,
            "method": group.method,
            "rules": group.rules,
            **group.held,
            self.axis: at.size,
            "base": at.size == group.base,
            "best": best.value,
            "log2_best": best.log2_value,
            "log2_low": best.low,
            "log2_high": best.high,
            "bracketed": best.bracketed,
            "add": [float(f"{2.0**x:.4g}") for x in best.add],
            "best_loss": best.loss,
            "log2_transferred": at.transferred,
            "transferred_loss": at.loss,
            "lost": at.lost,
            "lost_low": at.lost_low,
            "lost_high": at.lost_high,
            "runs": len(at.runs),
            "diverged": sum(run.status == "diverged" for run in at.runs),
            "flops": at.flops,
            "note": best.note,
        }


def transfer_table(
    runs: Iterable[Run],
    *,
    axis: Axis = "width",
    tuned: Tuned = "lr",
    metric: Metric = "val_loss",
    tolerance: float = TOLERANCE,
) -> TransferReport:
    """Find each size's optimum, how it moves with size, and what it costs to use the base's.

    Runs are grouped by method, parametrization, the other size, the bases and the hyperparameter that is not tuned.
    What is transferred is the optimum at the base size, or at the smallest where the base was not run. Noise is taken
    from repeats over seeds, at one size or any other of the group, and is expected to be 0.2% beside.

    Args:
        runs: runs on the same data, any number of groups.
        axis: which size varies.
        tuned: which hyperparameter varies at each size.
        metric: which loss is compared.
        tolerance: largest slope of the optimum that still stands (> 0).

    Raises:
        ValueError: there is no run that ended, the runs are of different data, those of one size have different
            budgets, or an option is unknown.

    Examples:
        >>> transfer_table([])
        Traceback (most recent call last):
        ...
        ValueError: none of the 0 runs has ended; a report needs runs with a result.json
    """
    for name, value, allowed in (("axis", axis, get_args(Axis)), ("tuned", tuned, get_args(Tuned))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{near(value, allowed)}")
    kept, notes = without_repeats(runs)
    ended = [run for run in kept if run.status != "unfinished"]
    if not ended:
        raise ValueError(f"none of the {len(kept)} runs has ended; a report needs runs with a result.json")
    data = check_same_data(ended)
    usable = [run for run in ended if getattr(run, tuned) > 0]
    if zeros := [run for run in ended if run not in usable]:
        why = f"{tuned} is 0, which has no place on a logarithmic axis"
        notes.append(f"left out, because {why}: {listed(run.folder.name for run in zeros)}")
    return TransferReport(
        groups=make_groups(usable, axis=axis, tuned=tuned, metric=metric, tolerance=tolerance),
        axis=axis,
        tuned=tuned,
        metric=metric,
        data=data,
        unfinished=tuple(run for run in kept if run.status == "unfinished"),
        diverged=tuple(run for run in ended if run.status == "diverged"),
        notes=tuple(notes),
    )


def plain(value: object) -> object:
    """Return a value as JSON can hold it: numbers that are not finite become "nan", "inf" and "-inf".

    Examples:
        >>> plain({"lost": [float("inf"), 1.5]})
        {'lost': ['inf', 1.5]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def number(value: float, form: str = ".4f") -> str:
    """Return a number for a table; "diverged" for inf, "-" where it is not known.

    Examples:
        >>> number(3.14159), number(math.inf), number(math.nan)
        ('3.1416', 'diverged', '-')
    """
    if math.isnan(value):
        return "-"
    value = 0.0 if -_TINY < value < 0 and form.endswith("4f") else value  # no minus before zero
    return format(value, form) if math.isfinite(value) else "diverged"


def cells(group: Group, at: AtSize) -> list[str]:
    """Return one line of the table."""
    best = at.optimum
    interval = f"{number(best.log2_value, '.2f')} [{best.low:.2f}, {best.high:.2f}]"
    lost = number(at.lost, "+.4f")
    if math.isfinite(at.lost_low):
        lost += f" [{number(at.lost_low, '+.4f')}, {number(at.lost_high, '+.4f')}]"
    add = ", ".join(f"{2.0**x:.3g}" for x in best.add)
    size = f"{at.size} (base)" if at.size == group.base else str(at.size)
    failed = sum(run.status == "diverged" for run in at.runs)
    shown = [number(best.value, ".3g"), interval, number(best.loss), number(at.loss), lost]
    return [group.label, size, *shown, f"{len(at.runs)} ({failed})", add]


def _quality_row(quality: TransferQuality) -> dict[str, object]:
    found = {"fit_error": quality.fit_error, "robustness": quality.robustness, "penalty": quality.penalty}
    return {
        f"{name}{end}": getattr(estimate, key)
        for name, estimate in found.items()
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high"), ("_note", "note"))
    }


def _drift_row(group: Group) -> dict[str, object]:
    drift = group.drift
    return {
        "group": group.label,
        "slope": drift.slope,
        "slope_low": drift.low,
        "slope_high": drift.high,
        "verdict": drift.verdict,
        "sizes": list(drift.sizes),
        "note": drift.note,
        "share_of_run": group.share_of_run,
        "share_of_tuning": group.share_of_tuning,
    }
