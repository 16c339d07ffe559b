"""Step time of a training with each callback alone, over the same training without it, in one interleaved run.

What is counted is processor time, on one thread by default, so that a machine's other work does not count.

Usage, from the repository's root: ``python -m recipes.benchmarks.callbacks``. See the README in this folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lightning_mup as mup
from recipes.any_lightning_module import TinyLM

ROOT = Path(__file__).parents[2]
WIDTH, DEPTH, SKIPPED = 512, 3, 3  # 9.8 million parameters; the first steps warm up
PLAIN = "none"
FLOOR = "a second optimizer's step alone"


class Second(L.Callback):
    """Has SGD step at rate 0 beside the module's own optimizer: what Grafting must take, whatever else it does."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Build it."""
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def on_train_batch_end(self, *args: object) -> None:
        """Step once; the gradients are still there."""
        self.optimizer.step()


# Each is built anew for every run; what is alone needs no plan, so the base is the model itself.
CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    PLAIN: list,
    "Parametrize": lambda: [mup.Parametrize(lambda: TinyLM(64, DEPTH))],
    "WeightDecay": lambda: [mup.WeightDecay(1e-4, base="self")],
    "SpectralNormalization": lambda: [mup.SpectralNormalization(warmup_steps=0)],
    FLOOR: lambda: [Second()],
    "Grafting, SGD's direction": lambda: [mup.Grafting(direction=lambda params: torch.optim.SGD(params, lr=0.1))],
    "WatchUpdates, at each step": lambda: [mup.WatchUpdates(1)],
}


class Clock(L.Callback):
    """Seconds of processor time between the beginnings of batches."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        """Note the time."""
        self.times.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        """Seconds per step, without the first ones."""
        return [end - start for start, end in zip(self.times[SKIPPED:], self.times[SKIPPED + 1 :], strict=False)]


def step_seconds(name: str, steps: int) -> float:
    """Return the median time of a step of one training."""
    torch.manual_seed(0)
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps + SKIPPED + 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*CALLBACKS[name](), clock],
    )
    trainer.fit(TinyLM(WIDTH, DEPTH))
    return statistics.median(clock.steps)


def run(rounds: int, steps: int) -> dict[str, list[float]]:
    """Train once with each callback in every round, and return all times."""
    found: dict[str, list[float]] = {name: [] for name in CALLBACKS}
    for name in track([name for _ in range(rounds) for name in CALLBACKS], "timing", console=Console(stderr=True)):
        found[name].append(step_seconds(name, steps))
    return found


def table(times: Mapping[str, Sequence[float]]) -> Table:
    """Return the times, and their ratios to the plain training of the same round."""
    shown = Table(title=f"AdamW, transformer of width {WIDTH}, depth {DEPTH}, on {torch.get_num_threads()} thread(s)")
    for i, heading in enumerate(("callback", "step [ms]", "over none", "(quartiles)")):
        shown.add_column(heading, justify="right" if i else "left")
    for name, seconds in times.items():
        ratios = [own / plain for own, plain in zip(seconds, times[PLAIN], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        cells = (f"{middle:.3f}", f"{low:.3f}-{high:.3f}")
        shown.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, time, and leave a table and all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="trainings with each callback")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "recipes/benchmarks/results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    times = run(given.rounds, given.steps)
    record: dict[str, Any] = {"width": WIDTH, "depth": DEPTH, "threads": given.threads, "seconds": times}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "callbacks.json").write_text(json.dumps(record, indent=1) + "\n")
    with (given.out / "callbacks.txt").open("w") as file:
        Console(file=file, width=100).print(table(times))
    Console().print(table(times))


if __name__ == "__main__":
    main()
