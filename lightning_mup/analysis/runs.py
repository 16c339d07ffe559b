"""Run directories as values: what each run was, how it ended and what it logged; nothing is skipped silently."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_mup.core.registry import near

RUN, METRICS, RESULT = "run.json", "metrics.jsonl", "result.json"
Status = Literal["finished", "diverged", "unfinished"]
Metric = Literal["val_loss", "train_loss"]
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers
_NAMED = 4  # runs or keys named in a message; the others are counted
_SAME = (
    *("method", "rules", "width", "depth", "base_width", "base_depth", "lr", "weight_decay", "seed"),
    *("max_steps", "tokens_per_step", "context", "data"),
)
"""Settings that tell runs apart; two runs that agree in all of them are one run, done twice."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, as its ``result.json`` says.

    Args:
        status: ``"finished"`` or ``"diverged"``.
        step: optimizer steps taken.
        tokens: tokens seen.
        flops: floating-point operations of forward and backward passes.
        seconds: wall-clock time of training.
        train_loss: mean over the last tenth of the steps, in nats; None where there is none.
        val_loss: loss on validation data after the last step, in nats; None where there is none.
    """

    status: Status
    step: int
    tokens: int
    flops: float
    seconds: float
    train_loss: float | None
    val_loss: float | None


@dataclass(frozen=True)
class Run:
    """One training run: the fields of its ``run.json``, its result, and its metrics, read when they are asked for.

    Args:
        name: name of the sweep or the run.
        method: name of the optimizer's configuration.
        rules: parametrization, ``"mup"`` or several as ``"mup x complete_p"``.
        width: width of the model.
        depth: number of its residual blocks.
        base_width: width at which ``lr`` and ``weight_decay`` hold.
        base_depth: depth at which they hold.
        lr: learning rate at the base.
        weight_decay: fraction of the weights removed per step at the base.
        seed: seed of the run.
        params: number of parameters.
        non_embedding_params: number of parameters but for embeddings.
        tokens_per_step: tokens of one optimizer step.
        flops_per_token: floating-point operations of training on one token, forward and backward.
        max_steps: steps that were to be taken.
        context: tokens in a sequence.
        data: fingerprint of the data; losses on other data cannot be compared.
        versions: version of each package.
        config: the whole configuration by dotted key.
        folder: where it was read.
        result: how it ended; None while it has not.
    """

    name: str
    method: str
    rules: str
    width: int
    depth: int
    base_width: int
    base_depth: int
    lr: float
    weight_decay: float
    seed: int
    params: int
    non_embedding_params: int
    tokens_per_step: int
    flops_per_token: float
    max_steps: int
    context: int
    data: str
    versions: Mapping[str, str] = field(repr=False)
    config: Mapping[str, object] = field(repr=False)
    folder: Path
    result: Result | None = None

    @property
    def status(self) -> Status:
        """How the run ended; ``"unfinished"`` where it has no result."""
        return self.result.status if self.result else "unfinished"

    @property
    def flops(self) -> float:
        """Floating-point operations spent; those logged last where the run has no result."""
        if self.result:
            return self.result.flops
        return max((row["flops"] for row in self.metrics if "flops" in row), default=0.0)  # validation logs none

    def loss(self, metric: Metric = "val_loss") -> float:
        """Return the final loss in nats: inf where the run diverged, nan where it is unfinished.

        Raises:
            ValueError: the run finished without this loss.
        """
        if self.result is None:
            return math.nan
        if self.status == "diverged":
            return math.inf
        value: float | None = getattr(self.result, metric)
        if value is None:
            other = next(m for m in get_args(Metric) if m != metric)
            raise ValueError(f"{self.folder} finished without a {metric}; compare all runs by {other}, or validate it")
        return value if math.isfinite(value) else math.inf

    def row(self) -> dict[str, object]:
        """Return what tells this run from others, and how it ended, as one flat row."""
        settings = {key: getattr(self, key) for key in ("name", *_SAME, "params")}
        ended = asdict(self.result) if self.result else {}
        return {**settings, **ended, "status": self.status}

    @cached_property
    def metrics(self) -> tuple[dict[str, float], ...]:
        """What was logged, one dict per step, in the order of steps; the last line of a step wins.

        Raises:
            ValueError: a line other than the last is broken; the message names file and line.
        """
        return read_metrics(self.folder / METRICS)


def read_runs(*folders: str | Path) -> list[Run]:
    """Read every run directory in the folders, at any depth, finished or not, sorted by path.

    Args:
        folders: run directories, or folders that hold some.

    Raises:
        ValueError: a folder holds no run, or a file is broken, lacks a key or holds a wrong one.

    Examples:
        >>> read_runs("no/such/folder")
        Traceback (most recent call last):
        ...
        ValueError: no run (a folder with a run.json) in no/such/folder; give the folder of a run or of a sweep
    """
    found: set[Path] = set()
    for folder in map(Path, folders):
        files = set(folder.rglob(RUN))
        if not files:
            raise ValueError(f"no run (a folder with a {RUN}) in {folder}; give the folder of a run or of a sweep")
        found |= {file.parent.resolve() for file in files}
    return [read_run(folder) for folder in sorted(found)]


def read_run(folder: str | Path) -> Run:
    """Read one run directory.

    Raises:
        ValueError: a file is missing or broken, lacks a key or holds a wrong value.
    """
    folder = Path(folder)
    facts = _read_json(folder / RUN)
    names = [f.name for f in fields(Run) if f.name not in {"folder", "result"}]
    _check_keys(facts, names, folder / RUN)
    for name in ("lr", "weight_decay", "width", "depth", "base_width", "base_depth", "max_steps"):
        if not isinstance(facts[name], int | float) or not math.isfinite(facts[name]) or facts[name] < 0:
            raise ValueError(f"{folder / RUN}: {name} must be a number >= 0, got {facts[name]!r}; run it again")
    return Run(**{name: facts[name] for name in names}, folder=folder, result=_read_result(folder / RESULT))


def read_metrics(path: str | Path) -> tuple[dict[str, float], ...]:
    """Read a ``metrics.jsonl``; a missing file is no metrics, a last line that was cut off is left out.

    Values of a step that stand on several lines are merged, the last of each key wins.

    Raises:
        ValueError: another line is broken.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = file.write_text('{"step": 1, "train/loss": "inf"}' + chr(10) + '{"step": 2, "tra')
        >>> read_metrics(file)
        ({'step': 1, 'train/loss': inf},)
    """
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for number, line in enumerate(lines, 1):
        try:
            row = {key: _NUMBERS.get(value, value) for key, value in json.loads(line).items()}
            steps[int(row["step"])].update(row)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break  # killed while it wrote
            raise ValueError(
                f"{path}, line {number}: {line[:60]!r} is not a JSON object with a step ({error}); remove the line"
            ) from error
    return tuple(steps[step] for step in sorted(steps))


def without_repeats(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """Keep one of each set of runs that agree in settings and seed, and say in a note what was left out and why.

    The newest run with a result is kept. Runs that differ in their seeds are no repeats: all are kept.

    Examples:
        >>> without_repeats([])
        ([], [])
    """
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(getattr(run, name) for name in _SAME)].append(run)
    kept, notes = [], []
    for group in groups.values():
        newest = max(group, key=_age)
        kept.append(newest)
        if others := [run for run in group if run is not newest]:
            differ = sorted({key for run in others for key in _differing(run.config, newest.config)})
            why = f"though their configurations differ in {listed(differ)}" if differ else "of the same configuration"
            notes.append(f"{_place(newest)} was used and not {listed(map(_place, others))}, {why}")
    return kept, notes


def _place(run: Run) -> str:
    """Return a run's folder as people write it: from here where it is below."""
    here = Path.cwd()
    return str(run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder)


