"""What a source of tokens is, where its files are kept, and how texts become a training and a validation file."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from lightning_mup.data.encoders import Encoder
from lightning_mup.data.files import TokenWriter

_KEY_DIGITS = 12
_TALKS_EVERY = 2.0  # seconds


class Files(NamedTuple):
    """The token files of a source, each kind in its order."""

    train: list[Path]
    val: list[Path]


class Source(Protocol):
    """Where tokens come from. Files get their names when they are whole: any number of processes may prepare."""

    def prepare(self) -> None:
        """Write the token files, unless they are there."""

    def files(self) -> Files:
        """Return the token files, which :meth:`prepare` has written."""


def cache_folder(cache: str | None) -> Path:
    """Return where token files are kept.

    Args:
        cache: a folder; None takes ``$LIGHTNING_MUP_CACHE``, or ``lightning_mup`` in the user's cache folder.

    Examples:
        >>> cache_folder("here").name
        'here'
    """
    if given := cache or os.environ.get("LIGHTNING_MUP_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_mup"


def key_of(settings: Mapping[str, object]) -> str:
    """Return a short hash of settings, for the names of the files made under them.

    Examples:
        >>> key_of({"seed": 0}) == key_of({"seed": 0}) != key_of({"seed": 1})
        True
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def pair(folder: Path, name: str) -> Files:
    """Return the training and the validation file of a name.

    Examples:
        >>> [path.name for paths in pair(Path("cache"), "text") for path in paths]
        ['text.train.tokens', 'text.val.tokens']
    """
    return Files([folder / f"{name}.train.tokens"], [folder / f"{name}.val.tokens"])


def is_prepared(files: Files) -> bool:
    """Return whether every file is there.

    Examples:
        >>> is_prepared(pair(Path("nowhere"), "text"))
        False
    """
    return all(path.exists() for paths in files for path in paths)


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is for validation, by its content alone: copies of it are on the same side.

    Args:
        text: the document.
        fraction: share of documents for validation, in [0, 1].

    Examples:
        >>> sum(is_validation(str(n), 0.05) for n in range(10_000))
        508
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def write_whole(path: Path, text: str) -> None:
    """Write a small file under another name and rename it, so that nobody finds half of it.

    Args:
        path: the file to be; folders are made.
        text: its content.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_whole(folder / "new" / "note.txt", "whole")
        >>> (folder / "new" / "note.txt").read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def write_split(texts: Iterable[str], encoder: Encoder, *, files: Files, val_fraction: float) -> None:
    """Encode documents, and write each into the training or the validation file.

    Args:
        texts: the documents.
        encoder: turns a document into tokens, or leaves it out.
        files: one file of each kind.
        val_fraction: share of documents for validation, in (0, 1).

    Raises:
        ValueError: one of the files would be empty.
    """
    (train,), (val,) = files
    progress, size = Progress(train.name.partition(".")[0]), encoder.vocab_size
    with TokenWriter(train, vocab_size=size) as into_train, TokenWriter(val, vocab_size=size) as into_val:
        for text, ids in encoder.encode_all(texts):
            if ids is None:
                progress.left_out += 1
                continue
            (into_val if is_validation(text, val_fraction) else into_train).append(ids)
            progress.add(len(ids))
        progress.end()


class Progress:
    """Print how many documents became tokens: a line every two seconds and one at the end, on standard error.

    Args:
        name: what is being prepared.

    Examples:
        >>> progress = Progress("text")
        >>> progress.add(10)
        >>> progress.line()
        'text: 1 documents, 10 tokens'
    """

    def __init__(self, name: str) -> None:
        self.name, self.documents, self.tokens, self.left_out = name, 0, 0, 0
        self._said = time.monotonic()

    def line(self) -> str:
        """Return where it stands."""
        left_out = f", {self.left_out} documents left out" if self.left_out else ""
        return f"{self.name}: {self.documents} documents, {self.tokens} tokens{left_out}"

    def add(self, tokens: int) -> None:
        """Count a document.

        Args:
            tokens: tokens that it gave.
        """
        self.documents, self.tokens = self.documents + 1, self.tokens + tokens
        if time.monotonic() - self._said > _TALKS_EVERY:
            self.end()

    def end(self) -> None:
        """Print where it stands."""
        print(self.line(), file=sys.stderr, flush=True)
        self._said = time.monotonic()
