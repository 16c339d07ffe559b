"""Graft, decay and watch sharded parameters (gloo, CPU): four ranks that step alone, two under Lightning's strategy.

Usage: python -m tests.distributed.sharded_grafting FOLDER
"""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_mup as mup
from lightning_mup import Grafted, Grafting
from lightning_mup.callbacks.quantities import QUANTITIES
from lightning_mup.callbacks.watch_updates import WatchUpdates
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.decay_step import DecayStep
from tests.distributed.dividing import Result, phase
from tests.distributed.ranks import BATCH, Small, two_d
from tests.models import generator

RANKS, STEPS = 4, 10
Placed = tuple[DeviceMesh, tuple[Placement, ...]]
MESHES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "sharded": ((4,), (Shard(0),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "with tensor parallelism": ((2, 2), (Shard(0), Shard(-1))),
}
FROZEN, SELDOM = 1, 3
SHAPES = [(8, 4), (4, 4), (7,), (1, 4), (3, 7), (5, 3), (6, 6), (2, 3, 5), (9, 2)]
LAYOUTS: dict[int, dict[str, Any]] = {
    6: {"split": 3},
    7: {"axes": ((1,), (2,))},
    8: {"axes": ((1,), (0,))},
}
PER: dict[str, dict[str, Any]] = {"matrix": {}, "block": {"block_size": 2}, "group": {}}


class Undeclared(torch.optim.Adamax):
    """May look at the weights, for all that is known, so that its step is a difference."""


Make = Callable[[list[dict[str, Any]]], Optimizer]
PARTS: dict[str, tuple[Make, Make, str]] = {
    "torch's": (
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
        "magnitude",
    ),
    "ours": (
        lambda groups: mup.Muon(groups, lr=0.02, weight_decay=0.005),
        lambda groups: mup.Adam(groups, lr=0.01),
        "direction",
    ),
    "as a difference": (
        lambda groups: mup.Shampoo(groups, lr=0.02),
        lambda groups: Undeclared(groups, lr=0.01),
        "magnitude",
    ),
}
CASES = [(mesh, parts, per) for mesh in ("sharded", "hybrid") for parts in ("torch's", "ours") for per in PER]
CASES += [("with tensor parallelism", "torch's", per) for per in PER] + [("sharded", "as a difference", "matrix")]


# -- optimizers alone -----------------------------------------------------------------------------------------------


def parameters(placed: Placed | None) -> list[nn.Parameter]:
    """Return parameters, the last of which is never sharded."""
    drawn = [torch.randn(shape, generator=generator(i)) for i, shape in enumerate([*SHAPES, (3, 3)])]
    made = [nn.Parameter(x if i == len(SHAPES) else put(x, placed)) for i, x in enumerate(drawn)]
    made[FROZEN].requires_grad_(False)
    return made


def put(x: Tensor, placed: Placed | None) -> Tensor:
    return x if placed is None else distribute_tensor(x, *placed, src_data_rank=None)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for i, p in enumerate(params) if i not in LAYOUTS]},
        *({"params": [params[i]], **layout} for i, layout in LAYOUTS.items()),
    ]


def set_gradients(params: list[nn.Parameter], placed: Placed | None, step: int) -> None:
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator(100 * step + i))
        here = p.requires_grad and (i != SELDOM or step % 3)
        p.grad = put(gradient, placed if isinstance(p, DTensor) else None) if here else None


def grafted(params: list[nn.Parameter], parts: str, per: str) -> Grafted:
    direction, magnitude, leader = PARTS[parts]
    made = [make(groups_of(params)) for make in (direction, magnitude)]
    return Grafted(direction=made[0], magnitude=made[1], leader=leader, per=per, **PER[per])


def stepped(parts: str, per: str, placed: Placed | None = None) -> list[Tensor]:
    params = parameters(placed)
    optimizer = grafted(params, parts, per)
    for step in range(STEPS):
        set_gradients(params, placed, step)
        optimizer.step()
    return [whole(p) for p in params]


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        self.entries = max([self.entries, *sizes])
        return made


def largest(placed: Placed) -> dict[str, int]:
    """Return by ``per`` the size of the largest tensor in a step of a matrix with 1,024 entries on each rank."""
    found = {}
    for per, settings in PER.items():
        weight = nn.Parameter(put(torch.ones(64, 64), placed))
        sgd, adamw = torch.optim.SGD([weight], lr=0.1), torch.optim.AdamW([weight], lr=0.1)
        optimizer = Grafted(direction=sgd, magnitude=adamw, per=per, **settings)
        weight.grad = put(torch.ones(64, 64), placed)
        with Largest() as seen:
            optimizer.step()
        found[per] = seen.entries
    return found


