"""The benchmark of divided optimizers runs, and what it measures by count is what is predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_ranks_receive_and_keep_half(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    sizes = ["--ranks", "2", "--width", "32", "--count", "4", "--steps", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.benchmarks.distributed", *sizes, "--output", str(file)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    for method, states in {"adam": 2, "muon": 1, "shampoo": 5, "soap": 6}.items():
        one, divided = (found["result"][method][how] for how in ("replicated", "divided"))
        assert one["state bytes"] == 4 * states * 4 * 32**2
        assert divided["state bytes"] * 2 == one["state bytes"]
        assert divided["received bytes"] == 2 * 4 * 32**2
        assert one["received bytes"] == 0
        assert method in done.stdout
