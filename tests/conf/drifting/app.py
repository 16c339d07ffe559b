"""A program of somebody else: its "training" looks up a valley whose bottom drifts with the width as O(1/width).

It leaves ``run.json``, ``metrics.jsonl`` and ``result.json`` as runs of ours do, and counts how often it ran. A file
`trouble` in the working directory names an exception and the learning rate from which it comes, after half the steps.
"""

from __future__ import annotations

import builtins
import json
import math
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

BOTTOM = {"adamw": -6.6, "muon": -4.3}
DRIFT = 1.0  # octaves, from width 64 to infinity
STEPS = 4


def bottom(method: str, width: float) -> float:
    """Return log2 of the best learning rate at a width."""
    return BOTTOM[method] + DRIFT * 64 / width


def flops(config: DictConfig) -> float:
    """Return the operations of a run."""
    return 1e6 * float(config.model.net.width) ** 2


@hydra.main(config_path=".", config_name="drifting", version_base="1.3")
def main(config: DictConfig) -> float:
    """Return the stored loss, or look it up, count and store it."""
    folder, lr = Path(config.folder), float(config.method.lr)
    stored = folder / "result.json"
    if not stored.exists():
        with (folder / "ran.txt").open("a") as file:
            file.write("once more\n")
        (folder / "run.json").write_text(json.dumps({"method": config.method.name}))
        _steps(folder, config, first=1, last=STEPS // 2)
        _trouble(lr)
        _steps(folder, config, first=STEPS // 2 + 1, last=STEPS)
        far = math.log2(lr) - bottom(config.method.name, config.model.net.width)
        loss = math.inf if far > 2.4 else 3.0 + 0.05 * far**2
        result = {"flops": flops(config), "seconds": float(STEPS), "val_loss": loss if math.isfinite(loss) else None}
        stored.write_text(json.dumps(result))
    found = json.loads(stored.read_text())["val_loss"]
    return math.inf if found is None else float(found)


def _steps(folder: Path, config: DictConfig, *, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            row = {"step": step, "flops": flops(config) * step / STEPS, "seconds": step + time.perf_counter() % 1e-3}
            file.write(json.dumps(row) + "\n")


def _trouble(lr: float) -> None:
    if Path("trouble").exists():
        name, least = Path("trouble").read_text().split()
        if lr >= float(least):
            raise getattr(builtins, name)(f"lr={lr} is too much")


if __name__ == "__main__":
    main()
