"""RunLog: every logged number of a run as a line of JSON, which is what all analysis reads."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

METRICS = "metrics.jsonl"


class RunLog(Logger):
    """Append each step's metrics to ``metrics.jsonl`` in a run's folder, one JSON object a line.

    A line is on disk as soon as it is logged. Where a killed run left half a line, that is cut off first; a resumed run
    writes the steps after its checkpoint again, and the last line of a step counts. Numbers that are not finite are
    written as ``"nan"``, ``"inf"`` and ``"-inf"``, which JSON lacks. Hyperparameters are not repeated here:
    :class:`~lightning_mup.RecordRun` writes them to ``run.json``.

    Args:
        folder: the run's folder, made if it is not there.

    Examples:
        >>> import tempfile
        >>> log = RunLog(tempfile.mkdtemp())
        >>> log.log_metrics({"train/loss": 2.5, "grad": float("inf")}, step=10)
        >>> json.loads((log.folder / "metrics.jsonl").read_text())
        {'step': 10, 'train/loss': 2.5, 'grad': 'inf'}
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._whole = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def version(self) -> str:
        """No version: a folder is one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder, where Lightning's callbacks put their files."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """The folder, where the plan goes."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one line."""
        if not self._whole:
            _cut_off(self.folder / METRICS)
            self._whole = True
        line = {"step": step, **{key: _plain(value) for key, value in metrics.items() if key != "epoch"}}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Do nothing: ``run.json`` has them."""


def _cut_off(path: Path) -> None:
    """Cut off half a line, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _plain(value: float) -> float | str:
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return int(value) if value.is_integer() else value
