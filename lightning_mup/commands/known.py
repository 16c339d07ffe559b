"""List the known rules and methods."""

from __future__ import annotations

import argparse

from lightning_mup.core.method import all_methods
from lightning_mup.core.plan import aligned
from lightning_mup.core.rules import all_rules

EXAMPLE = "example: lightning-mup list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no words."""


def run(args: argparse.Namespace) -> int:
    """Print names and references; return 0."""
    for title, known in (("rules", all_rules()), ("methods", all_methods())):
        print(title)
        print("\n".join(f"  {line}" for line in aligned([name, known[name].reference] for name in sorted(known))))
    return 0
