"""Gather whole tensors from shards at their owners, and scatter them again, on four ranks (gloo, CPU).

Usage: python -m tests.distributed.sharding FOLDER
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lightning_mup.core.shards import Shards, pieces_of
from tests.distributed.dividing import Result, phase
from tests.models import generator

RANKS = 4
SHAPES = [(8, 4), (5, 3), (7,), (1, 4), (3, 7), (2, 3, 5), (6, 6)]
MESHES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "sharded": ((4,), (Shard(0),)),
    "replicated": ((4,), (Replicate(),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "with tensor parallelism": ((2, 2), (Shard(0), Shard(-1))),
    "columns": ((4,), (Shard(-1),)),
}


def wholes() -> list[Tensor]:
    drawn = [torch.randn(shape, generator=generator(i)) for i, shape in enumerate(SHAPES)]
    return [x.to(torch.bfloat16) if i == len(SHAPES) - 1 else x for i, x in enumerate(drawn)]


def owners() -> list[int]:
    return [(3 * i + 1) % RANKS for i in range(len(SHAPES))]


def through(shape: tuple[int, ...], placements: tuple[Placement, ...]) -> Result:
    mesh = init_device_mesh("cpu", shape)
    sharded = [distribute_tensor(x, mesh, placements) for x in wholes()]
    assert all(isinstance(x, DTensor) for x in sharded)
    locals_ = [x.to_local() for x in sharded]
    shards = Shards(pieces_of(sharded), SHAPES, owners(), torch.device("cpu"))
    gathered = shards.gather(locals_).wait()
    scattered = shards.scatter([x if x is None else x * 2 for x in gathered], [x.dtype for x in locals_]).wait()
    return {"gathered": gathered, "scattered": [x.clone() for x in scattered], "locals": locals_}


def meshes(folder: Path, ranks: int) -> Result:
    init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {name: through(*mesh) for name, mesh in MESHES.items()}
    found["rank"] = {"rank": get_rank()}
    destroy_process_group()
    return found


if __name__ == "__main__":
    sys.exit(any(phase("meshes", RANKS, meshes, Path(sys.argv[1]))))
