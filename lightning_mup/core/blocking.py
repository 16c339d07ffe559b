"""Cut matrices into blocks, each with a preconditioner of its own.

Shapes: N matrices, O rows, I columns; B blocks per matrix, of P rows and Q columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from lightning_mup.core.spec import ParamSpec


@dataclass(frozen=True, slots=True)
class Blocking:
    """How matrices of one shape are cut.

    A side longer than ``max_dim`` is not preconditioned and not cut. A side that is really cut has its last block
    padded with zeros, which stay zeros in everything that is linear in the block.

    Args:
        rows: number of rows.
        columns: number of columns.
        block_size: largest side of a block (>= 1); None cuts nothing.
        max_dim: longest side that is preconditioned; None for no limit.

    Raises:
        ValueError: a size is not positive.

    Examples:
        >>> blocking = Blocking(5, 3, block_size=2)
        >>> x = torch.arange(15.0).view(1, 5, 3)
        >>> blocking.cut(x).shape, torch.equal(blocking.merge(blocking.cut(x)), x)
        (torch.Size([1, 6, 2, 2]), True)

    Reference:
        Anil et al. 2020 (arXiv:2002.09018), section 4; arXiv:2512.05620, section 3.1.
    """

    rows: int
    columns: int
    block_size: int | None = None
    max_dim: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be 1 or more, got {self.block_size}; None cuts nothing")
        if self.max_dim is not None and self.max_dim < 1:
            raise ValueError(f"max_dim must be 1 or more, got {self.max_dim}; None is no limit")

    @property
    def active_out(self) -> bool:
        """Whether the output side (rows) is preconditioned."""
        return self.max_dim is None or self.rows <= self.max_dim

    @property
    def active_in(self) -> bool:
        """Whether the input side (columns) is preconditioned."""
        return self.max_dim is None or self.columns <= self.max_dim

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self._side(self.rows, self.active_out), self._side(self.columns, self.active_in)

    @property
    def sides(self) -> dict[str, int]:
        """Size of a block along each preconditioned side, the input side first."""
        active = {"in": (self.active_in, self.block[1]), "out": (self.active_out, self.block[0])}
        return {side: size for side, (used, size) in active.items() if used}

    @property
    def count(self) -> tuple[int, int]:
        """Number of blocks along rows and columns."""
        return math.ceil(self.rows / self.block[0]), math.ceil(self.columns / self.block[1])

    def cut(self, x_NOI: torch.Tensor) -> torch.Tensor:
        """Return the blocks [N, B, P, Q], rows of blocks outer, columns inner."""
        (p, q), (a, b) = self.block, self.count
        missing = (0, b * q - self.columns, 0, a * p - self.rows)
        padded = F.pad(x_NOI, missing) if any(missing) else x_NOI  # to pad by nothing is to copy
        return padded.reshape(-1, a, p, b, q).transpose(2, 3).flatten(1, 2)

    def merge(self, x_NBPQ: torch.Tensor) -> torch.Tensor:
        """Put blocks together again and crop the padding."""
        (p, q), (a, b) = self.block, self.count
        whole = x_NBPQ.reshape(-1, a, b, p, q).transpose(2, 3).reshape(-1, a * p, b * q)
        return whole[:, : self.rows, : self.columns]

    def _side(self, size: int, active: bool) -> int:
        return size if self.block_size is None or not active else min(size, self.block_size)


def blocking_of(spec: ParamSpec, settings: Mapping[str, object], *, base: bool = False) -> Blocking:
    """Return how a parameter's matrices, or those of its counterpart at the base, are cut under settings.

    Examples:
        >>> from lightning_mup.core.spec import Dim, Role
        >>> spec = ParamSpec("w", Role.HIDDEN, (768, 512), Dim(512, 512), Dim(768, 512))
        >>> blocking_of(spec, {"block_size": 512}).count, blocking_of(spec, {"block_size": 512}, base=True).count
        ((2, 1), (1, 1))
    """
    rows, columns = (spec.fan_out.base, spec.fan_in.base) if base else (spec.fan_out.size, spec.fan_in.size)
    block_size, limit = (cast(int | None, settings.get(key)) for key in ("block_size", "max_preconditioned_dim"))
    return Blocking(rows, columns, block_size, limit)


def block_ratios(spec: ParamSpec, settings: Mapping[str, object]) -> tuple[float, float]:
    """Return the ratios (input side, output side) of block counts against the base; 1 without blocks.

    Examples:
        >>> from lightning_mup.core.spec import Dim, Role
        >>> spec = ParamSpec("w", Role.HIDDEN, (512, 256), Dim(256, 128), Dim(512, 128))
        >>> block_ratios(spec, {"block_size": 128})
        (2.0, 4.0)
    """
    (rows, columns), (base_rows, base_columns) = (
        blocking_of(spec, settings, base=base).count for base in (False, True)
    )
    return columns / base_columns, rows / base_rows


def active_sides(spec: ParamSpec, settings: Mapping[str, object]) -> tuple[bool, bool]:
    """Return whether (input side, output side) are preconditioned.

    Raises:
        ValueError: the base answers otherwise, or neither side is.

    Examples:
        >>> from lightning_mup.core.spec import Dim, Role
        >>> spec = ParamSpec("readout", Role.OUTPUT, (50257, 512), Dim(512, 128), Dim(50257, 50257))
        >>> active_sides(spec, {"max_preconditioned_dim": 10000})
        (True, False)
    """
    here, there = (blocking_of(spec, settings, base=base) for base in (False, True))
    sides = (here.active_in, here.active_out)
    if sides != (there.active_in, there.active_out) or not any(sides):
        raise ValueError(
            f"{spec.name!r} (fan_out {spec.fan_out}, fan_in {spec.fan_in}; size/base) must be preconditioned on the "
            f"same sides at size and base, on at least one, but max_preconditioned_dim="
            f"{settings.get('max_preconditioned_dim')} makes it {sides} (in, out) here and "
            f"{(there.active_in, there.active_out)} at the base; raise the limit, or lower it below both"
        )
    return sides
