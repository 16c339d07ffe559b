"""What the benchmark times, as data: each row is an optimizer under settings, and the work that it cannot avoid."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

CONTROL = "torch AdamW, foreach"

# The distribution to install for each package that a row may come from.
DISTRIBUTIONS = {
    "lightning_mup": "lightning_mup",
    "torch": "torch",
    "pytorch_optimizer": "pytorch-optimizer",
    "heavyball": "heavyball",
}

# Shapes of the parameters at width n.
MODELS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "squares": lambda n: [(n, n)] * 6,
    "transformer": lambda n: [(n, n)] * 4 + [(4 * n, n), (n, 4 * n)],  # q, k, v, o and the two of the MLP
}

# Floating-point operations of matrix products, for one matrix of m rows and n columns.
FLOPS: dict[str, Callable[[int, int], float]] = {
    # one Newton-Schulz iteration on the short side d: X X^T, A A and B X
    "newton_schulz": lambda m, n: 4.0 * min(m, n) * m * n + 2.0 * min(m, n) ** 3,
    # one product with a square matrix from either side, or both second moments G G^T and G^T G
    "two_sided": lambda m, n: 2.0 * m * n * (m + n),
    # one product of two square matrices on either side
    "square": lambda m, n: 2.0 * (m**3 + n**3),
}
FACTORIZATIONS: dict[str, Callable[[torch.Tensor], object]] = {"eigh": torch.linalg.eigh, "qr": torch.linalg.qr}


@dataclass(frozen=True)
class Work:
    """What a step of one matrix costs at least: counts of the products and factorizations named above.

    Args:
        counts: number per step of each unit of ``FLOPS`` (both sides together) and ``FACTORIZATIONS`` (of each side).
        block: largest side of a block.
        dtype: dtype of the products.
    """

    counts: Mapping[str, float]
    block: int | None = None
    dtype: torch.dtype = torch.float32

    def flops(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Return the floating-point operations of a step's products."""
        return sum(
            FLOPS[unit](*size) * count
            for size in self._blocks(shapes)
            for unit, count in self.counts.items()
            if unit in FLOPS
        )

    def factorizations(self, shapes: Sequence[tuple[int, int]]) -> dict[tuple[str, int], float]:
        """Return how many times per step each factorization is made of a matrix of each size."""
        found: dict[tuple[str, int], float] = {}
        for size in self._blocks(shapes):
            for unit in self.counts.keys() & FACTORIZATIONS.keys():
                for side in size:
                    found[unit, side] = found.get((unit, side), 0.0) + self.counts[unit]
        return found

    def _blocks(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        if self.block is None:
            return list(shapes)
        sides = [(min(m, self.block), min(n, self.block)) for m, n in shapes]
        counts = [math.ceil(m / p) * math.ceil(n / q) for (m, n), (p, q) in zip(shapes, sides, strict=True)]
        return [block for block, count in zip(sides, counts, strict=True) for _ in range(count)]


@dataclass(frozen=True)
class Row:
    """An optimizer under settings.

    Args:
        label: how tables call it.
        target: ``module:class``.
        settings: keyword arguments besides ``lr`` and ``weight_decay``, which are the same for all.
        like: label of our row that does the same under the same settings; its work is the floor of this one too.
        period: number of steps after which costs repeat; whole periods are timed.
        work: what a step cannot avoid; None where products are not what it costs.
        group: keys of the parameter group.
        prepare: called once, before the optimizer is made.
    """

    label: str
    target: str
    settings: Mapping[str, object] = field(default_factory=dict)
    like: str | None = None
    period: int = 1
    work: Work | None = None
    group: Mapping[str, object] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None

    @property
    def package(self) -> str:
        """Name of the package that it comes from."""
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def missing(self) -> str | None:
        """What to install before this can run; None if it can."""
        return None if importlib.util.find_spec(self.package) else DISTRIBUTIONS[self.package]

    def build(self, params: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters."""
        module, _, name = self.target.partition(":")
        if self.prepare is not None:
            self.prepare()
        cls = getattr(importlib.import_module(module), name)
        group = {"params": list(params), **self.group}
        optimizer: torch.optim.Optimizer = cls([group], lr=1e-4, weight_decay=0.0, **self.settings)
        return optimizer


def _run_eagerly() -> None:
    """Keep heavyball from compiling its functions, so that all rows run eagerly."""
    module: Any = importlib.import_module("heavyball.utils")
    module.compile_mode = None


def _multiply_in_float32() -> None:
    """Let pytorch-optimizer's Muon, which has no setting for it, iterate in float32."""
    module: Any = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    given = module.zero_power_via_newton_schulz_5
    module.zero_power_via_newton_schulz_5 = functools.partial(given, dtype=torch.float32)


def _converge_alike() -> None:
    """Let pytorch-optimizer's Newton roots, which stop at a residual of 1e-3, go on to 1e-6 as ours do."""
    module: Any = importlib.import_module("pytorch_optimizer.optimizer.utils.preconditioner")
    module.compute_power_schur_newton = functools.partial(module.compute_power_schur_newton, error_tolerance=1e-6)


_BF16, _FP32 = {"ns_dtype": torch.bfloat16}, {"ns_dtype": None}
_NS_BF16 = Work({"newton_schulz": 5}, dtype=torch.bfloat16)
_NS_FP32 = Work({"newton_schulz": 5})


def _soap(every: int, block: int | None = None) -> Work:
    # Both factors, then the gradient and the momentum into the basis and the update out of it; P Q before each QR.
    return Work({"two_sided": 4, "square": 1 / every, "qr": 1 / every}, block)


def _shampoo(every: int, block: int | None = None) -> Work:
    # Both factors and both sides of the update; V w V^T after each eigendecomposition.
    return Work({"two_sided": 2, "square": 1 / every, "eigh": 1 / every}, block)


_SOAP_1 = {"precondition_every": 1, "warmup_steps": 1, "warmup": "eigh"}
_SOAP_10 = {"precondition_every": 10, "warmup_steps": 1, "warmup": "eigh"}
_EIGH_1 = {"root": "eigh", "precondition_every": 1}
_EIGH_10 = {"root": "eigh", "precondition_every": 10}
_NEWTON_10 = {"root": "newton", "precondition_every": 10}

OURS = (
    Row("SGD, momentum", "lightning_mup:SGD", {"momentum": 0.9}),
    Row("Adam", "lightning_mup:Adam"),
    Row("AdamW", "lightning_mup:AdamW"),
    Row("AdamW, gradients not checked", "lightning_mup:AdamW", {"nonfinite": "ignore"}),
    Row("AdamAtan2", "lightning_mup:AdamAtan2"),
    Row("Muon, bf16 products", "lightning_mup:Muon", _BF16, work=_NS_BF16),
    Row("Muon, fp32 products", "lightning_mup:Muon", _FP32, work=_NS_FP32),
    Row("Muon, fp32, Adam's graft", "lightning_mup:Muon", {**_FP32, "graft": "adam"}, work=_NS_FP32),
    Row("AdaMuon, bf16 products", "lightning_mup:AdaMuon", _BF16, work=_NS_BF16),
    Row("AdaMuon, fp32 products", "lightning_mup:AdaMuon", _FP32, work=_NS_FP32),
    Row("SOAP, every step", "lightning_mup:SOAP", _SOAP_1, work=_soap(1)),
    Row("SOAP, every 10", "lightning_mup:SOAP", _SOAP_10, period=10, work=_soap(10)),
    Row(
        "SOAP, every 10, blocks of 256",
        "lightning_mup:SOAP",
        {**_SOAP_10, "block_size": 256},
        period=10,
        work=_soap(10, 256),
    ),
    Row("Shampoo, eigh every step", "lightning_mup:Shampoo", _EIGH_1, work=_shampoo(1)),
    Row("Shampoo, eigh every 10", "lightning_mup:Shampoo", _EIGH_10, period=10, work=_shampoo(10)),
    Row(
        "Shampoo, eigh every 10, blocks of 256",
        "lightning_mup:Shampoo",
        {**_EIGH_10, "block_size": 256},
        period=10,
        work=_shampoo(10, 256),
    ),
    Row(
        "Shampoo, eigh every 10, Adam's graft",
        "lightning_mup:Shampoo",
        {**_EIGH_10, "graft": "adam"},
        period=10,
        work=_shampoo(10),
    ),
    # The number of Newton's iterations follows from the data, so no floor is given.
    Row("Shampoo, Newton every 10", "lightning_mup:Shampoo", _NEWTON_10, period=10),
)

TORCH = (
    Row(CONTROL, "torch.optim:AdamW", {"foreach": True}, like="AdamW"),
    Row("torch AdamW, fused", "torch.optim:AdamW", {"fused": True}, like="AdamW"),
    Row("torch SGD, momentum", "torch.optim:SGD", {"momentum": 0.9}, like="SGD, momentum"),
    Row("torch Muon, bf16 products", "torch.optim:Muon", like="Muon, bf16 products"),
)

_MUON = {"use_muon": True}
# Averages of the factors, no graft, no warm-up, no blocks: what ours does by default.
_SCALABLE = {
    "betas": (0.9, 0.95),
    "start_preconditioning_step": 1,
    "graft_type": 0,
    "block_size": 1 << 20,
    "nesterov": False,
    "moving_average_for_momentum": True,
    "shape_interpretation": False,
}
_SVD_1 = {**_SCALABLE, "use_svd": True, "preconditioning_compute_steps": 1}
_SVD_10 = {**_SCALABLE, "use_svd": True, "preconditioning_compute_steps": 10}
_SCHUR_10 = {**_SCALABLE, "use_svd": False, "preconditioning_compute_steps": 10}

PYTORCH_OPTIMIZER = (
    Row(
        "pytorch-optimizer Muon, bf16 products",
        "pytorch_optimizer:Muon",
        like="Muon, bf16 products",
        group=_MUON,
    ),
    Row(
        "pytorch-optimizer Muon, fp32 products",
        "pytorch_optimizer:Muon",
        like="Muon, fp32 products",
        group=_MUON,
        prepare=_multiply_in_float32,
    ),
    Row(
        "pytorch-optimizer AdaMuon, bf16 products",
        "pytorch_optimizer:AdaMuon",
        {"foreach": True},
        like="AdaMuon, bf16 products",
        group=_MUON,
    ),
    Row(
        "pytorch-optimizer SOAP, every step",
        "pytorch_optimizer:SOAP",
        {"precondition_frequency": 1},
        like="SOAP, every step",
    ),
    Row(
        "pytorch-optimizer SOAP, every 10",
        "pytorch_optimizer:SOAP",
        {"precondition_frequency": 10},
        like="SOAP, every 10",
        period=10,
    ),
    Row(
        "pytorch-optimizer Shampoo, SVD every step",
        "pytorch_optimizer:ScalableShampoo",
        _SVD_1,
        like="Shampoo, eigh every step",
    ),
    Row(
        "pytorch-optimizer Shampoo, SVD every 10",
        "pytorch_optimizer:ScalableShampoo",
        _SVD_10,
        like="Shampoo, eigh every 10",
        period=10,
    ),
    Row(
        "pytorch-optimizer Shampoo, SVD every 10, blocks of 256",
        "pytorch_optimizer:ScalableShampoo",
        {**_SVD_10, "block_size": 256},
        like="Shampoo, eigh every 10, blocks of 256",
        period=10,
    ),
    Row(
        "pytorch-optimizer Shampoo, Newton every 10",
        "pytorch_optimizer:ScalableShampoo",
        _SCHUR_10,
        like="Shampoo, Newton every 10",
        period=10,
        prepare=_converge_alike,
    ),
)

_WHOLE = {"max_precond_dim": 1 << 20, "merge_dims": False}

HEAVYBALL = (
    Row("heavyball AdamW", "heavyball:AdamW", like="AdamW", prepare=_run_eagerly),
    Row("heavyball Muon, bf16 products", "heavyball:Muon", like="Muon, bf16 products", prepare=_run_eagerly),
    Row(
        "heavyball SOAP, every step",
        "heavyball:SOAP",
        {**_WHOLE, "precondition_frequency": 1},
        like="SOAP, every step",
        prepare=_run_eagerly,
    ),
    Row(
        "heavyball SOAP, every 10",
        "heavyball:SOAP",
        {**_WHOLE, "precondition_frequency": 10},
        like="SOAP, every 10",
        period=10,
        prepare=_run_eagerly,
    ),
    Row(
        "heavyball SOAP, every 10, blocks of 256",
        "heavyball:SOAP",
        {"max_precond_dim": 256, "merge_dims": True, "split": True, "precondition_frequency": 10},
        like="SOAP, every 10, blocks of 256",
        period=10,
        prepare=_run_eagerly,
    ),
    # Another Shampoo: its factors weigh each other, and its roots come from a basis that turns by QR steps.
    Row(
        "heavyball KL-Shampoo, QR every 10",
        "heavyball:KLShampoo",
        {**_WHOLE, "precondition_frequency": 10},
        like="Shampoo, eigh every 10",
        period=10,
        prepare=_run_eagerly,
    ),
)

ROWS: dict[str, Row] = {row.label: row for row in (*OURS, *TORCH, *PYTORCH_OPTIMIZER, *HEAVYBALL)}


def work_of(row: Row) -> Work | None:
    """Return the work that a row cannot avoid: a peer's is that of our row which does the same.

    Examples:
        >>> work_of(ROWS["torch Muon, bf16 products"]).flops([(2, 2)])
        240.0
    """
    return ROWS[row.like].work if row.like else row.work
