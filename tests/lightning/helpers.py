"""A small LightningModule whose optimizers each test chooses, and a Trainer that writes nothing by itself."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.models import generator

BASE = {"width": 16}
Rates = list[list[float]]


def adam(module: L.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


class Net(L.LightningModule):
    def __init__(
        self, width: int = 64, make: Callable[[L.LightningModule], Any] = adam, automatic: bool = True
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["make"])
        self.automatic_optimization = automatic
        self.make = make
        self.net = self.build(width)

    def build(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(self.dtype)), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log_dict({"loss": loss, "flat": 1.0})
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self)

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(64, 8, generator=generator(0))
        return DataLoader(TensorDataset(x, x.argmax(-1) % 4), batch_size=8)


class Evaluated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


class Tied(Evaluated):
    """The readout shares the embedding's matrix."""

    def build(self, width: int) -> nn.Module:
        embedding, readout = nn.Embedding(4, width), nn.Linear(width, 4)
        readout.weight = embedding.weight
        return nn.ModuleDict({"embedding": embedding, "readout": readout})

    def loss(self, batch: list[Tensor]) -> Tensor:
        y = batch[1]
        return nn.functional.cross_entropy(self.net["readout"](self.net["embedding"](y)), y.roll(1))


class Rated(Callback):
    """Notes the learning rates with which each step was taken."""

    def __init__(self) -> None:
        self.rates: Rates = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        """Before the step's gradients, hence before the scheduler moves on."""
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])


def trainer(*callbacks: Callback, steps: int = 2, **kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), max_steps=steps, **{**quiet, **kwargs})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())
