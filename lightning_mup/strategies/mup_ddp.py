"""MupDDPStrategy: DDP under which each matrix' optimizer state and step are one rank's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lightning_mup.core.ownership import Elementwise, Ownership, Traffic, assign, deferred_state, is_shared
from lightning_mup.strategies.division import divide, stacked_in, whole_state

_MB = 2**20


class MupDDPStrategy(DDPStrategy):
    """DDP that keeps the optimizer's state, and computes its steps, once across the ranks.

    Every matrix of this package's optimizers, :class:`~lightning_mup.Grafted` ones included, has an owner among the
    ranks: the one that keeps its state and takes its steps, whose new weights then go to all, while the next ones are
    being computed. Matrices are divided by how much their methods compute, so that a stack of one shape is spread
    evenly. Vectors under elementwise methods stay with every rank, as do torch's optimizers. The weights are those of
    DDP: bit for bit where rows are whole 64-byte lines, to the last digits elsewhere, since BLAS looks at alignment.

    Bytes that a rank sends, and as many that it receives, per step, for P bytes of matrices over R ranks:

    ===========  =================  ===============  ==================  ===============
    strategy     gradients          weights          float32 entry, R=8  state of a rank
    ===========  =================  ===============  ==================  ===============
    ``ddp``      2 P (R - 1) / R    0                7 bytes             all
    ``mup_ddp``  2 P (R - 1) / R    P (R - 1) / R    10.5 bytes          all / R
    ===========  =================  ===============  ==================  ===============

    It is the same for all methods: what they remember stays where it is. Theirs is, in units of a square float32
    matrix, SGD and Muon 1, Adam and AdaMuon 2, Shampoo 5, SOAP 6; of operations, all fall as 1 / R.

    A checkpoint is one file, with everybody's state by parameter: it is collected when saved, and each rank takes its
    part when loading, on any number of ranks, or in one process without this strategy; that is, files are those of
    ``ddp``. A gradient that is not finite on any rank stops, or with ``nonfinite="skip"`` skips, the step on all.

    Args:
        elementwise: whether matrices under elementwise methods (Adam), whose steps are cheaper than to send them, are
            ``"divide"``-d for the sake of state, or ``"replicate"``-d.
        exchange_mb: megabytes that all ranks together exchange at once (> 0); less overlaps better, more is computed
            faster.
        checkpoint_io, cluster_environment, precision_plugin, process_group_backend, timeout, start_method: see
            Lightning's ``DDPStrategy``.
        ddp_comm_hook, ddp_comm_state, ddp_comm_wrapper: see there; whatever makes gradients differ between ranks
            (local SGD) cannot be divided.
        find_unused_parameters, gradient_as_bucket_view, static_graph, bucket_cap_mb: see torch's
            ``DistributedDataParallel``.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="mup_ddp", barebones=True)
        >>> type(trainer.strategy).__name__
        'MupDDPStrategy'

    Reference:
        Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), stage 1, with whole matrices; Shi et al. 2023 (Distributed
        Shampoo, arXiv:2309.06497).
    """

    def __init__(  # noqa: PLR0913 - torch's and Lightning's settings, each named
        self,
        *,
        elementwise: Elementwise = "divide",
        exchange_mb: float = 128.0,
        checkpoint_io: CheckpointIO | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_state: object | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
    ) -> None:
        if elementwise not in ("divide", "replicate") or not exchange_mb > 0:
            raise ValueError(
                f"elementwise must be 'divide' or 'replicate', and exchange_mb > 0, got {elementwise!r} and "
                f"{exchange_mb!r}"
            )
        if hasattr(ddp_comm_state, "start_localSGD_iter"):
            raise ValueError(
                f"{type(ddp_comm_state).__name__} lets ranks have gradients of their own, of which an owner sees one "
                f"only; use strategy='ddp'"
            )
        super().__init__(
            checkpoint_io=checkpoint_io,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            ddp_comm_hook=ddp_comm_hook,
            ddp_comm_state=ddp_comm_state,
            ddp_comm_wrapper=ddp_comm_wrapper,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
            bucket_cap_mb=bucket_cap_mb,
        )
        self.elementwise, self.exchange_mb = elementwise, exchange_mb
        self.traffic: Traffic | None = None

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the optimizers without state, and divide them; their state is then made where it belongs."""
        self.traffic = None
        with deferred_state() if self.world_size > 1 else contextlib.nullcontext():
            super().setup_optimizers(trainer)
        if self.world_size == 1:
            return
        self.traffic = divide("mup_ddp", self.optimizers, self._ownership)

    def _ownership(self, beside: Ownership | None) -> Ownership:
        size = max(1, int(self.exchange_mb * _MB))
        return Ownership(elementwise=self.elementwise, bucket_bytes=size, beside=beside)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return an optimizer's whole state on the first rank, {} elsewhere; all ranks call it."""
        return whole_state(getattr(optimizer, "_optimizer", optimizer))

    def teardown(self) -> None:
        """Say what was sent, and let go."""
        if self.traffic is not None and self.traffic.steps:
            rank_zero_info(f"mup_ddp: {self.traffic}, in {self.traffic.steps} steps.")
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:  # noqa: ANN401 - Lightning's type is private
        """Register the names ``mup_ddp``, ``mup_ddp_spawn``, ``mup_ddp_fork``, and each with unused parameters."""
        for suffix, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
            for unused in (False, True):
                name = f"mup_ddp{suffix}{'_find_unused_parameters_true' if unused else ''}"
                strategy_registry.register(
                    name,
                    cls,
                    description=f"DDP that divides optimizer state and steps; processes start by {method}",
                    override=True,
                    start_method=method,
                    find_unused_parameters=unused,
                )


def say_what_is_replicated(trainer: Trainer) -> None:
    """Say, under plain DDP over several ranks, what dividing this package's optimizers would save.

    Examples:
        >>> say_what_is_replicated(Trainer(barebones=True, accelerator="cpu"))
    """
    strategy, ranks = trainer.strategy, trainer.world_size
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, MupDDPStrategy) or ranks == 1:
        return
    loads = [load for whole in trainer.optimizers for part in stacked_in(whole) for load in part.loads()]
    divided = [load for load in loads if not is_shared(load, "divide")]
    if not divided:
        return
    each = [(0.0, 0)] * ranks
    assign(divided, each)
    work, size = (sum(values) for values in zip(*each, strict=True))
    share = max(work for work, _ in each) / work if work else 0.0
    rank_zero_info(
        f"Every one of the {ranks} ranks keeps {size / 1e6:.3g} MB of optimizer state and computes all steps; "
        f"strategy='mup_ddp' would leave each at most {max(size for _, size in each) / 1e6:.3g} MB and "
        f"{share:.0%} of the work, for sending the weights once a step."
    )


MupDDPStrategy.register_strategies(StrategyRegistry)
