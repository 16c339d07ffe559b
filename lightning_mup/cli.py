"""The command line ``lightning-mup``: print a plan, check coordinates, measure an optimizer, list what there is.

Exit codes: 0 all is well, 1 a check failed or a plan differs, 2 the command could not be carried out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

import torch
from lightning.pytorch import LightningModule

from lightning_mup.analysis.coordinate import CoordinateReport
from lightning_mup.analysis.plots import plot_coordinates
from lightning_mup.callbacks.coordinate_check import Sweep, coordinate_check
from lightning_mup.commands import data as data_command
from lightning_mup.commands import report as report_command
from lightning_mup.commands import train as train_command
from lightning_mup.commands import transfer as transfer_command
from lightning_mup.commands.words import add_pairs
from lightning_mup.core.measure import Measurement, measure_update_norm
from lightning_mup.core.method import Method, all_methods
from lightning_mup.core.named import build_module, build_optimizer, keywords, load
from lightning_mup.core.plan import Plan, Row, aligned
from lightning_mup.core.rules import all_rules
from lightning_mup.core.scaling import Choices, plan

_PLAN_EXAMPLE = "example: lightning-mup plan my_project.model:LitGPT --base width=128 --set width=1024 depth=12"
_CHECK_EXAMPLE = "example: lightning-mup check my_project.model:LitGPT --widths 64,128,256 --lr 0.01 --out check.png"
_MODULES = {
    "train": train_command,
    "transfer": transfer_command,
    "report": report_command,
    "data": data_command,
}
_MEASURE_EXAMPLE = "example: lightning-mup measure my_project.optim:Lion --set betas=(0.9,0.99)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 well, 1 a check failed or plans differ, 2 it could not be done.

    Args:
        argv: the words after ``lightning-mup``; those of the process if not given.

    Raises:
        SystemExit: the words are not understood (code 2), or help was asked for (code 0).

    Examples:
        >>> main(["measure", "torch.optim:SGD"])
        optimizer      torch.optim.sgd.SGD
        update         fan_in^1/2 fan_out^-1/2 depth^-1
        learning rate  fan_in^-1 fan_out depth
        fitted         fan_in^0.500 fan_out^-0.500 depth^-1.000 weight^0.000, residual 0.000
        declared       sgd: fan_in^1/2 fan_out^-1/2 depth^-1, agrees
        0
    """
    parser = _parser()
    args, options = parser.parse_known_args(argv)
    if options and not hasattr(args, "words"):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if options:
        args.words = [*options, *args.words]  # Hydra's own, such as --multirun
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's own folder comes first, not the user's
    try:
        with _plain_warnings():
            return int(args.run(args))
    except ValueError as error:
        print(f"lightning-mup {args.command}: {error}", file=sys.stderr)
        return 2


# -- commands ---------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    settings, base = dict(args.set), dict(args.base)
    build = functools.partial(build_module, load(args.target), args.target)
    with torch.device("meta"):
        model = build(settings)
    proxy = functools.partial(build, {**settings, **base})
    made = plan(model, proxy, rules=args.rules, method=args.method, choices=_choices(args))
    if args.diff is not None:
        return _print_difference(made, args.diff)
    if args.json:
        print(made.to_json())
    elif args.csv:
        _write_csv(made.rows(), sys.stdout)
    else:
        _print_table(made)
    return 0


def _check(args: argparse.Namespace) -> int:
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


def _measure(args: argparse.Namespace) -> int:
    optimizer = load(args.target)
    declared = next((m for m in all_methods().values() if optimizer in m.optimizers), None)
    settings = {**_without_decay(optimizer), **dict(args.set)}
    found = measure_update_norm(
        lambda params: build_optimizer(optimizer, args.target, params, settings),
        own_factor=declared.own_factor if declared else None,
    )
    agrees = declared is None or _agrees(declared, found)
    rows = [
        ["optimizer", f"{found.optimizer.__module__}.{found.optimizer.__qualname__}"],
        ["update", str(found.power)],
        ["learning rate", str(found.lr_multiplier)],
        ["fitted", f"{found.exponents()}, residual {found.residual:.3f}"],
    ]
    if declared:
        verdict = "agrees" if agrees else "DIFFERS"
        rows.append(["declared", f"{declared.name}: {declared.update_norm}, {verdict}"])
    else:
        rows.append(["declare", found.declaration()])
    print("\n".join(aligned(rows)))
    return 0 if agrees else 1


