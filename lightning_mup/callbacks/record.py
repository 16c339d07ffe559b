"""The plan on record: in the loggers, in the checkpoint, and compared with what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch import Trainer

from lightning_mup.core.plan import Plan, Row

_DIFFERENCES_SHOWN = 8
_FORWARD = ("name", "forward", "readout")  # what a model computes depends on these alone


@rank_zero_only
def log_plan(trainer: Trainer, plan: Plan) -> None:
    """Hand the plan to every logger: as a table where it takes one, as ``plan.json`` where the run has a folder.

    Examples:
        >>> import tempfile
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> folder = tempfile.mkdtemp()
        >>> trainer = Trainer(logger=CSVLogger(folder), max_steps=1, accelerator="cpu")
        >>> log_plan(trainer, Plan((), "mup"))
        >>> json.loads((Path(trainer.log_dir) / "plan.json").read_text())
        {'rules': 'mup', 'params': []}
    """
    header, lines = plan.summary()
    for logger in trainer.loggers:
        logger.log_hyperparams({"parametrization": {"rules": plan.rules, "digest": plan.digest()}})
        if hasattr(logger, "log_table"):
            logger.log_table("parametrization", columns=header, data=lines)
        # Not Trainer.log_dir, which talks to the other ranks, and is the working directory without a logger.
        folder = getattr(logger, "log_dir", None)
        if isinstance(folder, (str, Path)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "plan.json").write_text(plan.to_json())


def as_state(plan: Plan) -> dict[str, Any]:
    """Return the plan for a checkpoint: plain strings, so that it loads with ``weights_only=True``.

    Examples:
        >>> sorted(as_state(Plan((), "mup")))
        ['digest', 'rows', 'rules']
    """
    return {"digest": plan.digest(), "rules": plan.rules, "rows": json.dumps(plan.rows())}


def compare(plan: Plan, saved: Mapping[str, Any]) -> None:
    """Compare the plan with the one that a checkpoint holds.

    Raises:
        ValueError: they differ; the message shows where.

    Examples:
        >>> compare(Plan((), "mup"), as_state(Plan((), "sp")))
        Traceback (most recent call last):
        ValueError: the checkpoint was written under another plan (other: ..., here: ...):
          rules mup (other: sp)
        resume with the base, rules and multipliers of that run, or start anew from its weights with initialize='keep'
    """
    if saved["digest"] == plan.digest():
        return
    lines = plan.diff(cast(list[Row], json.loads(saved["rows"])))
    if saved["rules"] != plan.rules:
        lines.insert(0, f"rules {plan.rules} (other: {saved['rules']})")
    more = f"\n  ... and {len(lines) - _DIFFERENCES_SHOWN} more" if len(lines) > _DIFFERENCES_SHOWN else ""
    shown = "\n  ".join(lines[:_DIFFERENCES_SHOWN])
    raise ValueError(
        f"the checkpoint was written under another plan (other: {saved['digest']}, here: {plan.digest()}):\n  "
        f"{shown}{more}\nresume with the base, rules and multipliers of that run, or start anew from its weights with "
        f"initialize='keep'"
    )


def compare_forward(plan: Plan, saved: Mapping[str, Any]) -> None:
    """Compare what a model computes, for an evaluation: the forward multipliers, not how it was trained.

    Raises:
        ValueError: a weight was trained under another forward multiplier.

    Examples:
        >>> compare_forward(Plan((), "mup"), as_state(Plan((), "sp")))
    """
    there = {row["name"]: [row[key] for key in _FORWARD] for row in json.loads(saved["rows"])}
    here = {row["name"]: [row[key] for key in _FORWARD] for row in plan.rows()}
    other = [name for name in here if name in there and here[name] != there[name]]
    if other:
        raise ValueError(
            f"the checkpoint's {other[0]!r} was trained with forward multipliers {there[other[0]][1:]}, here they are "
            f"{here[other[0]][1:]} ({len(other)} parameters differ); give the base, rules and multipliers of that run"
        )