def not_finite(placed: Placed, nonfinite: str) -> Result:
    """One rank's part of a gradient is not finite, while a graft steps and while weights decay."""
    found: Result = {}
    for name in ("grafted", "decayed"):
        weight = nn.Parameter(put(torch.ones(8, 4), placed))
        muon = mup.Muon([weight], lr=0.1, nonfinite=nonfinite)
        optimizer: Optimizer = muon
        if name == "grafted":
            optimizer = Grafted(direction=muon, magnitude=torch.optim.AdamW([weight], lr=0.1))
        else:
            DecayStep(optimizer, {id(weight): 0.5}, lambda group: 1.0)
        gradient = torch.ones(8, 4)
        gradient[0] = math.nan
        weight.grad = put(gradient, placed)
        error = ""
        try:
            optimizer.step()
        except ValueError as raised:
            error = str(raised)
        found[name] = {"weight": whole(weight), "error": error}
    return found


def alone(folder: Path, ranks: int) -> Result:
    init_process_group("gloo", timeout=timedelta(seconds=60))
    placed = {name: (init_device_mesh("cpu", shape), how) for name, (shape, how) in MESHES.items()}
    found: Result = {f"{mesh}, {parts}, {per}": stepped(parts, per, placed[mesh]) for mesh, parts, per in CASES}
    found["largest"] = largest(placed["sharded"])
    found |= {nonfinite: not_finite(placed["hybrid"], nonfinite) for nonfinite in ("skip", "raise")}
    destroy_process_group()
    return found


# -- with a Trainer -------------------------------------------------------------------------------------------------


class Net(Small):
    """Trains by what it is told, in float64: in float32, rounding chooses the directions that have no gradient."""

    def __init__(self, method: str, batch: int = BATCH // 2) -> None:
        super().__init__(batch=batch)
        self.save_hyperparameters()
        self.double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step([x.double(), y], batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer: Optimizer = mup.Muon(self.named_parameters(), lr=0.02)
        if self.hparams["method"] == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ShardedNet(Net):
    """The middle is sharded by itself, the rest with the whole, which FSDP2 leaves gathered after a forward pass."""

    def configure_model(self) -> None:
        for part in (self.net[2], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Metrics(Callback):
    """What WatchUpdates said, batch by batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key != "loss"}
        self.seen.append(found)


def trained(
    method: str, *, sharded: bool, resume: Path | None = None, save: Path | None = None, schedule: Any = "lr"
) -> Result:
    """Train with all callbacks of which no rank needs whole matrices while it steps."""
    torch.manual_seed(1)
    module = ShardedNet(method) if sharded else Net(method, BATCH)
    metrics = Metrics()
    callbacks: list[Callback] = [WeightDecay(0.005, base="self", schedule=schedule, exclude=["*.bias"])]
    callbacks += [WatchUpdates(2, quantities=QUANTITIES, per="matrix", max_matrices=None), metrics]
    if method == "grafting":
        callbacks.append(Grafting(magnitude=lambda params: torch.optim.AdamW(params, lr=0.01, eps=1e-3)))
    if save is not None:
        callbacks.append(ModelCheckpoint(save, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1))
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=two_d() if sharded else "auto",
        devices=2 if sharded else 1,
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=resume)
    weights = {name: whole(p) for name, p in module.named_parameters()}
    return {"weights": weights, "metrics": metrics.seen}


METHODS = ["adamw", "muon", "grafting"]


def trainers(folder: Path, ranks: int) -> Result:
    found = {method: trained(method, sharded=True) for method in METHODS}
    kwargs: dict[str, Any] = {"sharded": True, "schedule": "constant"}  # with "lr", a step of rate 0 would not decay
    found["saved"] = trained("adamw", save=folder / "saved", **kwargs)
    found["resumed"] = trained("adamw", resume=folder / "saved" / f"step={STEPS // 2}.ckpt", **kwargs)
    return found


PHASES = {"alone": (RANKS, alone), "trainers": (2, trainers)}


if __name__ == "__main__":
    sys.exit(any(any(phase(name, ranks, work, Path(sys.argv[1]))) for name, (ranks, work) in PHASES.items()))
