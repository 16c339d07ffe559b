"""Write what runs say about transfer and about compute: a page to read, a picture, and tables for programs."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_mup.analysis.costs import cost_parts
from lightning_mup.analysis.features import Feature, feature_changes
from lightning_mup.analysis.groups import Axis, Tuned
from lightning_mup.analysis.laws import Laws, find_laws, law_parts
from lightning_mup.analysis.page import Drawn, page
from lightning_mup.analysis.report_html import background, to_html
from lightning_mup.analysis.runs import Metric, Run
from lightning_mup.analysis.savings import Cost, Savings, can_compare, find_savings
from lightning_mup.analysis.savings_html import savings_parts
from lightning_mup.analysis.savings_plots import pictures_of
from lightning_mup.analysis.transfer import TransferReport, plain, transfer_table
from lightning_mup.analysis.transfer_plots import Picture, pictures, render, save_pictures
from lightning_mup.ledger import Ledger

_UNBOOKED = Ledger(())
_SWEPT = 2  # sizes at which values were tried; one alone says nothing of transfer


@dataclass(frozen=True)
class Report:
    """What a set of runs says.

    Args:
        transfer: whether what was tuned stands; None where one size alone was swept, and there are savings.
        savings: what methods save in compute; None where there is no baseline at two sizes, or no other method.
        features: how much features change, at each size.
        ledger: what all attempts cost; empty where nobody booked them.
        laws: how the loss of the methods that are compared falls with compute; None without savings.
    """

    transfer: TransferReport | None
    savings: Savings | None
    features: tuple[Feature, ...] = ()
    ledger: Ledger = _UNBOOKED
    laws: Laws | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and why."""
        return (*(self.transfer.notes if self.transfer else ()), *(self.savings.notes if self.savings else ()))

    def rows(self) -> list[dict[str, object]]:
        """Return the transfer table as plain dicts, or that of savings where there is none."""
        return self.transfer.rows() if self.transfer else self.savings.rows() if self.savings else []

    def table(self) -> str:
        """Return all tables as text."""
        parts = [self.transfer.table()] if self.transfer else []
        if self.savings:
            parts.append(f"compute saved over {self.savings.baseline}, in {self.savings.cost}\n{self.savings.table()}")
        return "\n\n".join(parts)


def find_report(
    runs: Sequence[Run],
    *,
    axis: Axis = "width",
    tuned: Tuned = "lr",
    metric: Metric = "val_loss",
    baseline: str | None = None,
    cost: Cost = "flops",
    ledger: Ledger = _UNBOOKED,
) -> Report:
    """Analyse runs; see :func:`write_report` for the arguments and errors.

    Examples:
        >>> find_report([])
        Traceback (most recent call last):
        ...
        ValueError: none of the 0 runs has ended; a report needs runs with a result.json
    """
    compared = bool(baseline) or can_compare(runs)
    savings = find_savings(runs, baseline=baseline, cost=cost, metric=metric) if compared else None
    laws = find_laws(savings) if savings else None
    if savings and not _swept(runs, axis, tuned):
        return Report(None, savings, ledger=ledger, laws=laws)
    transfer = transfer_table(runs, axis=axis, tuned=tuned, metric=metric)
    return Report(transfer, savings, tuple(feature_changes(transfer.groups)), ledger, laws)


