"""A folder of text files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_mup.data.encoders import Characters, Encoder, described, find_encoder
from lightning_mup.data.source import Files, cache_folder, is_prepared, key_of, pair, write_split, write_whole

CHARACTER = "character"


@dataclass(frozen=True)
class FolderText:
    r"""Text files below a folder, prepared again when one of them changes.

    Which documents are for validation follows from their content.

    Args:
        path: the folder, or one file.
        glob: which files in it.
        encoder: ``"byte"``; ``"character"``, whose vocabulary is what occurs and is kept beside the token files;
            ``"printable"``, which leaves out documents with characters outside 96 of ASCII; the path of a
            ``tokenizer.json``; or an encoder.
        divider: what parts documents inside a file, such as two newlines; None makes each file a document.
        val_fraction: share of documents for validation, in (0, 1).
        cache: folder of the token files; None takes the user's cache.

    Raises:
        ValueError: no file matches, a file is not in UTF-8, or a side of the split is empty.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "poem.txt").write_text("a rose\n\nis a rose\n\nis a rose.\n\nEnd")
        >>> source = FolderText(str(folder), divider="\n\n", val_fraction=0.5, cache=str(folder))
        >>> source.prepare()
        >>> [path.exists() for paths in source.files() for path in paths]
        [True, True]
    """

    path: str
    glob: str = "**/*.txt"
    encoder: str | Encoder = "byte"
    divider: str | None = None
    val_fraction: float = 0.05
    cache: str | None = None

    def prepare(self) -> None:
        """Write the token files, unless they are there."""
        files = self.files()
        if is_prepared(files):
            return
        encoder = Characters.of(self.texts()) if self.encoder == CHARACTER else find_encoder(self.encoder)
        if isinstance(encoder, Characters):
            write_whole(self.vocabulary(), json.dumps(encoder.alphabet))
        write_split(self.texts(), encoder, files=files, val_fraction=self.val_fraction)

    def files(self) -> Files:
        """Return the token files for the text as it is now."""
        return pair(cache_folder(self.cache), self._name())

    def vocabulary(self) -> Path:
        """Return the file with the alphabet, a JSON string in the order of ids, where the encoder is of characters."""
        return cache_folder(self.cache) / f"{self._name()}.vocabulary.json"

    def texts(self) -> Iterator[str]:
        """Yield the documents."""
        for path in self._paths():
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not in UTF-8 ({error}); convert it, or match others by glob") from error
            yield from filter(None, text.split(self.divider) if self.divider else [text])

    def _paths(self) -> list[Path]:
        top = Path(self.path)
        found = [top] if top.is_file() else sorted(path for path in top.glob(self.glob) if path.is_file())
        if not found:
            raise ValueError(f"no file in {self.path} matches {self.glob!r}; set data.source.path and data.source.glob")
        return found

    def _name(self) -> str:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths()]
        settings = {
            "files": stats,
            "encoder": described(self.encoder),
            "divider": self.divider,
            "val": self.val_fraction,
        }
        return f"{Path(self.path).resolve().stem}-{key_of(settings)}"
