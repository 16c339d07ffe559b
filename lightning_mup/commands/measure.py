"""Measure the scaling rule of an optimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lightning_mup.commands.words import add_pairs
from lightning_mup.core.measure import Measurement, measure_update_norm
from lightning_mup.core.method import Method, all_methods
from lightning_mup.core.named import build_optimizer, keywords, load
from lightning_mup.core.plan import aligned

EXAMPLE = "example: lightning-mup measure my_project.optim:Lion --set betas=(0.9,0.99)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["torch.optim:NAdam"]).target
        'torch.optim:NAdam'
    """
    parser.add_argument(
        "target", metavar="MODULE:OPTIMIZER", help="an optimizer class, or a function of the parameters"
    )
    add_pairs(parser, "--set", "NAME=VALUE", "further arguments of the optimizer")


def run(args: argparse.Namespace) -> int:
    """Print how large the optimizer's updates are; return 0, or 1 where that is not what was declared.

    Raises:
        ValueError: the optimizer cannot be built or measured.
    """
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


def _without_decay(optimizer: Callable[..., object]) -> dict[str, object]:
    """Return a learning rate, and weight decay off, as far as the optimizer takes them."""
    known = keywords(optimizer) or ()
    return {key: value for key, value in {"lr": 0.01, "weight_decay": 0.0}.items() if key in known}


def _agrees(declared: Method, found: Measurement) -> bool:
    same = not isinstance(declared.update_norm, type(found.power)) or declared.update_norm == found.power
    return same and declared.weight_degree == found.weight_degree
