"""Step time, state and traffic of optimizers divided over ranks, against the same ones with every rank doing all.

Ranks are processes of this machine (gloo, one thread each). Each figure is that of the rank that has most. Processor
time counts what a rank computes, packs and unpacks, but not its waiting, so that neither a machine's other work nor
more ranks than cores count; time on the clock has both in it, and says something only on an idle machine with a core
for each rank.

Usage, from the repository's root: ``python -m recipes.benchmarks.distributed``. See the README in this folder.
"""

from __future__ import annotations

import argparse
import io
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
from torch import Tensor, nn
from torch.distributed import all_gather_object, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import lightning_mup as mup
from lightning_mup.core.ownership import Ownership, deferred_state
from lightning_mup.core.sharding import ShardedOwnership

Row = dict[str, Any]
METHODS: dict[str, tuple[type[mup.StackedOptimizer], dict[str, Any]]] = {
    "adam": (mup.Adam, {}),
    "muon": (mup.Muon, {}),
    "shampoo": (mup.Shampoo, {"precondition_every": 10}),
    "soap": (mup.SOAP, {"precondition_every": 10, "warmup_steps": 1}),
}
SKIPPED = 1  # the first step warms up
REPLICAS = 2  # of HSDP
WIDE = 150  # columns of the table in text
HERE = Path(__file__).parent / "results"


def strategies(ranks: int) -> list[str]:
    """Return the strategies that differ on a number of ranks; the first one divides nothing.

    Examples:
        >>> strategies(1), strategies(4)
        (['ddp', 'mup_fsdp'], ['ddp', 'mup_ddp', 'mup_fsdp', 'mup_fsdp 2 x 2'])
    """
    hybrid = [f"mup_fsdp {REPLICAS} x {ranks // REPLICAS}"] * (ranks > REPLICAS and ranks % REPLICAS == 0)
    return ["ddp", *["mup_ddp"] * (ranks > 1), "mup_fsdp", *hybrid]


def shards_of(strategy: str, ranks: int) -> int:
    """Return over how many ranks a strategy shards the weights.

    Examples:
        >>> [shards_of(strategy, 4) for strategy in strategies(4)]
        [1, 1, 4, 2]
    """
    return 1 if "fsdp" not in strategy else ranks // REPLICAS if " x " in strategy else ranks


def predicted_bytes(strategy: str, method: str, size: int, ranks: int) -> float:
    """Return what a rank receives per step because the optimizer is divided, by the formulas of core.

    ``mup_ddp``: P (R - 1) / R. ``mup_fsdp``, S shards: P / R x (S - 1) / S of gradients and P / S x (R - 1) / R of
    updates, and nothing under elementwise methods.

    Args:
        strategy: one of :func:`strategies`.
        method: one of METHODS.
        size: P, bytes of all matrices.
        ranks: R.

    Examples:
        >>> [predicted_bytes(strategy, "muon", 1024, 4) for strategy in strategies(4)]
        [0.0, 768.0, 384.0, 512.0]
    """
    shards, others = shards_of(strategy, ranks), (ranks - 1) / ranks
    if strategy == "ddp" or (shards > 1 and method == "adam"):
        return 0.0
    return size * others if shards == 1 else size / ranks * (shards - 1) / shards + size / shards * others


def measured(method: str, strategy: str, ranks: int, settings: argparse.Namespace) -> Row:
    """Return seconds per step, bytes of state, and traffic of this rank."""
    torch.manual_seed(0)
    width, kind, options = settings.width, *METHODS[method]
    values = [torch.randn(width, width) / width**0.5 for _ in range(settings.count)]
    params = [nn.Parameter(placed(x, strategy, ranks)) for x in values]
    with deferred_state():
        optimizer = kind(params, lr=1e-3, **options)
    ownership = None if strategy == "ddp" else ShardedOwnership() if "fsdp" in strategy else Ownership()
    if ownership is not None:
        optimizer.divide(ownership)
    for p in params:
        p.grad = placed(torch.randn(width, width), strategy, ranks)
    processor, clock = [], []
    for _ in range(settings.steps + SKIPPED):
        starts = time.process_time(), time.perf_counter()
        optimizer.step()
        processor.append(time.process_time() - starts[0])
        clock.append(time.perf_counter() - starts[1])
    traffic = None if ownership is None else ownership.traffic
    return {
        "processor seconds": statistics.mean(processor[SKIPPED:]),  # roots are renewed at some steps only
        "clock seconds": statistics.mean(clock[SKIPPED:]),
        "state bytes": sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k != "step"),
        "received bytes": 0 if traffic is None else traffic.bytes / traffic.steps,
        "exchange seconds": 0 if traffic is None else traffic.seconds / traffic.steps,
    }


