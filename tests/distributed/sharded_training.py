"""Train under mup_fsdp and HSDP (gloo, CPU), phase after phase, and save what each rank saw.

Usage: python -m tests.distributed.sharded_training FOLDER
"""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_mup as mup
from lightning_mup import MupDDPStrategy, MupFSDPStrategy, Parametrize, SpectralNormalization, StackedOptimizer
from lightning_mup.core.finite import NonFiniteGradientError
from lightning_mup.core.sharding import ShardedOwnership
from lightning_mup.strategies import division, mup_fsdp
from tests.distributed.dividing import (
    ALIKE,
    CASES,
    DTYPES,
    EVEN,
    FEW,
    STEPS,
    UNEVEN,
    VECTORS,
    Dies,
    Net,
    Result,
    counted,
    every,
    parameters,
    phase,
    state_bytes,
)
from tests.models import generator

Mesh = tuple[DeviceMesh, tuple[Placement, ...]]
MANY = [(64, 64)] * 128
TRAINED = [case for case in CASES if case not in DTYPES]
SIZED = "sgd under SpectralNormalization"


def meshes(ranks: int) -> dict[str, Mesh]:
    found: dict[str, Mesh] = {"fsdp": (init_device_mesh("cpu", (ranks,)), (Shard(0),))}
    return found | ({"hsdp": (init_device_mesh("cpu", (2, 2)), (Replicate(), Shard(0)))} if ranks == 4 else {})


# -- optimizers alone -----------------------------------------------------------------------------------------------


def placed(x: Tensor, mesh: Mesh | None) -> Tensor:
    """Return a tensor as it lies on a mesh; every rank has the whole, and nothing is sent."""
    if mesh is None or not x.dim():
        return x
    return distribute_tensor(x, *mesh, src_data_rank=None)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def step(optimizer: StackedOptimizer, seed: int, mesh: Mesh | None, seldom: int) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        noise = torch.randn(p.shape, generator=generator(100 * seed + i)).to(p.dtype)
        present = p.requires_grad and (i != seldom or seed % 4)
        p.grad = placed(noise, mesh) if present else None
    optimizer.step()


def trained(case: str, shapes: list[tuple[int, ...]], mesh: Mesh | None, bucket_bytes: int = 2**14) -> Result:
    kind, settings = CASES[case]
    drawn = parameters(shapes, DTYPES.get(case, torch.float32))
    params: list[Tensor] = [nn.Parameter(placed(p.detach(), mesh)) for p in drawn]
    params[1 % len(params)].requires_grad_(False)
    with patch.object(ShardedOwnership.__init__, "__kwdefaults__", {"bucket_bytes": bucket_bytes, "beside": None}):
        optimizer = kind(params[:-1] or params, lr=0.02, **settings)
    if len(params) > 1:
        optimizer.add_param_group({"params": params[-1:]})
    with counted() as matrices:
        for seed in range(STEPS):
            step(optimizer, seed, mesh, seldom=1 if shapes == ALIKE else 3)
    ownership = optimizer._ownership
    return {
        "weights": [whole(p) for p in params],
        "state bytes": state_bytes(optimizer),
        "matrices": matrices[0],
        "state": optimizer.whole_state_dict(),
        "traffic": None if ownership is None else ownership.traffic.bytes,
    }


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are held at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._now = 0, 0
        self._holders: dict[int, int] = {}  # by storage, tensors that are alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in (x for x in tree_leaves(out) if isinstance(x, Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in self._holders and storage._cdata in given:
                continue  # a part of what was there before
            if storage._cdata not in self._holders:
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
            self._holders[storage._cdata] = self._holders.get(storage._cdata, 0) + 1
            weakref.finalize(x, self._let_go, storage._cdata, storage.nbytes())
        return out

    def _let_go(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self._now -= size


def most_bytes(bucket_bytes: int, mesh: Mesh) -> int:
    """Return the most memory that a step of Muon on many matrices takes beyond what there is before it."""
    params = [nn.Parameter(placed(p.detach(), mesh)) for p in parameters(MANY)]
    with patch.object(ShardedOwnership.__init__, "__kwdefaults__", {"bucket_bytes": bucket_bytes, "beside": None}):
        optimizer = mup.Muon(params, lr=0.02)
    for p in params:
        p.grad = placed(torch.ones(p.shape), mesh)
    optimizer.step()
    with Memory() as found:
        optimizer.step()
    return found.most


def not_finite(nonfinite: str, mesh: Mesh) -> Result:
    """One rank has a part that is not a number."""
    params = [nn.Parameter(placed(p.detach(), mesh)) for p in parameters([(16, 16)] * 3)]
    before, error = [whole(p) for p in params], ""
    optimizer = mup.Muon(params, lr=0.1, nonfinite=nonfinite)
    for p in params:
        p.grad = torch.ones_like(p)
    if get_rank() == 1:
        assert isinstance(params[2].grad, DTensor)
        params[2].grad.to_local()[0] = float("nan")
    try:
        optimizer.step()
    except NonFiniteGradientError as found:
        error = str(found)
    return {"error": error, "unmoved": all(map(torch.equal, before, map(whole, params)))}


def optimizers(folder: Path, ranks: int) -> Result:
    """Run what needs no Trainer."""
    init_process_group("gloo", timeout=timedelta(seconds=60))
    shapes = {f"{case}, even": [*EVEN, *VECTORS] for case in CASES}
    shapes |= {f"{case}, uneven": [*UNEVEN, *VECTORS] for case in ("muon", "shampoo in blocks", "adam")}
    shapes |= {f"{case}, alike": ALIKE for case in ("adam", "muon", "shampoo", "soap in blocks")}
    shapes |= {f"{case}, few": FEW for case in ("muon", "shampoo")}
    found: Result = {}
    made = meshes(ranks)
    for name, those in shapes.items():
        ways: dict[str, Mesh | None] = {"one": None, **made}
        found[name] = {way: trained(name.split(", ")[0], those, mesh) for way, mesh in ways.items()}
    found["most bytes"] = {size: most_bytes(size, made["fsdp"]) for size in (2**16, 2**24)}
    found |= {f"not finite, {what}": not_finite(what, made["fsdp"]) for what in ("raise", "skip")}
    destroy_process_group()
    return found


# -- with a Trainer -------------------------------------------------------------------------------------------------


def fit(strategy: Any, ranks: int, *callbacks: Callback, steps: int = STEPS, **kwargs: Any) -> Result:
    torch.manual_seed(1)
    resume, device = kwargs.pop("resume", None), kwargs.pop("device", "cpu")
    with torch.device(device):
        module = Net(**kwargs.pop("module", {}))
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=ranks,
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **kwargs},
    )
    trainer.fit(module, ckpt_path=resume)
    sharded = all(isinstance(p, DTensor) for p in module.parameters())
    weights = {name: whole(p) for name, p in module.named_parameters()}
    return {"weights": weights, "sharded": sharded, "state bytes": state_bytes(trainer.optimizers[0])}


