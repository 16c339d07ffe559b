"""Token files: a header that says what is inside, then the tokens of all documents, one after another.

Header of a ``.tokens`` file, 64 bytes, little-endian: the 8 bytes ``mup.toks``, version (uint32), bytes per token
(uint32: 1, 2 or 4, unsigned), vocabulary size (uint64), number of tokens (uint64), SHA-256 of the tokens (32 bytes).
Each document ends with the separator of its encoder (:mod:`~lightning_mup.data.encoders`).

GPT-2 shards (``.bin``, as FineWeb is handed around) are read, too: 256 int32, of which the first three are 20240520, 1
and the number of tokens, then uint16 tokens. They say neither their vocabulary nor a checksum.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[Any]  # token ids, one-dimensional, of an unsigned type

VERSION = 1
_MAGIC = b"mup.toks"
_HEADER = struct.Struct("<8sIIQQ32s")
_SHARD_MAGIC, _SHARD_VERSION, _SHARD_HEADER = 20240520, 1, struct.Struct("<256i")
_UNSIGNED = (np.uint8, np.uint16, np.uint32)
_BLOCK = 1 << 24  # bytes read at once for a checksum
_SAMPLED = 4096  # tokens of each of the places where a file is looked at when it is opened
_PLACES = 16


@dataclass(frozen=True)
class TokenFile:
    """What a token file's header says.

    Args:
        path: the file.
        count: number of tokens.
        dtype: unsigned integer type of a token.
        offset: bytes before the first token.
        vocab_size: ids are below it; None where the file does not say.
        checksum: SHA-256 of the tokens, in hexadecimal; None where the file does not say.
    """

    path: Path
    count: int
    dtype: np.dtype[Any]
    offset: int
    vocab_size: int | None = None
    checksum: str | None = None

    def tokens(self) -> Ids:
        """Return the tokens, memory-mapped and read-only."""
        mapped = np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(self.count,))
        return np.asarray(mapped)  # a plain view: slices of a memmap are several times as slow

    def computed_checksum(self) -> str:
        """Return the SHA-256 of the tokens as they are on disk."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def sample(self) -> Ids:
        """Return tokens of several evenly spaced places, the first and the last tokens among them."""
        tokens = self.tokens()
        starts = np.linspace(0, max(0, self.count - _SAMPLED), _PLACES).astype(np.int64)
        return np.concatenate([tokens[start : start + _SAMPLED] for start in starts])

    def identity(self) -> str:
        """Return a hash of the content: the checksum, or, where there is none, one of the length and a sample."""
        if self.checksum is not None:
            return self.checksum
        return hashlib.sha256(str(self.count).encode() + self.sample().tobytes()).hexdigest()


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned integer type that holds every id below ``vocab_size``.

    Args:
        vocab_size: number of different tokens, 1 to 2^32.

    Raises:
        ValueError: no type of at most 32 bits holds them.

    Examples:
        >>> [str(smallest_dtype(size)) for size in (256, 257, 65_536, 65_537)]
        ['uint8', 'uint16', 'uint16', 'uint32']
    """
    for kind in _UNSIGNED:
        if 1 <= vocab_size <= np.iinfo(kind).max + 1:
            return np.dtype(kind).newbyteorder("<")
    raise ValueError(f"vocab_size must be from 1 to 2^32, got {vocab_size}")


def read_header(path: str | Path) -> TokenFile:
    """Return what a ``.tokens`` file or a GPT-2 ``.bin`` shard says of itself.

    Args:
        path: the file.

    Raises:
        ValueError: there is no such file, it is neither of the two, of another version, empty, or cut off.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/a.tokens"
        >>> with TokenWriter(path, vocab_size=256) as writer:
        ...     writer.append(list(b"to be"))
        >>> read_header(path).count
        5
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no token file {path}; make one with lightning-mup data prepare")
    with path.open("rb") as file:
        start = file.read(_SHARD_HEADER.size)
    if start[:8] == _MAGIC and len(start) >= _HEADER.size:
        found = _own(path, start)
    elif len(start) == _SHARD_HEADER.size and _SHARD_HEADER.unpack(start)[0] == _SHARD_MAGIC:
        found = _shard(path, start)
    else:
        raise ValueError(f"{path} is neither a .tokens file nor a GPT-2 .bin shard: it starts with {start[:8]!r}")
    _check_length(found)
    return found


