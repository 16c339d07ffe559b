"""Pictures of a transfer report; matplotlib is an optional package and is loaded only to draw."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mup.analysis import sentences
from lightning_mup.analysis.features import Feature
from lightning_mup.analysis.plot_parts import methods_of, rules_of, sizes_of
from lightning_mup.analysis.size_plots import draw_drifts, draw_features, draw_losses
from lightning_mup.analysis.transfer import WORDS, TransferReport
from lightning_mup.analysis.valley_plots import draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

_PANEL = (4.2, 3.1)  # inches
_SIZES, _PER_SIZE = 4, 0.3  # a panel grows by so many inches for each size beyond four, to keep names apart
_NARROWEST = 6.4  # inches that the legends take
_DPI = 130


@dataclass(frozen=True)
class Picture:
    """One figure of a report.

    Args:
        title: what it shows.
        sentence: what there is to see in it.
        size: width and height in inches.
        draw: draws it into a figure.
    """

    title: str
    sentence: str
    size: tuple[float, float]
    draw: Callable[[FigureBase], None]


def pictures(report: TransferReport, features: Sequence[Feature] = ()) -> list[Picture]:
    """Return a report's pictures: loss curves, optimum by size, loss by size, and feature changes where there are any.

    Examples:
        >>> [picture.title for picture in pictures(TransferReport((), "width", "lr", "val_loss", ""))]
        []
    """
    if not any(math.isfinite(at.optimum.loss) for group in report.groups for at in group.sizes):
        return []  # a picture of nothing but diverged runs shows nothing
    word, axis = WORDS[report.tuned], report.axis
    methods, rules = methods_of(report.groups), rules_of(report.groups)
    width, height = _PANEL[0], _PANEL[1] + _PER_SIZE * max(0, len(sizes_of(report)) - _SIZES)
    row = (max(width * len(methods) + 0.3, _NARROWEST), _PANEL[1] + 0.4)
    curves = (max(width * len(rules) + 0.6, _NARROWEST), height * len(methods) + 0.5)
    made = [
        Picture(f"Loss against {word}", sentences.of_valleys(report), curves, lambda f: draw_curves(f, report)),
        Picture(f"Best {word} against {axis}", sentences.of_drift(report), row, lambda f: draw_drifts(f, report)),
        Picture(f"Loss against {axis}", sentences.of_losses(report), row, lambda f: draw_losses(f, report)),
    ]
    if features:
        said = sentences.of_features(features, axis)
        made.append(
            Picture(f"Change of features against {axis}", said, row, lambda f: draw_features(f, report, features))
        )
    return made


def render(picture: Picture) -> bytes:
    """Return a picture as PNG.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that installs it.
    """
    figure = _figure(picture.size)
    picture.draw(figure)
    return _png(figure)


def save_pictures(drawn: Sequence[Picture], path: str | Path) -> None:
    """Write all pictures below each other into one file, each with its title.

    Args:
        drawn: the pictures.
        path: the file; the suffix tells the format (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not drawn:
        raise ValueError(f"there is nothing to draw in {path}; give at least one picture")
    heights = [picture.size[1] + 0.3 for picture in drawn]
    figure = _figure((max(picture.size[0] for picture in drawn), sum(heights)))
    parts: Any = figure.subfigures(len(drawn), 1, height_ratios=heights, squeeze=False)
    widest = max(picture.size[0] for picture in drawn)
    for part, picture in zip(parts[:, 0], drawn, strict=True):
        rest = max(widest - picture.size[0], 1e-3 * widest)
        left: Any = part.subfigures(1, 2, width_ratios=[picture.size[0], rest])[0]
        left.suptitle(picture.title, fontweight="bold", fontsize=12)
        picture.draw(left)
    figure.savefig(path, dpi=_DPI)


def _figure(size: tuple[float, float]) -> Any:  # noqa: ANN401 - a Figure
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a picture of {size} inches needs matplotlib, which is not installed; pip install 'lightning_mup[plots]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def _png(figure: Any) -> bytes:  # noqa: ANN401 - a Figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
