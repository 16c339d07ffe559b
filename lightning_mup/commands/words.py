"""Words that several commands take."""

from __future__ import annotations

import argparse
import ast
import csv
import json
from collections.abc import Mapping, Sequence
from typing import TextIO

from hydra.errors import HydraException
from omegaconf import DictConfig

from lightning_mup.compose_errors import composed, explain
from lightning_mup.core.scaling import Choices
from lightning_mup.sweep import Sweep, from_words


def pair(text: str) -> tuple[str, object]:
    """Read ``NAME=VALUE``, with the value as a Python literal where it is one, else as a word.

    Raises:
        argparse.ArgumentTypeError: it is no such pair.

    Examples:
        >>> pair("width=128"), pair("mlp=gelu")
        (('width', 128), ('mlp', 'gelu'))
    """
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE; write width=128")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_pairs(parser: argparse.ArgumentParser, option: str, form: str, what: str, *, required: bool = False) -> None:
    """Add an option that takes pairs, all together or one by one.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_pairs(parser, "--set", "NAME=VALUE", "arguments")
        >>> parser.parse_args(["--set", "a=1", "b=2", "--set", "c=3"]).set
        [('a', 1), ('b', 2), ('c', 3)]
    """
    parser.add_argument(
        option, nargs="+", action="extend", type=pair, default=[], required=required, metavar=form, help=what
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the words that name a model, its rules and its method.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_model(parser)
        >>> parser.parse_args(["my.model:GPT", "--set", "width=64"]).set
        [('width', 64)]
    """
    parser.add_argument("target", metavar="MODULE:FACTORY", help="a module class, or a function that returns a module")
    add_pairs(parser, "--set", "NAME=VALUE", "arguments of the factory")
    parser.add_argument("--rules", nargs="+", default=["mup"], help="parametrization, or several to multiply")
    parser.add_argument("--method", default="adam", help="optimizer")
    add_pairs(parser, "--role", "PATTERN=ROLE", "roles of parameters that cannot be known")
    parser.add_argument("--branches", nargs="+", metavar="PATTERN", help="last matrices of the residual branches")


def choices(args: argparse.Namespace) -> Choices:
    """Return what the words of :func:`add_model` say beyond rules and method."""
    return Choices(roles=dict(args.role), branches=args.branches)


def configured(words: Sequence[str]) -> tuple[DictConfig, Sweep | None]:
    """Return the configuration that words of the command line compose to, and its sweep if it has a grid.

    Raises:
        ValueError: they do not compose; the message says what there is.

    Examples:
        >>> configured(["method=muonn"])
        Traceback (most recent call last):
        ValueError: unknown choice method=muonn; did you mean 'muon'? ...
    """
    try:
        return from_words(words)
    except HydraException as error:
        raise ValueError(explain(error, config=composed(words))) from error


def write_csv(rows: Sequence[Mapping[str, object]], file: TextIO) -> None:
    """Write rows with the first one's keys as the heading; lists and tuples as JSON.

    Examples:
        >>> import sys
        >>> write_csv([{"a": 1, "b": [1, 2]}], sys.stdout)
        a,b
        1,"[1, 2]"
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([[_cell(value) for value in row.values()] for row in rows])


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else value
