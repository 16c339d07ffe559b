"""The benchmark of a whole run runs; what it measures is no test."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import trainer


@pytest.mark.filterwarnings("default")
def test_either_loop_leaves_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("WIDTH", 64), ("BASE", 32), ("DEPTH", 1), ("CONTEXT", 16)):
        monkeypatch.setattr(trainer, name, size)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    trainer.main(["--rounds", "1", "--steps", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "trainer.json").read_text())
    assert record["seconds"].keys() == trainer.LOOPS.keys()
    assert all(len(rounds) == 1 and min(rounds[0]) > 0 for rounds in record["seconds"].values())
    assert all(name in (tmp_path / "trainer.txt").read_text() for name in trainer.LOOPS)
