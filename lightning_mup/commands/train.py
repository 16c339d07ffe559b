"""Train as configured; Hydra's words, such as method=muon model.net.width=256, and its options."""

from __future__ import annotations

import argparse
import sys

from lightning_mup import train

EXAMPLE = "example: lightning-mup train method=muon model.net.width=128; options: lightning-mup train --hydra-help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes: Hydra reads them all.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["method=muon", "--multirun"]).words
        ['method=muon', '--multirun']
    """
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="KEY=VALUE", help="overrides of conf/train.yaml")


def run(args: argparse.Namespace) -> int:
    """Train; return 0."""
    hydra_main(args.words)
    return 0


def hydra_main(words: list[str]) -> None:
    """Call the Hydra program as ``python -m lightning_mup.train`` would, with the given words."""
    sys.argv = [str(train.__file__), *words]
    train.main()
