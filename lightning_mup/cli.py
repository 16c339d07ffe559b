"""The command line ``lightning-mup``: print a plan, check how coordinates grow, measure an optimizer, list what there is.

Exit codes: 0 all is well, 1 a check failed or a plan differs, 2 the command could not be carried out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mup.analysis.coordinate import CoordinateReport
from lightning_mup.analysis.plots import plot_coordinates
from lightning_mup.callbacks.coordinate_check import coordinate_check
from lightning_mup.core.measure import Measurement, measure_update_norm
from lightning_mup.core.method import Method, all_methods
from lightning_mup.core.plan import Plan, Row, aligned
from lightning_mup.core.registry import near
from lightning_mup.core.rules import all_rules
from lightning_mup.core.scaling import Choices, plan

T = TypeVar("T")
Settings = dict[str, object]
Table = Sequence[Mapping[str, object]]

_PLAN_EXAMPLE = "example: lightning-mup plan my_project.model:LitGPT --base width=128 --set width=1024 depth=12 --rules mup"
_CHECK_EXAMPLE = "example: lightning-mup check my_project.model:LitGPT --widths 64,128,256,512 --lr 0.01 --out check.png"
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
    args = _parser().parse_args(argv)
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
    build = functools.partial(_module, _load(args.target), args.target)
    choices = Choices(roles=dict(args.role), branches=args.branches)
    with torch.device("meta"):
        model = build(settings)
    made = plan(model, lambda: build({**settings, **base}), rules=args.rules, method=args.method, choices=choices)
    if args.diff is not None:
        return _print_difference(made, args.diff)
    if args.json:
        print(made.to_json())
    elif args.csv:
        _write_csv(made.rows(), None)
    else:
        _print_table(made)
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.out and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--out {args.out} needs matplotlib; install lightning_mup[plots], or leave --out away")
    factory = functools.partial(_module_of, _load(args.target), args.target, dict(args.set))
    checked = [args.rules] + ([] if args.against == "none" else [[args.against]])
    reports = {}
    for rules in checked:
        label = " x ".join(rules)
        reports[label] = _coordinates(factory, rules, args)
        print(f"{label}: {reports[label].table()}\n")
    if args.csv:
        _write_csv([{"rules": label, **row} for label, report in reports.items() for row in report.rows()], args.csv)
    if args.out:
        plot_coordinates(reports, args.out)
        print(f"drawn in {args.out}")
    return 0 if next(iter(reports.values())).passed else 1


def _measure(args: argparse.Namespace) -> int:
    optimizer = _load(args.target)
    declared = next((m for m in all_methods().values() if optimizer in m.optimizers), None)
    settings = {**_quiet_settings(optimizer), **dict(args.set)}
    found = measure_update_norm(
        lambda params: _optimizer(optimizer, args.target, params, settings),
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


def _coordinates(
    factory: Callable[..., nn.Module], rules: Sequence[str], args: argparse.Namespace
) -> CoordinateReport:
    return coordinate_check(
        factory,
        widths=args.widths,
        depths=args.depths,
        rules=rules[0] if len(rules) == 1 else rules,
        method=args.method,
        lr=args.lr,
        steps=args.steps,
        seeds=args.seeds,
    )


def _agrees(declared: Method, found: Measurement) -> bool:
    same = not isinstance(declared.update_norm, type(found.power)) or declared.update_norm == found.power
    return same and declared.weight_degree == found.weight_degree


# -- what the user names ----------------------------------------------------------------------------------------------


def _load(target: str) -> Callable[..., object]:
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"{target!r} must be package.module:name, as in my_project.model:LitGPT")
    found: object = _import(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise ValueError(f"{module_name!r} has no {path!r}{near(part, public)}; name a class or function in it")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{target!r} must be a class or a function, got {found!r}")
    return found


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"importing {name!r} failed: {error}") from error
        beside = [info.name for info in pkgutil.iter_modules([os.getcwd()])]
        raise ValueError(
            f"no module {error.name!r} in {os.getcwd()} or in the environment{near(error.name, beside)}; run in the "
            f"folder that holds it, or install it"
        ) from error
    except Exception as error:  # the module is the user's, and may fail in any way
        raise ValueError(f"importing {name!r} failed with {type(error).__name__}: {error}") from error


def _called(function: Callable[..., T], target: str, positional: Sequence[object], settings: Settings) -> T:
    _check_keywords(function, target, settings)
    try:
        return function(*positional, **settings)
    except Exception as error:  # the factory is the user's, and may fail in any way
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise ValueError(f"{target} called with ({given}) failed with {type(error).__name__}: {error}") from error


def _check_keywords(function: Callable[..., object], target: str, settings: Settings) -> None:
    known = _keywords(function)
    unknown = [key for key in settings if known is not None and key not in known]
    if unknown:
        raise ValueError(
            f"{target} takes no {unknown[0]!r}; it takes {', '.join(known or ())}{near(unknown[0], known or ())}"
        )


def _keywords(function: Callable[..., object]) -> list[str] | None:
    """Return the keywords that a function takes; None where it takes any or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _module(factory: Callable[..., object], target: str, settings: Settings) -> nn.Module:
    made = _called(factory, target, (), settings)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{target} must make a torch module, got {made!r}")
    configure = getattr(made, "configure_model", None)
    if configure is not None and next(made.parameters(), None) is None:
        _called(configure, f"{target}.configure_model", (), {})
    return made


