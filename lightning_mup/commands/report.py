"""Report from runs whether what was tuned at the base is best at other sizes, and what compute methods save."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from lightning_mup.analysis.costs import booked, said_of_cost
from lightning_mup.analysis.groups import Axis, Tuned
from lightning_mup.analysis.report import write_report
from lightning_mup.analysis.runs import Metric, read_runs
from lightning_mup.analysis.savings import Cost

EXAMPLE = "example: lightning-mup report runs/sweep --out report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["runs"]).axis
        'width'
    """
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs or of sweeps, any depth")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="where to write")
    parser.add_argument("--axis", choices=get_args(Axis), default="width", help="which size varies")
    parser.add_argument("--tuned", choices=get_args(Tuned), default="lr", help="which hyperparameter was tuned")
    parser.add_argument("--baseline", metavar="METHOD", help="what others are compared with in compute (AdamW's runs)")
    parser.add_argument("--cost", choices=get_args(Cost), default="flops", help="what compute is counted in")
    parser.add_argument("--loss", choices=get_args(Metric), default="val_loss", help="what runs are compared by")


def run(args: argparse.Namespace) -> int:
    """Write the report, print its table and what it left out; return 0.

    Raises:
        ValueError: runs cannot be read or compared.
    """
    runs = read_runs(*args.runs)
    settings = {"axis": args.axis, "tuned": args.tuned, "metric": args.loss}
    ledger = booked(*args.runs)
    report, written = write_report(runs, args.out, **settings, baseline=args.baseline, cost=args.cost, ledger=ledger)
    print(report.table())
    if told := said_of_cost(ledger, runs):
        print(f"\nin the ledger: {told}")
    if count := sum(run.status == "unfinished" for run in runs):
        print(f"\n{count} unfinished {'run was' if count == 1 else 'runs were'} left out; report.html names them")
    for note in report.notes:
        print(f"note: {note}")
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0
