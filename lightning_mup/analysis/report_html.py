"""A transfer report as one HTML page that needs nothing beside it: no script, no style sheet, no network."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from lightning_mup.analysis import sentences
from lightning_mup.analysis.groups import Group
from lightning_mup.analysis.recommend import Recommendation
from lightning_mup.analysis.runs import Run
from lightning_mup.analysis.transfer import WORDS, TransferReport, cells, number

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
p, li { max-width: 48rem; } .quiet { color: #57606a; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #d0d7de; text-align: left; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; } td.words { white-space: normal; } tr.base { background: #f3f6f9; }
.stands { color: #1a7f37; font-weight: 600; } .moves { color: #c0272d; font-weight: 600; }
.unclear { color: #57606a; font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { max-width: 48rem; color: #57606a; }
pre { background: #f3f6f9; padding: 0.8rem; overflow-x: auto; }
"""
_SHOWN = 40  # lines of a list; the others are counted


def to_html(report: TransferReport, drawn: Sequence[tuple[str, str, bytes]], *, versions: Iterable[str] = ()) -> str:
    """Return the page.

    Args:
        report: what it is about.
        drawn: title, sentence and PNG of each picture.
        versions: versions of packages that the runs used, as text.

    Examples:
        >>> page = to_html(TransferReport((), "width", "lr", "val_loss", "<data>"), [])
        >>> "&lt;data&gt;" in page, "<data>" in page
        (True, False)
    """
    title = f"Transfer of the {WORDS[report.tuned]} over {report.axis}"
    parts = [
        f"<h1>{title}</h1>",
        *_introduction(report),
        "<h2>Result</h2>",
        _drift_table(report),
        *_recommended(report.recommended()),
        f"<h2>Every {report.axis}</h2>",
        _size_table(report),
        *_reading(report),
        "<h2>What tuning cost</h2>",
        *_paragraphs(filter(None, map(sentences.of_cost, report.groups)), "No size beside the base was run."),
        "<h2>Pictures</h2>",
        *(_figure(*picture) for picture in drawn),
        *([] if drawn else [f"<p>None: {_why_none(report)}.</p>"]),
        *_runs(report),
        *_background(report, versions),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
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
        f"{report.axis} doubles: 0 is perfect transfer, -1 means that it halves.</p>"
    )
    return _table(header, rows) + explained


def _size_table(report: TransferReport) -> str:
    rows = []
    for group in report.groups:
        for at in group.sizes:
            mark = " class='base'" if at.size == group.base else ""
            rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(text)}</td>" for text in cells(group, at)) + "</tr>")
    return _table(report.header(), rows)


def _table(header: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"


def _recommended(chosen: Recommendation | None) -> list[str]:
    if chosen is None:
        return ["<p>Nothing is recommended: at no base do the runs enclose an optimum. Add the values named below.</p>"]
    return ["<p>Train with (<code>recommended.yaml</code>):</p>", f"<pre>{escape(chosen.to_yaml())}</pre>"]


def _figure(title: str, sentence: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<figure><h3>{escape(title)}</h3>{image}<figcaption>{escape(sentence)}</figcaption></figure>"


def _runs(report: TransferReport) -> list[str]:
    unfinished = [f"{report.name_of(run)}: {_described(run)}, seed {run.seed}" for run in report.unfinished]
    counts = Counter(_described(run) for run in report.diverged)
    diverged = [f"{count} x {what}" if count > 1 else what for what, count in counts.items()]
    titled = (("Unfinished runs, left out", unfinished), ("Diverged runs, bounds of the optima", diverged))
    return [line for title, texts in titled for line in (f"<h2>{title}</h2>", *_list(texts))]


def _list(texts: Sequence[str]) -> list[str]:
    if not texts:
        return ["<p>None.</p>"]
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return ["<ul>", *(f"<li>{escape(text)}</li>" for text in [*texts[:_SHOWN], *more]), "</ul>"]


def _described(run: Run) -> str:
    sizes = f"width {run.width}, depth {run.depth}"
    return f"{run.method}, {run.rules}, {sizes}, lr {run.lr:.3g}, weight decay {run.weight_decay:.3g}"


def _background(report: TransferReport, versions: Iterable[str]) -> list[str]:
    loss = "validation loss after the last step" if report.metric == "val_loss" else "training loss of the last tenth"
    lines = [
        f"Data: fingerprint {report.data}, the same in all runs.",
        f"Compared by: {loss}, in nats per token.",
        f"Versions: {'; '.join(versions) or 'not recorded'}.",
        *(note for group in report.groups for note in _notes(group)),
        *report.notes,
    ]
    return ["<h2>Background</h2>", *_list(lines)]


def _notes(group: Group) -> list[str]:
    return [f"{group.label}, {at.size}: {at.optimum.note}." for at in group.sizes if at.optimum.note]


def _paragraphs(texts: Iterable[str], otherwise: str) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in texts] or [f"<p>{escape(otherwise)}</p>"]
