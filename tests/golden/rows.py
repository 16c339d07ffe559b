"""Rows of learning-rate multipliers: what ``multipliers`` gives, or refuses, for each."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lightning_mup import all_methods, multipliers
from tests.golden.dialect import LIMIT, ONE, SETTINGS, Record, UnknownError, known, translate

ROW_TOLERANCE = 1e-12  # the file gives none; its numbers are float64, of a handful of operations
ROW_SETTINGS = ("block_size", "max_precond_dim", "exponent", "grafting", "rms_align")
COLUMNS = {
    *ROW_SETTINGS,
    *("optimizer", "role", "base_shape", "shape", "depth", "base_depth", "width_scaling", "spectral_normalization"),
    *("depth_scaling_of_learning_rate", "depth_ratio", "normalized_blocks_in", "normalized_blocks_out", "rejected"),
    *("learning_rate", "learning_rate_multiplier", "multiplier_without_role_factor"),
}
EQUAL, REFUSED, ACCEPTED, FAILED = "equal", "refused", "accepted on purpose", "failed"


class RowOutcome(NamedTuple):
    """How one row compares: equal, refused by ours as well, accepted on purpose, or failed."""

    optimizer: str
    verdict: str
    error: float = 0.0
    note: str = ""


def row_question(row: Record) -> Record:
    """Return the arguments of ``multipliers`` for a row; an optimizer without blocks or limit is not told of them."""
    names = known(SETTINGS, row["optimizer"], "optimizer")
    recorded = {key: row[key] for key in ROW_SETTINGS if row.get(key) is not None and key in names}
    fan_in, fan_out = zip(row["shape"], row["base_shape"], strict=True)
    in_a_branch = row["role"] == "hidden" and row["depth_scaling_of_learning_rate"]
    return {
        "method": row["optimizer"],
        "fan_in": fan_in,
        "fan_out": fan_out,
        "depth": (row["depth"], row["base_depth"]) if in_a_branch else ONE,
        "role": row["role"],
        "rules": "mup" if row["width_scaling"] else "sp",
        "spectral_norm": row["spectral_normalization"],
        **translate(row["optimizer"], recorded),
    }


def replay_row(row: Record, table: Record) -> RowOutcome:
    """Compare one row's three numbers, or see whether ours refuses it, too."""
    name, factor = row["optimizer"], table.get(f"{row['role']}_learning_rate_factor", 1.0)
    try:
        found = multipliers(**row_question(row))["lr"]
    except UnknownError as problem:
        return RowOutcome(name, FAILED, math.nan, str(problem))
    except ValueError as problem:
        clear = row["rejected"] and LIMIT in str(problem)
        return RowOutcome(name, REFUSED) if clear else RowOutcome(name, FAILED, math.nan, str(problem))
    if row["rejected"]:  # by a limit on the sides of preconditioners, which most optimizers do not have
        has_limit = LIMIT in all_methods()[name].defaults
        return RowOutcome(name, FAILED, math.nan, "not refused") if has_limit else RowOutcome(name, ACCEPTED)
    pairs = (
        (found, row["multiplier_without_role_factor"]),
        (found * factor, row["learning_rate_multiplier"]),
        (found * factor * table["base_learning_rate"], row["learning_rate"]),
    )
    errors = [abs(got - wanted) / abs(wanted) for got, wanted in pairs]
    return RowOutcome(name, EQUAL if all(e <= ROW_TOLERANCE for e in errors) else FAILED, max(errors))


def replay_rows(folder: Path) -> list[RowOutcome]:
    """Return one outcome for each row."""
    table = json.loads((folder / "learning_rate_multipliers.json").read_text())
    if unknown := set(table["columns"]) - COLUMNS:
        return [RowOutcome("-", FAILED, math.nan, f"unknown columns {sorted(unknown)}")] * len(table["rows"])
    return [replay_row(dict(zip(table["columns"], row, strict=True)), table) for row in table["rows"]]


def show_rows(outcomes: list[RowOutcome]) -> None:
    """Print one line for each optimizer, and one for each row that failed."""
    verdicts = (EQUAL, REFUSED, ACCEPTED, FAILED)
    print(f"\n{'rows of':<12}" + "".join(f"{v:>21}" for v in verdicts) + f"{'worst error':>13}{'tolerance':>11}")
    for name in dict.fromkeys(o.optimizer for o in outcomes):
        own = [o for o in outcomes if o.optimizer == name]
        count = Counter(o.verdict for o in own)
        counts = "".join(f"{count[v]:>21}" for v in verdicts)
        print(f"{name:<12}{counts}{max(o.error for o in own):>13.1e}{ROW_TOLERANCE:>11.1e}")
    for number, o in enumerate(outcomes):
        if o.verdict == FAILED:
            print(f"FAILED row {number} ({o.optimizer}): error {o.error:.1e} {o.note}")
    print("accepted on purpose: refused there for a limit on preconditioned sides, which these optimizers do not have")
