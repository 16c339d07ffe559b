"""The order of windows: one endless sequence, every window once per epoch, the same at every number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
_ROUNDS = 8
_BLOCK = 4096  # windows whose places are computed together


def shuffled(index: Positions, *, count: int, key: str) -> Positions:
    """Return where a permutation of ``0 .. count-1`` sends each index, in memory that does not grow with ``count``.

    A Feistel network over a grid of ``a x b >= count`` cells: one coordinate at a time is shifted by a hash of the
    other (mod a or b); what lands outside ``count`` goes through it again. Unlike a generator's stream, it is the same
    with every version of numpy and torch.

    Args:
        index: indices, each from 0 to ``count - 1``.
        count: number of elements (>= 1).
        key: names the permutation.

    Examples:
        >>> shuffled(np.arange(8), count=8, key="seed 0, epoch 0").tolist()
        [5, 3, 6, 4, 0, 2, 7, 1]

    Reference:
        Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3.
    """
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    out = _rounds(index.astype(np.uint64), rows, columns, keys)
    while (outside := out >= count).any():
        out[outside] = _rounds(out[outside], rows, columns, keys)
    return out.astype(np.int64)


def _rounds(cell: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    height, width = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cell, width)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _hash(column ^ even) % height) % height
        column = (column + _hash(row ^ odd) % width) % width
    mixed: NDArray[np.uint64] = row * width + column
    return mixed


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of SplitMix64 (Steele, Lea and Flood 2014), whose constants these are."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """The endless sequence of windows: epoch after epoch, each a permutation of all of them.

    Args:
        count: number of windows (>= 1).
        seed: another one gives another order.

    Examples:
        >>> order = Order(5, seed=0)
        >>> sorted(order.at(np.arange(5, 10)).tolist())  # the second epoch
        [0, 1, 2, 3, 4]
    """

    count: int
    seed: int = 0

    def at(self, positions: Positions) -> Positions:
        """Return the windows at these positions of the sequence (each >= 0)."""
        epochs, index = np.divmod(positions, self.count)
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = shuffled(index[here], count=self.count, key=f"seed {self.seed}, epoch {epoch}")
        return out


@dataclass(frozen=True)
class Share:
    """One rank's part of every batch.

    Args:
        batch_size: sequences in a batch, over all ranks (>= 1).
        rank: number of this rank, from 0.
        ranks: how many ranks share a batch.

    Raises:
        ValueError: the ranks cannot share a batch equally.

    Examples:
        >>> Share(6, rank=1, ranks=2).positions(batch=0).tolist()
        [3, 4, 5]
    """

    batch_size: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.ranks:
            raise ValueError(
                f"batch_size must be a positive multiple of the {self.ranks} ranks that share it, got "
                f"{self.batch_size}; it counts sequences over all ranks"
            )

    def positions(self, batch: int, *, start: int = 0, batches: int = 1) -> Positions:
        """Return positions in the order of this rank's sequences of some batches, one after another.

        Args:
            batch: number of the first batch, counted from ``start`` (>= 0).
            start: position at which batch 0 begins (>= 0).
            batches: how many batches.
        """
        local = self.batch_size // self.ranks
        firsts = start + self.batch_size * np.arange(batch, batch + batches) + self.rank * local
        return (firsts[:, None] + np.arange(local)).ravel()


@dataclass(frozen=True)
class Batches:
    """Windows of one rank, batch by batch, from a position of the order on.

    Args:
        order: the order of all windows.
        share: this rank's part of each batch.
        start: position of the first batch (>= 0).
        length: number of batches.

    Examples:
        >>> batches = Batches(Order(6), Share(3), start=0, length=2)
        >>> sorted(window for batch in batches for window in batch.tolist())
        [0, 1, 2, 3, 4, 5]
    """

    order: Order
    share: Share
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Positions]:
        local = self.share.batch_size // self.share.ranks
        block = max(1, _BLOCK // local)  # batches
        for batch in range(0, self.length, block):
            batches = min(block, self.length - batch)
            positions = self.share.positions(batch, start=self.start, batches=batches)
            yield from self.order.at(positions).reshape(batches, local)
