"""The part of a report's page that says what methods save in compute."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lightning_mup.analysis.page import Drawn, figures, paragraphs, table
from lightning_mup.analysis.savings import COSTS, Savings
from lightning_mup.analysis.transfer import number

_HEADER = ("runs of", "cost", "loss", "baseline's cost", "multiplier [95%]", "runs", "note")


def savings_parts(savings: Savings, drawn: Sequence[Drawn]) -> list[str]:
    """Return the section, as HTML.

    Args:
        savings: what it is about.
        drawn: title, sentence and PNG of each picture.

    Examples:
        >>> savings_parts(Savings("adamw, mup", "", "flops", "val_loss", {}, {}), [])[0]
        '<h2>Compute saved over adamw, mup</h2>'
    """
    header, *lines = savings.summary()
    return [
        f"<h2>Compute saved over {escape(savings.baseline)}</h2>",
        "<p>The <b>compute multiplier</b> is what the baseline needs for the same loss, over what the method took: 1.4 "
        "says that the baseline needs 1.4 times as much. All runs of a method have one learning rate and weight decay, "
        "those at the base, which the parametrization carries over to each size.</p>",
        table(header, lines),
        *figures(drawn),
        "<h3>Every size</h3>",
        table(_HEADER, _rows(savings)),
        "<ul class='quiet'>",
        f"<li><b>cost</b>: {escape(COSTS[savings.cost])}.</li>",
        "<li><b>baseline's cost</b>: where the straight line through the baseline's points, in log cost and log loss, "
        "has this loss; beyond its points the two nearest ones go on.</li>",
        f"<li>Intervals come from a noise of {_noise(savings)} of the loss between seeds.</li>",
        *(f"<li>{escape(note)}.</li>" for note in _notes(savings)),
        "</ul>",
        *paragraphs([f"{label} could not be compared: {why}." for label, why in savings.refused.items()]),
    ]


def _rows(savings: Savings) -> list[list[str]]:
    return [
        [
            label,
            f"{row.cost:.3g}",
            number(row.loss),
            f"{row.baseline_cost:.3g}",
            f"below {row.high:.2f}" if row.diverged else f"{row.multiplier:.3g} [{row.low:.3g}, {row.high:.3g}]",
            str(row.runs),
            row.note,
        ]
        for label, found in savings.multipliers.items()
        for row in found.rows
    ]


def _noise(savings: Savings) -> str:
    words = {"stated": "as expected", "repeats": "from repeats", "scatter": "from the scatter about the trend"}
    found = {f"{100 * m.noise:.2g}% ({label}, {words[m.source]})" for label, m in savings.multipliers.items()}
    return "; ".join(sorted(found)) or "nothing"


def _notes(savings: Savings) -> list[str]:
    return [*savings.notes, *(f"{label}: {note}" for label, m in savings.multipliers.items() for note in m.notes)]
