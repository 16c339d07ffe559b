"""Train at several sizes and rates, then report whether the best rate stands; Hydra's words name an experiment."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_mup import train
from lightning_mup.analysis.report import write_report
from lightning_mup.analysis.runs import read_runs
from lightning_mup.commands.train import hydra_main

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
    """Run the sweep, or what is left of it, and write the report beside its runs; return 0.

    Raises:
        ValueError: the words name no sweep, or its runs cannot be compared.
    """
    config = train.composed(args.words)
    if config.hydra.mode is None:
        raise ValueError(f"{args.words} name no sweep; give experiment=width_transfer, or sweep=width_lr rules=sp,mup")
    hydra_main(args.words)
    folder = Path(config.hydra.sweep.dir)
    report, written = write_report(
        read_runs(folder), folder / "report", axis=config.report.axis, tuned=config.report.tuned
    )
    print(f"\n{report.table()}\n\nwritten: {', '.join(map(str, written))}")
    train.log_report(config, report.rows(), folder / "report")
    return 0
