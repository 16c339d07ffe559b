"""Train as configured; Hydra's words, such as method=muon model.net.width=256, and its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_mup import train
from lightning_mup.compose_errors import run_plainly

EXAMPLE = (
    "examples: lightning-mup train method=muon model.net.width=128; lightning-mup train @report/recommended.yaml "
    "model.net.width=1024; lightning-mup train --hydra-help"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes: Hydra reads them all.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["method=muon", "--multirun"]).words
        ['method=muon', '--multirun']
    """
    what = "overrides of conf/train.yaml, or @FILE for a report's recommended.yaml"
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="KEY=VALUE", help=what)


def run(args: argparse.Namespace) -> int:
    """Train; return 0, or 2 where the words do not compose or jobs of a sweep failed.

    Raises:
        ValueError: a file that is named holds no recommendation, or the run does not fit together.
    """
    return hydra_main(expanded(args.words))


def expanded(words: Sequence[str]) -> list[str]:
    """Return words with each ``@FILE`` replaced by what that recommends."""
    return [part for word in words for part in (_recommended(word[1:]) if word.startswith("@") else [word])]


def hydra_main(words: Sequence[str]) -> int:
    """Call the Hydra program as ``python -m lightning_mup.train`` would, and return its exit code."""
    return run_plainly(train.main, words, name="lightning-mup train", script=str(train.__file__))


def _recommended(path: str) -> list[str]:
    try:
        found = train.recommendation(Path(path))
        decay = (
            ["weight_decay=width", f"weight_decay.weight_decay={found['weight_decay']}"]
            if found["weight_decay"]
            else []
        )
        names = ",".join(str(found["rules"]).partition(", ")[0].split(" x "))
        return [f"method={found['method']}", f"method.lr={found['lr']}", f"rules.names=[{names}]", *decay]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{path} holds no recommendation ({type(error).__name__}: {error}); lightning-mup report writes one"
        ) from error
