"""A run that is killed in the middle and resumed ends bit for bit where one that was not ends."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mup import Parametrize
from tests.lightning.helpers import Net, same, trainer
from tests.models import generator

STEPS, SAVED_EVERY, KILLED_AT = 20, 6, 14


class Resumable(DataLoader[Any]):
    """Goes on in the middle of an epoch, and shuffles by the epoch's number."""

    def __init__(self, dataset: TensorDataset) -> None:
        super().__init__(dataset, batch_size=8)
        self.epoch = self.served = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.dataset), generator=generator(self.epoch)).split(8)
        while self.served < len(order):
            self.served += 1
            yield [tensor[order[self.served - 1]] for tensor in self.dataset.tensors]
        self.epoch, self.served = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.served = state["epoch"], state["served"]


class Trained(Net):
    def build(self, width: int) -> nn.Module:
        return nn.Sequential(super().build(width), nn.BatchNorm1d(4))

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(64, 8, generator=generator(0))
        return Resumable(TensorDataset(x, x.argmax(-1) % 4))


def one_cycle(module: Net) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, STEPS)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-3)


@dataclass
class Case:
    make: Any = one_cycle
    parametrize: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


CASES = {
    "own optimizer": Case(),
    "accumulated and clipped": Case(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "supplied, drawn, hooked": Case(
        make=lambda module: None,
        parametrize={
            "method": "sgd",
            "lr": 0.1,
            "schedule": cosine,
            "options": {"momentum": 0.9},
            "initialize": "draw",
            "rules": "mean_field",
            "multipliers": "hook",
            "lr_multipliers": {"embedding": 0.5},
        },
    ),
}


def fit(case: Case, folder: Path, callbacks: Sequence[Callback] = (), resume: str | None = None) -> Trained:
    torch.manual_seed(0)
    module = Trained(make=case.make)
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=SAVED_EVERY)
    parametrize = Parametrize(lambda: Trained(16), **case.parametrize)
    ran = trainer(parametrize, saving, *callbacks, steps=STEPS, enable_checkpointing=True, **case.trainer)
    ran.fit(module, ckpt_path=resume)
    assert ran.global_step == STEPS
    return module


def run_until_killed(name: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tests.lightning.killed", name, str(folder)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_bit_identical(name: str, tmp_path: Path) -> None:
    run_until_killed(name, tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 12
    resumed = fit(CASES[name], tmp_path / "killed", resume=str(checkpoint))
    whole = fit(CASES[name], tmp_path / "whole")
    assert same(whole, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))
    states = [module.trainer.optimizers[0].state_dict() for module in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_a_run_that_loses_its_optimizer_state_ends_elsewhere(tmp_path: Path) -> None:
    """The comparison above can fail."""
    whole = fit(CASES["own optimizer"], tmp_path / "whole")

    class Forgetful(Callback):
        def on_train_batch_start(self, ran: Any, module: Net, batch: list[Tensor], batch_idx: int) -> None:
            if ran.global_step == KILLED_AT:
                ran.optimizers[0].state.clear()

    assert not same(whole, fit(CASES["own optimizer"], tmp_path / "other", [Forgetful()]))


def test_checkpoint_holds_the_plan_as_plain_values(tmp_path: Path) -> None:
    module = fit(CASES["own optimizer"], tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["Parametrize"]
    parametrize = next(c for c in module.trainer.callbacks if isinstance(c, Parametrize))
    assert set(map(type, state.values())) == {str}
    assert state == {**state, "digest": parametrize.plan.digest(), "rules": "mup"}
    assert '"net.0.2.weight"' in state["rows"]
