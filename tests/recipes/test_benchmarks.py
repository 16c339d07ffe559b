"""The benchmark runs; what it measures is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import optimizers, report
from recipes.benchmarks.rows import ROWS, Row, Work, work_of
from recipes.benchmarks.timing import Stepper


def test_two_rows_leave_json_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Row("absent", "not_a_package:Absent", like="AdamW")
    monkeypatch.setitem(ROWS, "absent", absent)
    monkeypatch.setitem(optimizers.DISTRIBUTIONS, "not_a_package", "not-a-package")
    rows = ["SOAP, every 10", "torch AdamW, fused", "absent"]
    arguments = ["--widths", "16", "--samples", "1", "--seconds", "0.001", "--out", str(tmp_path)]
    optimizers.main([*arguments, "--rows", *rows])
    record = json.loads((tmp_path / "optimizers.json").read_text())
    assert sorted(found["label"] for found in record["samples"]) == sorted(rows[:2])
    assert record["left_out"] == {"16": {"absent": "not installed: pip install not-a-package"}}
    table = (tmp_path / "optimizers.txt").read_text()
    assert all(row in table for row in rows)
    assert (tmp_path / "optimizers.png").stat().st_size > 1000


def test_a_row_that_fails_is_listed() -> None:
    task = optimizers.Task("no such row", (16,))
    assert [found["left_out"] for found in optimizers.run_task(task)] == ["failed: KeyError: 'no such row'"]


def test_disturbed_samples_are_dropped_unless_all_are() -> None:
    def sample(label: str, step: float, probe: float) -> dict[str, object]:
        return {
            "label": label,
            "width": 8,
            "step": step,
            "control": [1.0, 3.0],
            "probes": [probe, 100.0],
            "state_bytes": 8.0,
            "floor": {"products": 1.0, "factorizations": 1.0},
        }

    given = [sample("a", 4.0, 100.0), sample("a", 9.0, 50.0), sample("b", 6.0, 50.0)]
    found = report.summarize(given, tolerance=0.1)
    kept, doubtful = found["a", 8], found["b", 8]
    assert (kept.ratio, kept.floor, kept.kept, kept.dropped, kept.disturbed) == ((2.0, 2.0, 2.0), 2.0, 1, 1, False)
    assert (doubtful.ratio[0], doubtful.kept, doubtful.dropped, doubtful.disturbed) == (3.0, 1, 0, True)


OURS_AND_TORCHS = [row for row in ROWS.values() if row.package in ("lightning_mup", "torch")]  # others may warn


@pytest.mark.parametrize("row", OURS_AND_TORCHS, ids=lambda row: row.label)
def test_rows_step(row: Row) -> None:
    stepper = Stepper(row, [(6, 4), (4, 6)])
    before = [p.detach().clone() for p in stepper.params]
    stepper(2)
    assert not any(torch.equal(p, old) for p, old in zip(stepper.params, before, strict=True))
    assert stepper.state_bytes() > 0


def test_peers_name_a_row_of_ours() -> None:
    peers = [row for row in ROWS.values() if row.package != "lightning_mup"]
    assert {ROWS[row.like].package for row in peers if row.like} == {"lightning_mup"}
    assert all(row.like for row in peers)


@pytest.mark.parametrize(
    ("label", "cubes"),
    [
        ("Muon, fp32 products", 30),  # 5 iterations of 3 products
        ("SOAP, every step", 20),  # 8 products and P Q on either side
        ("Shampoo, eigh every 10", 8.4),  # 4 products, and V w V^T on either side every 10 steps
        ("AdamW", None),
    ],
)
def test_floor_of_a_square_matrix(label: str, cubes: float | None) -> None:
    work = work_of(ROWS[label])
    assert (work.flops([(4, 4)]) if work else None) == (None if cubes is None else pytest.approx(cubes * 4**3))


def test_blocks_have_floors_of_their_own() -> None:
    work = Work({"two_sided": 1, "eigh": 0.5}, block=4)
    assert work.flops([(8, 2)]) == 2 * 2 * 4 * 2 * 6
    assert work.factorizations([(8, 2)]) == {("eigh", 4): 1.0, ("eigh", 2): 1.0}
