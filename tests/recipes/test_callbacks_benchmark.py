"""The benchmark of the callbacks runs; what it measures is no test."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from recipes.benchmarks import callbacks


@pytest.mark.filterwarnings("default")
def test_every_callback_leaves_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "WIDTH", 32)
    monkeypatch.setattr(callbacks, "DEPTH", 1)
    monkeypatch.setitem(callbacks.CALLBACKS, "Parametrize", lambda: [])  # its base is as wide as this model
    monkeypatch.setattr(logging, "disable", lambda level: None)
    callbacks.main(["--rounds", "1", "--steps", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "callbacks.json").read_text())
    assert record["seconds"].keys() == callbacks.CALLBACKS.keys()
    assert all(len(rounds) == 1 and min(rounds[0]) > 0 for rounds in record["seconds"].values())
    assert all(name in (tmp_path / "callbacks.txt").read_text() for name in callbacks.CALLBACKS)
