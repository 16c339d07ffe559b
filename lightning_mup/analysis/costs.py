"""What tuning cost, from the ledger, as a share of the run that it was done for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_mup.analysis.page import listing, paragraphs, table
from lightning_mup.analysis.runs import Run
from lightning_mup.ledger import LEDGER, Entry, Ledger, read_ledger

_HEADER = ("sweep", "method", "runs", "finished", "diverged", "failed attempts", "FLOPs", "hours", "cost not known")
_HOUR = 3600.0


def booked(*folders: str | Path) -> Ledger:
    """Return what the ledgers in and beside some folders say of the runs in them.

    Args:
        folders: of runs or sweeps, as :func:`~lightning_mup.analysis.runs.read_runs` takes them.

    Raises:
        ValueError: a ledger cannot be read.

    Examples:
        >>> booked("no/such/folder").entries
        ()
    """
    paths = [Path(folder).resolve() for folder in folders]
    files = dict.fromkeys(place / LEDGER for path in paths for place in (path, path.parent))
    ledgers = [(file, read_ledger(file)) for file in files]
    return Ledger(
        entries=tuple(e for file, ledger in ledgers for e in ledger.entries if _is_in(file, e, paths)),
        broken=tuple(line for _, ledger in ledgers for line in ledger.broken),
    )


def said_of_cost(ledger: Ledger, runs: Sequence[Run]) -> str:
    """Say what all attempts took, as a share of the most expensive run and of as many of these; "" for no entries.

    Examples:
        >>> said_of_cost(Ledger(()), [])
        ''
    """
    if not ledger.entries:
        return ""
    total, largest = ledger.total(), max((run.flops for run in runs), default=0.0)
    attempts = f"{total.runs} runs and {total.failed} failed attempts"
    spent = f"{attempts} took {total.flops:.3g} FLOPs and {_hours(total.seconds)}"
    lacking = f" ({total.unknown} attempts left no record of their cost)" if total.unknown else ""
    if not 0 < largest < math.inf:
        return f"{spent}{lacking}."
    one, many = (_times(share) for share in (total.share_of(largest), total.share_of_tuning(largest)))
    return f"{spent}{lacking}: {one} one run at the largest size, and {many} as many runs there."


def cost_parts(ledger: Ledger, runs: Sequence[Run]) -> list[str]:
    """Return the section of a report's page, as HTML; empty for no entries.

    Examples:
        >>> cost_parts(Ledger(()), [])
        []
    """
    if not ledger.entries:
        return []
    broken = [f"left out, because a killed process cut it off: {line}" for line in ledger.broken]
    return [
        "<h2>What all of it cost, as booked</h2>",
        *paragraphs([said_of_cost(ledger, runs)]),
        table(_HEADER, _rows(ledger)),
        *(listing(broken) if broken else []),
    ]


def _rows(ledger: Ledger) -> Iterable[list[str]]:
    for sweep, method in dict.fromkeys((entry.sweep, entry.method) for entry in ledger.entries):
        mine = replace(ledger, entries=tuple(e for e in ledger.entries if (e.sweep, e.method) == (sweep, method)))
        total = mine.total()
        counts = (total.runs, total.finished, total.diverged, total.failed)
        spent = (f"{total.flops:.3g}", f"{total.seconds / _HOUR:.2f}", str(total.unknown))
        yield [sweep, method or "-", *map(str, counts), *spent]


def _is_in(file: Path, entry: Entry, folders: Iterable[Path]) -> bool:
    run = (file.parent / entry.folder).resolve()
    return any(run.is_relative_to(folder) for folder in folders)


def _times(share: float) -> str:
    return f"{100 * share:.3g}% of" if share < 1 else f"{share:.3g} times"


def _hours(seconds: float) -> str:
    return f"{seconds / _HOUR:.2f} hours" if seconds >= _HOUR / 10 else f"{seconds:.0f} seconds"
