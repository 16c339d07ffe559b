"""Train a module of `test_resume.py` and die in the middle of a step, as a machine does."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from tests.lightning.test_resume import CASES, KILLED_AT, fit


class Killed(Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        """Die with gradients at hand, after the last checkpoint."""
        if trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(CASES[sys.argv[1]], Path(sys.argv[2]), callbacks=[Killed()])
