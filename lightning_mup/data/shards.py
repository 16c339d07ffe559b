"""Token files that somebody has prepared."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from lightning_mup.data.source import Files


@dataclass(frozen=True)
class TokenShards:
    """GPT-2 ``.bin`` shards or ``.tokens`` files, in the order of their names.

    Args:
        train: pattern of the training files, such as ``fineweb10B/fineweb_train_*.bin``.
        val: pattern of the validation files.

    Raises:
        ValueError: a pattern matches no file.

    Examples:
        >>> TokenShards("nowhere/*.bin", val="nowhere/*.bin").prepare()
        Traceback (most recent call last):
        ValueError: no file matches 'nowhere/*.bin'; set data.source.train
    """

    train: str
    val: str

    def prepare(self) -> None:
        """Make sure that there are files."""
        self.files()

    def files(self) -> Files:
        """Return the files that match."""
        return Files(_matching("train", self.train), _matching("val", self.val))


def _matching(name: str, pattern: str) -> list[Path]:
    found = sorted(Path(path) for path in glob.glob(str(Path(pattern).expanduser()), recursive=True))
    if not found:
        raise ValueError(f"no file matches {pattern!r}; set data.source.{name}")
    return found
