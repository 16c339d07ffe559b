"""Step time and state of this package's optimizers beside torch's and others', in one interleaved run.

Usage, from the repository's root: ``python -m recipes.benchmarks.optimizers``. See the README in this folder.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from recipes.benchmarks import report
from recipes.benchmarks.rows import DISTRIBUTIONS, MODELS, ROWS, Row
from recipes.benchmarks.timing import Task

ROOT = Path(__file__).parents[2]
# glibc gives memory back and takes fresh pages by rules that depend on what a process did before, which makes the same
# step of the control take 2 or 4 ms. With these, memory that was taken once is kept, as on accelerators.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
LeftOut = dict[str, dict[str, str]]  # width -> label -> why there are no figures


def chosen(patterns: Sequence[str]) -> list[Row]:
    """Return the rows whose label matches any of the patterns, in which ``*`` stands for anything.

    Raises:
        ValueError: a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(ROWS, pattern):
            raise ValueError(f"no row matches {pattern!r}; there are: {', '.join(ROWS)}")
    return [row for label, row in ROWS.items() if any(fnmatch.fnmatchcase(label, p) for p in patterns)]


def run_task(task: Task) -> Iterator[dict[str, Any]]:
    """Time one row in a process of its own, and return its samples as they come; a failure is the last of them."""
    environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": str(task.threads), "PYTHONWARNINGS": "ignore"}
    call = [sys.executable, "-m", "recipes.benchmarks.timing", task.dumps()]
    done = 0
    with subprocess.Popen(  # noqa: S603 - this very interpreter
        call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("{"):
                done += 1
                yield json.loads(line)
        said = process.stderr.read().strip().splitlines()
    for width in task.widths[done:]:
        yield {"label": task.label, "width": width, "left_out": f"failed: {said[-1] if said else 'no message'}"}


def run(rows: Sequence[Row], like: Task, rounds: int) -> tuple[list[dict[str, Any]], LeftOut]:
    """Take ``rounds`` samples of every row, one row after the other in each round.

    Returns:
        The samples, and what was left out.
    """
    samples: list[dict[str, Any]] = []
    left_out: LeftOut = {
        str(width): {row.label: f"not installed: pip install {row.missing}" for row in rows if row.missing}
        for width in like.widths
    }
    present = [row for row in rows if not row.missing]
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("timing", total=rounds * len(present) * len(like.widths))
        for _ in range(rounds):
            for row in present:
                progress.update(bar, description=row.label)
                widths = tuple(width for width in like.widths if row.label not in left_out[str(width)])
                progress.advance(bar, len(like.widths) - len(widths))
                for found in run_task(replace(like, label=row.label, widths=widths)) if widths else ():
                    if "left_out" in found:
                        left_out[str(found["width"])][row.label] = str(found["left_out"])
                    else:
                        samples.append(found)
                    progress.advance(bar)
    return samples, left_out


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    versions = {}
    for distribution in DISTRIBUTIONS.values():
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = "not installed"
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(record: Mapping[str, Any], out: Path) -> None:
    """Show the tables, and leave them, the picture and all samples in a folder."""
    settings, samples = record["settings"], record["samples"]
    figures = report.summarize(samples, settings["tolerance"])
    shown = report.tables(figures, settings["widths"], record["left_out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "optimizers.json").write_text(json.dumps(record, indent=1) + "\n")
    report.write_text(out / "optimizers.txt", shown)
    if figures:
        report.draw(figures, out / "optimizers.png")
    Console(width=None if sys.stdout.isatty() else 190).print(shown)
    # Where every sample was disturbed all of them are kept, hence the two numbers.
    dropped = sum(found.dropped for found in figures.values())
    doubtful = sum(found.disturbed for found in figures.values())
    print(f"{len(samples)} samples, {dropped} dropped as disturbed; {doubtful} figures had no undisturbed sample (*).")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, and time, or show again what was timed before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--model", choices=MODELS, default="squares", help="shapes of the parameters")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="labels, e.g. '*SOAP*'")
    parser.add_argument("--samples", type=int, default=5, help="rounds through all rows, each in a new process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="shortest time of a sample's steps")
    parser.add_argument("--limit", type=float, default=120.0, help="leave rows out that would take more seconds")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="drop samples when matmul was slower by this share"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "recipes/benchmarks/results")
    parser.add_argument("--list", action="store_true", help="print the labels of all rows, and stop")
    parser.add_argument("--show", type=Path, metavar="JSON", help="make tables and picture of an earlier run's file")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(ROWS))
        return
    if given.show:
        write(json.loads(given.show.read_text()), given.out)
        return
    like = Task("", tuple(given.widths), given.model, given.threads, given.seconds, given.limit)
    samples, left_out = run(chosen(given.rows), like, given.samples)
    names = ("widths", "model", "samples", "threads", "seconds", "limit", "tolerance")
    settings = {name: getattr(given, name) for name in names}
    write({"settings": settings, "machine": machine(), "left_out": left_out, "samples": samples}, given.out)


if __name__ == "__main__":
    main()
