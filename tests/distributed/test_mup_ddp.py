"""Optimizers divided over two, three and four ranks (gloo, CPU) do what undivided ones do, each rank its part of it."""

# ruff: noqa: ANN401 - tests hand on whatever torch takes

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.dividing import ALIKE, CASES, EVEN, FEW, RUNS, STEPS, VECTORS, Net, Result, fit
from tests.distributed.test_ddp import close, equal, python

Values = dict[str, Tensor]
RANKS = pytest.mark.parametrize("ranks", [2, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dividing")
    python("-m", "tests.distributed.dividing", str(made))
    return made


def seen(folder: Path, phase: str, ranks: int) -> list[Result]:
    return [torch.load(folder / f"{phase} {ranks} {rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, list[Result]]:
    return {ranks: seen(folder, "optimizers", ranks) for ranks in (2, 4)}


def states_equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


# -- optimizers alone -----------------------------------------------------------------------------------------------

EXACT = [*(f"{case}, even" for case in CASES), "muon, 1 bytes", "muon, 134217728 bytes", "muon, few", "shampoo, few"]
EXACT += [f"{case}, alike" for case in ("adam", "muon", "shampoo", "soap in blocks")]
ODD = [f"{case}, uneven" for case in ("muon", "shampoo in blocks", "adam")]


@RANKS
@pytest.mark.parametrize("name", [*EXACT, *ODD])
def test_weights_and_state_are_those_of_an_undivided_optimizer(
    alone: dict[int, list[Result]], ranks: int, name: str
) -> None:
    one = alone[ranks][0][name]["one"]
    tolerance = 1e-5 if name in ODD else 0.0  # BLAS looks at alignment, hence at the place in a stack
    for rank in alone[ranks]:
        assert all(map(torch.equal, rank[name]["divided"]["weights"], alone[ranks][0][name]["divided"]["weights"]))
        for got, want in zip(rank[name]["divided"]["weights"], one["weights"], strict=True):
            assert float((got - want).norm()) <= tolerance * float(want.norm())
    got, want = alone[ranks][0][name]["divided"]["state"]["state"], one["state"]["state"]
    assert got.keys() == want.keys()
    for key, state in want.items():
        assert got[key].keys() == state.keys()
        for part, value in state.items():
            torch.testing.assert_close(got[key][part], value, rtol=tolerance, atol=tolerance)
    assert [rank[name]["divided"]["state"] for rank in alone[ranks][1:]] == [{}] * (ranks - 1)


@RANKS
@pytest.mark.parametrize("name", ["adam", "muon", "shampoo", "soap in blocks"])
def test_state_and_roots_fall_as_one_over_ranks(alone: dict[int, list[Result]], ranks: int, name: str) -> None:
    """Of nine alike matrices one is frozen, and comes on top of somebody's even share of the others."""
    found = [rank[f"{name}, alike"] for rank in alone[ranks]]
    whole = found[0]["one"]
    assert [rank["divided"]["matrices"] for rank in found] == [whole["matrices"] // ranks] * ranks
    kept = sorted(rank["divided"]["state bytes"] * len(ALIKE) // whole["state bytes"] for rank in found)
    assert kept == [8 // ranks] * (ranks - 1) + [8 // ranks + 1]


@RANKS
@pytest.mark.parametrize("name", CASES)
def test_every_root_is_taken_once(alone: dict[int, list[Result]], ranks: int, name: str) -> None:
    found = [rank[f"{name}, even"] for rank in alone[ranks]]
    assert sum(rank["divided"]["matrices"] for rank in found) == found[0]["one"]["matrices"]
    shared = [found[0]["one"]["state"]["state"][len(EVEN) + i] for i in range(len(VECTORS))]  # every rank keeps these
    size = sum(value.nbytes for state in shared for key, value in state.items() if key != "step")
    kept = sum(rank["divided"]["state bytes"] for rank in found)
    assert kept == found[0]["one"]["state bytes"] + (ranks - 1) * size


@RANKS
def test_fewer_matrices_than_ranks(alone: dict[int, list[Result]], ranks: int) -> None:
    found = [rank["shampoo, few"]["divided"] for rank in alone[ranks]]
    assert [rank["state bytes"] > 0 for rank in found] == [True] + [False] * (ranks - 1)
    size = 4 * FEW[0][0] * FEW[0][1]
    assert [rank["traffic"] for rank in found] == [0] + [size * STEPS] * (ranks - 1)


@RANKS
def test_every_matrix_is_sent_once_a_step(alone: dict[int, list[Result]], ranks: int) -> None:
    for size in (1, 2**14, 2**27):
        name = "muon, even" if size == 2**14 else f"muon, {size} bytes"
        received = sum(rank[name]["divided"]["traffic"] for rank in alone[ranks])
        assert received == (ranks - 1) * STEPS * 4 * sum(rows * columns for rows, columns in EVEN)
        assert alone[ranks][0]["sgd without state, even"]["divided"]["traffic"] == 0


@RANKS
def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_by_all(alone: dict[int, list[Result]], ranks: int) -> None:
    for rank, found in enumerate(alone[ranks]):
        assert found["not finite, raise"]["unmoved"]
        assert found["not finite, skip"]["unmoved"]
        assert not found["not finite, skip"]["error"]
        where = "of 'parameter 0 of group 0'" if rank == 0 else "on another rank"
        assert f"the gradient {where} is not finite" in found["not finite, raise"]["error"]


@RANKS
def test_elementwise_methods_may_stay_with_every_rank(alone: dict[int, list[Result]], ranks: int) -> None:
    size, vectors = 4 * 32 * 32, 2 * 4 * sum(shape[0] if shape else 1 for shape in VECTORS)
    found = [rank["replicated"] for rank in alone[ranks]]
    assert [rank["state bytes"][0] for rank in found] == [2 * len(ALIKE) * size + vectors] * ranks
    owned = [(rank["state bytes"][1] - vectors) // size for rank in found]
    assert sorted(owned) == sorted(len(range(rank, len(ALIKE), ranks)) for rank in range(ranks))
    assert [rank["traffic"] for rank in found] == [(len(ALIKE) - own) * size for own in owned]


@RANKS
def test_a_divided_optimizer_is_not_copied_and_not_divided_again(alone: dict[int, list[Result]], ranks: int) -> None:
    for rank in alone[ranks]:
        assert f"has a part of the state of {ranks} ranks and cannot be copied" in rank["refusals"]["copy"]
        assert f"divided over {ranks} ranks already" in rank["refusals"]["twice"]


# -- with a Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_strategy_does_what_ddp_does(folder: Path, name: str) -> None:
    """Bit for bit, with callbacks, clipping and accumulation, a frozen layer and one that is seldom used."""
    ranks = seen(folder, "beside ddp", 2)
    want = ranks[0][f"{name}, DDPStrategy"]
    for rank in ranks:
        got = rank[f"{name}, MupDDPStrategy"]
        assert equal(got["weights"], want["weights"])
        assert got["metrics"] == want["metrics"]
        assert got["bytes"] < 0.9 * want["bytes"]
        assert got["traffic"].steps == 12 * (2 if name == "grafting" else 1)
    assert not equal(want["weights"], {n: p.detach() for n, p in Net().named_parameters()})
    assert ranks[0][f"{name}, MupDDPStrategy"]["records"] == want["records"]
    assert bool(want["records"]) == (name == "coordinate check")
    saved = ranks[0][f"{name}, MupDDPStrategy"]["saved"]
    for side in ("direction", "magnitude") if name == "grafting" else ("",):
        ours, theirs = ((found[side] if side else found) for found in (saved, want["saved"]))
        assert ours["param_groups"] == theirs["param_groups"]
        assert states_equal(ours["state"], theirs["state"])


def test_ddp_says_once_what_dividing_would_save(folder: Path) -> None:
    plain, divided = (seen(folder, "beside ddp", 2)[0][f"parametrize, {kind}Strategy"] for kind in ("DDP", "MupDDP"))
    (said,) = plain["said"]
    found = re.fullmatch(r"Every one of the 2 ranks keeps ([\d.]+) MB .* at most ([\d.]+) MB and (\d+)% of .*", said)
    assert found is not None
    vectors = 1e6 * float(found[1]) - plain["bytes"]
    assert -3000 < vectors <= 0
    assert "divides" in divided["said"][0]
    assert all(f"{float(found[i])} MB" in divided["said"][0] for i in (1, 2))
    assert divided["said"][1] == f"mup_ddp: {divided['traffic']}, in 12 steps."


@pytest.mark.parametrize("ranks", [2, 3])
def test_saved_by_four_and_resumed_by_fewer(folder: Path, ranks: int) -> None:
    whole = seen(folder, "saving", 4)[0]["whole"]
    file, again = folder / "saved" / "step=10.ckpt", folder / "again" / f"{ranks}.ckpt"
    saved, later = (torch.load(path, weights_only=False) for path in (file, again))
    assert states_equal(later["optimizer_states"][0]["state"], saved["optimizer_states"][0]["state"])
    for found in seen(folder, "resuming", ranks):
        assert close(found["resumed"]["weights"], whole["weights"])
        assert found["resumed"]["bytes"] < 0.7 * seen(folder, "saving", 4)[0]["whole"]["bytes"] * 4
        assert found["resumed"]["traffic"].steps == STEPS - 10


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # the ModelCheckpoint is not needed
def test_one_process_goes_on_with_what_four_ranks_saved(folder: Path) -> None:
    whole = seen(folder, "saving", 4)[0]["whole"]
    resumed = fit("auto", 1, resume=folder / "saved" / "step=10.ckpt")
    assert close(resumed["weights"], whole["weights"])
    assert states_equal_in_shape(resumed["saved"]["state"], whole["saved"]["state"])
    assert not close(fit("auto", 1, steps=10)["weights"], whole["weights"])


def states_equal_in_shape(one: Any, other: Any) -> bool:
    shapes = [{key: {n: v.shape for n, v in state.items()} for key, state in found.items()} for found in (one, other)]
    return shapes[0] == shapes[1]


def test_two_ranks_train_as_one_process(folder: Path) -> None:
    assert close(seen(folder, "after the kill", 2)[0]["whole"]["weights"], fit("auto", 1)["weights"])


def test_a_rank_that_dies_ends_the_others_and_leaves_a_whole_checkpoint(folder: Path) -> None:
    died = torch.load(folder / "codes.pt")["killed"]
    assert died == [1, -9]
    found = seen(folder, "after the kill", 2)[0]
    assert found["last"] == "step=6"
    assert equal(found["resumed"]["weights"], found["whole"]["weights"])


LAUNCHED = """
import sys, torch, warnings
import lightning as L
from tests.distributed.dividing import Net

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="mup_ddp_find_unused_parameters_true", max_steps=20, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, gradient_clip_val=0.5, use_distributed_sampler=False,
    )
    module = Net()
    trainer.fit(module)
    if trainer.global_rank == 0:
        torch.save({name: p.detach() for name, p in module.named_parameters()}, sys.argv[1])
    torch.distributed.destroy_process_group()
"""


def test_processes_that_lightning_launches_by_name(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    python(str(script), str(tmp_path / "end.pt"))
    assert equal(torch.load(tmp_path / "end.pt"), seen(folder, "after the kill", 2)[0]["whole"]["weights"])
