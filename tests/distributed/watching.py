"""Watch updates, and synchronize metrics, on two ranks (gloo, CPU); each rank saves what it saw.

Usage: python -m tests.distributed.watching FOLDER
"""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torchmetrics import Metric

from lightning_mup import Parametrize
from lightning_mup.callbacks.quantities import QUANTITIES
from lightning_mup.callbacks.watch_updates import WatchUpdates
from lightning_mup.metrics import (
    RMS,
    Alignment,
    DecayTimescale,
    EffectiveLearningRate,
    RelativeUpdate,
    SpectralNorm,
    StableRank,
)
from tests.distributed.ranks import RANKS, Sharded, Small, free_port, two_d
from tests.models import generator

Numbers = dict[str, float]
STEPS = 4


def updates(rank: int) -> dict[Metric, tuple[Any, ...]]:
    """Return each metric with what it sees on a rank; ranks differ in the number of matrices and tokens."""

    def drawn(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator(10 * rank + seed), dtype=torch.float64)

    stack, weight = drawn(0, 1 + rank, 3, 4), drawn(1, 1 + rank, 3, 4)
    given: dict[Metric, tuple[Any, ...]] = {
        RMS(): (stack,),
        SpectralNorm(): (stack,),
        StableRank(): (stack,),
        RelativeUpdate("spectral"): (stack, weight),
        Alignment(): (drawn(2, 5 + rank, 4), stack),
        EffectiveLearningRate(): (0.1, 1e-3 * (1 + rank)),
        DecayTimescale(): (1e-3 * (1 + rank),),
    }
    return {metric.set_dtype(torch.float64): arguments for metric, arguments in given.items()}


def synchronized(rank: int) -> Numbers:
    found = updates(rank)
    for metric, arguments in found.items():
        metric.update(*arguments)
    return {type(metric).__name__: float(metric.compute()) for metric in found}


def watched(module: Small, strategy: Any, logger: Any = False, **settings: Any) -> Numbers:
    torch.manual_seed(1)
    watch = WatchUpdates(STEPS, quantities=QUANTITIES, **settings)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=1 if strategy == "auto" else RANKS,
        max_steps=STEPS,
        callbacks=[Parametrize({"width": 8}, initialize="draw"), watch],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key}


def run(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = {
        "ddp": watched(Small(), DDPStrategy(), CSVLogger(folder)),
        "ddp matrices": watched(Small(), DDPStrategy(), per="matrix"),
        "sharded": watched(Sharded(), two_d()),
        "metrics": synchronized(rank),  # in the process group that the trainers leave
    }
    torch.save(results, folder / f"{rank}.pt")


def main(folder: Path) -> None:
    port, children = free_port(), []
    for rank in range(RANKS):
        if (child := os.fork()) == 0:
            try:
                run(rank, port, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # the other rank may wait for this one
            os._exit(0)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