def _own(path: Path, start: bytes) -> TokenFile:
    _, version, width, vocab_size, count, checksum = _HEADER.unpack(start[: _HEADER.size])
    dtypes = {np.dtype(kind).itemsize: np.dtype(kind).newbyteorder("<") for kind in _UNSIGNED}
    if version != VERSION or width not in dtypes:
        raise ValueError(
            f"{path} is of version {version} with {width} bytes per token, but this package reads version {VERSION} "
            "with 1, 2 or 4; prepare it again"
        )
    return TokenFile(path, count, dtypes[width], _HEADER.size, vocab_size, checksum.hex())


def _shard(path: Path, start: bytes) -> TokenFile:
    _, version, count = _SHARD_HEADER.unpack(start)[:3]
    if version != _SHARD_VERSION:
        raise ValueError(f"{path} is a GPT-2 shard of version {version}; only {_SHARD_VERSION} is known")
    return TokenFile(path, count, np.dtype("<u2"), _SHARD_HEADER.size)


def _check_length(file: TokenFile) -> None:
    found, wanted = file.path.stat().st_size - file.offset, file.count * file.dtype.itemsize
    if file.count < 1:
        raise ValueError(f"{file.path} holds {file.count} tokens; a token file needs at least one")
    if found < wanted:
        raise ValueError(
            f"{file.path} is cut off: {file.count} tokens of {file.dtype.itemsize} bytes are {wanted} bytes, got "
            f"{found}; fetch or prepare it again"
        )
    if found > wanted:
        raise ValueError(
            f"{file.path} has another type than it says: {file.count} tokens in {found} bytes are "
            f"{found / file.count:g} bytes per token, not {file.dtype.itemsize} ({file.dtype.name})"
        )


class TokenWriter:
    """Write a ``.tokens`` file, which gets its name when it is whole; an exception leaves nothing behind.

    Args:
        path: the file to be; an older one is replaced. Folders are made.
        vocab_size: number of different tokens, 1 to 2^32.

    Raises:
        ValueError: an id is not below ``vocab_size``, or nothing was written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.tokens"
        >>> with TokenWriter(path, vocab_size=3) as writer:
        ...     writer.append([0, 1, 3])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...a.tokens: token ids must be from 0 to 2, got 3
        >>> list(path.parent.iterdir())
        []
    """

    def __init__(self, path: str | Path, *, vocab_size: int) -> None:
        self.path, self.vocab_size, self.count = Path(path), vocab_size, 0
        self._dtype, self._digest = smallest_dtype(vocab_size), hashlib.sha256()

    def __enter__(self) -> TokenWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")  # one of each process
        self._file = self._part.open("wb")
        self._file.write(bytes(_HEADER.size))
        return self

    def append(self, ids: Sequence[int] | Ids) -> None:
        """Write further tokens.

        Args:
            ids: token ids, each from 0 to ``vocab_size - 1``.

        Raises:
            ValueError: an id is outside.
        """
        wide = np.asarray(ids)
        if wide.size == 0:
            return
        for extreme in (wide.min(), wide.max()):
            if not 0 <= extreme < self.vocab_size:
                raise ValueError(f"{self.path}: token ids must be from 0 to {self.vocab_size - 1}, got {extreme}")
        block = wide.astype(self._dtype).tobytes()
        self._digest.update(block)
        self._file.write(block)
        self.count += wide.size

    def checksum(self) -> str:
        """Return the SHA-256, in hexadecimal, of what has been written."""
        return self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.count == 0:
            raise ValueError(f"{self.path} would be empty: no document gave a token in {self.vocab_size} for it")
        self._file.seek(0)
        width, digest = self._dtype.itemsize, self._digest.digest()
        self._file.write(_HEADER.pack(_MAGIC, VERSION, width, self.vocab_size, self.count, digest))
        self._file.flush()
        os.fsync(self._file.fileno())  # else a crash may keep the name and lose the tokens
        os.replace(self._part, self.path)
