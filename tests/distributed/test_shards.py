"""On four ranks, owners get whole tensors from shards on any mesh, and all ranks get their parts back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mup.core.shards import Piece, _sources
from tests.distributed.dividing import Result
from tests.distributed.sharding import MESHES, RANKS, owners, wholes
from tests.distributed.test_ddp import python


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder: Path = tmp_path_factory.mktemp("sharding")
    python("-m", "tests.distributed.sharding", str(folder))
    return [torch.load(folder / f"meshes {RANKS} {rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("mesh", MESHES)
def test_each_owner_has_the_whole(ranks: list[Result], mesh: str) -> None:
    for rank, found in enumerate(ranks):
        for got, want, owner in zip(found[mesh]["gathered"], wholes(), owners(), strict=True):
            assert (got is None) == (owner != rank)
            assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_rank_has_its_parts_again(ranks: list[Result], mesh: str) -> None:
    for found in ranks:
        for got, part in zip(found[mesh]["scattered"], found[mesh]["locals"], strict=True):
            assert torch.equal(got, 2 * part)


def test_an_owner_asks_its_own_replica() -> None:
    pieces = [Piece((0, 0), (2, 2)), Piece((2, 0), (2, 2))] * 2
    assert _sources(pieces, 1, (4, 2)) == {0, 1}
    assert _sources(pieces, 2, (4, 2)) == {2, 3}


def test_parts_must_make_up_the_whole() -> None:
    with pytest.raises(ValueError, match="are 4 entries, but a whole of shape"):
        _sources([Piece((0, 0), (2, 2))], 0, (4, 2))
