"""The ledger of tuning: what every run of every sweep cost, failed and repeated ones too, as lines of JSON.

A sweep writes one line whenever a run ends: ``finished``, ``diverged`` or ``failed``. The file stands beside the
sweep's folder and outlives it. What it knows and the runs on disk do not: attempts that failed, steps that were taken
again after an interruption, and runs whose folders were deleted and trained anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_mup.core.plan import aligned
from lightning_mup.core.registry import near

LEDGER = "ledger.jsonl"
Status = Literal["finished", "diverged", "failed"]
_RUN, _METRICS, _RESULT = "run.json", "metrics.jsonl", "result.json"  # as lightning_mup.callbacks.record_run has them
_SHOWN = 60
_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: what one attempt at a run cost.

    Args:
        sweep: name of the sweep's folder.
        folder: the run's folder, relative to the ledger's.
        training: tells a training from another one in the same folder; ``""`` where it logged nothing.
        method: name of the method; ``""`` where that is not known.
        status: how the attempt ended.
        flops: floating-point operations since the line before on this training (>= 0); None where no record tells.
        seconds: wall-clock time likewise.
        when: when it was booked, ISO 8601 in UTC.
    """

    sweep: str
    folder: str
    training: str
    method: str
    status: Status
    flops: float | None
    seconds: float | None
    when: str


