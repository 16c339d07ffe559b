"""Pictures of what methods save: loss against cost, and the compute multiplier against cost."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from lightning_mup.analysis.multiplier import Multiplier
from lightning_mup.analysis.plot_parts import COLOURS, GREY, columns, label_right, means, tidy
from lightning_mup.analysis.savings import Savings
from lightning_mup.analysis.transfer_plots import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_SIZE = (11.0, 3.9)  # inches
_NAMES, _PER_NAME = 6, 0.25  # the picture grows by so many inches for each name beyond six
_MARKS = {"o": "●", "s": "■", "v": "▼", "^": "▲", "D": "◆"}  # in a panel, and before a name
_UNITS = {"flops": "FLOPs of a run", "6nd": "6 N D of a run", "seconds": "seconds of a run"}
_LEAST = 1.1  # octaves of multiplier that a panel shows at the least


def pictures_of(savings: Savings) -> list[Picture]:
    """Return the picture of a comparison; none where no method could be compared.

    Examples:
        >>> pictures_of(Savings("adamw, mup", "", "flops", "val_loss", {}, {}))
        []
    """
    if not any(math.isfinite(found.value) for found in savings.multipliers.values()):
        return []
    size = (_SIZE[0], _SIZE[1] + _PER_NAME * max(0, len(savings.multipliers) + 1 - _NAMES))
    return [Picture("Loss and compute multiplier", said_of(savings), size, lambda figure: _draw(figure, savings))]


def said_of(savings: Savings) -> str:
    """Say what each method needs of the baseline's compute, and how that moves with scale."""
    return " ".join(_said(label, found, savings.baseline) for label, found in savings.multipliers.items())


def _said(label: str, found: Multiplier, baseline: str) -> str:
    if not math.isfinite(found.value):
        return f"{label}: cannot be compared."
    trends = {
        "stands": "the same at all sizes",
        "falls": "less at larger sizes",
        "rises": "more at larger sizes",
        "unclear": "whether that depends on size these runs do not tell",
    }
    told = "" if found.low > 1 or found.high < 1 else ", which is not told apart from none"
    interval = f"95% interval {found.low:.2f} to {found.high:.2f}"
    return (
        f"{label}: {baseline} needs {found.value:.2f} times the compute for the same loss ({interval}){told}; "
        f"{trends[found.trend.verdict]}."
    )


def _draw(figure: FigureBase, savings: Savings) -> None:
    left, right = figure.subplots(1, 2)
    pairs = itertools.cycle((colour, mark) for mark in _MARKS for colour in COLOURS)
    styles = {savings.baseline: (GREY, "o")} | dict(zip(savings.multipliers, pairs, strict=False))
    _draw_losses(left, savings, styles)
    _draw_multipliers(right, savings, styles)
    for ax in (left, right):
        tidy(ax)
        ax.set_xscale("log")
        ax.set_xlabel(_UNITS[savings.cost])


def _draw_losses(ax: Axes, savings: Savings, styles: dict[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    ax.set_yscale("log")
    ax.set_ylabel("validation loss (nats)" if savings.metric == "val_loss" else "training loss (nats)")
    ends = []
    for label, line in _lines(savings).items():
        colour, mark = styles[label]
        ax.plot(*columns(line), color=colour, marker=mark, markersize=4.5, linewidth=1.4)
        ends.append((line[-1][1], f"{_MARKS[mark]} {label}", colour))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter() if _tall(ax) else ScalarFormatter())
    label_right(ax, ends)


def _tall(ax: Axes) -> bool:
    low, high = ax.get_ylim()
    return high / low > 4


def _lines(savings: Savings) -> dict[str, list[tuple[float, float]]]:
    """Return cost and mean loss of every method, the baseline first."""
    lines = {
        label: means((trial.cost, trial.loss) for trial in carried.trials if math.isfinite(trial.loss))
        for label, carried in savings.carried.items()
    }
    return {label: line for label, line in lines.items() if line and label not in savings.refused}


def _draw_multipliers(ax: Axes, savings: Savings, styles: dict[str, tuple[str, str]]) -> None:
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel(f"compute multiplier over {savings.baseline}")
    ax.axhline(1, color=GREY, linewidth=1, linestyle="--")
    ends = []
    for label, found in savings.multipliers.items():
        rows = [row for row in found.rows if math.isfinite(row.multiplier) and row.multiplier > 0]
        if not rows:
            continue
        reach = [
            [max(row.multiplier - row.low, 0) for row in rows],
            [max(min(row.high, 8 * row.multiplier) - row.multiplier, 0) for row in rows],
        ]
        x, y = [row.cost for row in rows], [row.multiplier for row in rows]
        colour, mark = styles[label]
        ax.errorbar(x, y, yerr=reach, color=colour, marker=mark, markersize=4.5, capsize=3, linewidth=1.4)
        ends.append((y[-1], f"{_MARKS[mark]} {label}", colour))
    low, high = (math.log2(end) for end in ax.get_ylim())
    extra = max(0.0, _LEAST - (high - low)) / 2
    low, high = low - extra, high + extra
    ax.set_ylim(2**low, 2**high)
    ticks = [tick for tick in (0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 8) if low <= math.log2(tick) <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    label_right(ax, ends)
