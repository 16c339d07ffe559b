"""On two ranks metrics and WatchUpdates give the numbers of one rank that sees everything."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import BATCH, Small
from tests.distributed.test_ddp import python
from tests.distributed.watching import Numbers, updates, watched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("watching")
    python("-m", "tests.distributed.watching", str(made))
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Numbers]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_metrics_are_those_of_one_rank_that_sees_all_updates(ranks: list[dict[str, Numbers]]) -> None:
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    for metric, other in zip(updates(0).items(), updates(1).items(), strict=True):
        metric[0].update(*metric[1])
        metric[0].update(*other[1])
        assert ranks[0]["metrics"][type(metric[0]).__name__] == pytest.approx(float(metric[0].compute()), rel=1e-12)


@pytest.mark.parametrize("name", ["ddp", "ddp matrices", "sharded"])
def test_watching_two_ranks_gives_the_numbers_of_one(ranks: list[dict[str, Numbers]], name: str) -> None:
    want = watched(Small(32, BATCH), "auto", per="matrix" if name == "ddp matrices" else "role")
    assert ranks[0][name] == ranks[1][name]
    assert ranks[0][name].keys() == want.keys()
    assert len(want) > 40
    for key, value in want.items():
        assert ranks[0][name][key] == pytest.approx(value, rel=1e-4), key


def test_the_first_rank_logs(ranks: list[dict[str, Numbers]], folder: Path) -> None:
    (file,) = folder.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row["update/rms/hidden"]]
    assert len(rows) == 1
    assert float(rows[0]["update/rms/hidden"]) == pytest.approx(ranks[0]["ddp"]["update/rms/hidden"])
