"""Which parts of a module FSDP2 shards together, for modules that do not shard themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Return the blocks of a module: the outermost members of lists that have parameters and parts of their own.

    Examples:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> net = nn.ModuleDict({"embed": nn.Embedding(8, 4), "blocks": nn.ModuleList([block(), block()])})
        >>> [type(found).__name__ for found in blocks_of(net)]
        ['Sequential', 'Sequential']
    """
    for child in module.children():
        is_block = isinstance(module, _LISTS) and not isinstance(child, _LISTS[:2])
        if is_block and any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from blocks_of(child)


def shard(
    module: LightningModule,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
) -> None:
    """Shard a module: each block on its own, so that one of them at a time is whole, and the rest with the module.

    The module's steps become what FSDP2 takes for its forward, so that parameters that stand in the module itself are
    whole inside them. Values are the first rank's.

    Args:
        module: what is to be trained; not sharded so far.
        mesh: one axis to shard along; or two, replicas and shards (HSDP).
        reshard_after_forward: see ``fully_shard``.
        mp_policy: see there; None for the parameters' own precision.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            dist.broadcast(tensor.detach(), src=0)
    for part in (*blocks_of(module), module):
        fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=mp_policy or MixedPrecisionPolicy(),
        )
    for step in _STEPS:
        if is_overridden(step, module):
            register_fsdp_forward_method(module, step)