def _list(args: argparse.Namespace) -> int:
    for title, known in (("rules", all_rules()), ("methods", all_methods())):
        print(title)
        print("\n".join(f"  {line}" for line in aligned([name, known[name].reference] for name in sorted(known))))
    return 0


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
        sweep=Sweep(seeds=args.seeds, choices=_choices(args)),
    )


def _save(reports: Mapping[str, CoordinateReport], args: argparse.Namespace) -> None:
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            _write_csv([{"rules": label, **row} for label, report in reports.items() for row in report.rows()], file)
    if args.out:
        plot_coordinates(reports, args.out)
        print(f"drawn in {args.out}")


def _choices(args: argparse.Namespace) -> Choices:
    return Choices(roles=dict(args.role), branches=args.branches)


def _without_decay(optimizer: Callable[..., object]) -> dict[str, object]:
    """Return a learning rate, and weight decay off, as far as the optimizer takes them."""
    known = keywords(optimizer) or ()
    return {key: value for key, value in {"lr": 0.01, "weight_decay": 0.0}.items() if key in known}


def _agrees(declared: Method, found: Measurement) -> bool:
    same = not isinstance(declared.update_norm, type(found.power)) or declared.update_norm == found.power
    return same and declared.weight_degree == found.weight_degree


# -- printing ---------------------------------------------------------------------------------------------------------


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


def _write_csv(rows: Sequence[Mapping[str, object]], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([[_cell(value) for value in row.values()] for row in rows])


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else value


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each warning as one line, without the source line that raised it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside libraries are not the user's business here
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    print(f"warning: {message}", file=sys.stderr)


# -- words ------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    what = "Carry hyperparameters from small to large models."
    parser = argparse.ArgumentParser(prog="lightning-mup", description=what)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(_command(commands, "plan", _plan, "print what would be done to every parameter", _PLAN_EXAMPLE))
    _add_check(_command(commands, "check", _check, "train at several sizes, compare how layers move", _CHECK_EXAMPLE))
    told = _command(commands, "measure", _measure, "measure the scaling rule of an optimizer", _MEASURE_EXAMPLE)
    told.add_argument("target", metavar="MODULE:OPTIMIZER", help="an optimizer class, or a function of the parameters")
    add_pairs(told, "--set", "NAME=VALUE", "further arguments of the optimizer")
    for name, module in _MODULES.items():
        what = str(module.__doc__).partition("\n")[0]
        module.add_arguments(
            _command(commands, name, module.run, what[0].lower() + what[1:].rstrip("."), module.EXAMPLE)
        )
    _command(commands, "list", _list, "list the known rules and methods", "example: lightning-mup list")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what, epilog=example)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODULE:FACTORY", help="a module class, or a function that returns a module")
    add_pairs(parser, "--set", "NAME=VALUE", "arguments of the factory")
    parser.add_argument("--rules", nargs="+", default=["mup"], help="parametrization, or several to multiply")
    parser.add_argument("--method", default="adam", help="optimizer")
    add_pairs(parser, "--role", "PATTERN=ROLE", "roles of parameters that cannot be known")
    parser.add_argument("--branches", nargs="+", metavar="PATTERN", help="last matrices of the residual branches")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add_pairs(parser, "--base", "NAME=VALUE", "arguments in which the base (proxy) model differs", required=True)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the whole plan as json")
    output.add_argument("--csv", action="store_true", help="print the whole plan as csv")
    output.add_argument("--diff", type=Path, metavar="PLAN.json", help="print differences; exit code 1 if any")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--widths", type=_integers, metavar="N,N,...", help="64,128,256,512 if no sizes are given")
    parser.add_argument("--depths", type=_integers, metavar="N,N,...", help="vary the depth")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at the smallest size")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--seeds", type=_integers, default=(0, 1, 2), metavar="N,N,...")
    parser.add_argument("--against", default="sp", metavar="RULES", help="rules to compare with, or none")
    parser.add_argument("--out", type=Path, metavar="CHECK.png", help="where to draw")
    parser.add_argument("--csv", type=Path, metavar="OUT.csv", help="where to write the slopes")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write 64,128,256") from error


if __name__ == "__main__":
    sys.exit(main())
