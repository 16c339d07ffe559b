"""The text that is always there: Python's own standard library, or the sources of this package's dependencies, too."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from packaging.requirements import Requirement

from lightning_mup.core.registry import near
from lightning_mup.data.encoders import Bytes
from lightning_mup.data.source import Files, cache_folder, is_prepared, key_of, pair, write_split

Scope = Literal["library", "site"]

# Tests, programs that are not everywhere, tables, and what is installed beside.
_LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "lib2to3", "ensurepip", "turtledemo", "encodings", "pydoc_data"}
_LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}
_MAX_BYTES = 1_000_000  # larger files are tables
_MAX_LINE = 1000  # characters; longer lines are data
_VERSION = 1  # of the rules in this file, for the names of what they made


@dataclass(frozen=True)
class StandardLibrary:
    """Bytes of Python's own source files: about 10 MB without tests, programs and tables; 100 MB with dependencies.

    Content varies with the versions of Python and packages, hence the fingerprint: compare losses under the same one
    alone. It is code, not prose, and enough for a few million tokens. Each file is a document; which are for validation
    follows from their content. Left out are copies, files beyond 1 MB or not in UTF-8, lines beyond 1000 characters,
    and comments at the top of a file that another file had (licences).

    Args:
        scope: ``"library"``, or ``"site"`` for the installed dependencies of this package as well.
        val_fraction: share of files for validation, in (0, 1).
        cache: folder of the token files; None takes the user's cache.

    Raises:
        ValueError: the scope is unknown.

    Examples:
        >>> StandardLibrary("sight")
        Traceback (most recent call last):
        ValueError: scope must be library or site, got 'sight'; did you mean 'site'?
    """

    scope: Scope = "library"
    val_fraction: float = 0.05
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(
                f"scope must be {' or '.join(get_args(Scope))}, got {self.scope!r}{near(self.scope, get_args(Scope))}"
            )

    def prepare(self) -> None:
        """Write the token files, unless they are there."""
        if not is_prepared(self.files()):
            write_split(clean(self.paths()), Bytes(), files=self.files(), val_fraction=self.val_fraction)

    def files(self) -> Files:
        """Return the token files for this Python, these versions and settings."""
        versions = {name: package.version for name, package in _dependencies().items()} if self.scope == "site" else {}
        place = [sys.version, sysconfig.get_path("stdlib"), versions, self.val_fraction, _VERSION]
        return pair(cache_folder(self.cache), f"standard_{self.scope}-{key_of({'place': place})}")

    def paths(self) -> list[Path]:
        """Return the source files that are looked at, in a fixed order."""
        found = _library()
        if self.scope == "site":
            for package in _dependencies().values():
                inside = sorted(path for path in package.files or () if path.suffix == ".py" and _wanted(path.parts))
                found += [Path(str(path.locate())) for path in inside]
        return found


def clean(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the text of each file that is worth reading.

    Args:
        paths: source files.
    """
    seen: set[bytes] = set()
    for path in paths:
        text = _read(path)
        if text is None:
            continue
        head = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
        body = text[len(head) :]
        text = body if _is_known(head, seen) else text
        text = "".join(line for line in text.splitlines(keepends=True) if len(line) <= _MAX_LINE)
        if body.strip() and not _is_known(body, seen):
            yield text


def _is_known(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    known = digest in seen
    seen.add(digest)
    return known


def _read(path: Path) -> str | None:
    try:
        return None if path.stat().st_size > _MAX_BYTES else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _library() -> list[Path]:
    top = Path(sysconfig.get_path("stdlib"))
    found = sorted(path.relative_to(top) for path in top.rglob("*.py"))
    return [top / path for path in found if _wanted(path.parts)]


def _wanted(parts: tuple[str, ...]) -> bool:
    builds = parts[-1].startswith("_sysconfigdata")  # names of the machine that built this Python
    return not builds and _LEFT_OUT.isdisjoint(parts) and not parts[0].startswith("..")


def _dependencies() -> dict[str, importlib.metadata.Distribution]:
    """Return what this package needs, and what that needs, as far as it is installed."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = _required("lightning_mup")
    while queue:
        name = queue.pop()
        if name not in found:
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            queue += _required(name)
    return dict(sorted(found.items()))


def _required(name: str) -> list[str]:
    needs = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    return [need.name.lower() for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
