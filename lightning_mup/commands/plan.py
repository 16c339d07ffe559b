"""Print what would be done to every parameter."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import torch

from lightning_mup import train
from lightning_mup.commands.words import add_model, add_pairs, choices, configured, write_csv
from lightning_mup.core.named import build_module, load
from lightning_mup.core.plan import Plan, Row
from lightning_mup.core.scaling import plan

EXAMPLE = (
    "examples: lightning-mup plan my_project.model:LitGPT --base width=128 --set width=1024 depth=12; "
    "lightning-mup plan experiment=llama_1.4b method=muon"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["experiment=llama_1.4b", "method=muon"]).words
        ['method=muon']
    """
    add_model(parser)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="or, all as of lightning-mup train, a run's plan")
    add_pairs(parser, "--base", "NAME=VALUE", "arguments in which the base (proxy) model differs")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the whole plan as json")
    output.add_argument("--csv", action="store_true", help="print the whole plan as csv")
    output.add_argument("--diff", type=Path, metavar="PLAN.json", help="print differences; exit code 1 if any")


def run(args: argparse.Namespace) -> int:
    """Print the plan, or how it differs; return 0, or 1 where it does.

    Raises:
        ValueError: the model or the base cannot be built or read.
    """
    made = train.plan_of(configured([args.target, *args.words])[0]) if "=" in args.target else _of_factory(args)
    if args.diff is not None:
        return _print_difference(made, args.diff)
    if args.json:
        print(made.to_json())
    elif args.csv:
        write_csv(made.rows(), sys.stdout)
    else:
        _print_table(made)
    return 0


def _of_factory(args: argparse.Namespace) -> Plan:
    if not args.base or args.words:
        raise ValueError(
            f"{args.target} needs --base NAME=VALUE, arguments of the base model, got {args.words or 'none'}"
        )
    settings, base = dict(args.set), dict(args.base)
    build = functools.partial(build_module, load(args.target), args.target)
    with torch.device("meta"):
        model = build(settings)
    proxy = functools.partial(build, {**settings, **base})
    return plan(model, proxy, rules=args.rules, method=args.method, choices=choices(args))


def _print_table(made: Plan) -> None:
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(made.table())
        return
    from rich.console import Console
    from rich.table import Table

    header, lines = made.summary()
    table = Table(*header, title=made.table().partition("\n")[0], box=None, header_style="bold")
    colours = {"input": "green", "hidden": "cyan", "output": "magenta"}
    for line in lines:
        table.add_row(*line, style=colours.get(line[0], ""))
    Console().print(table)


def _print_difference(made: Plan, path: Path) -> int:
    rules, rows = _saved(path)
    lines = made.diff(rows)
    if rules != made.rules:
        lines.insert(0, f"rules {made.rules} (other: {rules})")
    print("\n".join(lines) or f"the plan is the one in {path}")
    return 1 if lines else 0


def _saved(path: Path) -> tuple[str, list[Row]]:
    try:
        saved = json.loads(path.read_text())
        return str(saved["rules"]), [row for row in saved["params"] if row["name"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read a plan from {path} ({type(error).__name__}: {error}); write one with lightning-mup plan "
            f"... --json > {path}"
        ) from error
