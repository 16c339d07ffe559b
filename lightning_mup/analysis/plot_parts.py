"""What the pictures of a transfer report share: limits, colours, and labels that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lightning_mup.analysis.groups import Group
from lightning_mup.analysis.transfer import TransferReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, LIGHT = "#57606a", "#d0d7de"
LABEL_GAP = 0.06
"""Between the middles of two labels of one line, of a panel's height."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's, told apart by everybody
_LONG = {"sp": "standard parametrization (sp)", "mup": "maximal update parametrization (mup)"}
_DARKEST, _LIGHTEST = 0.05, 0.74  # of the colour map viridis, whose yellow end is too pale on white
_HEADROOM = 0.6  # above the highest optimum, of the span of optima
_HUGE = 3.0  # spans above the highest optimum that losses may take up
_LEAST_SPAN = 0.12  # of the lowest loss; less is shown as this, so that flat looks flat


def methods_of(groups: Iterable[Group]) -> list[str]:
    """Return the panels' names: the methods, with what is held where a method occurs with several."""
    return list(dict.fromkeys(method_of(group) for group in groups))


def method_of(group: Group) -> str:
    """Return the name of a group's panel: its label without the parametrization."""
    return group.label.replace(f", {group.rules}", "", 1)


def rules_of(groups: Iterable[Group]) -> list[str]:
    """Return the parametrizations, standard ones (sp) first.

    Examples:
        >>> rules_of([])
        []
    """
    return sorted({group.rules for group in groups}, key=lambda name: (not name.startswith("sp"), name))


def long_name(rules: str) -> str:
    """Return what a parametrization is called where there is room.

    Examples:
        >>> long_name("sp")
        'standard parametrization (sp)'
    """
    return _LONG.get(rules, rules)


def coloured(report: TransferReport, method: str) -> list[tuple[Group, str]]:
    """Return the groups of one panel, each with the colour of its parametrization."""
    rules = sorted(rules_of(report.groups), key=lambda name: name.startswith("sp"))  # mup is blue, sp comes last
    found = [group for group in report.groups if method_of(group) == method]
    return [(group, COLOURS[rules.index(group.rules) % len(COLOURS)]) for group in found]


def shade(size: int, report: TransferReport) -> tuple[float, ...]:
    """Return the colour of a size, dark for small ones; the same in all panels."""
    import matplotlib as mpl

    sizes = sizes_of(report)
    place = _DARKEST + (_LIGHTEST - _DARKEST) * sizes.index(size) / max(len(sizes) - 1, 1)
    return tuple(mpl.colormaps["viridis"](place))


def sizes_of(report: TransferReport) -> list[int]:
    """Return all sizes, smallest first."""
    return sorted({at.size for group in report.groups for at in group.sizes})


def loss_limits(groups: Iterable[Group], *, carried: bool = False) -> tuple[float, float]:
    """Return the limits of a loss axis: all optima, and as far above them as tells a valley's shape.

    Args:
        groups: the groups that are drawn.
        carried: whether losses at the value carried over are to be within the limits, as far as they are not huge.
    """
    groups = list(groups)
    best = [at.optimum.loss for group in groups for at in group.sizes if math.isfinite(at.optimum.loss)] or [1.0]
    span = max(max(best) - min(best), _LEAST_SPAN * min(best))
    top = max(best) + _HEADROOM * span
    if carried:
        losses = [at.loss for group in groups for at in group.sizes if math.isfinite(at.loss)]
        top = min(max([top, *(loss + 0.1 * span for loss in losses)]), max(best) + _HUGE * span)
    return min(best) - 0.22 * span, top


def loss_word(report: TransferReport) -> str:
    """Return the name of a loss axis."""
    return f"{'validation' if report.metric == 'val_loss' else 'training'} loss (nats)"


def columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return points as two lists.

    Examples:
        >>> columns([(1, 2), (3, 4)])
        ([1, 3], [2, 4])
    """
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def means(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the mean over repeats.

    Examples:
        >>> means([(1, 2.0), (1, 4.0), (0, 1.0)])
        [(0, 1.0), (1, 3.0)]
    """
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(found.items())]


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels up or down until they are a gap apart, in their order.

    Examples:
        >>> spread([1.0, 1.0, 5.0], 1.0)
        [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[int]] = []
    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and _bottom(blocks[-1], heights, gap) - _top(blocks[-2], heights, gap) < gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = list(heights)
    for block in blocks:
        for k, i in enumerate(block):
            placed[i] = _bottom(block, heights, gap) + k * gap
    return placed


def label_right(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines beside the panel, at the heights of their last points; ends are height, text and colour."""
    transform = ax.transScale.transform
    low, high = (float(transform((1, y))[1]) for y in ax.get_ylim())
    places = [(float(transform((1, y))[1]) - low) / (high - low) for y, *_ in ends]
    lines = max((text.count("\n") + 1 for _, text, _ in ends), default=1)
    for (_, text, colour), place in zip(ends, spread(places, LABEL_GAP * lines), strict=True):
        ax.text(1.015, place, text, fontsize=8.5, color=colour, va="center", transform=ax.transAxes)


def room(ax: Axes, least: float = 3.0) -> None:
    """Let an axis of log2 values show at least so many octaves."""
    low, high = ax.get_ylim()
    extra = max(0.0, least - (high - low)) / 2
    ax.set_ylim(low - extra - 0.2, high + extra + 0.2)


def tidy(ax: Axes) -> None:
    """Take frame and clutter away."""
    ax.grid(color=LIGHT, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)


def _bottom(block: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[i] for i in block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(block, heights, gap) + gap * (len(block) - 1)
