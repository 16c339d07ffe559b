"""Tokens: several token files as one long sequence, of which windows are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_mup.data.files import Ids, TokenFile, read_header


class Tokens:
    """Token files, one after another, memory-mapped.

    The vocabulary is checked where the files state it, else in a sample of every file, and in each window read.

    Args:
        paths: files that :func:`~lightning_mup.data.files.read_header` knows, in their order.
        vocab_size: number of different tokens that the model knows; ids are below it.

    Raises:
        ValueError: there is no file, one cannot be read, or its vocabulary is larger.

    Examples:
        >>> from lightning_mup.data.files import TokenWriter
        >>> import tempfile
        >>> paths = [Path(tempfile.mkdtemp()) / name for name in ("a.tokens", "b.tokens")]
        >>> for path, text in zip(paths, (b"to be ", b"or not")):
        ...     with TokenWriter(path, vocab_size=256) as writer:
        ...         writer.append(list(text))
        >>> tokens = Tokens(paths, vocab_size=256)
        >>> bytes(tokens.windows(np.array([3]), length=5)[0].tolist())
        b'be or'
    """

    def __init__(self, paths: Iterable[str | Path], *, vocab_size: int) -> None:
        self.files, self.vocab_size = [read_header(path) for path in paths], vocab_size
        if not self.files:
            raise ValueError(f"there must be at least one token file, got {self.files}")
        self._ends = np.cumsum([file.count for file in self.files])
        self._arrays: list[Ids] | None = None
        for file in self.files:
            _check_vocabulary(file, vocab_size)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": None}  # a pickled memory map would be a copy of the file

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that tell these tokens from others."""
        return hashlib.sha256("".join(file.identity() for file in self.files).encode()).hexdigest()

    def windows(self, starts: NDArray[np.int64], *, length: int) -> Tensor:
        """Return the tokens ``[starts, length]`` that begin at each start, as int64.

        Args:
            starts: positions of first tokens, from 0 to ``len(self) - length``.
            length: tokens in a window (>= 1).

        Raises:
            ValueError: a token is outside the vocabulary.
        """
        if self._arrays is None:  # in each process that reads
            self._arrays = [file.tokens() for file in self.files]
        out = np.empty((len(starts), length), np.int64)
        for row, start, which in zip(out, starts.tolist(), self._holders(starts), strict=True):
            self._fill(row, start, which)
        if out.max(initial=0) >= self.vocab_size:
            raise ValueError(
                _too_large(f"one of {[str(file.path) for file in self.files]}", out.max(), self.vocab_size)
            )
        return torch.from_numpy(out)

    def _holders(self, starts: NDArray[np.int64]) -> list[int]:
        """Return which file each start lies in."""
        found: list[int] = np.searchsorted(self._ends, starts, side="right").tolist()
        return found

    def _fill(self, row: NDArray[np.int64], start: int, which: int) -> None:
        """Copy tokens from ``start`` on, over as many files as it takes."""
        assert self._arrays is not None
        start -= int(self._ends[which - 1]) if which else 0
        part = self._arrays[which][start : start + len(row)]
        row[: len(part)] = part
        if len(part) < len(row):
            self._fill(row[len(part) :], int(self._ends[which]), which + 1)


def _check_vocabulary(file: TokenFile, vocab_size: int) -> None:
    if file.vocab_size is not None and file.vocab_size > vocab_size:
        raise ValueError(
            f"{file.path} has a vocabulary of {file.vocab_size}, but vocab_size is {vocab_size}; "
            f"set data.vocab_size={file.vocab_size}"
        )
    if (largest := int(file.sample().max())) >= vocab_size:
        raise ValueError(_too_large(str(file.path), largest, vocab_size))


def _too_large(where: str, largest: int, vocab_size: int) -> str:
    return f"{where} holds the token {largest}, but vocab_size is {vocab_size}; set data.vocab_size to its vocabulary"