def ways(ranks: int) -> dict[str, Callable[[], Any]]:
    """Return strategies by name; those of one process are none."""
    if ranks == 1:
        return {"one": lambda: "auto"}
    found: dict[str, Callable[[], Any]] = {"ddp": lambda: MupDDPStrategy(find_unused_parameters=True)}
    found["fsdp"] = MupFSDPStrategy
    return found | ({"hsdp": lambda: MupFSDPStrategy(replicas=2)} if ranks == 4 else {})


def training(folder: Path, ranks: int) -> Result:
    """Train by every method, clipping and accumulating."""
    found: Result = {}
    for way, strategy in ways(ranks).items():
        for case in TRAINED:
            found[f"{case}, {way}"] = fit(strategy(), ranks, module={"method": case}, accumulate_grad_batches=2)
        sized = SpectralNormalization(roles={"seldom.weight": "hidden"})
        found[f"{SIZED}, {way}"] = fit(strategy(), ranks, sized, module={"method": "sgd"})
    if ranks == 1:
        return found
    said: list[str] = []
    with patch.object(division, "rank_zero_info", said.append), patch.object(mup_fsdp, "rank_zero_info", said.append):
        fit("mup_fsdp", ranks, steps=2)
    return {**found, "said": said}


def saving(folder: Path, ranks: int) -> Result:
    one_file = MupFSDPStrategy(replicas=2, save_distributed_checkpoint=False)
    return {
        "whole": fit(MupFSDPStrategy(), ranks, every(folder / "folders")),
        "hsdp, one file": fit(one_file, ranks, every(folder / "files")),
        "meta": fit(MupFSDPStrategy(), ranks, drawn(), steps=0, device="meta"),
    }


def drawn() -> Parametrize:
    return Parametrize(lambda: Net(16), roles={"seldom.weight": "hidden"}, initialize="draw")


def resuming(folder: Path, ranks: int) -> Result:
    """Go on from the tenth step of a folder and of a file."""
    files = {kind: folder / kind / "step=10.ckpt" for kind in ("folders", "files")}
    found = {kind: fit(MupFSDPStrategy(), ranks, resume=file) for kind, file in files.items()}
    return {**found, "meta": fit(MupFSDPStrategy(), ranks, drawn(), steps=0, device="meta")}


def killed(folder: Path, ranks: int) -> Result:
    return {"killed": fit(MupFSDPStrategy(timeout=timedelta(seconds=20)), ranks, every(folder / "killed", 1), Dies())}


def after_the_kill(folder: Path, ranks: int) -> Result:
    last = max((folder / "killed").glob("*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))
    whole_run = fit(MupFSDPStrategy(), ranks)
    return {"last": last.stem, "resumed": fit(MupFSDPStrategy(), ranks, resume=last), "whole": whole_run}


PHASES = [
    ("optimizers", 4, optimizers),
    ("optimizers", 2, optimizers),
    ("training", 1, training),
    ("training", 4, training),
    ("training", 2, training),
    ("saving", 4, saving),
    ("resuming", 3, resuming),
    ("resuming", 2, resuming),
    ("resuming", 1, resuming),
    ("killed", 2, killed),
    ("after the kill", 2, after_the_kill),
]


def main(folder: Path) -> None:
    codes = {}
    for name, ranks, work in PHASES:
        codes[name] = phase(name, ranks, work, folder)
        if name != "killed" and any(codes[name]):
            sys.exit(f"{name} on {ranks} ranks: {codes[name]}")
    torch.save(codes, folder / "codes.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
