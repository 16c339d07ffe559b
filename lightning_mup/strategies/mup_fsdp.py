"""MupFSDPStrategy: FSDP2 and HSDP under which each matrix' optimizer state and step are one rank's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mup.core.ownership import Ownership, Traffic, deferred_state
from lightning_mup.core.sharding import ShardedOwnership
from lightning_mup.strategies.division import divide
from lightning_mup.strategies.shard_modules import shard
from lightning_mup.strategies.sharded_checkpoint import load, remove, replace, state_of

_MB = 2**20
_PART = ".part"  # of a checkpoint's name, until it is whole


class MupFSDPStrategy(ModelParallelStrategy):
    """FSDP2 that keeps the optimizer's state, and computes its steps, once across the ranks.

    Weights, gradients, and the state of elementwise methods (Adam) are sharded by torch's ``fully_shard``. Every other
    matrix of this package's optimizers has an owner among all ranks, which is sent its whole gradient, keeps its state
    (momentum, factors, roots), computes its update and sends each rank its part, while the next ones are on their way.
    The weights are those of one process up to the order in which gradients are summed.

    A module that overrides ``configure_model`` shards itself there, along ``self.device_mesh["data_parallel"]``, and
    may apply tensor parallelism along ``self.device_mesh["tensor_parallel"]``. Any other is sharded by the strategy:
    each block of its lists on its own, the rest with the module. One that was built on the meta device gets its memory
    shard by shard, and from :class:`~lightning_mup.Parametrize` the initial values of its plan, which are the same at
    every number of ranks.

    Bytes that a rank sends, and as many that it receives, per step, for P bytes of matrices over R ranks (HSDP: R / S
    replicas of S shards), beside 3 P (S - 1) / S for FSDP2 itself and 2 P / S for the mean over replicas:

    ==================  ==============  ===========  ====================
    method              gradients       updates      state of a rank
    ==================  ==============  ===========  ====================
    Adam, SGD           0               0            all / S
    Muon, SOAP, ...     P / R           P / S        all / R
    ==================  ==============  ===========  ====================

    A checkpoint is a folder of torch's distributed format, with state by the parameter's name; any number of ranks
    resumes it. With ``save_distributed_checkpoint=False`` it is one file, that of plain ``ddp``, which every strategy
    and a single process load; so is what :func:`~lightning_mup.strategies.sharded_checkpoint.consolidate` makes of a
    folder. Either is written under another name, and renamed when it is whole. (Lightning's own ModelParallelStrategy
    trains with this package's optimizers, too, but cannot load their state again.)

    Args:
        replicas: number of copies of the weights, each sharded over the ranks of its own (HSDP); divides the number of
            ranks.
        tensor_parallel_size: number of ranks among which ``configure_model`` divides single layers.
        save_distributed_checkpoint: whether checkpoints are folders; False makes one file, for which the first rank
            needs memory for everything.
        exchange_mb: megabytes of gradients, and as many of updates, that all ranks together exchange at once (> 0).
        reshard_after_forward: see ``fully_shard``; for modules that the strategy shards, as are the next two.
        mp_policy: precision of computation and reduction; None for the parameters' own.
        process_group_backend, timeout: see Lightning's ``ModelParallelStrategy``.

    Raises:
        ValueError: a setting is out of range, or does not divide the number of ranks.

    Examples:
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="mup_fsdp", barebones=True)
        >>> type(trainer.strategy).__name__
        'MupFSDPStrategy'

    Reference:
        Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), stage 3; Zhao et al. 2023 (FSDP, arXiv:2304.11277); Shi et
        al. 2023 (Distributed Shampoo, arXiv:2309.06497).
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        exchange_mb: float = 128.0,
        reshard_after_forward: bool | int | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        if replicas < 1 or tensor_parallel_size < 1 or not exchange_mb > 0:
            raise ValueError(
                f"replicas and tensor_parallel_size must be 1 or more, and exchange_mb > 0, got {replicas}, "
                f"{tensor_parallel_size} and {exchange_mb!r}"
            )
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.replicas, self.exchange_mb = replicas, exchange_mb
        self.traffic: Traffic | None = None
        self._reshard, self._precision = reshard_after_forward, mp_policy

    # -- mesh and module ------------------------------------------------------------------------------------------

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh along which ``fully_shard`` is to shard: ``("data_parallel",)``, or ``("replicate", "shard")``."""
        mesh = self.device_mesh
        return mesh["data_parallel"] if self.replicas == 1 else mesh["replicate", "shard"]

    def setup_environment(self) -> None:
        """Start the process group, and divide its ranks into replicas, shards, and parts of layers.

        Raises:
            ValueError: the number of ranks does not divide that way.
        """
        ranks, parts = self.num_nodes * self.num_processes, int(self._tensor_parallel_size)
        if ranks % (parts * self.replicas):
            raise ValueError(
                f"{ranks} ranks cannot be divided into replicas={self.replicas} x shards x "
                f"tensor_parallel_size={parts}; their product must divide the number of ranks"
            )
        self._data_parallel_size = ranks // parts
        super().setup_environment()
        if self.replicas > 1:
            sizes = (self.replicas, ranks // parts // self.replicas, parts)
            names = ("replicate", "shard", "tensor_parallel")
            self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
            self._device_mesh["replicate", "shard"]._flatten("data_parallel")
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: Trainer) -> None:
        """Shard the module where it did not do so itself; build the optimizers, and divide them."""
        module = self.lightning_module
        assert module is not None
        if is_overridden("configure_model", module):
            super().setup(trainer)
            return
        if not any(isinstance(p, DTensor) for p in module.parameters()):
            shard(module, self.shard_mesh, reshard_after_forward=self._reshard, mp_policy=self._precision)
        with _said_to_configure(module):
            super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the optimizers without state, and divide them; their state is then made where it belongs."""
        with deferred_state():
            super().setup_optimizers(trainer)
        self.traffic = divide("mup_fsdp", self.optimizers, self._ownership)

    def _ownership(self, beside: Ownership | None) -> Ownership:
        return ShardedOwnership(bucket_bytes=max(1, int(self.exchange_mb * _MB)), beside=beside)

    def teardown(self) -> None:
        """Say what was sent, and let go."""
        if self.traffic is not None and self.traffic.steps:
            rank_zero_info(f"mup_fsdp: {self.traffic}, in {self.traffic.steps} steps.")
        super().teardown()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state by name, as this rank has it; or for one file, on the first rank, the whole."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        return state_of(inner, self.model, whole=not self._save_distributed_checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: object | None = None
    ) -> None:
        """Write a checkpoint under another name, and rename it when all ranks have written; all ranks call it."""
        path = Path(self.broadcast(filepath))
        part = path.with_name(path.name + _PART)
        if self.is_global_zero:
            remove(part)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace(part, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and state from a folder that any number of ranks wrote, or from one file of any strategy.

        Returns:
            the rest of the checkpoint.
        """
        assert self.model is not None
        assert self.lightning_module is not None
        return load(
            Path(self.broadcast(checkpoint_path)),
            self.model,
            self.optimizers,
            strict=self.lightning_module.strict_loading,
            weights_only=weights_only,
        )

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:  # noqa: ANN401 - Lightning's type is private
        """Register the name ``mup_fsdp``."""
        strategy_registry.register(
            "mup_fsdp", cls, description="FSDP2 that divides optimizer state and steps", override=True
        )


@contextlib.contextmanager
def _said_to_configure(module: LightningModule) -> Iterator[None]:
    """Let a module pass for one that shards itself, as Lightning insists on."""
    module.configure_model = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.configure_model


MupFSDPStrategy.register_strategies(StrategyRegistry)
