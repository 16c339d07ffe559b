"""From samples to a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.table import Table

from recipes.benchmarks.rows import ROWS, Row

Sample = Mapping[str, Any]
_COLOURS = {
    "lightning_mup": "#0969da",
    "torch": "#57606a",
    "pytorch_optimizer": "#bf8700",
    "heavyball": "#8250df",
}
_MARKERS = "o^sDvP"
_HEADINGS = (
    "",
    "step [ms]",
    "x AdamW",
    "(min-max)",
    "x floor",
    "of it LAPACK",
    "state [B/param]",
    "growth",
    "kept",
    "ours / this: time",
    "state",
)


@dataclass(frozen=True)
class Figures:
    """What the samples of one row at one width come to.

    Args:
        step: median time of a step, in seconds.
        ratio: median, smallest and largest ratio to the control of the same sample.
        floor: median ratio to the row's floor; None where it has none.
        factorizations: share of factorizations in the floor.
        state_bytes: per parameter.
        kept: number of samples that these are of.
        dropped: number of samples that were disturbed; where all were, all are kept and none is dropped.
        disturbed: whether all were.
    """

    step: float
    ratio: tuple[float, float, float]
    floor: float | None
    factorizations: float | None
    state_bytes: float
    kept: int
    dropped: int
    disturbed: bool


def summarize(samples: Sequence[Sample], tolerance: float) -> dict[tuple[str, int], Figures]:
    """Return the figures of each row and width.

    A sample is disturbed if the machine multiplied matrices, before or after it, slower by more than ``tolerance``
    than it did at its best at this width.
    """
    best: dict[int, float] = {}
    groups: dict[tuple[str, int], list[Sample]] = {}
    for found in samples:
        width = found["width"]
        best[width] = max(best.get(width, 0.0), *found["probes"])
        groups.setdefault((found["label"], width), []).append(found)
    return {key: _figures(group, (1 - tolerance) * best[key[1]]) for key, group in groups.items()}


def _figures(group: Sequence[Sample], slowest: float) -> Figures:
    calm = [found for found in group if min(found["probes"]) >= slowest]
    used = calm or group
    ratios = [found["step"] / statistics.mean(found["control"]) for found in used]
    floors = [(found["step"], found["floor"]) for found in used if "floor" in found]
    return Figures(
        step=statistics.median(found["step"] for found in used),
        ratio=(statistics.median(ratios), min(ratios), max(ratios)),
        floor=statistics.median(step / sum(floor.values()) for step, floor in floors) if floors else None,
        factorizations=statistics.median(f["factorizations"] / sum(f.values()) for _, f in floors) if floors else None,
        state_bytes=statistics.median(found["state_bytes"] for found in used),
        kept=len(used),
        dropped=len(group) - len(used),
        disturbed=not calm,
    )


def growth(figures: Mapping[tuple[str, int], Figures], label: str) -> float | None:
    """Return the power of the width that the step's time grows with, between the smallest and the largest width."""
    times = {width: found.step for (name, width), found in sorted(figures.items()) if name == label}
    if len(times) < 2:
        return None
    (low, first), *_, (high, last) = times.items()
    return math.log(last / first) / math.log(high / low)


def tables(
    figures: Mapping[tuple[str, int], Figures], widths: Iterable[int], left_out: Mapping[str, Mapping[str, str]]
) -> Group:
    """Return a table per width; rows that have no figures say why."""
    return Group(*(_table(figures, width, left_out.get(str(width), {})) for width in widths))


def _table(figures: Mapping[tuple[str, int], Figures], width: int, left_out: Mapping[str, str]) -> Table:
    table = Table(title=f"width {width}")
    for i, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
    package = None
    for row in ROWS.values():
        if (row.label, width) in figures or row.label in left_out:
            if package not in (None, row.package):
                table.add_section()
            package = row.package
        if row.label in left_out:
            table.add_row(row.label, *["-"] * (len(_HEADINGS) - 1))
        elif (row.label, width) in figures:
            table.add_row(row.label, *_cells(figures, row, width))
    notes = [f"{label}: {reason}" for label, reason in left_out.items()]
    if any(found.disturbed for (_, of), found in figures.items() if of == width):
        notes.append("* every sample was disturbed")
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


def _compared(ours: Figures, theirs: Figures) -> float:
    """Return our time over theirs, each in units of what its own process measured of the same kind of work."""
    if ours.floor is not None and theirs.floor is not None:
        return ours.floor / theirs.floor
    return ours.ratio[0] / theirs.ratio[0]


def _cells(figures: Mapping[tuple[str, int], Figures], row: Row, width: int) -> list[str]:
    own = figures[row.label, width]
    power = growth(figures, row.label)
    ours = figures.get((row.like, width)) if row.like else None
    return [
        f"{1e3 * own.step:.3g}",
        f"{own.ratio[0]:.3g}",
        f"{own.ratio[1]:.3g}-{own.ratio[2]:.3g}",
        "" if own.floor is None else f"{own.floor:.2f}",
        "" if own.factorizations is None else f"{own.factorizations:.0%}",
        f"{own.state_bytes:.1f}",
        "" if power is None else f"n^{power:.1f}",
        f"{own.kept}/{own.kept + own.dropped}{'*' if own.disturbed else ''}",
        "" if ours is None else f"{_compared(ours, own):.2f}",
        "" if ours is None or not own.state_bytes else f"{ours.state_bytes / own.state_bytes:.2f}",
    ]


def write_text(path: Path, shown: Group, width: int = 190) -> None:
    """Write what rich would show as plain text."""
    with path.open("w") as file:
        Console(file=file, width=width, color_system=None).print(shown)


def draw(figures: Mapping[tuple[str, int], Figures], path: Path) -> None:
    """Draw a line per row: time over the control's on the left, a marker per width; bytes of state on the right."""
    labels = [label for label in ROWS if any(name == label for name, _ in figures)]
    widths = sorted({width for _, width in figures})
    picture = Figure(figsize=(11, 1.5 + 0.24 * len(labels)), layout="constrained")
    time, state = picture.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for i, label in enumerate(labels):
        colour = _COLOURS[ROWS[label].package]
        for marker, width in zip(_MARKERS, widths, strict=False):
            if found := figures.get((label, width)):
                time.plot(found.ratio[0], i, marker, color=colour, alpha=0.8)
                time.hlines(i, *found.ratio[1:], color=colour, linewidth=1)
        last = max(width for name, width in figures if name == label)
        state.barh(i, figures[label, last].state_bytes, color=colour, height=0.6)
    for marker, width in zip(_MARKERS, widths, strict=False):
        time.plot([], [], marker, color="black", label=f"width {width}")
    time.set(xscale="log", xlabel="time of a step / torch AdamW's (foreach)", yticks=range(len(labels)))
    time.set_yticklabels(labels, fontsize=8)
    time.invert_yaxis()
    time.legend(fontsize=8)
    state.set(xlabel="bytes of state per parameter")
    for axes in (time, state):
        axes.grid(axis="x", alpha=0.3)
    picture.savefig(path, dpi=120)
