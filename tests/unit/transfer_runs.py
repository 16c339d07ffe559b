"""Run directories with a planted valley per size: noise, seeds, divergence, and a run that was killed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NOISE = 0.002


def valley(u: np.ndarray | float, skew: float) -> np.ndarray:
    """A valley in log loss, 0.02 high one octave off; steeper on the right for skew > 0."""
    z = np.asarray(u) * skew
    return 0.04 * (np.expm1(z) - z) / skew**2 if skew else 0.02 * np.square(u)


@dataclass(frozen=True)
class Planted:
    """Rules whose optimum moves from 2^-7 at the base by `slope` octaves per octave of size."""

    rules: str = "mup"
    slope: float = 0.0
    sizes: tuple[int, ...] = (64, 128, 256)
    axis: str = "width"
    log2_lr: tuple[float, ...] = (-10, -9, -8, -7, -6, -5, -4)
    seeds: int = 2
    skew: float = 0.7
    cliff: float = math.inf  # octaves above the optimum from which on runs diverge
    method: str = "muon"
    tuned: str = "lr"
    base: int = 0  # the smallest size
    floor: float = 1.2  # log loss of the best run at size 64
    changes: dict[str, object] = field(default_factory=dict)

    def optimum(self, size: int) -> float:
        return -7.0 + self.slope * math.log2(size / (self.base or self.sizes[0]))

    def loss(self, size: int, log2_lr: float, noise: float = 0.0) -> float:
        u = log2_lr - self.optimum(size)
        floor = self.floor + 0.1 * math.log2(64 / size) / 2
        return math.inf if u >= self.cliff else math.exp(floor + float(valley(u, self.skew)) + noise)


def write_runs(folder: Path, planted: Planted, *, noise: float = NOISE, seed: int = 0) -> Path:
    """Write one run directory for each size, learning rate and seed."""
    random = np.random.default_rng(seed)
    for size in planted.sizes:
        for x in planted.log2_lr:
            for s in range(planted.seeds):
                loss = planted.loss(size, x, noise * random.standard_normal())
                name = f"{planted.method}-{planted.rules}/{planted.axis}{size}/{x:g}-{s}"
                write_run(folder / name, facts_of(planted, size, x, s), loss)
    return folder


def facts_of(planted: Planted, size: int, log2_value: float, seed: int) -> dict[str, object]:
    sizes = {"width": 64, "depth": 4, "base_width": 64, "base_depth": 4, "lr": 2.0**-6, "weight_decay": 2.0**-12}
    base = planted.base or planted.sizes[0]
    sizes |= {planted.axis: size, f"base_{planted.axis}": base, planted.tuned: 2.0**log2_value}
    return {
        **sizes,
        "name": "planted",
        "method": planted.method,
        "rules": planted.rules,
        "seed": seed,
        "params": 12 * size**2,
        "non_embedding_params": 10 * size**2,
        "tokens_per_step": 1024,
        "flops_per_token": 60.0 * size**2,
        "max_steps": 200,
        "context": 64,
        "data": "text-3fe1",
        "versions": {"lightning_mup": "0.1.0", "torch": "2.13.0"},
        "config": {"method.name": planted.method, "seed": seed},
        **planted.changes,
    }


def write_run(folder: Path, facts: dict[str, object], loss: float | None) -> Path:
    """Write one run; a loss of inf is a run that diverged halfway, None one that was killed."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts))
    diverged = loss == math.inf
    steps = [1, 10, 100] if diverged or loss is None else [1, 10, 100, 200]
    width = abs(float(str(facts["width"]))) / 64
    lines = [json.dumps(_logged(facts, step, width)) for step in steps]
    if diverged:
        lines.append(json.dumps({"step": 101, "train/loss": "nan"}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + ("\n" if loss is not None else '\n{"step": 150, "tra'))
    if loss is not None:
        (folder / "result.json").write_text(json.dumps(_result(facts, steps[-1], None if diverged else loss)))
    return folder


def _logged(facts: dict[str, object], step: int, width: float) -> dict[str, object]:
    grown = width ** (0.5 if facts["rules"] == "sp" else 0.02)
    row = {"step": step, "tokens": 1024 * step, "flops": _flops(facts, step), "train/loss": 5 - math.log10(step)}
    return row | {"feature/change/hidden": 0.1 * grown / step**0.5, "feature/change/input": 0.05 / step**0.5}


def _flops(facts: dict[str, object], step: int) -> float:
    return float(str(facts["flops_per_token"])) * 1024 * step


def _result(facts: dict[str, object], step: int, loss: float | None) -> dict[str, object]:
    spent = {"step": step, "tokens": 1024 * step, "flops": _flops(facts, step), "seconds": step / 10}
    status = "diverged" if loss is None else "finished"
    return {"status": status, **spent, "train_loss": None if loss is None else loss + 0.1, "val_loss": loss}
