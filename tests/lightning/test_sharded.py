"""What SpectralNormalization says of sharded parameters, of which no rank has a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_mup.callbacks.spectral_normalization import SpectralNormalization
from tests.lightning.helpers import Net, trainer


@pytest.fixture
def sharded() -> Iterator[Net]:
    """Return a module whose second matrix is sharded over the one rank that there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = Net(16, make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        mesh = init_device_mesh("cpu", (1,))
        module.net[2].weight = nn.Parameter(distribute_tensor(module.net[2].weight.detach(), mesh, [Shard(0)]))
        yield module
    finally:
        dist.destroy_process_group()


def test_spectral_normalization_refuses_sharded_matrices(sharded: Net) -> None:
    wanted = r"SpectralNormalization needs whole matrices, got a DTensor of shape \(16, 16\); use DDP"
    with pytest.raises(TypeError, match=wanted):
        trainer(SpectralNormalization()).fit(sharded)
