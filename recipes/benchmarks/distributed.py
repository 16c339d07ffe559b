"""Step time, state and traffic of optimizers divided over ranks, against the same ones with every rank doing all.

Ranks are processes of this machine (gloo, one thread each). Time is each rank's own processor time, so that a machine's
other work does not count, and a step's is that of the busiest rank; an exchange's is on the clock.

Usage, from the repository's root: ``python -m recipes.benchmarks.distributed --ranks 2``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed import all_gather_object, destroy_process_group, init_process_group

import lightning_mup as mup
from lightning_mup.core.ownership import Ownership

Row = dict[str, Any]
METHODS: dict[str, tuple[type[mup.StackedOptimizer], dict[str, Any]]] = {
    "adam": (mup.Adam, {}),
    "muon": (mup.Muon, {}),
    "shampoo": (mup.Shampoo, {"precondition_every": 10}),
    "soap": (mup.SOAP, {"precondition_every": 10, "warmup_steps": 1}),
}
SKIPPED = 1  # the first step warms up


def measured(method: str, width: int, count: int, *, steps: int, divide: bool) -> Row:
    """Return seconds per step, bytes of state, and traffic of this rank."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(count)]
    kind, settings = METHODS[method]
    optimizer = kind(params, lr=1e-3, **settings)
    ownership = Ownership() if divide else None
    if ownership is not None:
        optimizer.divide(ownership)
    for p in params:
        p.grad = torch.randn_like(p)
    times: list[float] = []
    for _ in range(steps + SKIPPED):
        start = time.process_time()
        optimizer.step()
        times.append(time.process_time() - start)
    traffic = None if ownership is None else ownership.traffic
    return {
        "seconds": statistics.mean(times[SKIPPED:]),  # roots are renewed at some steps only
        "state bytes": sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k != "step"),
        "received bytes": 0 if traffic is None else traffic.bytes / traffic.steps,
        "exchange seconds": 0 if traffic is None else traffic.seconds / traffic.steps,
    }


def busiest(found: Row, ranks: int) -> Row:
    """Return the largest of each number over ranks."""
    rows: list[Row] = [{} for _ in range(ranks)]
    all_gather_object(rows, found)
    return {key: max(row[key] for row in rows) for key in found}


def run(rank: int, port: int, settings: argparse.Namespace, file: str) -> None:
    """Measure on one rank; the first one writes the result."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(settings.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    init_process_group("gloo")
    result: dict[str, Row] = {}
    for method in settings.methods:
        for how in ("replicated", "divided"):
            found = measured(method, settings.width, settings.count, steps=settings.steps, divide=how == "divided")
            result.setdefault(method, {})[how] = busiest(found, settings.ranks)
    if rank == 0:
        Path(file).write_text(json.dumps({**vars(settings), "output": None, "result": result}, indent=1) + "\n")
    destroy_process_group()


def table(found: Row) -> Table:
    """Return the result as a table, with the traffic that is predicted: P (R - 1) / R."""
    made = Table(title=f"{found['count']} matrices of {found['width']} x {found['width']}, {found['ranks']} ranks")
    for column in ("method", "ms replicated", "ms divided", "state MB", "divided", "MB received", "predicted", "ms"):
        made.add_column(column, justify="left" if column == "method" else "right")
    predicted = 4 * found["count"] * found["width"] ** 2 * (found["ranks"] - 1) / found["ranks"]
    for method, both in found["result"].items():
        one, divided = both["replicated"], both["divided"]
        values = [1e3 * one["seconds"], 1e3 * divided["seconds"]]
        values += [one["state bytes"] / 1e6, divided["state bytes"] / 1e6]
        values += [divided["received bytes"] / 1e6, predicted / 1e6, 1e3 * divided["exchange seconds"]]
        made.add_row(method, *(f"{value:.1f}" for value in values))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--count", type=int, default=12, help="number of matrices")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", default="distributed.json", help="file that the result is written into")
    settings = parser.parse_args(arguments)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    mp.start_processes(run, (port, settings, settings.output), nprocs=settings.ranks, start_method="fork")
    Console().print(table(json.loads(Path(settings.output).read_text())))


if __name__ == "__main__":
    main()
