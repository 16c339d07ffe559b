"""Pictures of measurements; matplotlib is an optional package and is loaded only to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mup.analysis.coordinate import NO_CHANGE, Coordinate, CoordinateReport, Kind, Slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Panels from left to right: title, kind of record, groups of layers.
_PANELS: tuple[tuple[str, Kind, frozenset[str]], ...] = (
    ("input layers", "output", frozenset({"input"})),
    ("hidden layers", "output", frozenset({"hidden"})),
    ("stream and norms", "output", frozenset({"stream", "vector", "scalar", ""})),
    ("output layers", "output", frozenset({"output"})),
    ("updates", "update", frozenset({"input", "hidden", "output", "vector", "scalar", ""})),
)
_STEPS_SHOWN = 3
_GREEN, _RED, _GREY = "#1a7f37", "#c0272d", "#57606a"
_BLUES = ("#a6c8ea", "#4f93cf", "#08306b")
_PANEL_SIZE = (2.2, 2.3)  # inches; five panels make a picture that a README shows without shrinking much
_ZOOM = 4.0  # a panel shows at least this factor around its values, so that flat looks flat


def plot_coordinates(reports: Mapping[str, CoordinateReport], path: str | Path) -> None:
    """Draw coordinate checks side by side: a row for each parametrization, a panel for each group of layers.

    Both axes are logarithmic: a right parametrization is flat. There is one line per layer and step (first, middle,
    last), the geometric mean over seeds; the title gives the worst slope of the panel's layers over all steps.

    Args:
        reports: what was checked by what it is to be called, in the order of the rows (``{"mup": ..., "sp": ...}``).
        path: picture file; the suffix tells the format (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed; the message names the extra that installs it.

    Examples:
        >>> import tempfile
        >>> from lightning_mup.analysis.coordinate import fit_slopes
        >>> records = [Coordinate(n, 0, 1, "output", "fc", n**0.5, "hidden") for n in (64, 128)]
        >>> file = Path(tempfile.mkdtemp()) / "check.png"
        >>> plot_coordinates({"mup": fit_slopes(records)}, file)
        >>> file.exists()
        True
    """
    if not reports:
        raise ValueError(f"there is nothing to draw in {dict(reports)!r}; give {{'mup': report}}, say")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"drawing {str(path)!r} needs matplotlib, which is not installed; pip install 'lightning_mup[plots]'"
        ) from error
    panels = [p for p in _PANELS if any(_records(r, p) for r in reports.values())]
    width, height = _PANEL_SIZE
    figure = Figure(figsize=(width * len(panels) + 0.6, height * len(reports) + 0.75), layout="constrained")
    grid: Any = figure.subplots(len(reports), len(panels), squeeze=False, sharex=True, sharey="col")
    for axes, (label, report) in zip(grid, reports.items(), strict=True):
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, report, panel)
        axes[0].set_ylabel(f"{label}\n", fontweight="bold", fontsize=13, color=_GREEN if report.passed else _RED)
    first = next(iter(reports.values()))
    for ax, top in zip(grid[-1], grid[0], strict=True):
        ax.set_xlabel(first.size, fontsize=10)
        _zoom_out(top)
    _legend(figure, first)
    figure.savefig(path, dpi=150)


def _legend(figure: Any, report: CoordinateReport) -> None:  # noqa: ANN401 - a Figure
    from matplotlib.lines import Line2D

    steps = _shown(report.steps)
    handles = [Line2D([], [], color=_colour(i, steps), label=f"step {step}") for i, step in enumerate(steps)]
    figure.legend(
        handles=handles,
        title=f"change of each layer's output (RMS) and update (spectral norm) with {report.size}; flat within "
        f"$\\pm${report.tolerance:g} passes",
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )


def _draw(ax: Axes, report: CoordinateReport, panel: tuple[str, Kind, frozenset[str]]) -> None:
    title, kind, groups = panel
    steps = _shown(report.steps)
    for i, step in enumerate(steps):
        for line in _lines([r for r in _records(report, panel) if r.step == step]):
            ax.plot(*zip(*line, strict=True), color=_colour(i, steps), linewidth=1.1, marker="o", markersize=2.2)
    sizes = sorted({r.size for r in report.records})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.tick_params(labelsize=8.5)
    ax.grid(color="#d0d7de", linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    slopes = [s for s in report.worst if s.kind == kind and s.group in groups]
    text, colour = _title(slopes)
    ax.set_title(f"{title}\n{text}", fontsize=10, color=colour)


def _title(slopes: Sequence[Slope]) -> tuple[str, str]:
    bad = [s for s in slopes if not s.passed]
    broken = [s for s in bad if s.note]
    if not slopes:
        return "none", _GREY
    if broken:
        return f"FAIL: {broken[0].note}", _RED
    moving = [s.slope for s in slopes if not s.note]
    if not moving:
        return NO_CHANGE, _GREY
    worst = f"worst slope {max(moving, key=abs):+.2f}"
    return (f"FAIL: {worst}", _RED) if bad else (f"pass: {worst}", _GREEN)


def _records(report: CoordinateReport, panel: tuple[str, Kind, frozenset[str]]) -> list[Coordinate]:
    _, kind, groups = panel
    group_of = {(s.kind, s.layer): s.group for s in report.slopes}
    return [r for r in report.records if r.kind == kind and group_of[r.kind, r.layer] in groups]


def _lines(records: Sequence[Coordinate]) -> list[list[tuple[int, float]]]:
    """One line per layer: size and the geometric mean over seeds, where it can be drawn on a logarithmic axis."""
    layers: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.value > 0 and math.isfinite(r.value):
            layers.setdefault(r.layer, {}).setdefault(r.size, []).append(math.log(r.value))
    return [
        [(size, math.exp(sum(logs) / len(logs))) for size, logs in sorted(points.items())] for points in layers.values()
    ]


def _shown(steps: Sequence[int]) -> list[int]:
    """Return the first, the middle (on a logarithmic scale) and the last step."""
    if len(steps) <= _STEPS_SHOWN:
        return list(steps)
    middle = min(steps[1:-1], key=lambda step: abs(math.log(step / math.sqrt(steps[0] * steps[-1]))))
    return [steps[0], middle, steps[-1]]


def _colour(index: int, steps: Sequence[int]) -> str:
    return _BLUES[len(_BLUES) - len(steps) + index]


def _zoom_out(ax: Axes) -> None:
    low, high = ax.get_ylim()
    margin = math.sqrt(max(1.0, _ZOOM * low / high))
    ax.set_ylim(low / margin / 1.5, high * margin * 1.5)
