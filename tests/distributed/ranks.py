"""Run the scenarios of `test_ddp.py` on two ranks (gloo, CPU) and save what each rank saw.

Usage: python -m tests.distributed.ranks FOLDER
"""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_mup import Parametrize
from tests.models import generator

RANKS, BATCH, STEPS = 2, 16, 4
Result = dict[str, Any]


class Small(L.LightningModule):
    def __init__(self, width: int = 32, batch: int = BATCH // RANKS) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = self.build()

    def build(self) -> nn.Module:
        width = self.hparams["width"]
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        # One batch only: Lightning resumes a checkpoint of an epoch's end one batch late.
        x = torch.randn(BATCH, 6, generator=generator(0))
        data = TensorDataset(x, x.argmax(-1) % 4)
        # Lightning's own would shuffle.
        sampler = DistributedSampler(data, shuffle=False) if torch.distributed.is_initialized() else None
        return DataLoader(data, batch_size=self.hparams["batch"], sampler=sampler)


class Sharded(Small):
    """Sharded in ``configure_model``, as Lightning's documentation does it."""

    device_of_build = "cpu"

    def build(self) -> nn.Module:
        return nn.Sequential()

    def configure_model(self) -> None:
        if len(self.net) > 0:
            return
        with torch.device(self.device_of_build):
            self.net = Small.build(self)
        for part in (*self.net, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class OnMeta(Sharded):
    device_of_build = "meta"


class Recorder(Callback):
    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """When everything is built and, in a resumed run, loaded."""
        self.start = whole(module)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """After each step."""
        self.losses.append(float(trainer.callback_metrics["loss"]))


def whole(module: nn.Module) -> dict[str, Tensor]:
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def fit(module: Small, parametrize: Parametrize, strategy: Any = "auto", steps: int = STEPS, **kwargs: Any) -> Result:
    resume, recorder = kwargs.pop("resume", None), Recorder()
    saving = [ModelCheckpoint(kwargs.pop("save_to"), "{step}", save_top_k=-1)] if "save_to" in kwargs else []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(saving)}
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=1 if strategy == "auto" else RANKS,
        max_steps=steps,
        callbacks=[parametrize, recorder, *saving],
        log_every_n_steps=1,
        **{"logger": False, **quiet, **kwargs},
    )
    trainer.fit(module, ckpt_path=resume)
    assert parametrize.plan is not None
    return {
        "start": recorder.start,
        "end": whole(module),
        "losses": recorder.losses,
        "digest": parametrize.plan.digest(),
        "shape": parametrize.plan["net.2.weight"].spec.shape,
        "trainer": trainer,
    }


def two_d() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)


# Blocks of few directions, damped: directions without a gradient may be any, and rounding chooses them.
SOAP = {"block_size": 4, "relative_eps": True, "eps": 0.1, "warmup_steps": 2, "precondition_every": 2}
MATRIX_METHODS: dict[str, dict[str, Any]] = {
    "muon": {"method": "muon", "lr": 0.02},
    "soap": {"method": "soap", "lr": 0.003, "options": SOAP},
}


def ddp(how: Any, rank: int, **kwargs: Any) -> Result:
    # "scale" takes each rank's own draws; DDP sends rank 0's to all.
    torch.manual_seed(1 if how == "scale" else rank)
    return fit(Small(), Parametrize({"width": 8}, initialize=how), DDPStrategy(**kwargs))


def supplied(name: str, module: Small, **kwargs: Any) -> Result:
    torch.manual_seed(1)
    return fit(module, Parametrize({"width": 8}, initialize="draw", **MATRIX_METHODS[name]), **kwargs)


def sharded(how: Any, kind: type[Small] = Sharded, width: int = 32, base: Any = None, **kwargs: Any) -> Result:
    torch.manual_seed(1)
    return fit(kind(width), Parametrize(base or {"width": width // 4}, initialize=how), two_d(), **kwargs)


def uneven() -> Result:
    return sharded("scale", width=33, base=lambda: Small(11))


def differing_base(rank: int) -> Result:
    torch.manual_seed(rank)
    return sharded("scale", base=Small(8))


def resumed(folder: Path) -> Result:
    whole_run = sharded("draw", save_to=folder)
    return {**sharded("draw", resume=folder / "step=2.ckpt"), "whole": whole_run["end"]}


def refused(folder: Path) -> Result:
    try:
        sharded("draw", base={"width": 16}, resume=folder / "step=2.ckpt")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": "none"}


def twice() -> Result:
    torch.manual_seed(1)
    module, parametrize = OnMeta(), Parametrize(lambda: Small(8))
    first = fit(module, parametrize, two_d())
    second = fit(module, parametrize, two_d(), steps=0)
    return {**first, "end": whole(module), "second": second["end"], "first": first["end"]}


def scenarios(folder: Path, rank: int) -> dict[str, Callable[[], Result]]:
    return {
        "ddp scale": lambda: ddp("scale", rank),
        "ddp draw": lambda: ddp("draw", rank),
        "ddp muon": lambda: supplied("muon", Small(), strategy=DDPStrategy()),
        "ddp soap": lambda: supplied("soap", Small(), strategy=DDPStrategy()),
        "ddp find unused": lambda: ddp("draw", rank, find_unused_parameters=True),
        "logged": lambda: fit(Small(), Parametrize({"width": 8}), DDPStrategy(), logger=CSVLogger(folder)),
        "sharded scale": lambda: sharded("scale"),
        "sharded draw": lambda: sharded("draw"),
        "sharded clipped": lambda: sharded("draw", gradient_clip_val=0.1),
        "uneven": uneven,
        "differing base": lambda: differing_base(rank),
        "meta": lambda: sharded("scale", OnMeta, base=lambda: Small(8)),
        "meta base run": lambda: sharded("scale", OnMeta, base=lambda: Small(32)),
        "resumed": lambda: resumed(folder),
        "refused": lambda: refused(folder),
        "twice": twice,
    }


def run(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results: dict[str, Result] = {}
    for name, scenario in scenarios(folder, rank).items():
        results[name] = scenario()
        results[name].pop("trainer", None)
    torch.save(results, folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
