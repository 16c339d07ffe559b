"""Divide optimizers over ranks (gloo, CPU), phase after phase, and save what each rank saw.

Usage: python -m tests.distributed.dividing FOLDER
"""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_mup as mup
from lightning_mup import Grafted, Grafting, MupDDPStrategy, Parametrize, SpectralNormalization, StackedOptimizer
from lightning_mup.callbacks.coordinate_check import CoordinateCheck
from lightning_mup.callbacks.watch_updates import WatchUpdates
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.finite import NonFiniteGradientError
from lightning_mup.core.ownership import Ownership
from lightning_mup.strategies import division, mup_ddp
from lightning_mup.transforms import orthogonalize, shampoo, soap
from tests.distributed.ranks import free_port
from tests.models import generator

Result = dict[str, Any]
STEPS = 20
BATCH = 24  # divides by every number of ranks
EVEN = [(32, 16), (16, 32), (32, 32), (32, 32), (32, 32), (48, 16)]
ALIKE = [(32, 32)] * 9
UNEVEN = [(5, 3), (7, 7), (7, 7), (1, 9), (9, 1), (3, 4, 5)]
FEW = [(16, 16)]
VECTORS = [(32,), ()]

# Damped: directions without a gradient may be any, rounding chooses them, and roots of next to nothing magnify it.
SOAP = {"relative_eps": True, "eps": 1.0, "warmup_steps": 2, "precondition_every": 2}
SHAMPOO = {"matrix_eps": 0.1, "precondition_every": 3}
CASES: dict[str, tuple[type[StackedOptimizer], dict[str, Any]]] = {
    "sgd": (mup.SGD, {"momentum": 0.9}),
    "sgd without state": (mup.SGD, {"momentum": 0.0}),
    "adam": (mup.Adam, {}),
    "adamw": (mup.AdamW, {"weight_decay": 0.1}),
    "adam_atan2": (mup.AdamAtan2, {}),
    "muon": (mup.Muon, {}),
    "muon in float64": (mup.Muon, {}),
    "muon in bfloat16": (mup.Muon, {}),
    "adamuon": (mup.AdaMuon, {}),
    "shampoo": (mup.Shampoo, SHAMPOO),
    "shampoo in blocks": (mup.Shampoo, {**SHAMPOO, "block_size": 16}),
    "shampoo on one side": (mup.Shampoo, {**SHAMPOO, "max_preconditioned_dim": 16}),
    "shampoo grafted": (mup.Shampoo, {**SHAMPOO, "graft": "adam"}),
    "soap": (mup.SOAP, SOAP),
    "soap in blocks": (mup.SOAP, {**SOAP, "block_size": 16}),
    "soap on one side": (mup.SOAP, {**SOAP, "max_preconditioned_dim": 16}),
    "soap normalized": (mup.SOAP, {**SOAP, "spectral_norm": True}),
}
DTYPES = {"muon in float64": torch.float64, "muon in bfloat16": torch.bfloat16}


# -- optimizers alone -----------------------------------------------------------------------------------------------


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator(i)).to(dtype)) for i, shape in enumerate(shapes)]


def step(optimizer: StackedOptimizer, seed: int, seldom: int = 3) -> None:
    """Take a step with gradients that depend on the weights; one parameter has none now and then."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        noise = torch.randn(p.shape, generator=generator(100 * seed + i)).to(p.dtype)
        p.grad = noise + 0.1 * p.detach() if p.requires_grad and (i != seldom or seed % 4) else None
    optimizer.step()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the matrices of which roots, bases or orthogonal factors are taken."""
    found = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(stack: Tensor, *args: Any, **kwargs: Any) -> Any:
            found[0] += len(stack)
            return function(stack, *args, **kwargs)

        return call

    with (
        patch.object(shampoo, "inverse_root", counting(shampoo.inverse_root)),
        patch.object(soap, "qr_step", counting(soap.qr_step)),
        patch.object(soap, "eigenbasis", counting(soap.eigenbasis)),
        patch.object(orthogonalize, "newton_schulz", counting(orthogonalize.newton_schulz)),
    ):
        yield found


