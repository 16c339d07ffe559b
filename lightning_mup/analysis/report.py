"""Write what runs say about transfer: a page to read, a picture, and tables for programs."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_mup.analysis.features import Feature, feature_changes
from lightning_mup.analysis.groups import Axis, Tuned
from lightning_mup.analysis.report_html import to_html
from lightning_mup.analysis.runs import Metric, Run
from lightning_mup.analysis.transfer import TransferReport, plain, transfer_table
from lightning_mup.analysis.transfer_plots import pictures, render, save_pictures


def write_report(
    runs: Iterable[Run],
    folder: str | Path,
    *,
    axis: Axis = "width",
    tuned: Tuned = "lr",
    metric: Metric = "val_loss",
) -> tuple[TransferReport, list[Path]]:
    """Analyse runs and write ``report.html``, ``report.json``, ``report.csv``, ``report.png``, ``recommended.yaml``.

    The page holds everything, pictures included. Without matplotlib there are no pictures, and where no base brackets
    an optimum there is no ``recommended.yaml``; older ones are removed, so that the folder tells one story.

    Args:
        runs: runs on the same data.
        folder: where to write; made if it is not there.
        axis: which size varies.
        tuned: which hyperparameter varies at each size.
        metric: which loss is compared.

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
    report = transfer_table(runs, axis=axis, tuned=tuned, metric=metric)
    features = feature_changes(report.groups)
    drawn = pictures(report, features) if importlib.util.find_spec("matplotlib") else []
    folder.mkdir(parents=True, exist_ok=True)
    chosen = report.recommended()
    texts = {
        "report.html": to_html(report, [(p.title, p.sentence, render(p)) for p in drawn], versions=versions_of(runs)),
        "report.json": _json(report, features),
        "report.csv": _csv(report),
        "recommended.yaml": chosen.to_yaml() if chosen else None,
    }
    written = [path for name, text in texts.items() if (path := _write(folder / name, text))]
    picture = folder / "report.png"
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


def _write(path: Path, text: str | None) -> Path | None:
    if text is None:
        path.unlink(missing_ok=True)
        return None
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _json(report: TransferReport, features: Sequence[Feature]) -> str:
    found = json.loads(report.to_json())
    return json.dumps(found | {"features": plain([feature.row() for feature in features])}, indent=1) + "\n"


def _csv(report: TransferReport) -> str:
    rows = report.rows()
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    return buffer.getvalue()
