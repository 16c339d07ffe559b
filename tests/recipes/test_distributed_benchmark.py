"""The benchmark of divided optimizers runs, and what it measures by count is what is predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks import distributed

RECORDED = Path(__file__).parents[2] / "recipes" / "benchmarks" / "results"
STATES = {"adam": 2, "muon": 1, "shampoo": 5, "soap": 6}  # in units of all matrices
SIZE = 4 * 4 * 32**2  # bytes of all matrices
# (ranks, strategy) -> received per step, and parts of state, of an elementwise method and of another
EXPECTED = {
    (1, "ddp"): ((0, 1), (0, 1)),
    (1, "mup_fsdp"): ((0, 1), (0, 1)),
    (2, "ddp"): ((0, 1), (0, 1)),
    (2, "mup_ddp"): ((8192, 2), (8192, 2)),
    (2, "mup_fsdp"): ((0, 2), (4096 + 4096, 2)),
    (4, "ddp"): ((0, 1), (0, 1)),
    (4, "mup_ddp"): ((12288, 4), (12288, 4)),
    (4, "mup_fsdp"): ((0, 4), (3072 + 3072, 4)),
    (4, "mup_fsdp 2 x 2"): ((0, 2), (2048 + 6144, 4)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    sizes = ["--ranks", "1", "2", "4", "--width", "32", "--count", "4", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.benchmarks.distributed", *sizes, "--out", str(folder)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "distributed.txt").read_text()
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "distributed.json").read_text())["rows"])


def test_every_strategy_receives_and_keeps_its_part(made: Path) -> None:
    found = {(row["method"], row["ranks"], row["strategy"]): row for row in rows(made)}
    assert found.keys() == {(method, *key) for method in STATES for key in EXPECTED}
    for (method, *key), row in found.items():
        received, parts = EXPECTED[tuple(key)][method != "adam"]
        assert (row["received bytes"], row["state bytes"]) == (received, STATES[method] * SIZE // parts)
        assert row["predicted bytes"] == received


def test_what_is_recorded_is_what_is_predicted() -> None:
    found = rows(RECORDED)
    assert {(row["method"], row["ranks"], row["strategy"]) for row in found} == {
        (method, *key) for method in STATES for key in EXPECTED
    }
    assert [row["received bytes"] for row in found] == [row["predicted bytes"] for row in found]
    record = json.loads((RECORDED / "distributed.json").read_text())
    assert (RECORDED / "distributed.txt").read_text() == distributed.text(record)