@dataclass(frozen=True, slots=True)
class Total:
    """What several entries cost together.

    Args:
        runs: trainings, each counted once.
        finished: trainings that finished.
        diverged: trainings that diverged.
        failed: attempts that failed, also where a later attempt went on.
        flops: floating-point operations.
        seconds: wall-clock time.
        unknown: attempts without a record of their cost, which the sums lack.
    """

    runs: int
    finished: int
    diverged: int
    failed: int
    flops: float
    seconds: float
    unknown: int

    def share_of(self, target_flops: float) -> float:
        """Return the operations as a share of one run at the target: ``flops / target_flops``.

        Args:
            target_flops: operations of the target's run (> 0).

        Raises:
            ValueError: they are not positive and finite.

        Examples:
            >>> Total(5, 4, 1, 0, flops=2e15, seconds=60.0, unknown=0).share_of(1e16)
            0.2
        """
        if not 0 < target_flops < math.inf:
            raise ValueError(f"target_flops must be positive and finite, got {target_flops!r}; give those of one run")
        return self.flops / target_flops

    def share_of_tuning(self, target_flops: float, *, runs: int | None = None) -> float:
        """Return the operations as a share of tuning at the target: ``flops / (runs target_flops)``.

        Args:
            target_flops: operations of the target's run (> 0).
            runs: runs that tuning at the target would take (>= 1); as many as there are here if None.

        Raises:
            ValueError: a number is out of range, or there are no runs.

        Examples:
            >>> Total(5, 4, 1, 0, flops=2e15, seconds=60.0, unknown=0).share_of_tuning(1e16)
            0.04
        """
        runs = self.runs if runs is None else runs
        if runs < 1:
            raise ValueError(f"tuning takes at least one run, got runs={runs!r}; give the number of runs")
        return self.share_of(target_flops) / runs


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a ledger's file holds.

    Args:
        entries: one per line, in their order; a line that stands twice is one.
        broken: file, line number and text of lines that a killed process left unfinished.
        repeated: number of lines that were left out because they stand twice.
    """

    entries: tuple[Entry, ...]
    broken: tuple[str, ...] = ()
    repeated: int = 0

    def total(self, *, sweep: str | None = None, method: str | None = None) -> Total:
        """Return what all entries cost, or those of one sweep or method.

        Raises:
            ValueError: there is no entry of that sweep or method.
        """
        for name, wanted in (("sweep", sweep), ("method", method)):
            known = dict.fromkeys(getattr(entry, name) for entry in self.entries)
            if wanted is not None and wanted not in known:
                raise ValueError(f"no {name} {wanted!r} in the ledger{near(wanted, known)}; it has {', '.join(known)}")
        return _total(e for e in self.entries if sweep in (None, e.sweep) and method in (None, e.method))

    def totals(self, by: Literal["sweep", "method"]) -> dict[str, Total]:
        """Return what each sweep or each method cost, in the order of their first entries."""
        names = dict.fromkeys(getattr(entry, by) for entry in self.entries)
        return {name: _total(e for e in self.entries if getattr(e, by) == name) for name in names}

    def table(self) -> str:
        """Return one row per sweep and method as aligned lines.

        Examples:
            >>> when = "2026-01-01T00:00:00+00:00"
            >>> made = Entry("width_lr", "width_lr/lr=2^-4", "", "muon", "finished", 2e15, 90.0, when)
            >>> print(Ledger((made,)).table())
            sweep     method  runs  finished  diverged  failed  FLOPs  seconds  not known
            width_lr  muon    1     1         0         0       2e+15  90       0
        """
        pairs = dict.fromkeys((entry.sweep, entry.method) for entry in self.entries)
        rows = [["sweep", "method", "runs", "finished", "diverged", "failed", "FLOPs", "seconds", "not known"]]
        for sweep, method in pairs:
            sum_ = _total(e for e in self.entries if (e.sweep, e.method) == (sweep, method))
            counts = [sum_.runs, sum_.finished, sum_.diverged, sum_.failed]
            rows.append([sweep, method or "-", *map(str, counts), f"{sum_.flops:.3g}", f"{sum_.seconds:.0f}"])
            rows[-1].append(str(sum_.unknown))
        return "\n".join(aligned(rows))


def ledger_of(sweep_folder: str | Path) -> Path:
    """Return where a sweep's ledger stands unless it was configured: beside the sweep's folder.

    Examples:
        >>> str(ledger_of("runs/width_lr"))
        'runs/ledger.jsonl'
    """
    return Path(sweep_folder).parent / LEDGER


def read_ledger(path: str | Path) -> Ledger:
    """Read a ledger; a missing file is an empty one.

    A line that is no JSON was cut off when its process was killed: it is left out and named in ``broken``.

    Raises:
        ValueError: a line lacks a field, or holds a wrong value; the message names file and line.

    Examples:
        >>> read_ledger("no/such/file")
        Ledger(entries=(), broken=(), repeated=0)
    """
    path = Path(path)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    entries: dict[Entry, Entry] = {}
    broken, count = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            broken.append(f"{path}, line {number}: {line[:_SHOWN]!r}")
            continue
        entry = _entry(found, f"{path}, line {number}")
        entries.setdefault(replace(entry, when=""), entry)  # two processes may have booked it at different times
        count += 1
    return Ledger(tuple(entries.values()), tuple(broken), count - len(entries))


def book(path: str | Path, sweep_folder: str | Path, ended: Mapping[Path, Status]) -> tuple[Entry, ...]:
    """Add the runs of a sweep that ended, each once: a run that is booked already and has not gone on adds nothing.

    What an attempt cost is read from the run's own files. Steps that were taken again after an interruption count
    again. Each line is one write at the file's end, so that several processes can share a ledger.

    Args:
        path: the ledger.
        sweep_folder: the sweep's, whose name the entries bear.
        ended: how each run ended, by its folder.

    Returns:
        The entries that were added.

    Raises:
        ValueError: the ledger cannot be read.

    Examples:
        >>> import tempfile
        >>> runs = Path(tempfile.mkdtemp())
        >>> (runs / "widths" / "lr=1").mkdir(parents=True)
        >>> _ = (runs / "widths" / "lr=1" / "result.json").write_text('{"flops": 2e12, "seconds": 3.5}')
        >>> for _ in range(2):
        ...     print(len(book(ledger_of(runs / "widths"), runs / "widths", {runs / "widths" / "lr=1": "finished"})))
        1
        0
        >>> read_ledger(runs / "ledger.jsonl").total().flops
        2000000000000.0
    """
    path = Path(path)
    earlier: dict[tuple[str, str], list[Entry]] = {}
    for entry in read_ledger(path).entries:
        earlier.setdefault((entry.folder, entry.training), []).append(entry)
    added = []
    for folder, status in ended.items():
        name, training = os.path.relpath(folder, path.parent), _training(folder)
        before = earlier.get((name, training), [])
        if before and before[-1].status != "failed":
            continue
        flops, seconds = (_beyond(spent, before, key) for key, spent in _spent(folder).items())
        if before and status == "failed" and not flops:
            continue
        method, when = str(_object(folder / _RUN).get("method", "")), datetime.now(timezone.utc)
        time = when.isoformat(timespec="seconds")
        added.append(Entry(Path(sweep_folder).name, name, training, method, status, flops, seconds, time))
    _append(path, added)
    return tuple(added)


# -- files ------------------------------------------------------------------------------------------------------------


def _training(folder: Path) -> str:
    """Return what tells trainings in one folder apart: the first line logged, whose seconds no other training has."""
    first = next(_rows(folder / _METRICS), None) or _object(folder / _RESULT)
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:_DIGITS] if first else ""


def _beyond(spent: float | None, before: Iterable[Entry], key: str) -> float | None:
    """Return what was spent beyond what is booked."""
    return None if spent is None else max(0.0, spent - sum(getattr(entry, key) or 0.0 for entry in before))


def _spent(folder: Path) -> dict[str, float | None]:
    """Return FLOPs and seconds of a training from its first step on; None where it left no record."""
    rows, result = list(_rows(folder / _METRICS)), _object(folder / _RESULT)
    final, again = {**(rows[-1] if rows else {}), **result}, _again(rows)
    return {key: float(final[key]) + lost if key in final else None for key, lost in again.items()}


def _again(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return what was spent on steps that an interruption lost: each time, from the checkpoint to the last step.

    A run that goes on logs the steps after its checkpoint again, so that a step smaller than the one before it, or
    equal to it, is where it went on; its checkpoint was at the last step before that.
    """
    lost = {"flops": 0.0, "seconds": 0.0}
    for place, (before, row) in enumerate(itertools.pairwise(rows), 1):
        if row["step"] <= before["step"]:
            kept = next((r for r in reversed(rows[:place]) if r["step"] < row["step"]), {"flops": 0.0, "seconds": 0.0})
            lost = {key: lost[key] + max(0.0, before[key] - kept[key]) for key in lost}
    return lost


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines, in their order, that say what has been spent; half a line says nothing."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
            yield {key: float(found[key]) for key in ("step", "flops", "seconds")}
        except (ValueError, KeyError, TypeError):
            continue  # a validation, which spends nothing that is counted, or a line that was cut off


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _append(path: Path, entries: Iterable[Entry]) -> None:
    texts = [json.dumps(asdict(entry), allow_nan=False) + "\n" for entry in entries]
    if not texts:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for text in texts:
            size = os.fstat(file).st_size
            cut_off = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # a line of a process that was killed
            os.write(file, (("\n" if cut_off else "") + text).encode())
    finally:
        os.close(file)


