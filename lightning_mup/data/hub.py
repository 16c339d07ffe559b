"""Data sets of Hugging Face, streamed into token shards; a preparation that was cut off goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mup.data.encoders import Encoder, described, find_encoder
from lightning_mup.data.sharding import Prepared, write_shards
from lightning_mup.data.source import Files, cache_folder, key_of

Documents = Callable[[int], Iterable[str]]  # all documents but the first so many


@dataclass(frozen=True)
class HubText:
    """A data set such as FineWeb, as ``.tokens`` files of about ``shard_tokens``, the first of them for validation.

    It is prepared by ``lightning-mup data prepare hub``, never by a run. Beside the shards, ``prepared.json`` says how
    many documents went into whole ones; asking for more tokens later goes on from there.

    Args:
        name: the data set on the hub.
        subset: its configuration, such as ``sample-10BT``.
        column: the column with the text.
        encoder: ``"byte"``, ``"printable"``, ``"gpt2"``, the path of a ``tokenizer.json``, or an encoder.
        tokens: training tokens that are wanted (>= 1); whole shards are made.
        shard_tokens: tokens after which a shard ends, with its last document (>= 1).
        cache: folder of the shards; None takes the user's cache.

    Raises:
        ValueError: it is not prepared, was prepared under other settings, or ``datasets`` is not installed.

    Examples:
        >>> HubText("HuggingFaceFW/fineweb", subset="sample-10BT", cache="cache").command()
        'lightning-mup data prepare hub --set name=HuggingFaceFW/fineweb subset=sample-10BT cache=cache'
    """

    name: str
    subset: str | None = None
    column: str = "text"
    encoder: str | Encoder = "gpt2"
    tokens: int = 1_000_000_000
    shard_tokens: int = 100_000_000
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def command(self) -> str:
        """Return the command line that prepares it."""
        defaults = HubText(self.name)
        given = {n: getattr(self, n) for n in ("subset", "column", "encoder", "tokens", "shard_tokens", "cache")}
        words = [f"{name}={value}" for name, value in given.items() if value != getattr(defaults, name)]
        return " ".join([f"lightning-mup data prepare hub --set name={self.name}", *words])

    def folder(self) -> Path:
        """Return where the shards are."""
        settings = {"name": self.name, "subset": self.subset, "column": self.column, "shard": self.shard_tokens}
        slug = self.name.replace("/", "--")
        return cache_folder(self.cache) / f"{slug}-{key_of({**settings, 'encoder': described(self.encoder)})}"

    def prepare(self) -> None:
        """Make sure that the shards are there."""
        self.files()

    def files(self) -> Files:
        """Return the validation shard, and as many training shards as hold the wanted tokens."""
        state = Prepared.read(self.folder())
        if not state.has(self.tokens):
            raise ValueError(
                f"{self.name} is not prepared: {sum(count for _, count in state.training())} of {self.tokens} training "
                f"tokens are in {self.folder()}; run {self.command()}"
            )
        train, count = [], 0
        for name, tokens in state.training():
            if count < self.tokens:
                train.append(self.folder() / name)
                count += tokens
        return Files(train, [self.folder() / next(iter(state.shards))])

    def write(self, documents: Documents | None = None) -> None:
        """Stream documents into shards until there are enough, after the last whole shard.

        Args:
            documents: function from a number of documents to skip to the others; those of the hub if not given.

        Raises:
            ValueError: ``datasets`` is not installed, or there are too few documents.
        """
        state = Prepared.read(self.folder())
        if state.has(self.tokens):
            return
        encoder = find_encoder(self.encoder)
        encoded = encoder.encode_all((documents or self._stream)(state.documents))
        sizes = {"size": self.shard_tokens, "wanted": self.tokens, "vocab_size": encoder.vocab_size}
        write_shards(encoded, self.folder(), **sizes)

    def _stream(self, skipped: int) -> Iterator[str]:
        try:
            import datasets  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ValueError(f"{self.name} needs datasets; install lightning_mup[text]") from error
        rows: Any = datasets.load_dataset(self.name, self.subset, split="train", streaming=True)
        return (str(row[self.column]) for row in rows.skip(skipped))
