"""A transfer report as one HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from lightning_mup.analysis import sentences
from lightning_mup.analysis.page import Drawn, figures, listing, page, paragraphs, table, table_of
from lightning_mup.analysis.recommend import Recommendation
from lightning_mup.analysis.runs import Metric, Run
from lightning_mup.analysis.transfer import WORDS, TransferReport, cells, number


def to_html(
    report: TransferReport, drawn: Sequence[Drawn], *, more: Iterable[str] = (), versions: Iterable[str] = ()
) -> str:
    """Return the page.

    Args:
        report: what it is about.
        drawn: title, sentence and PNG of each picture.
        more: HTML of further sections.
        versions: versions of packages that the runs used, as text.

    Examples:
        >>> page = to_html(TransferReport((), "width", "lr", "val_loss", "<data>"), [])
        >>> "&lt;data&gt;" in page, "<data>" in page
        (True, False)
    """
    return page(
        f"Transfer of the {WORDS[report.tuned]} over {report.axis}",
        [
            *_introduction(report),
            "<h2>Result</h2>",
            _drift_table(report),
            *_recommended(report.recommended()),
            f"<h2>Every {report.axis}</h2>",
            _size_table(report),
            *_reading(report),
            "<h3>Transfer in three more numbers</h3>",
            _quality_table(report),
            *_reading_of_quality(),
            "<h2>What tuning cost</h2>",
            *paragraphs(filter(None, map(sentences.of_cost, report.groups)), "No size beside the base was run."),
            "<h2>Pictures</h2>",
            *figures(drawn),
            *([] if drawn else [f"<p>None: {_why_none(report)}.</p>"]),
            *more,
            *_runs(report),
            *background(report.data, report.metric, versions, _notes(report)),
        ],
    )


def _why_none(report: TransferReport) -> str:
    if any(math.isfinite(at.optimum.loss) for group in report.groups for at in group.sizes):
        return "matplotlib is not installed (pip install 'lightning_mup[plots]')"
    return "no run has a finite loss"


def _introduction(report: TransferReport) -> list[str]:
    word, axis = WORDS[report.tuned], report.axis
    return [
        f"<p class='quiet'>{len({g.method for g in report.groups})} methods, "
        f"{sum(len(at.runs) for g in report.groups for at in g.sizes)} runs that ended, "
        f"{len(report.diverged)} of them diverged; {len(report.unfinished)} unfinished.</p>",
        f"<p>A large model is too expensive to tune. So the {word} is tuned on a small model, the <b>base</b>, and "
        f"used for larger ones. That works if the best {word} is the same at every {axis}. Whether it is depends on "
        f"the <b>parametrization</b>, the rules by which initial values and learning rates of each layer change with "
        f"size: <i>sp</i> is the standard one, <i>mup</i> and others are made for transfer. Here models of several "
        f"sizes were trained with several values each, and the best ones are compared.</p>",
    ]


def _reading(report: TransferReport) -> list[str]:
    word = WORDS[report.tuned]
    return [
        "<ul class='quiet'>",
        f"<li><b>best {escape(report.tuned)}</b>: the fitted optimum; <b>log2 [95%]</b>: its logarithm to base 2, in "
        f"which +1 is twice as large, with the interval that the noise between runs leaves.</li>",
        f"<li><b>loss there</b>: fitted loss at this size's own optimum, in nats per token; <b>loss at base's "
        f"best</b>: the loss when the base's {word} is used; <b>lost</b>: the difference, the price of not tuning "
        f"again.</li>",
        f"<li><b>{escape(report.tuned)} to add</b>: the runs did not enclose the optimum; run these values too.</li>",
        "</ul>",
    ]


def _drift_table(report: TransferReport) -> str:
    header = ["runs of", "slope [95%]", "verdict", f"loss at the largest {report.axis}, base's best", "meaning"]
    meaning = {
        "stands": f"the best value stays: tune small, use it at any {report.axis} in this range",
        "moves": f"the best value depends on {report.axis}: a value tuned small is wrong for larger models",
        "unclear": "these runs do not tell: add seeds, sizes or values",
    }
    rows = []
    for group in report.groups:
        drift = group.drift
        slope = f"{drift.slope:+.2f} [{drift.low:+.2f}, {drift.high:+.2f}]" if math.isfinite(drift.slope) else "-"
        note = f" ({drift.note})" if drift.note else ""
        texts = [group.label, slope, drift.verdict, number(group.target.loss), meaning[drift.verdict] + note]
        marks = ["", "", f" class='{drift.verdict}'", "", " class='words'"]
        found = zip(texts, marks, strict=True)
        rows.append("<tr>" + "".join(f"<td{mark}>{escape(text)}</td>" for text, mark in found) + "</tr>")
    explained = (
        f"<p>The slope says by how many octaves (doublings) the best {WORDS[report.tuned]} moves when the "
        f"{report.axis} doubles: 0 is perfect transfer, -1 means that it halves. What is uncertain about the shape "
        "that valleys of one method share moves all optima alike, so that the slope is surer than each of them.</p>"
    )
    return table_of(header, rows) + explained


def _quality_table(report: TransferReport) -> str:
    header = ["runs of", "error of the power law, octaves", "exponent of an error's price", "lost in the limit, nats"]
    rows = [[g.label, str(q.fit_error), str(q.robustness), str(q.penalty)] for g, q in report.qualities]
    return table(header, rows)


def _reading_of_quality() -> list[str]:
    return [
        "<ul class='quiet'>",
        "<li><b>error of the power law</b>: how far the optima are off the line by which they are extrapolated, beyond "
        "their own noise.</li>",
        "<li><b>exponent of an error's price</b>: what one octave off costs grows with size to this power; below 0, "
        "larger models forgive more.</li>",
        "<li><b>lost in the limit</b>: the loss that is lost by not tuning again, extrapolated to endless size.</li>",
        "</ul>",
    ]


def _size_table(report: TransferReport) -> str:
    found = [(group, at) for group in report.groups for at in group.sizes]
    bases = (i for i, (group, at) in enumerate(found) if at.size == group.base)
    return table(report.header(), [cells(group, at) for group, at in found], marked=bases)


def _recommended(chosen: Recommendation | None) -> list[str]:
    if chosen is None:
        return ["<p>Nothing is recommended: at no base do the runs enclose an optimum. Add the values named below.</p>"]
    return ["<p>Train with (<code>recommended.yaml</code>):</p>", f"<pre>{escape(chosen.to_yaml())}</pre>"]


def _runs(report: TransferReport) -> list[str]:
    unfinished = [f"{report.name_of(run)}: {_described(run)}, seed {run.seed}" for run in report.unfinished]
    counts = Counter(_described(run) for run in report.diverged)
    diverged = [f"{count} x {what}" if count > 1 else what for what, count in counts.items()]
    titled = (("Unfinished runs, left out", unfinished), ("Diverged runs, bounds of the optima", diverged))
    return [line for title, texts in titled for line in (f"<h2>{title}</h2>", *listing(texts))]


def _described(run: Run) -> str:
    sizes = f"width {run.width}, depth {run.depth}"
    return f"{run.method}, {run.rules}, {sizes}, lr {run.lr:.3g}, weight decay {run.weight_decay:.3g}"


def background(data: str, metric: Metric, versions: Iterable[str], notes: Iterable[str] = ()) -> list[str]:
    """Return the section that says what all runs share.

    Examples:
        >>> background("<1f>", "val_loss", [])[2]
        '<li>Data: fingerprint &lt;1f&gt;, the same in all runs.</li>'
    """
    loss = "validation loss after the last step" if metric == "val_loss" else "training loss of the last tenth"
    lines = [
        f"Data: fingerprint {data}, the same in all runs.",
        f"Compared by: {loss}, in nats per token.",
        f"Versions: {'; '.join(versions) or 'not recorded'}.",
        *notes,
    ]
    return ["<h2>Background</h2>", *listing(lines)]


def _notes(report: TransferReport) -> list[str]:
    unusual = [(g.label, at.size, at.optimum.note) for g in report.groups for at in g.sizes if at.optimum.note]
    return [*(f"{label}, {size}: {note}." for label, size, note in unusual), *report.notes]
