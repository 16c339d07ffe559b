"""Words that several commands take."""

from __future__ import annotations

import argparse
import ast


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
