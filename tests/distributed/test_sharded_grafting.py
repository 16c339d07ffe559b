"""Grafts, weight decay and watching of sharded parameters do what one process does with whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.dividing import Result
from tests.distributed.sharded_grafting import (
    CASES,
    FROZEN,
    METHODS,
    PER,
    PHASES,
    parameters,
    stepped,
    trained,
)
from tests.distributed.test_ddp import python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("sharded_grafting")
    python("-m", "tests.distributed.sharded_grafting", str(made))
    return made


def load(folder: Path, name: str) -> list[Result]:
    ranks = PHASES[name][0]
    return [torch.load(folder / f"{name} {ranks} {rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Result]:
    return load(folder, "alone")


@pytest.fixture(scope="module")
def trainers(folder: Path) -> list[Result]:
    return load(folder, "trainers")


@pytest.fixture(scope="module")
def one_process() -> Result:
    return {method: trained(method, sharded=False) for method in METHODS}


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# -- optimizers alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "parts", "per"), CASES)
def test_shards_are_grafted_as_wholes(alone: list[Result], mesh: str, parts: str, per: str) -> None:
    trios = zip(alone[0][f"{mesh}, {parts}, {per}"], stepped(parts, per), parameters(None), strict=True)
    for i, (got, want, start) in enumerate(trios):
        assert off(got, want) < 1e-6, i
        assert torch.equal(got, start) == (i == FROZEN)


@pytest.mark.parametrize(("mesh", "parts", "per"), CASES)
def test_all_ranks_have_the_same_bits(alone: list[Result], mesh: str, parts: str, per: str) -> None:
    first, *others = (found[f"{mesh}, {parts}, {per}"] for found in alone)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_no_rank_makes_a_whole_tensor(alone: list[Result]) -> None:
    assert [found["largest"] for found in alone] == [dict.fromkeys(PER, 64 * 64 // 4)] * 4


def test_a_part_that_is_not_finite_keeps_every_rank_from_the_step(alone: list[Result]) -> None:
    for found in alone:
        for name in ("grafted", "decayed"):
            skipped, raised = found["skip"][name], found["raise"][name]
            assert torch.equal(skipped["weight"], torch.ones(8, 4))
            assert torch.equal(raised["weight"], torch.ones(8, 4))
            assert skipped["error"] == ""
            assert "is not finite" in raised["error"]


# -- with a Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_weights_decay_and_move_as_in_one_process(trainers: list[Result], one_process: Result, method: str) -> None:
    want = one_process[method]["weights"]
    for found in trainers:
        got = found[method]["weights"]
        assert got.keys() == want.keys()
        for name, whole in want.items():
            assert off(got[name], whole) < 1e-6, (name, off(got[name], whole))


@pytest.mark.parametrize("method", METHODS)
def test_shards_are_watched_as_wholes(trainers: list[Result], one_process: Result, method: str) -> None:
    want = one_process[method]["metrics"]
    for found in trainers:
        for got, whole in zip(found[method]["metrics"], want, strict=True):
            assert got == pytest.approx(whole, rel=1e-5)


def test_resumed_weights_decay_as_uninterrupted(trainers: list[Result]) -> None:
    """Lightning's strategy takes a step of its own to load an optimizer's state, at which nothing may decay."""
    for found in trainers:
        saved, resumed = found["saved"], found["resumed"]
        assert all(torch.equal(resumed["weights"][name], whole) for name, whole in saved["weights"].items())
        assert resumed["metrics"][-1] == saved["metrics"][-1]