def state_bytes(optimizer: StackedOptimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")


def trained(case: str, shapes: list[tuple[int, ...]], *, divide: bool, bucket_bytes: int = 2**14) -> Result:
    kind, settings = CASES[case]
    params = parameters(shapes, DTYPES.get(case, torch.float32))
    params[1 % len(params)].requires_grad_(False)
    optimizer = kind(params[:-1] or params, lr=0.02, **settings)
    ownership = Ownership(bucket_bytes=bucket_bytes) if divide else None
    if ownership is not None:
        optimizer.divide(ownership)
    if len(params) > 1:
        optimizer.add_param_group({"params": params[-1:]})
    with counted() as matrices:
        for seed in range(STEPS):
            step(optimizer, seed, seldom=3 if shapes != ALIKE else 1)  # the frozen one
    return {
        "weights": [p.detach() for p in params],
        "state bytes": state_bytes(optimizer),
        "matrices": matrices[0],
        "state": optimizer.whole_state_dict(),
        "traffic": None if ownership is None else ownership.traffic.bytes,
    }


def alone(case: str, shapes: list[tuple[int, ...]], bucket_bytes: int = 2**14) -> Result:
    return {
        how: trained(case, shapes, divide=how == "divided", bucket_bytes=bucket_bytes) for how in ("divided", "one")
    }


def not_finite(nonfinite: str) -> Result:
    """One rank has a gradient that is not a number, of a parameter that it steps and of one that it does not."""
    params = parameters([(16, 16)] * 4)
    optimizer = mup.Muon(params, lr=0.02, nonfinite=nonfinite)
    ownership = Ownership()
    optimizer.divide(ownership)
    step(optimizer, 1)
    before = [p.detach().clone() for p in params]
    mine = next(p for p in params if ownership.owner(p) == 0)
    for p in params:
        p.grad = torch.ones_like(p)
    if get_rank() == 0:
        mine.grad = torch.full_like(mine, math.nan)
    error = ""
    try:
        optimizer.step()
    except NonFiniteGradientError as found:
        error = str(found)
    return {"unmoved": all(map(torch.equal, before, params)), "error": error}


def refusals() -> dict[str, str]:
    optimizer = mup.Muon(parameters(FEW), lr=0.02)
    optimizer.divide(Ownership())
    tried = {"copy": lambda: copy.deepcopy(optimizer), "twice": lambda: optimizer.divide(Ownership())}
    found: dict[str, str] = {}
    for what, call in tried.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            found[what] = str(error)
    return found


def replicated() -> Result:
    """Elementwise methods stay with every rank."""
    optimizers = [kind(parameters([*ALIKE, *VECTORS]), lr=0.02) for kind in (mup.Adam, mup.Muon)]
    ownership = None
    for optimizer in optimizers:
        ownership = Ownership(elementwise="replicate", beside=ownership)
        optimizer.divide(ownership)
        step(optimizer, 1)
    assert ownership is not None
    return {"state bytes": [state_bytes(optimizer) for optimizer in optimizers], "traffic": ownership.traffic.bytes}


def optimizers(folder: Path, ranks: int) -> Result:
    """Run what needs no Trainer."""
    init_process_group("gloo", timeout=timedelta(seconds=60))
    found: Result = {f"{case}, even": alone(case, [*EVEN, *VECTORS]) for case in CASES}
    found |= {f"{case}, uneven": alone(case, [*UNEVEN, *VECTORS]) for case in ("muon", "shampoo in blocks", "adam")}
    found |= {f"{case}, alike": alone(case, ALIKE) for case in ("adam", "muon", "shampoo", "soap in blocks")}
    found |= {f"{case}, few": alone(case, FEW) for case in ("muon", "shampoo")}
    found |= {f"muon, {size} bytes": alone("muon", [*EVEN, *VECTORS], size) for size in (1, 2**27)}
    found |= {f"not finite, {what}": not_finite(what) for what in ("raise", "skip")}
    found |= {"refusals": refusals(), "replicated": replicated()}
    destroy_process_group()
    return found


# -- with a Trainer -------------------------------------------------------------------------------------------------


class Net(L.LightningModule):
    """A small net with a frozen layer, a part that is seldom used, and an optimizer as a user would build it."""

    def __init__(self, width: int = 32, method: str = "soap in blocks", lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = [(16, width), (width, width), (width, width), (width, width), (width, 16)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.seldom = nn.Linear(16, 16, bias=False)
        self.layers[1].requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if self.global_step % 3 == 1:
            x = x + self.seldom(x)
        return nn.functional.mse_loss(x, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind, settings = CASES[self.hparams["method"]]
        return kind(self.named_parameters(), lr=self.hparams["lr"], **settings)

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(BATCH * 2, 16, generator=generator(0))
        data = TensorDataset(x, x.flip(-1).tanh())
        divided = torch.distributed.is_initialized()
        sampler = DistributedSampler(data, shuffle=False) if divided else None
        ranks = torch.distributed.get_world_size() if divided else 1
        return DataLoader(data, batch_size=BATCH // ranks, sampler=sampler)


class Dies(Callback):
    """Kill one rank in the middle of a step, before its gradients are there."""

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        """At the seventh step."""
        if trainer.global_step == 6 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(strategy: Any, ranks: int, *callbacks: Callback, steps: int = STEPS, **kwargs: Any) -> Result:
    torch.manual_seed(1)
    resume = kwargs.pop("resume", None)
    module = Net(**kwargs.pop("module", {}))
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=ranks,
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=saves,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **kwargs},
    )
    trainer.fit(module, ckpt_path=resume)
    found: Result = {"weights": {n: p.detach().clone() for n, p in module.named_parameters()}}
    found["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    found["records"] = [record for c in callbacks if isinstance(c, CoordinateCheck) for record in c.records]
    found["bytes"] = sum(map(state_bytes, stacked(trainer.optimizers[0])))
    if isinstance(strategy, MupDDPStrategy):
        found["traffic"] = strategy.traffic
    found["saved"] = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return found


def stacked(optimizer: torch.optim.Optimizer) -> list[StackedOptimizer]:
    parts = [optimizer.direction, optimizer.magnitude] if isinstance(optimizer, Grafted) else [optimizer]
    return [part for part in parts if isinstance(part, StackedOptimizer)]


def every(folder: Path, steps: int = 5) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


def callbacks(name: str) -> list[Callback]:
    made: dict[str, Callable[[], list[Callback]]] = {
        "muon": list,
        "shampoo in blocks": list,
        "grafting": lambda: [Grafting(magnitude=lambda params: mup.AdamW(params, lr=1e-3))],
        "spectral normalization": lambda: [SpectralNormalization()],
        "weight decay": lambda: [WeightDecay(1e-3, base="self"), WatchUpdates(5, quantities=["update/spectral_norm"])],
        "coordinate check": lambda: [CoordinateCheck(3)],
        "parametrize": lambda: [
            Parametrize({"width": 16}, method="muon_adam", lr=0.01, roles={"seldom.weight": "hidden"})
        ],
    }
    return made[name]()


RUNS = ["muon", "shampoo in blocks", "grafting", "spectral normalization", "weight decay", "coordinate check"]
RUNS += ["parametrize"]
METHODS = {"muon": "muon", "grafting": "muon", "weight decay": "adam", "spectral normalization": "sgd"}


def method_of(name: str) -> dict[str, str]:
    return {"method": METHODS.get(name, "shampoo in blocks")}


def beside_ddp(folder: Path, ranks: int) -> Result:
    """Run the same under both strategies, clipping and accumulating."""
    found: Result = {}
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "steps": 12}
    for name in RUNS:
        for strategy in (DDPStrategy(find_unused_parameters=True), MupDDPStrategy(find_unused_parameters=True)):
            said: list[str] = []
            with (
                patch.object(mup_ddp, "rank_zero_info", said.append),
                patch.object(division, "rank_zero_info", said.append),
            ):
                result = fit(strategy, ranks, *callbacks(name), module=method_of(name), **settings)
            found[f"{name}, {type(strategy).__name__}"] = {**result, "said": said}
    return found


def saving(folder: Path, ranks: int) -> Result:
    return {"whole": fit(divided(), ranks, every(folder / "saved"))}


def resuming(folder: Path, ranks: int) -> Result:
    """Go on from the tenth step; and, without a step, save again."""
    file, again = folder / "saved" / "step=10.ckpt", folder / "again" / f"{ranks}.ckpt"
    module = Net()
    trainer = L.Trainer(
        accelerator="cpu", strategy=divided(), devices=ranks, max_steps=10, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=file)
    trainer.save_checkpoint(again)
    return {"resumed": fit(divided(), ranks, resume=file)}


def killed(folder: Path, ranks: int) -> Result:
    return {"killed": fit(divided(timeout=timedelta(seconds=20)), ranks, every(folder / "killed", 1), Dies())}


def after_the_kill(folder: Path, ranks: int) -> Result:
    last = max((folder / "killed").glob("*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))
    return {
        "last": last.stem,
        "resumed": fit(divided(), ranks, resume=last),
        "whole": fit(divided(), ranks),
    }


def divided(**settings: Any) -> MupDDPStrategy:
    return MupDDPStrategy(find_unused_parameters=True, **settings)


# -- ranks ----------------------------------------------------------------------------------------------------------

Phase = Callable[[Path, int], Result]
PHASES: list[tuple[str, int, Phase]] = [
    ("optimizers", 4, optimizers),
    ("optimizers", 2, optimizers),
    ("beside ddp", 2, beside_ddp),
    ("saving", 4, saving),
    ("resuming", 3, resuming),
    ("resuming", 2, resuming),
    ("killed", 2, killed),
    ("after the kill", 2, after_the_kill),
]


def run(rank: int, ranks: int, port: int, work: Callable[[], Result], file: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.save(work(), file)


def phase(name: str, ranks: int, work: Phase, folder: Path) -> list[int]:
    """Run one phase and return the ranks' exit codes."""
    port, children = free_port(), []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            try:
                run(rank, ranks, port, lambda: work(folder, ranks), folder / f"{name} {ranks} {rank}.pt")
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # the other ranks may wait for this one
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path) -> None:
    os.chdir(folder)  # CoordinateCheck writes a file
    codes = {}
    for name, ranks, work in PHASES:
        codes[name] = phase(name, ranks, work, folder)
        if name != "killed" and any(codes[name]):
            sys.exit(f"{name} on {ranks} ranks: {codes[name]}")
    torch.save(codes, folder / "codes.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
