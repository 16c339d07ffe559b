"""Prepare token files, say what is in them, and check that they are whole."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lightning_mup.commands.words import add_pairs
from lightning_mup.core.named import keywords
from lightning_mup.core.plan import aligned
from lightning_mup.core.registry import near
from lightning_mup.data.files import TokenFile, read_header
from lightning_mup.data.folder import FolderText
from lightning_mup.data.hub import HubText
from lightning_mup.data.sharding import SIDECAR, Prepared
from lightning_mup.data.shards import TokenShards
from lightning_mup.data.source import Source
from lightning_mup.data.standard_library import StandardLibrary
from lightning_mup.data.synthetic import MarkovChain

EXAMPLE = "example: lightning-mup data prepare folder --set path=books encoder=byte"

_SOURCES: dict[str, Callable[..., Source]] = {
    "embedded": StandardLibrary,
    "folder": FolderText,
    "shards": TokenShards,
    "hub": HubText,
    "synthetic": MarkovChain,
}
_SHOWN = 60  # bytes of text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of ``lightning-mup data``.

    Args:
        parser: the command's parser.
    """
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("prepare", help="write the token files of a source", epilog=EXAMPLE)
    prepare.add_argument("source", choices=_SOURCES, help="what to prepare")
    add_pairs(prepare, "--set", "NAME=VALUE", "arguments of the source")
    for name, what in (("info", "say what is in token files"), ("verify", "compare token files with their checksums")):
        action = actions.add_parser(name, help=what, epilog=f"example: lightning-mup data {name} text.train.tokens")
        action.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a token file, or a folder of them")


def run(args: argparse.Namespace) -> int:
    """Carry the command out and return its exit code: 0 well, 1 a file differs from its checksum.

    Args:
        args: parsed words.

    Raises:
        ValueError: it cannot be carried out.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> import tempfile
        >>> cache = tempfile.mkdtemp()
        >>> words = f"prepare synthetic --set vocab_size=4 tokens=100 val_tokens=100 cache={cache}"
        >>> run(parser.parse_args(words.split()))  # doctest: +ELLIPSIS
        train: 100 tokens in ...markov_chain-81f890160f9c.train.tokens
        val: 100 tokens in ...markov_chain-81f890160f9c.val.tokens
        0
    """
    actions = {"prepare": _prepare, "info": _info, "verify": _verify}
    return actions[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    source = _build(args.source, dict(args.set))
    if isinstance(source, HubText):
        source.write()
    source.prepare()
    for kind, paths in zip(("train", "val"), source.files(), strict=True):
        files = [read_header(path) for path in paths]
        print(f"{kind}: {sum(file.count for file in files)} tokens in {', '.join(str(path) for path in paths)}")
    return 0


def _build(word: str, settings: dict[str, object]) -> Source:
    known = keywords(_SOURCES[word]) or []
    for name in settings:
        if name not in known:
            raise ValueError(f"{word} takes no {name!r}; it takes {', '.join(known)}{near(name, known)}")
    try:
        return _SOURCES[word](**settings)
    except TypeError as error:
        raise ValueError(f"{word} takes {', '.join(known)}; {error}; give them as --set NAME=VALUE") from error


def _info(args: argparse.Namespace) -> int:
    for path in _files(args.paths):
        print("\n".join(aligned(_rows(read_header(path)))))
    return 0


def _rows(file: TokenFile) -> list[list[str]]:
    rows = [
        ["file", str(file.path)],
        ["tokens", f"{file.count} of type {file.dtype.name}"],
        ["vocabulary", "not said" if file.vocab_size is None else str(file.vocab_size)],
        ["checksum", file.checksum or "none"],
    ]
    start = file.tokens()[:_SHOWN]
    as_text = file.vocab_size == 256
    return [*rows, ["start", repr(bytes(start.tolist())) if as_text else " ".join(map(str, start[: _SHOWN // 4]))]]


def _verify(args: argparse.Namespace) -> int:
    differing = 0
    for path in _files(args.paths):
        file = read_header(path)
        if file.checksum is None:
            verdict = "whole; it has no checksum"
        elif file.checksum == file.computed_checksum():
            verdict = "agrees"
        else:
            verdict, differing = "DIFFERS from its checksum; prepare it again", differing + 1
        print(f"{path}: {verdict}")
    return 1 if differing else 0


def _files(paths: list[Path]) -> list[Path]:
    """Return the token files that are named, or are in folders that are; those of ``prepared.json`` must be there."""
    found: list[Path] = []
    for path in paths:
        inside = sorted([*path.glob("*.tokens"), *path.glob("*.bin")]) if path.is_dir() else [path]
        recorded = [path / name for name in Prepared.read(path).shards] if (path / SIDECAR).exists() else []
        found += [*inside, *(name for name in recorded if name not in inside)]
        if not inside:
            raise ValueError(f"{path} holds no .tokens or .bin file; name a token file, or a folder of them")
    return found