def check_same_data(runs: Sequence[Run]) -> str:
    """Return the fingerprint of the data that all runs saw.

    Raises:
        ValueError: the runs saw different data, or sequences of different length, so that losses cannot be compared.
    """
    for what in ("data", "context"):
        values: dict[object, list[str]] = defaultdict(list)
        for run in runs:
            values[getattr(run, what)].append(_place(run))
        if len(values) > 1:
            text = "; ".join(f"{value!r} in {listed(folders)}" for value, folders in values.items())
            raise ValueError(f"losses of runs with different {what} cannot be compared: {text}; give runs of one alone")
    return runs[0].data if runs else ""


def listed(words: Iterable[object], limit: int = _NAMED) -> str:
    """Return the first few words of many as one phrase.

    Examples:
        >>> listed(range(6))
        '0, 1, 2, 3 and 2 more'
    """
    texts = list(map(str, words))
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _read_result(path: Path) -> Result | None:
    if not path.exists():
        return None
    found = _read_json(path)
    names = [f.name for f in fields(Result)]
    _check_keys(found, names, path)
    if found["status"] not in ("finished", "diverged"):
        raise ValueError(f"{path}: status must be 'finished' or 'diverged', got {found['status']!r}; run it again")
    return Result(**{name: found[name] for name in names})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}; give folders that were written by a run") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); remove it and run again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}; run it again")
    return {key: _NUMBERS.get(value, value) if isinstance(value, str) else value for key, value in found.items()}


def _check_keys(found: Mapping[str, object], names: Sequence[str], path: Path) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}{near(missing[0], found)}; it has {', '.join(found)}")


def _age(run: Run) -> tuple[bool, float]:
    return run.result is not None, (run.folder / (RESULT if run.result else RUN)).stat().st_mtime


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
