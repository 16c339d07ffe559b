"""Sharded over one to four ranks (gloo, CPU), by FSDP2 and HSDP, optimizers and trainings do what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mup import MupFSDPStrategy
from lightning_mup.strategies.sharded_checkpoint import consolidate
from tests.distributed.dividing import ALIKE, CASES, EVEN, STEPS, Net, Result
from tests.distributed.dividing import fit as fit_divided
from tests.distributed.sharded_training import MANY, SIZED, TRAINED, fit
from tests.distributed.test_ddp import close, equal, python
from tests.distributed.test_mup_ddp import EXACT, ODD, seen

WAYS = [(2, "fsdp"), (4, "fsdp"), (4, "hsdp")]
EVERYWHERE = pytest.mark.parametrize(("ranks", "way"), WAYS)
FIXED = [name for name in EXACT if "bytes" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharded")
    python("-m", "tests.distributed.sharded_training", str(made))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, list[Result]]:
    return {ranks: seen(folder, "optimizers", ranks) for ranks in (2, 4)}


def shards(ranks: int, way: str) -> int:
    return ranks // 2 if way == "hsdp" else ranks


# -- optimizers alone -----------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("name", [*FIXED, *ODD])
def test_weights_and_state_are_those_of_one_process(
    alone: dict[int, list[Result]], ranks: int, way: str, name: str
) -> None:
    """Bit for bit, but where vectorized loops end elsewhere in a part than in the whole."""
    one = alone[ranks][0][name]["one"]
    tolerance = 0.0 if name in FIXED and "atan2" not in name else 1e-6
    for rank in alone[ranks]:
        for got, want in zip(rank[name][way]["weights"], one["weights"], strict=True):
            assert float((got - want).norm()) <= tolerance * float(want.norm())
    got, want = alone[ranks][0][name][way]["state"]["state"], one["state"]["state"]
    assert got.keys() == want.keys()
    for key, state in want.items():
        assert got[key].keys() == state.keys()
        for part, value in state.items():
            torch.testing.assert_close(got[key][part], value, rtol=tolerance, atol=tolerance)
    assert [rank[name][way]["state"] for rank in alone[ranks][1:]] == [{}] * (ranks - 1)


@EVERYWHERE
@pytest.mark.parametrize("name", ["muon", "shampoo", "soap in blocks"])
def test_owned_state_and_roots_fall_as_one_over_ranks(
    alone: dict[int, list[Result]], ranks: int, way: str, name: str
) -> None:
    """Of nine alike matrices one is frozen, and comes on top of somebody's even share of the others."""
    found = [rank[f"{name}, alike"] for rank in alone[ranks]]
    one = found[0]["one"]
    assert [rank[way]["matrices"] for rank in found] == [one["matrices"] // ranks] * ranks
    kept = sorted(rank[way]["state bytes"] * len(ALIKE) // one["state bytes"] for rank in found)
    assert kept == [8 // ranks] * (ranks - 1) + [8 // ranks + 1]


@EVERYWHERE
def test_elementwise_state_falls_as_one_over_shards(alone: dict[int, list[Result]], ranks: int, way: str) -> None:
    found = [rank["adam, alike"] for rank in alone[ranks]]
    assert [rank[way]["state bytes"] for rank in found] == [
        found[0]["one"]["state bytes"] // shards(ranks, way)
    ] * ranks
    assert [rank[way]["traffic"] for rank in found] == [0] * ranks


@EVERYWHERE
@pytest.mark.parametrize("name", CASES)
def test_every_root_is_taken_once(alone: dict[int, list[Result]], ranks: int, way: str, name: str) -> None:
    found = [rank[f"{name}, even"] for rank in alone[ranks]]
    assert sum(rank[way]["matrices"] for rank in found) == found[0]["one"]["matrices"]


@EVERYWHERE
def test_each_rank_sends_its_part_and_gets_its_part(alone: dict[int, list[Result]], ranks: int, way: str) -> None:
    """Of every matrix with a gradient: a shard less the owner's own to each owner, and a part to everyone else."""
    moved = sum(rows * columns for i, (rows, columns) in enumerate(EVEN) if i not in (1, 3)) * STEPS
    moved += EVEN[3][0] * EVEN[3][1] * (STEPS * 3 // 4)
    of = shards(ranks, way)
    gathered, scattered = 4 * moved * (of - 1) // of, 4 * moved * (ranks - 1) // of
    assert sum(rank["muon, even"][way]["traffic"] for rank in alone[ranks]) == gathered + scattered


@EVERYWHERE
def test_fewer_matrices_than_ranks(alone: dict[int, list[Result]], ranks: int, way: str) -> None:
    found = [rank["shampoo, few"][way] for rank in alone[ranks]]
    assert [rank["state bytes"] > 0 for rank in found] == [True] + [False] * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_takes_memory_for_what_is_exchanged_at_once(alone: dict[int, list[Result]], ranks: int) -> None:
    """Not for all matrices, or all that a rank owns, unless they are exchanged at once."""
    everything = 4 * len(MANY) * MANY[0][0] * MANY[0][1]
    for rank in alone[ranks]:
        small, large = rank["most bytes"][2**16], rank["most bytes"][2**24]
        assert small < 18 * 2**16 // ranks < everything // ranks
        assert large > everything // ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_part_that_is_not_finite_is_seen_by_all(alone: dict[int, list[Result]], ranks: int) -> None:
    for rank, found in enumerate(alone[ranks]):
        assert found["not finite, raise"]["unmoved"]
        assert found["not finite, skip"]["unmoved"]
        assert not found["not finite, skip"]["error"]
        where = "of 'parameter 2 of group 0'" if rank == 1 else "on another rank"
        assert f"the gradient {where} is not finite" in found["not finite, raise"]["error"]


# -- with a Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "way"), [(2, "ddp"), (4, "ddp"), *WAYS])
@pytest.mark.parametrize("case", [*TRAINED, SIZED])
def test_trainings_are_those_of_one_process(folder: Path, ranks: int, way: str, case: str) -> None:
    """In float32, with clipping and accumulation, a frozen layer, and one that is seldom used."""
    one = seen(folder, "training", 1)[0][f"{case}, one"]["weights"]
    for rank in seen(folder, "training", ranks):
        found = rank[f"{case}, {way}"]
        assert found["sharded"] == (way != "ddp")
        for name, want in one.items():
            assert float((found["weights"][name] - want).norm()) <= 1e-5 * float(want.norm())
    assert not equal(one, {name: p.detach() for name, p in Net().named_parameters()})


def test_it_says_how_much_is_divided_and_sent(folder: Path) -> None:
    divided, sent = seen(folder, "training", 4)[0]["said"]
    assert divided.startswith("mup_fsdp divides ")
    assert "over 4 ranks" in divided
    assert sent.startswith("mup_fsdp: ")
    assert sent.endswith("in 2 steps.")


@pytest.mark.parametrize("ranks", [3, 2, 1])
@pytest.mark.parametrize("kind", ["folders", "files"])
def test_saved_by_four_and_resumed_by_fewer(folder: Path, ranks: int, kind: str) -> None:
    saved = seen(folder, "saving", 4)[0]
    want = saved["whole" if kind == "folders" else "hsdp, one file"]["weights"]
    for rank in seen(folder, "resuming", ranks):
        assert close(rank[kind]["weights"], want)


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # the ModelCheckpoint is not needed
def test_one_process_without_the_strategy_goes_on_with_either(folder: Path, tmp_path: Path) -> None:
    saved = seen(folder, "saving", 4)[0]
    consolidate(folder / "folders" / "step=10.ckpt", tmp_path / "one.ckpt")
    assert close(fit_divided("auto", 1, resume=tmp_path / "one.ckpt")["weights"], saved["whole"]["weights"])
    file = folder / "files" / "step=10.ckpt"
    assert close(fit_divided("auto", 1, resume=file)["weights"], saved["hsdp, one file"]["weights"])
    assert not close(fit_divided("auto", 1, steps=10)["weights"], saved["whole"]["weights"])


def test_what_is_built_on_meta_starts_alike_at_every_number_of_ranks(folder: Path) -> None:
    want = trainable(seen(folder, "saving", 4)[0]["meta"]["weights"])
    assert float(want["layers.2.weight"].std()) > 0
    for ranks in (3, 2, 1):
        for rank in seen(folder, "resuming", ranks):
            assert equal(trainable(rank["meta"]["weights"]), want)


def trainable(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the frozen layer, which no plan knows, and which a checkpoint is to fill."""
    return {name: value for name, value in weights.items() if not name.startswith("layers.1.")}


def test_a_rank_that_dies_ends_the_others_and_leaves_a_whole_checkpoint(folder: Path) -> None:
    assert torch.load(folder / "codes.pt")["killed"] == [1, -9]
    found = seen(folder, "after the kill", 2)[0]
    assert found["last"] == "step=6"
    assert equal(found["resumed"]["weights"], found["whole"]["weights"])
    assert not list((folder / "killed").glob("*.part"))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"replicas": 0}, {"tensor_parallel_size": 0}, {"exchange_mb": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        MupFSDPStrategy(**settings)  # type: ignore[arg-type]


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="1 ranks cannot be divided into replicas=2"):
        fit(MupFSDPStrategy(replicas=2), 1)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no meta\.pt"):
        consolidate(tmp_path, tmp_path / "one.ckpt")
