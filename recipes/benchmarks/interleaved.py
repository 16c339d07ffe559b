"""Ways of training, timed in turn in one process, each against the first of the same round."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[2]
SKIPPED = 3  # first steps, which warm up


class Clock(L.Callback):
    """Seconds of processor time at the beginnings of batches."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        """Note the time."""
        self.times.append(time.process_time())


@dataclass(frozen=True)
class Comparison:
    """Ways of training that are compared.

    Args:
        name: of the files that are left.
        title: of the table, without the number of threads.
        ways: name to a function of a number of steps that returns the processor time at each one's beginning; the first
            is what the others are compared with.
        facts: what the record says beside the times.
    """

    name: str
    title: str
    ways: Mapping[str, Callable[[int], list[float]]]
    facts: Mapping[str, object] = field(default_factory=dict)

    def step_seconds(self, name: str, steps: int) -> float:
        """Return the median time of a step of one training."""
        torch.manual_seed(0)
        times = self.ways[name](steps + SKIPPED + 1)
        return statistics.median(end - start for start, end in zip(times[SKIPPED:], times[SKIPPED + 1 :], strict=False))

    def run(self, rounds: int, steps: int) -> dict[str, list[float]]:
        """Train once in each way in every round, and return all times."""
        found: dict[str, list[float]] = {name: [] for name in self.ways}
        for name in track([name for _ in range(rounds) for name in self.ways], "timing", console=Console(stderr=True)):
            found[name].append(self.step_seconds(name, steps))
        return found

    def table(self, times: Mapping[str, Sequence[float]]) -> Table:
        """Return the times, and their ratios to the first way of the same round."""
        first, *_ = self.ways
        shown = Table(title=f"{self.title}, on {torch.get_num_threads()} thread(s)")
        for i, heading in enumerate(("", "step [ms]", f"over {first}", "(quartiles)")):
            shown.add_column(heading, justify="right" if i else "left")
        for name, seconds in times.items():
            ratios = [own / plain for own, plain in zip(seconds, times[first], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            cells = (f"{middle:.3f}", f"{low:.3f}-{high:.3f}")
            shown.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", *cells)
        return shown

    def main(self, description: str, arguments: Sequence[str] | None = None) -> None:
        """Parse the command line, time, and leave a table and all times."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=9, help="trainings in each way")
        parser.add_argument("--steps", type=int, default=8, help="timed steps of each training")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--out", type=Path, default=ROOT / "recipes/benchmarks/results")
        given = parser.parse_args(arguments)
        torch.set_num_threads(given.threads)
        logging.disable(logging.INFO)
        warnings.filterwarnings("ignore")
        times = self.run(given.rounds, given.steps)
        given.out.mkdir(parents=True, exist_ok=True)
        record = {**self.facts, "threads": given.threads, "seconds": times}
        (given.out / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        with (given.out / f"{self.name}.txt").open("w") as file:
            Console(file=file, width=100).print(self.table(times))
        Console().print(self.table(times))
