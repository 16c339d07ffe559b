"""The command line ``lightning-mup``: print a plan, check coordinates, measure an optimizer, list what there is.

Exit codes: 0 all is well, 1 a check failed or a plan differs, 2 the command could not be carried out.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_mup.commands import (
    check,
    data,
    known,
    measure,
    plan,
    recommend,
    report,
    slurm,
    sweep_file,
    train,
    transfer,
)

_COMMANDS = {
    "train": train,
    "transfer": transfer,
    "report": report,
    "recommend": recommend,
    "slurm": slurm,
    "sweep-file": sweep_file,
    "plan": plan,
    "check": check,
    "measure": measure,
    "data": data,
    "list": known,
}


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


def _parser() -> argparse.ArgumentParser:
    what = "Carry hyperparameters from small to large models."
    parser = argparse.ArgumentParser(prog="lightning-mup", description=what)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        what = str(command.__doc__).partition("\n")[0].rstrip(".")
        one = commands.add_parser(name, help=what[0].lower() + what[1:], description=what, epilog=command.EXAMPLE)
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
