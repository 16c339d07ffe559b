"""A long stream of documents into token shards, with a record from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_mup.data.encoders import Encoded
from lightning_mup.data.files import Ids, TokenWriter
from lightning_mup.data.source import Progress, write_whole

SIDECAR = "prepared.json"


@dataclass
class Prepared:
    """What a folder of shards holds, as its ``prepared.json`` says.

    Args:
        documents: how many went into whole shards or were left out on the way.
        ended: whether the stream has no more.
        shards: tokens and checksum of each shard by name, in order; the first is for validation.
    """

    documents: int = 0
    ended: bool = False
    shards: dict[str, dict[str, int | str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """Return the record of a folder; an empty one where there is none.

        Args:
            folder: where the shards are.
        """
        path = folder / SIDECAR
        return cls(**json.loads(path.read_text("utf-8"))) if path.exists() else cls()

    def save(self, folder: Path) -> None:
        """Write the record, whole or not at all.

        Args:
            folder: where the shards are.
        """
        write_whole(folder / SIDECAR, json.dumps(asdict(self), indent=1))

    def training(self) -> list[tuple[str, int]]:
        """Return the training shards and their numbers of tokens."""
        return [(name, int(shard["tokens"])) for name, shard in self.shards.items()][1:]

    def has(self, tokens: int) -> bool:
        """Return whether there are so many training tokens, or all that the stream gave.

        Args:
            tokens: how many are wanted.

        Examples:
            >>> Prepared().has(1)
            False
        """
        training = self.training()
        return bool(training) and (self.ended or sum(count for _, count in training) >= tokens)


@dataclass
class _Counted:
    """Documents that gave tokens, beside a count of all that were taken."""

    encoded: Iterator[Encoded]
    progress: Progress
    taken: int = 0

    def __iter__(self) -> Iterator[Ids]:
        for _, ids in self.encoded:
            self.taken += 1
            if ids is None:
                self.progress.left_out += 1
            else:
                self.progress.add(len(ids))
                yield ids


def write_shards(encoded: Iterator[Encoded], folder: Path, *, size: int, wanted: int, vocab_size: int) -> Prepared:
    """Write documents into shards after those that are there, until there are enough training tokens.

    A shard ends with the document that fills it. The record is written after each whole shard.

    Args:
        encoded: documents and their tokens, from the first that is in no whole shard on.
        folder: where to write.
        size: tokens that fill a shard (>= 1).
        wanted: training tokens (>= 1).
        vocab_size: number of different tokens.

    Raises:
        ValueError: the documents do not even fill the validation shard.
    """
    state, progress = Prepared.read(folder), Progress(folder.name)
    counted = _Counted(encoded, progress, state.documents)
    documents = iter(counted)
    while not (state.has(wanted) or state.ended):
        first = next(documents, None)
        if first is not None:
            name = f"train_{len(state.shards):06d}.tokens" if state.shards else "val_000000.tokens"
            state.shards[name] = _write_shard(folder / name, first, documents, size=size, vocab_size=vocab_size)
        state.ended = first is None
        state.documents = counted.taken
        state.save(folder)
    progress.end()
    if not state.training():
        raise ValueError(
            f"{state.documents} documents gave {progress.tokens} tokens, not enough for a validation shard of {size} "
            "and one for training; take a smaller shard_tokens"
        )
    return state


def _write_shard(
    path: Path, first: Ids, documents: Iterator[Ids], *, size: int, vocab_size: int
) -> dict[str, int | str]:
    with TokenWriter(path, vocab_size=vocab_size) as writer:
        ids: Ids | None = first
        while ids is not None:
            writer.append(ids)
            ids = next(documents, None) if writer.count < size else None
    return {"tokens": writer.count, "checksum": writer.checksum()}
