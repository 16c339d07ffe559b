"""Encoders: text to token ids, as bytes, as characters, or by a tokenizer of Hugging Face."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lightning_mup.core.registry import near
from lightning_mup.data.files import Ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoded = tuple[str, Ids | None]

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))  # the 96 characters of arXiv:2512.05620
_WORDS = ("byte", "printable", "gpt2")
_TOGETHER = 256  # documents that a tokenizer encodes in parallel


class Encoder(Protocol):
    """Turn documents into token ids, each document's ending with a separator."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, the separator included."""

    def encode_all(self, texts: Iterable[str]) -> Iterator[Encoded]:
        """Yield each document with its tokens, or with None where it is left out."""


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes; byte 0 ends a document, and documents that hold one are left out.

    Examples:
        >>> [(text, ids.tolist()) for text, ids in Bytes().encode_all(["hi"])]
        [('hi', [104, 105, 0])]
    """

    vocab_size: int = 256

    def encode_all(self, texts: Iterable[str]) -> Iterator[Encoded]:
        """Yield each document with its bytes."""
        for text in texts:
            encoded = text.encode("utf-8", "replace")
            yield text, None if 0 in encoded else np.frombuffer(encoded + b"\0", np.uint8)


class Characters:
    r"""Characters of an alphabet; a newline ends a document, and documents with any other character are left out.

    Args:
        alphabet: the characters, in the order of their ids, a newline among them; each once.

    Raises:
        ValueError: a character stands twice, or there is no newline.

    Examples:
        >>> [ids if ids is None else ids.tolist() for _, ids in Characters("\nab").encode_all(["abba", "abc"])]
        [[1, 2, 2, 1, 0], None]
    """

    def __init__(self, alphabet: str = PRINTABLE) -> None:
        if len(set(alphabet)) < len(alphabet) or "\n" not in alphabet:
            raise ValueError(f"alphabet must hold a newline, and each character once, got {alphabet!r}")
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        codes = [ord(character) for character in alphabet]
        self._ids = np.full(max(codes) + 1, len(alphabet), np.uint32)  # of a code point; else one too large
        self._ids[codes] = np.arange(len(alphabet))

    @classmethod
    def of(cls, texts: Iterable[str]) -> Characters:
        """Return the encoder whose alphabet is a newline and all characters of the texts, in Unicode's order.

        Args:
            texts: the documents.
        """
        found: set[str] = set().union(*texts) - {"\n"}
        return cls("\n" + "".join(sorted(found)))

    def encode_all(self, texts: Iterable[str]) -> Iterator[Encoded]:
        """Yield each document with its characters' ids."""
        for text in texts:
            codes = np.frombuffer((text + "\n").encode("utf-32-le", "surrogatepass"), "<u4")
            known = codes.max() < len(self._ids) and (ids := self._ids[codes]).max() < self.vocab_size
            yield text, ids if known else None


class TokenizerFile:
    """A tokenizer of Hugging Face; its end-of-text token ends a document.

    Args:
        path: a ``tokenizer.json``; or ``gpt2``, which is fetched.
        separator: the token that ends a document.

    Raises:
        ValueError: ``tokenizers`` is not installed, the file cannot be read, or it has no such token.
    """

    def __init__(self, path: str, *, separator: str = "<|endoftext|>") -> None:
        self.path, self.separator = path, separator
        self._tokenizer = _load(path)
        found = self._tokenizer.token_to_id(separator)
        if found is None:
            known = self._tokenizer.get_added_tokens_decoder().values()
            raise ValueError(
                f"the tokenizer {path} has no token {separator!r}; name the one that ends a document as separator, "
                f"one of {sorted(token.content for token in known)}"
            )
        self._separator = int(found)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_all(self, texts: Iterable[str]) -> Iterator[Encoded]:
        """Yield each document with its tokens."""
        texts = iter(texts)
        while some := list(itertools.islice(texts, _TOGETHER)):
            encoded = self._tokenizer.encode_batch(some, add_special_tokens=False)
            for text, tokens in zip(some, encoded, strict=True):
                yield text, np.array([*tokens.ids, self._separator], np.uint32)


def _load(path: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(f"the tokenizer {path} needs tokenizers; install lightning_mup[text]") from error
    if path == "gpt2":
        return Tokenizer.from_pretrained(path)
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"cannot read a tokenizer from {path} ({error}); give a tokenizer.json") from error


def find_encoder(encoder: str | Encoder) -> Encoder:
    """Return the encoder that a word names.

    Args:
        encoder: ``"byte"``, ``"printable"`` (96 characters of ASCII), ``"gpt2"``, the path of a ``tokenizer.json``, or
            an encoder, which is handed back.

    Raises:
        ValueError: nothing goes by that name.

    Examples:
        >>> find_encoder("printable").vocab_size
        96
        >>> find_encoder("bytes")
        Traceback (most recent call last):
        ValueError: encoder must be byte, printable, gpt2 or a tokenizer.json, got 'bytes'; did you mean 'byte'?
    """
    if not isinstance(encoder, str):
        return encoder
    if encoder == "byte":
        return Bytes()
    if encoder == "printable":
        return Characters()
    if encoder == "gpt2" or Path(encoder).suffix == ".json":
        return TokenizerFile(encoder)
    raise ValueError(f"encoder must be {', '.join(_WORDS)} or a tokenizer.json, got {encoder!r}{near(encoder, _WORDS)}")


def described(encoder: str | Encoder) -> str:
    """Return words that tell an encoder from others, for the names of the files it makes.

    Args:
        encoder: as for :func:`find_encoder`; of a tokenizer's file, the content counts.

    Examples:
        >>> described("byte")
        'byte'
        >>> described(Bytes())
        "Bytes {'vocab_size': 256}"
    """
    if not isinstance(encoder, str):
        settings = {name: value for name, value in vars(encoder).items() if not name.startswith("_")}
        return f"{type(encoder).__qualname__} {settings}"
    path = Path(encoder)
    return f"{encoder} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else encoder
