"""Train at several sizes, compare how layers move."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningModule

from lightning_mup.analysis.coordinate import CoordinateReport
from lightning_mup.analysis.plots import plot_coordinates
from lightning_mup.callbacks.coordinate_check import Sweep, coordinate_check
from lightning_mup.commands.words import add_model, choices, write_csv
from lightning_mup.core.named import build_module, load

EXAMPLE = "example: lightning-mup check my_project.model:LitGPT --widths 64,128,256 --lr 0.01 --out check.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["my.model:GPT", "--widths", "64,128"]).widths
        (64, 128)
    """
    add_model(parser)
    parser.add_argument("--widths", type=_integers, metavar="N,N,...", help="64,128,256,512 if no sizes are given")
    parser.add_argument("--depths", type=_integers, metavar="N,N,...", help="vary the depth")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at the smallest size")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--seeds", type=_integers, default=(0, 1, 2), metavar="N,N,...")
    parser.add_argument("--against", default="sp", metavar="RULES", help="rules to compare with, or none")
    parser.add_argument("--out", type=Path, metavar="CHECK.png", help="where to draw")
    parser.add_argument("--csv", type=Path, metavar="OUT.csv", help="where to write the slopes")


def run(args: argparse.Namespace) -> int:
    """Train, print the verdicts and tables; return 0, or 1 where the rules failed.

    Raises:
        ValueError: the model cannot be built or read, or a picture cannot be drawn.
    """
    if args.out and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--out {args.out} needs matplotlib; install lightning_mup[plots], or leave --out away")
    factory, fixed = load(args.target), dict(args.set)
    reports: dict[str, CoordinateReport] = {}
    passed = True
    for axis, sizes in _sweeps(args).items():
        with torch.device("meta"):
            build_module(factory, args.target, {**fixed, axis: min(sizes)})  # fails early, and in plain words
        for rules in [args.rules] + [[args.against]] * (args.against != "none"):
            label = f"{' x '.join(rules)}, {axis}"
            reports[label] = _coordinates(functools.partial(factory, **fixed), axis, sizes, rules, args)
            passed &= reports[label].passed or rules is not args.rules
            print(f"{label}: {reports[label].table()}\n")
    _save(reports, args)
    return 0 if passed else 1


def _sweeps(args: argparse.Namespace) -> dict[str, Sequence[int]]:
    given = {axis: sizes for axis, sizes in (("width", args.widths), ("depth", args.depths)) if sizes}
    return given or {"width": (64, 128, 256, 512)}


def _coordinates(
    factory: Callable[..., object], axis: str, sizes: Sequence[int], rules: Sequence[str], args: argparse.Namespace
) -> CoordinateReport:
    return coordinate_check(
        cast(Callable[..., LightningModule], factory),
        widths=sizes if axis == "width" else None,
        depths=sizes if axis == "depth" else None,
        rules=rules,
        method=args.method,
        lr=args.lr,
        steps=args.steps,
        sweep=Sweep(seeds=args.seeds, choices=choices(args)),
    )


def _save(reports: Mapping[str, CoordinateReport], args: argparse.Namespace) -> None:
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            write_csv([{"rules": label, **row} for label, report in reports.items() for row in report.rows()], file)
    if args.out:
        plot_coordinates(reports, args.out)
        print(f"drawn in {args.out}")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write 64,128,256") from error
