"""Step time of a whole run of `lightning-mup train`, over a bare PyTorch loop of the same model, data and optimizer.

Usage, from the repository's root: ``python -m recipes.benchmarks.trainer``. See the README in this folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lightning_mup as mup
from lightning_mup import schedules
from lightning_mup.callbacks.record_run import RecordRun
from lightning_mup.data.module import TokenDataModule
from lightning_mup.data.synthetic import MarkovChain
from lightning_mup.language import LanguageModel
from lightning_mup.models.llama import Llama
from lightning_mup.run_log import RunLog
from recipes.benchmarks.callbacks import ROOT, SKIPPED, Clock

WIDTH, DEPTH, CONTEXT, VOCABULARY = 384, 4, 128, 256  # 9.6 million parameters
BATCH, LOGGED_EVERY = 8, 10


def build(width: int = WIDTH) -> LanguageModel:
    """Return the model."""
    return LanguageModel(Llama(VOCABULARY, width=width, depth=DEPTH, context=CONTEXT, head_dim=32))


def data(cache: str) -> TokenDataModule:
    """Return the data."""
    source = MarkovChain(vocab_size=VOCABULARY, cache=cache)
    return TokenDataModule(source, vocab_size=VOCABULARY, context=CONTEXT, batch_size=BATCH)


def bare(steps: int, folder: str) -> list[float]:
    """Return the seconds of each step of a bare loop."""
    module, text = build(), data(folder)
    text.prepare_data()
    text.setup("fit")
    optimizer = mup.AdamW(module.parameters(), lr=1e-3)
    scheduler = schedules.linear(optimizer, total=steps)
    times: list[float] = []
    for batch, _ in zip(text.train_dataloader(), range(steps), strict=False):
        times.append(time.perf_counter())
        logits = module.net(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if len(times) % LOGGED_EVERY == 0:
            loss.item()
    return times


def whole(steps: int, folder: str) -> list[float]:
    """Return the seconds of each step under the Trainer, with all that a run has."""
    clock = Clock()
    parametrize = mup.Parametrize(
        functools.partial(build, 64),
        method="adamw",
        lr=1e-3,
        schedule=functools.partial(schedules.linear, total=steps),
    )
    record = RecordRun(folder, {}, tokens_per_step=BATCH * CONTEXT, flops_per_token=6e7)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=RunLog(folder),
        log_every_n_steps=LOGGED_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=steps + 1,
        check_val_every_n_epoch=None,
        callbacks=[parametrize, mup.WeightDecay(1e-4), record, clock],
    )
    trainer.fit(build(), data(folder))
    return clock.times


LOOPS: dict[str, Callable[[int, str], list[float]]] = {"bare PyTorch": bare, "lightning-mup train": whole}


def step_seconds(name: str, steps: int) -> float:
    """Return the median time of a step of one training."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        times = LOOPS[name](steps + SKIPPED + 1, folder)
    return statistics.median(end - start for start, end in zip(times[SKIPPED:], times[SKIPPED + 1 :], strict=False))


def run(rounds: int, steps: int) -> dict[str, list[float]]:
    """Train once in each way in every round, and return all times."""
    found: dict[str, list[float]] = {name: [] for name in LOOPS}
    for name in track([name for _ in range(rounds) for name in LOOPS], "timing", console=Console(stderr=True)):
        found[name].append(step_seconds(name, steps))
    return found


def table(times: Mapping[str, Sequence[float]]) -> Table:
    """Return the times, and their ratios to the bare loop of the same round."""
    first, *_ = LOOPS
    shown = Table(title=f"Llama of width {WIDTH}, depth {DEPTH}, AdamW, on {torch.get_num_threads()} thread(s)")
    for i, heading in enumerate(("loop", "step [ms]", "over bare", "(min-max)")):
        shown.add_column(heading, justify="right" if i else "left")
    for name, seconds in times.items():
        ratios = [own / plain for own, plain in zip(seconds, times[first], strict=True)]
        cells = (f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}")
        shown.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, time, and leave a table and all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="trainings in each way")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "recipes/benchmarks/results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    times = run(given.rounds, given.steps)
    record: dict[str, Any] = {"width": WIDTH, "depth": DEPTH, "threads": given.threads, "seconds": times}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "trainer.json").write_text(json.dumps(record, indent=1) + "\n")
    with (given.out / "trainer.txt").open("w") as file:
        Console(file=file, width=100).print(table(times))
    Console().print(table(times))


if __name__ == "__main__":
    main()