def placed(x: Tensor, strategy: str, ranks: int) -> Tensor:
    """Return a tensor, of which every rank has the whole, as it lies under a strategy."""
    if "fsdp" not in strategy:
        return x
    shards = shards_of(strategy, ranks)
    sizes: tuple[int, ...] = (ranks,) if shards == ranks else (ranks // shards, shards)
    placements: list[Placement] = [*[Replicate()] * (len(sizes) - 1), Shard(0)]
    return distribute_tensor(x, init_device_mesh("cpu", sizes), placements, src_data_rank=None)


def most(found: Row, ranks: int) -> Row:
    """Return the largest of each number over ranks."""
    rows: list[Row] = [{} for _ in range(ranks)]
    all_gather_object(rows, found)
    return {key: max(row[key] for row in rows) for key in found}


def run(rank: int, ranks: int, port: int, settings: argparse.Namespace, results: Any) -> None:  # noqa: ANN401 - a queue
    """Measure on one rank; the first one hands on the result."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    init_process_group("gloo")
    rows: list[Row] = []
    for method in settings.methods:
        for strategy in strategies(ranks):
            predicted = predicted_bytes(strategy, method, 4 * settings.count * settings.width**2, ranks)
            found = most(measured(method, strategy, ranks, settings), ranks)
            rows.append({"ranks": ranks, "method": method, "strategy": strategy, **found, "predicted bytes": predicted})
    if rank == 0:
        results.put(rows)
    destroy_process_group()


def table(record: Row) -> Table:
    """Return the result as a table."""
    made = Table(title=f"{record['count']} matrices of {record['width']} x {record['width']}, {record['cores']} cores")
    columns = ["ranks", "processor ms", "of ddp's", "clock ms", "state MB", "of ddp's"]
    for column in ("method", "strategy", *columns, "received MB", "predicted", "exchange ms"):
        made.add_column(column, justify="left" if column in ("method", "strategy") else "right")
    for method in record["methods"]:
        made.add_section()
        for row in (row for row in record["rows"] if row["method"] == method):
            alike = [r for r in record["rows"] if (r["ranks"], r["method"]) == (row["ranks"], method)]
            processor, state = (row[key] / alike[0][key] for key in ("processor seconds", "state bytes"))
            times = [f"{1e3 * row[key]:.1f}" for key in ("processor seconds", "clock seconds", "exchange seconds")]
            sizes = [f"{row[key] / 1e6:.2f}" for key in ("state bytes", "received bytes", "predicted bytes")]
            cells = [times[0], f"{processor:.2f}", times[1], sizes[0], f"{state:.3g}", *sizes[1:], times[2]]
            made.add_row(method, row["strategy"], str(row["ranks"]), *cells)
    return made


def text(record: Row) -> str:
    """Return the table as plain text."""
    shown = io.StringIO()
    Console(file=shown, width=WIDE, color_system=None).print(table(record))
    return shown.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--count", type=int, default=12, help="number of matrices")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=HERE, help="folder of distributed.json and distributed.txt")
    settings = parser.parse_args(arguments)
    results = mp.get_context("fork").SimpleQueue()
    rows: list[Row] = []
    for ranks in settings.ranks:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        mp.start_processes(run, (ranks, port, settings, results), nprocs=ranks, start_method="fork")
        rows += results.get()
    facts = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    record = {**{key: value for key, value in vars(settings).items() if key != "out"}, **facts, "rows": rows}
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "distributed.json").write_text(json.dumps(record, indent=1) + "\n")
    (settings.out / "distributed.txt").write_text(text(record))
    print(text(record), end="")


if __name__ == "__main__":
    main()
