"""Step time of a training with each callback alone, over the same training without it, in one interleaved run.

Usage, from the repository's root: ``python -m recipes.benchmarks.callbacks``. See the README in this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import lightning as L
import torch

import lightning_mup as mup
from recipes.any_lightning_module import TinyLM
from recipes.benchmarks.interleaved import Clock, Comparison

WIDTH, DEPTH = 512, 3  # 9.8 million parameters


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
    "none": list,
    "Parametrize": lambda: [mup.Parametrize(lambda: TinyLM(64, DEPTH))],
    "WeightDecay": lambda: [mup.WeightDecay(1e-4, base="self")],
    "SpectralNormalization": lambda: [mup.SpectralNormalization(warmup_steps=0)],
    "a second optimizer's step alone": lambda: [Second()],
    "Grafting, SGD's direction": lambda: [mup.Grafting(direction=lambda params: torch.optim.SGD(params, lr=0.1))],
    "WatchUpdates, at each step": lambda: [mup.WatchUpdates(1)],
}


def train(name: str, steps: int, begin: Callable[[], None]) -> None:
    """Train with the callbacks of that name."""
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*CALLBACKS[name](), Clock(begin)],
    )
    trainer.fit(TinyLM(WIDTH, DEPTH))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, time, and leave a table and all times."""
    Comparison(
        name="callbacks",
        title=f"AdamW, transformer of width {WIDTH}, depth {DEPTH}",
        ways={name: functools.partial(train, name) for name in CALLBACKS},
        facts={"width": WIDTH, "depth": DEPTH},
    ).main(__doc__, arguments)


if __name__ == "__main__":
    main()
