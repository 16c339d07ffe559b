"""Step time of a whole run of `lightning-mup train`, over a bare PyTorch loop of the same model, data and optimizer.

Usage, from the repository's root: ``python -m recipes.benchmarks.trainer``. See the README in this folder.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence

import lightning as L
import torch.nn.functional as F

import lightning_mup as mup
from lightning_mup import schedules
from lightning_mup.data.module import TokenDataModule
from lightning_mup.data.synthetic import MarkovChain
from lightning_mup.language import LanguageModel
from lightning_mup.models.llama import Llama
from recipes.benchmarks.interleaved import Clock, Comparison

WIDTH, BASE, DEPTH, CONTEXT, VOCABULARY = 384, 64, 4, 128, 256  # 9.6 million parameters
BATCH, LOGGED_EVERY = 8, 10


def build(width: int) -> LanguageModel:
    """Return a model."""
    return LanguageModel(Llama(VOCABULARY, width=width, depth=DEPTH, context=CONTEXT, head_dim=32))


def data(cache: str) -> TokenDataModule:
    """Return the data."""
    source = MarkovChain(vocab_size=VOCABULARY, cache=cache)
    return TokenDataModule(source, vocab_size=VOCABULARY, context=CONTEXT, batch_size=BATCH)


def bare(steps: int, begin: Callable[[], None], folder: str) -> None:
    """Train in a bare loop."""
    net, text = build(WIDTH).net, data(folder)
    text.prepare_data()
    text.setup("fit")
    optimizer = mup.AdamW(net.parameters(), lr=1e-3)
    scheduler = schedules.linear(optimizer, total=steps)
    for batch, step in zip(text.train_dataloader(), range(1, steps + 1), strict=False):
        begin()
        loss = F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % LOGGED_EVERY == 0:
            loss.item()


def whole(steps: int, begin: Callable[[], None], folder: str) -> None:
    """Train under the Trainer, with all that a run has."""
    schedule = functools.partial(schedules.linear, total=steps)
    parametrize = mup.Parametrize(functools.partial(build, BASE), method="adamw", lr=1e-3, schedule=schedule)
    record = mup.RecordRun(folder, {}, tokens_per_step=BATCH * CONTEXT, flops_per_token=6e7)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=mup.RunLog(folder),
        log_every_n_steps=LOGGED_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=steps + 1,
        check_val_every_n_epoch=None,
        callbacks=[parametrize, mup.WeightDecay(1e-4), record, Clock(begin)],
    )
    trainer.fit(build(WIDTH), data(folder))


LOOPS: dict[str, Callable[[int, Callable[[], None], str], None]] = {"bare PyTorch": bare, "lightning-mup train": whole}


def in_new_folder(name: str, steps: int, begin: Callable[[], None]) -> None:
    """Train in one of the ways, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        LOOPS[name](steps, begin, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, time, and leave a table and all times."""
    Comparison(
        name="trainer",
        title=f"Llama of width {WIDTH}, depth {DEPTH}, AdamW",
        ways={name: functools.partial(in_new_folder, name) for name in LOOPS},
        facts={"width": WIDTH, "depth": DEPTH, "context": CONTEXT, "batch": BATCH},
    ).main(__doc__, arguments)


if __name__ == "__main__":
    main()
