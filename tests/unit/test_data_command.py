"""`lightning-mup data`: prepare, info, verify."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from lightning_mup.commands import data
from lightning_mup.data.hub import HubText


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args(words))


@pytest.fixture
def prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "all.txt").write_text("\n\n".join(f"line {n}" for n in range(100)))
    words = [f"path={tmp_path / 'all.txt'}", "divider='\\n\\n'", f"cache={tmp_path / 'cache'}"]
    assert run("prepare", "folder", "--set", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["train", "val"]
    (found,) = (tmp_path / "cache").glob("*.train.tokens")
    assert str(found) in lines[0]
    return found


def test_info(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(prepared)) == 0
    shown = capsys.readouterr().out
    assert "of type uint8" in shown
    assert "vocabulary  256" in shown
    assert r"b'line 0\x00line 1\x00" in shown


def test_verify_finds_a_changed_byte(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(prepared.parent)) == 0
    assert capsys.readouterr().out.count(": agrees") == 2
    content = bytearray(prepared.read_bytes())
    content[100] ^= 1
    prepared.write_bytes(content)
    assert run("verify", str(prepared.parent)) == 1
    shown = capsys.readouterr().out
    assert f"{prepared}: DIFFERS from its checksum" in shown
    assert shown.count(": agrees") == 1


def test_shards_without_checksum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.array([5, 50_256], "<u2").tobytes())
    assert run("verify", str(tmp_path)) == 0
    assert run("info", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "whole; it has no checksum" in shown
    assert "start       5 50256" in shown


def test_missing_shard_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubText, "_stream", lambda self, skipped: (f"text {n}" for n in range(skipped, 99)))
    words = ["name=some/texts", "encoder=byte", "tokens=100", "shard_tokens=50", f"cache={tmp_path}"]
    assert run("prepare", "hub", "--set", *words) == 0
    (folder,) = tmp_path.iterdir()
    assert run("verify", str(folder)) == 0
    (folder / "train_000001.tokens").unlink()
    with pytest.raises(ValueError, match=r"there is no token file .*train_000001.tokens"):
        run("verify", str(folder))


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"folder takes no 'paths'; it takes path, .*; did you mean 'path'\?"):
        run("prepare", "folder", "--set", "paths=x")
    with pytest.raises(ValueError, match=r"folder takes path, glob, .* missing .* 'path'"):
        run("prepare", "folder")
    with pytest.raises(ValueError, match=r"holds no .tokens or .bin file"):
        run("verify", str(tmp_path))
    for words, message in (
        (["prepare", "books"], "invalid choice: 'books'"),
        (["prepare", "hub", "--set", "x"], "NAME"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
