"""Ways of training, timed in turn, step by step, in one process, each step against the first way's of the same turn."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[2]
SKIPPED = 3  # first steps, which warm up

Way = Callable[[int, Callable[[], None]], object]
Times = Mapping[str, Sequence[Sequence[float]]]


class Clock(L.Callback):
    """Calls at the beginnings of batches.

    Args:
        begin: what is called.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_batch_start(self, *args: object) -> None:
        """Call."""
        self._begin()


class Turns:
    """Lets threads run one at a time, each from one call of its own to the next, always in one order.

    Args:
        names: of the threads.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._order, self._changed = deque(names), threading.Condition()

    def wait(self, name: str) -> None:
        """Wait until it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == name)

    def end(self, name: str, *, last: bool = False) -> None:
        """End this one's turn, which must be now; after its last one it is not waited for."""
        with self._changed:
            assert self._order[0] == name
            self._order.rotate(-1)
            if last:
                self._order.pop()
            self._changed.notify_all()


@dataclass(frozen=True)
class Comparison:
    """Ways of training that are compared.

    Args:
        name: of the files that are left.
        title: of the table, without the number of threads.
        ways: name to a function of a number of steps, and of what it calls at each one's beginning; the first is what
            the others are compared with.
        facts: what the record says beside the times.
    """

    name: str
    title: str
    ways: Mapping[str, Way]
    facts: Mapping[str, object] = field(default_factory=dict)

    def round(self, steps: int, threads: int) -> dict[str, list[float]]:
        """Train once in each way, all taking one step in turn, and return the processor time of each step."""
        turns, found = Turns(self.ways), {name: list[float]() for name in self.ways}

        def run(name: str) -> None:
            started: list[float] = []

            def begin() -> None:
                now = time.process_time()  # the others wait, so that all of it is this one's
                found[name].extend(now - then for then in started)
                turns.end(name)
                turns.wait(name)
                started[:] = [time.process_time()]

            turns.wait(name)
            try:
                torch.set_num_threads(threads)  # which each thread has for itself
                torch.manual_seed(0)
                self.ways[name](steps + SKIPPED + 1, begin)
            finally:
                turns.end(name, last=True)

        with ThreadPoolExecutor(len(self.ways)) as pool:
            for done in [pool.submit(run, name) for name in self.ways]:
                done.result()
        return {name: seconds[SKIPPED:] for name, seconds in found.items()}

    def run(self, rounds: int, steps: int, threads: int = 1) -> Times:
        """Train in all ways so many times, and return the seconds of each step of each round."""
        found: dict[str, list[list[float]]] = {name: [] for name in self.ways}
        for _ in track(range(rounds), "timing", console=Console(stderr=True)):
            for name, seconds in self.round(steps, threads).items():
                found[name].append(seconds)
        return found

    def table(self, times: Times) -> Table:
        """Return the times, and each round's median ratio to the step that the first way took in the same turn."""
        first, *_ = self.ways
        shown = Table(title=f"{self.title}, on {torch.get_num_threads()} thread(s)")
        for i, heading in enumerate(("", "step [ms]", f"over {first}", "(quartiles)")):
            shown.add_column(heading, justify="right" if i else "left")
        for name, rounds in times.items():
            ratios = [_median_ratio(own, plain) for own, plain in zip(rounds, times[first], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            step = statistics.median(seconds for own in rounds for seconds in own)
            shown.add_row(name, f"{step * 1e3:.1f}", f"{middle:.3f}", f"{low:.3f}-{high:.3f}")
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
        times = self.run(given.rounds, given.steps, given.threads)
        given.out.mkdir(parents=True, exist_ok=True)
        record = {**self.facts, "threads": given.threads, "seconds": times}
        (given.out / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        with (given.out / f"{self.name}.txt").open("w") as file:
            Console(file=file, width=100).print(self.table(times))
        Console().print(self.table(times))


def _median_ratio(own: Sequence[float], plain: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, plain, strict=True))
