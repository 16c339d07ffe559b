"""How much the features change in one step, by size: what should not depend on width where transfer works."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from lightning_mup.analysis.groups import AtSize, Group
from lightning_mup.analysis.runs import Run

PREFIX = "feature/change/"
"""Keys that :class:`~lightning_mup.WatchUpdates` logs for its quantity ``feature/change``, one per role."""


@dataclass(frozen=True, slots=True)
class Feature:
    """RMS of the change of one role's features in one step, geometric mean over seeds.

    Args:
        group: label of the group.
        size: width or depth.
        role: role of the layers.
        step: optimizer steps taken.
        value: the RMS (> 0).
    """

    group: str
    size: int
    role: str
    step: int
    value: float

    def row(self) -> dict[str, object]:
        """Return the fields as a plain dict."""
        return asdict(self)


def feature_changes(groups: Iterable[Group], *, prefix: str = PREFIX) -> list[Feature]:
    """Return the feature changes at the first and the last step that was logged at all sizes of a group.

    They are those of the runs whose value is nearest to the transferred one. Groups of which fewer than two sizes
    logged any are left out.

    Args:
        groups: groups of a report.
        prefix: what the keys in ``metrics.jsonl`` start with; what follows is the role.

    Raises:
        ValueError: a ``metrics.jsonl`` is broken.

    Examples:
        >>> feature_changes([])
        []
    """
    return [feature for group in groups for feature in _of_group(group, prefix)]


def _of_group(group: Group, prefix: str) -> list[Feature]:
    tables = {at.size: _logged(_nearest(group, at), prefix) for at in group.sizes}
    tables = {size: table for size, table in tables.items() if table}
    if len(tables) < 2:
        return []
    shared = set.intersection(*({step for step, _ in table} for table in tables.values()))
    ends = sorted({min(shared), max(shared)}) if shared else []
    return [
        Feature(group.label, size, role, step, value)
        for size, table in tables.items()
        for (step, role), value in table.items()
        if step in ends
    ]


def _nearest(group: Group, at: AtSize) -> list[Run]:
    """Return the finished runs whose value is nearest to the transferred one, one per seed."""
    name = "weight_decay" if "lr" in group.held else "lr"
    finished = [run for run in at.runs if run.status == "finished"]
    if not finished or math.isnan(at.transferred):
        return []
    gap = {id(run): round(abs(math.log2(getattr(run, name)) - at.transferred), 6) for run in finished}
    return [run for run in finished if gap[id(run)] == min(gap.values())]


def _logged(runs: Iterable[Run], prefix: str) -> Mapping[tuple[int, str], float]:
    logs: dict[tuple[int, str], list[float]] = {}
    for run in runs:
        for row in run.metrics:
            for key, value in row.items():
                if key.startswith(prefix) and 0 < value < math.inf:
                    logs.setdefault((int(row["step"]), key[len(prefix) :]), []).append(math.log(value))
    return {key: math.exp(sum(values) / len(values)) for key, values in logs.items()}
