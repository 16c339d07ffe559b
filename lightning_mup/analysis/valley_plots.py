"""Loss against the tuned hyperparameter: one panel per method and parametrization, one line per size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_mup.analysis import sentences
from lightning_mup.analysis.groups import AtSize, Group
from lightning_mup.analysis.plot_parts import (
    GREY,
    LABEL_GAP,
    columns,
    long_name,
    loss_limits,
    loss_word,
    means,
    method_of,
    methods_of,
    rules_of,
    shade,
    sizes_of,
    spread,
    tidy,
)
from lightning_mup.analysis.transfer import WORDS, TransferReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_BAND = "#eef1f4"
_LINE = 0.04  # height of one size's line in the band of diverged runs, of a panel's height
_BELOW = 0.055  # of a panel's height, from an optimum down to its name


def draw_curves(figure: FigureBase, report: TransferReport) -> None:
    """Draw a row of panels for each method, a column for each parametrization, one line for each size."""
    methods, rules = methods_of(report.groups), rules_of(report.groups)
    grid: Any = figure.subplots(len(methods), len(rules), squeeze=False, sharex="row", sharey="row")
    for axes, method in zip(grid, methods, strict=True):
        row = [group for group in report.groups if method_of(group) == method]
        low, top = loss_limits(row)
        losses = (run.loss(report.metric) for group in row for at in group.sizes for run in at.runs)
        failed = not all(map(math.isfinite, losses))
        axes[0].set_ylabel(loss_word(report))
        for ax, name in zip(axes, rules, strict=True):
            tidy(ax)
            ax.locator_params(axis="x", integer=True)
            found = [group for group in row if group.rules == name]
            _draw_title(ax, f"{method}, {long_name(name)}", found, report)
            ax.set_ylim(low, top)
            if failed:
                _draw_band(ax, low, top, count=len(sizes_of(report)))
            for group in found:
                _draw_group(ax, group, report, top=top)
            if not found:
                ax.text(0.5, 0.5, "no runs", ha="center", color=GREY, transform=ax.transAxes)
        if failed:
            spot = (-0.012, (top + axes[0].get_ylim()[1]) / 2)
            across = axes[0].get_yaxis_transform()
            axes[0].text(*spot, "diverged", fontsize=8.5, color=GREY, ha="right", va="center", transform=across)
    for ax in grid[-1]:
        ax.set_xlabel(f"log2 of the {WORDS[report.tuned]} (at the base)")
    _key(figure, report)


def _draw_title(ax: Axes, name: str, groups: Sequence[Group], report: TransferReport) -> None:
    """Say above a panel whose valleys these are, and what they tell."""
    ax.set_title("\n".join([name, *(sentences.in_short(group, report) for group in groups)]), fontsize=9)


def _draw_band(ax: Axes, low: float, top: float, *, count: int) -> None:
    """Add a band above the losses for runs that diverged."""
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= top])
    ceiling = top + (top - low) * _LINE * (count + 0.5)
    ax.set_ylim(low, ceiling)
    ax.axhspan(top, ceiling, color=_BAND, zorder=3, linewidth=0)


def _draw_group(ax: Axes, group: Group, report: TransferReport, *, top: float) -> None:
    high = ax.get_ylim()[1]
    sizes = sizes_of(report)
    for at in group.sizes:
        colour = shade(at.size, report)
        points = [(math.log2(getattr(r, report.tuned)), r.loss(report.metric)) for r in at.runs]
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        ax.plot(*columns(means(finite)), color=colour, linewidth=1.4)
        ax.plot(*columns(finite), color=colour, linestyle="", marker="o", markersize=2.6)
        failed = sorted({x for x, y in points if not math.isfinite(y)})
        height = high - (high - top) * (sizes.index(at.size) + 1) / (len(sizes) + 1)
        ax.plot(failed, [height] * len(failed), color=colour, linestyle="", marker="x", markersize=5, zorder=4)
        _mark_optimum(ax, at, colour)
    _label(ax, group, report)
    if math.isfinite(group.at_base.transferred):
        ax.axvline(group.at_base.transferred, color=GREY, linestyle="--", linewidth=1, zorder=0)


def _mark_optimum(ax: Axes, at: AtSize, colour: object) -> None:
    best = at.optimum
    if math.isnan(best.log2_value):
        return
    if best.bracketed:
        ends = [[best.log2_value - best.low], [best.high - best.log2_value]]
        ax.errorbar([best.log2_value], [best.loss], xerr=ends, color=colour, capsize=2.5, linewidth=1.8, zorder=4)
    face = colour if best.bracketed else "white"
    ax.plot([best.log2_value], [best.loss], marker="D", markersize=6, color=colour, mfc=face, mec=colour, zorder=5)


def _label(ax: Axes, group: Group, report: TransferReport) -> None:
    """Name each line below its optimum."""
    low, high = ax.get_ylim()
    known = [at for at in group.sizes if math.isfinite(at.optimum.log2_value)]
    below = [at.optimum.loss - (high - low) * _BELOW for at in known]
    heights = spread(below, (high - low) * LABEL_GAP)
    for at, height in zip(known, heights, strict=True):
        ax.text(
            at.optimum.log2_value,
            height,
            f"{report.axis} {at.size}" if at is group.sizes[0] else str(at.size),
            fontsize=8.5,
            color=shade(at.size, report),
            ha="center",
            va="center",
            zorder=4.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )


def _key(figure: FigureBase, report: TransferReport) -> None:
    from matplotlib.lines import Line2D

    bases = sorted({group.base for group in report.groups})
    base = f"{report.axis} {bases[0]}" if len(bases) == 1 else "the base"
    handles = [
        Line2D([], [], color=GREY, marker="D", linewidth=1.8, markersize=6, label="optimum, 95% interval"),
        Line2D([], [], color=GREY, marker="D", linestyle="", mfc="white", markersize=6, label="not bracketed"),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1, label=f"optimum at {base}, carried over"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