def write_report(
    runs: Iterable[Run],
    folder: str | Path,
    *,
    axis: Axis = "width",
    tuned: Tuned = "lr",
    metric: Metric = "val_loss",
    baseline: str | None = None,
    cost: Cost = "flops",
    ledger: Ledger = _UNBOOKED,
) -> tuple[Report, list[Path]]:
    """Analyse runs and write ``report.html``, ``.json``, ``.csv`` and ``.png``, ``savings.csv``, ``recommended.yaml``.

    The page holds everything, pictures included; ``runs.csv`` has the settings and losses of every run. Without
    matplotlib there are no pictures, where no base brackets an optimum there is no ``recommended.yaml``, and without a
    baseline there are no savings; older files are removed, so that the folder tells one story.

    Args:
        runs: runs on the same data.
        folder: where to write; made if it is not there.
        axis: which size varies.
        tuned: which hyperparameter varies at each size.
        metric: which loss is compared.
        baseline: the runs that others are compared with in compute, see
            :func:`~lightning_mup.analysis.savings.find_savings`; None for AdamW's or Adam's, where there are any.
        cost: what compute is counted in.
        ledger: what all attempts cost, see :func:`~lightning_mup.analysis.costs.booked`.

    Returns:
        The report, and the files that were written.

    Raises:
        ValueError: the runs cannot be compared, see :func:`~lightning_mup.analysis.transfer.transfer_table`.

    Examples:
        >>> write_report([], "report")
        Traceback (most recent call last):
        ...
        ValueError: none of the 0 runs has ended; a report needs runs with a result.json
    """
    runs, folder = list(runs), Path(folder)
    report = find_report(runs, axis=axis, tuned=tuned, metric=metric, baseline=baseline, cost=cost, ledger=ledger)
    drawing = importlib.util.find_spec("matplotlib") is not None
    of_transfer = pictures(report.transfer, report.features) if report.transfer and drawing else []
    of_savings = pictures_of(report.savings) if report.savings and drawing else []
    folder.mkdir(parents=True, exist_ok=True)
    chosen = report.transfer.recommended() if report.transfer else None
    texts = {
        "report.html": _html(report, runs, _rendered(of_transfer), _rendered(of_savings)),
        "report.json": _json(report),
        "report.csv": _csv(report.transfer.rows()) if report.transfer else None,
        "savings.csv": _csv(report.savings.rows()) if report.savings else None,
        "runs.csv": _csv([run.row() for run in runs]),
        "recommended.yaml": chosen.to_yaml() if chosen else None,
    }
    written = [path for name, text in texts.items() if (path := _write(folder / name, text))]
    picture, drawn = folder / "report.png", [*of_transfer, *of_savings]
    picture.unlink(missing_ok=True)
    if drawn:
        save_pictures(drawn, picture)
        written.append(picture)
    return report, written


def versions_of(runs: Iterable[Run]) -> list[str]:
    """Return the versions of packages that runs used, one text for each different set.

    Examples:
        >>> versions_of([])
        []
    """
    texts = (", ".join(f"{name} {version}" for name, version in sorted(run.versions.items())) for run in runs)
    return sorted(set(texts))


def _swept(runs: Iterable[Run], axis: Axis, tuned: Tuned) -> bool:
    values: dict[tuple[object, ...], set[float]] = {}
    for run in runs:
        other = run.weight_decay if tuned == "lr" else run.lr
        key = (run.method, run.rules, run.width, run.depth, other)
        values.setdefault(key, set()).add(getattr(run, tuned))
    sizes = {key[2] if axis == "width" else key[3] for key, found in values.items() if len(found) > 1}
    return len(sizes) >= _SWEPT


def _rendered(drawn: Iterable[Picture]) -> list[Drawn]:
    return [(picture.title, picture.sentence, render(picture)) for picture in drawn]


def _html(report: Report, runs: Sequence[Run], of_transfer: list[Drawn], of_savings: list[Drawn]) -> str:
    more = savings_parts(report.savings, of_savings) if report.savings else []
    more += law_parts(report.laws) if report.laws else []
    more, versions = [*more, *cost_parts(report.ledger, runs)], versions_of(runs)
    if report.transfer:
        return to_html(report.transfer, of_transfer, more=more, versions=versions)
    assert report.savings is not None
    return page("Compute saved", [*more, *background(report.savings.data, report.savings.metric, versions)])


def _write(path: Path, text: str | None) -> Path | None:
    if text is None:
        path.unlink(missing_ok=True)
        return None
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _json(report: Report) -> str:
    found: dict[str, object] = json.loads(report.transfer.to_json()) if report.transfer else {}
    if report.transfer:
        found["features"] = plain([feature.row() for feature in report.features])
    if report.savings:
        found["savings"] = plain(report.savings.as_dict())
    if report.laws:
        found["laws"] = plain(report.laws.as_dict())
    if report.ledger.entries:
        found["ledger"] = {name: asdict(total) for name, total in report.ledger.totals("sweep").items()}
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    return buffer.getvalue()
