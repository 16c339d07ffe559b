"""Train at several sizes and rates, then report whether the best rate stands; Hydra's words name an experiment."""

from __future__ import annotations

import argparse

from lightning_mup import train
from lightning_mup.analysis.costs import booked, said_of_cost
from lightning_mup.analysis.report import write_report
from lightning_mup.analysis.runs import read_runs
from lightning_mup.commands.train import hydra_main
from lightning_mup.commands.words import configured

EXAMPLE = "example: lightning-mup transfer experiment=width_transfer launcher=joblib"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes: Hydra reads them all.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["experiment=width_transfer"]).words
        ['experiment=width_transfer']
    """
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="KEY=VALUE", help="overrides of conf/train.yaml")


def run(args: argparse.Namespace) -> int:
    """Run the sweep, or what is left of it, and write the report beside its runs; return 0, or 2 where jobs failed.

    Raises:
        ValueError: the words do not compose, name no sweep, or its runs cannot be compared.
    """
    config, sweep = configured(args.words)
    if sweep is None:
        raise ValueError(f"{args.words} name no sweep; give experiment=width_transfer, or sweep=width_lr rules=sp,mup")
    if code := hydra_main(args.words):
        return code
    folder, settings = sweep.folder / "report", config.report
    runs, ledger = read_runs(sweep.folder), booked(sweep.folder)
    report, written = write_report(runs, folder, axis=settings.axis, tuned=settings.tuned, ledger=ledger)
    print(f"\n{report.table()}\n\n{said_of_cost(ledger, runs)}\n\nwritten: {', '.join(map(str, written))}")
    train.log_report(config, report.rows(), folder)
    return 0