def _entry(found: object, where: str) -> Entry:
    names = [field.name for field in fields(Entry)]
    if not isinstance(found, dict) or (missing := [name for name in names if name not in found]):
        lacks = "is no JSON object" if not isinstance(found, dict) else f"lacks {', '.join(missing)}"
        raise ValueError(f"{where} {lacks}; a line has {', '.join(names)}; remove it")
    if found["status"] not in get_args(Status):
        raise ValueError(f"{where}: status must be one of {get_args(Status)}, got {found['status']!r}; remove the line")
    for name in ("flops", "seconds"):
        value = found[name]
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"{where}: {name} must be >= 0 or null, got {value!r}; remove the line")
    return Entry(**{name: found[name] for name in names})


def _total(entries: Iterable[Entry]) -> Total:
    entries = list(entries)
    last = {(entry.folder, entry.training): entry.status for entry in entries}
    ends = list(last.values())
    return Total(
        runs=len(last),
        finished=ends.count("finished"),
        diverged=ends.count("diverged"),
        failed=sum(entry.status == "failed" for entry in entries),
        flops=math.fsum(entry.flops or 0.0 for entry in entries),
        seconds=math.fsum(entry.seconds or 0.0 for entry in entries),
        unknown=sum(entry.flops is None for entry in entries),
    )