def _module_of(factory: Callable[..., object], target: str, fixed: Settings, **sizes: object) -> nn.Module:
    return _module(factory, target, {**fixed, **sizes})


def _optimizer(
    kind: Callable[..., object], target: str, params: Sequence[nn.Parameter], settings: Settings
) -> Optimizer:
    made = _called(kind, target, (list(params),), settings)
    if not isinstance(made, Optimizer):
        raise ValueError(f"{target} must make a torch optimizer, got {made!r}")
    return made


def _quiet_settings(optimizer: Callable[..., object]) -> Settings:
    """Return a learning rate, and weight decay off, as far as the optimizer takes them."""
    known = _keywords(optimizer) or ()
    return {key: value for key, value in {"lr": 0.01, "weight_decay": 0.0}.items() if key in known}


# -- printing ---------------------------------------------------------------------------------------------------------


def _print_table(made: Plan) -> None:
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(made.table())
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    header, lines = made.summary()
    table = RichTable(*header, title=made.table().partition("\n")[0], box=None, header_style="bold")
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


def _write_csv(rows: Table, path: Path | None) -> None:
    with open(path, "w", newline="") if path else _stdout() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([[_cell(value) for value in row.values()] for row in rows])


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else value


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each warning as one line, without the source line that raised it."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


# -- words ------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-mup", description="Carry hyperparameters from small to large models.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(_command(commands, "plan", _plan, "print what would be done to every parameter", _PLAN_EXAMPLE))
    _add_check(_command(commands, "check", _check, "train small and wide models, compare how layers move", _CHECK_EXAMPLE))
    told = _command(commands, "measure", _measure, "measure the scaling rule of an optimizer", _MEASURE_EXAMPLE)
    told.add_argument("target", metavar="MODULE:OPTIMIZER", help="an optimizer class, or a function of the parameters")
    _add_set(told, "further arguments of the optimizer")
    _command(commands, "list", _list, "list the known rules and methods", "example: lightning-mup list")
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--base", nargs="+", action="extend", type=_pair, required=True, metavar="NAME=VALUE",
        help="arguments in which the base (proxy) model differs",
    )  # fmt: skip
    parser.add_argument("--role", nargs="+", action="extend", type=_pair, default=[], metavar="PATTERN=ROLE")
    parser.add_argument("--branches", nargs="+", metavar="PATTERN", help="last matrices of the residual branches")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the whole plan as json")
    output.add_argument("--csv", action="store_true", help="print the whole plan as csv")
    output.add_argument("--diff", type=Path, metavar="PLAN.json", help="print differences; exit code 1 if any")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--widths", type=_integers, default=(64, 128, 256, 512), metavar="N,N,...")
    parser.add_argument("--depths", type=_integers, metavar="N,N,...", help="vary the depth, too")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at the base")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--seeds", type=_integers, default=(0, 1, 2), metavar="N,N,...")
    parser.add_argument("--against", default="sp", metavar="RULES", help="rules to compare with; none for none")
    parser.add_argument("--out", type=Path, metavar="CHECK.png", help="where to draw")
    parser.add_argument("--csv", type=Path, metavar="OUT.csv", help="where to write the slopes")
