"""Optimum, loss and feature changes against size: one panel per method, one colour per parametrization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_mup.analysis.features import Feature
from lightning_mup.analysis.groups import Group
from lightning_mup.analysis.optimum import Optimum
from lightning_mup.analysis.plot_parts import (
    GREY,
    coloured,
    columns,
    label_right,
    loss_limits,
    loss_word,
    methods_of,
    room,
    sizes_of,
    tidy,
)
from lightning_mup.analysis.transfer import WORDS, TransferReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_ROLE_MARKS = "osv^D"
_ZOOM = 4.0  # a panel of feature changes shows at least this factor, so that flat looks flat


def draw_drifts(figure: FigureBase, report: TransferReport) -> None:
    """Draw each size's optimum with its interval, and the line through them, one panel for each method."""
    labels = []
    for ax, method in _row(figure, report, f"log2 of the best {WORDS[report.tuned]}"):
        ends = []
        for group, colour in coloured(report, method):
            _draw_optima(ax, group, colour)
            drift = group.drift
            line = [(size, drift.at(size)) for size in drift.sizes if math.isfinite(drift.slope)]
            beyond = [(at.size, drift.at(at.size)) for at in group.sizes if line and at.size >= line[-1][0]]
            ax.plot(*columns(line), color=colour, linewidth=1.2)
            ax.plot(*columns(beyond), color=colour, linewidth=1.2, linestyle=":")
            ends += _named(group, colour)
        labels.append((ax, ends))
    room(labels[0][0])
    for ax, ends in labels:
        label_right(ax, ends)
    _key_of_optima(figure)


def _named(group: Group, colour: str) -> list[tuple[float, str, str]]:
    drift, last = group.drift, group.target
    if math.isfinite(drift.slope):
        return [(drift.at(last.size), f"{group.rules}\n{drift.slope:+.2f} {drift.verdict}", colour)]
    known = [at.optimum.log2_value for at in group.sizes if math.isfinite(at.optimum.log2_value)]
    return [(known[-1], group.rules, colour)] if known else []


def _draw_optima(ax: Axes, group: Group, colour: str) -> None:
    known = [at for at in group.sizes if at.optimum.bracketed]
    ends = [
        [a.optimum.log2_value - a.optimum.low for a in known],
        [a.optimum.high - a.optimum.log2_value for a in known],
    ]
    sizes, best = [a.size for a in known], [a.optimum.log2_value for a in known]
    ax.errorbar(sizes, best, yerr=ends, color=colour, linestyle="", marker="D", markersize=5, capsize=3)
    for at in group.sizes:
        if not at.optimum.bracketed:
            ax.plot([at.size], [at.optimum.log2_value], marker=_open_mark(at.optimum), color=colour, mfc="white")


def _open_mark(best: Optimum) -> str:
    if math.isfinite(best.low) == math.isfinite(best.high):
        return "s"
    return "^" if math.isfinite(best.low) else "v"


def draw_losses(figure: FigureBase, report: TransferReport) -> None:
    """Draw the loss at each size's own optimum and at the base's, one panel for each method."""
    low, top = loss_limits(report.groups, carried=True)
    edge = top - (top - low) * 0.03
    for ax, method in _row(figure, report, loss_word(report)):
        groups = coloured(report, method)
        ax.set_ylim(low, top)
        ends = []
        for group, colour in groups:
            tuned = [(at.size, at.optimum.loss) for at in group.sizes]
            carried = [(at.size, at.loss) for at in group.sizes]
            ax.plot(*columns(tuned), color=colour, linewidth=1.2, marker="D", markersize=5, linestyle="--", mfc="white")
            ax.plot(*columns(carried), color=colour, linewidth=1.8, marker="o", markersize=5)
            failed = [size for size, loss in carried if loss == math.inf]
            ax.plot(failed, [edge] * len(failed), color=colour, linestyle="", marker="x")
            ends.append((min(carried[-1][1], edge) if carried[-1][1] > 0 else tuned[-1][1], group.rules, colour))
        label_right(ax, ends)
    _key_of_losses(figure)


def _key_of_losses(figure: FigureBase) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, linewidth=1.8, marker="o", markersize=5, label="at the base's best"),
        Line2D([], [], color=GREY, linestyle="--", marker="D", markersize=5, mfc="white", label="at this size's best"),
        Line2D([], [], color=GREY, linestyle="", marker="x", label="diverges at the base's best"),
    ]
    _legend(figure, handles)


def _key_of_optima(figure: FigureBase) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, linestyle="", marker="D", markersize=5, label="optimum, 95% interval"),
        Line2D([], [], color=GREY, linestyle="", marker="v", mfc="white", label="there or lower"),
        Line2D([], [], color=GREY, linestyle="", marker="^", mfc="white", label="there or higher"),
        Line2D([], [], color=GREY, linestyle="", marker="s", mfc="white", label="not bracketed"),
    ]
    _legend(figure, handles)


def _legend(figure: FigureBase, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5)


def draw_features(figure: FigureBase, report: TransferReport, features: Sequence[Feature]) -> None:
    """Draw feature changes at the last shared step over those at the smallest size, one panel for each method."""
    roles, labels = sorted({feature.role for feature in features}), []
    for ax, method in _row(figure, report, f"change over that at {report.axis} {min(f.size for f in features)}"):
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        ends = []
        for group, colour in coloured(report, method):
            for role, mark in zip(roles, itertools.cycle(_ROLE_MARKS)):
                line = _relative([f for f in features if f.group == group.label and f.role == role])
                ax.plot(*columns(line), color=colour, marker=mark, markersize=5, linewidth=1.2)
                ends += [(line[-1][1], f"{group.rules}, {role}", colour)] if line else []
        labels.append((ax, ends))
    low, high = labels[0][0].get_ylim()
    margin = max(1.0, _ZOOM * low / high) ** 0.5
    labels[0][0].set_ylim(low / margin, high * margin)
    for ax, ends in labels:
        label_right(ax, ends)


def _relative(features: Sequence[Feature]) -> list[tuple[int, float]]:
    last = [f for f in features if f.step == max(f.step for f in features)]
    line = sorted((f.size, f.value) for f in last)
    return [(size, value / line[0][1]) for size, value in line]


def _row(figure: FigureBase, report: TransferReport, what: str) -> list[tuple[Axes, str]]:
    """Return one panel for each method, sizes on a logarithmic axis."""
    methods = methods_of(report.groups)
    axes: Any = figure.subplots(1, len(methods), squeeze=False, sharey=True)
    axes[0, 0].set_ylabel(what)
    sizes = sizes_of(report)
    for ax, method in zip(axes[0], methods, strict=True):
        tidy(ax)
        ax.set_title(method, fontsize=10.5)
        ax.set_xscale("log", base=2)
        ax.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.08)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set_xlabel(report.axis)
    return list(zip(axes[0], methods, strict=True))
