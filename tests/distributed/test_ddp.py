"""Two ranks (gloo, CPU) do what one process does: DDP in three launches, and FSDP2 under ModelParallelStrategy."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_mup import Parametrize
from lightning_mup.core.base import resolve_base
from tests.distributed.ranks import BATCH, MATRIX_METHODS, Result, Small, fit, supplied
from tests.lightning.helpers import rms

Values = dict[str, Tensor]


def python(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    python("-m", "tests.distributed.ranks", str(made))
    return made


@pytest.fixture(scope="session")
def ranks(folder: Path) -> list[dict[str, Result]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def alone(how: Any, width: int = 32, base: object = None, **kwargs: Any) -> Result:
    torch.manual_seed(1)
    return fit(Small(width, BATCH), Parametrize(base or {"width": width // 4}, initialize=how), **kwargs)


def equal(one: Values, other: Values) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: Values, other: Values, tolerance: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], tolerance, tolerance) for n in one)


FITTED = ["ddp scale", "ddp draw", "ddp find unused", "logged", "sharded scale", "sharded draw", "sharded clipped"]
FITTED += [f"ddp {name}" for name in MATRIX_METHODS]
FITTED += ["uneven", "differing base", "meta", "meta base run", "resumed", "twice"]


@pytest.mark.parametrize("name", FITTED)
def test_ranks_agree(ranks: list[dict[str, Result]], name: str) -> None:
    one, other = (rank[name] for rank in ranks)
    assert one["digest"] == other["digest"]
    assert equal(one["start"], other["start"])
    assert equal(one["end"], other["end"])
    assert not equal(one["start"], one["end"])


@pytest.mark.parametrize("name", ["ddp scale", "ddp draw", "ddp find unused", "sharded scale", "sharded draw"])
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Result]], name: str) -> None:
    got, want = ranks[0][name], alone("scale" if "scale" in name else "draw")
    assert got["digest"] == want["digest"]
    exact = name != "sharded scale"  # there the sizes are summed over the ranks
    assert equal(got["start"], want["start"]) if exact else close(got["start"], want["start"], 1e-6)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-4)
    assert close(got["end"], want["end"], 1e-4)


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_matrix_methods_on_two_ranks_train_as_on_one(ranks: list[dict[str, Result]], name: str) -> None:
    got, want = ranks[0][f"ddp {name}"], supplied(name, Small(32, BATCH))
    assert equal(got["start"], want["start"])
    for n, end in want["end"].items():
        assert float((got["end"][n] - end).norm()) <= 1e-5 * float(end.norm()), n


def test_clipping_of_shards(ranks: list[dict[str, Result]]) -> None:
    want = alone("draw", gradient_clip_val=0.1)
    assert close(ranks[0]["sharded clipped"]["end"], want["end"], 1e-4)
    assert not close(ranks[0]["sharded clipped"]["end"], ranks[0]["sharded draw"]["end"], 1e-4)


def test_plan_has_global_shapes(ranks: list[dict[str, Result]]) -> None:
    assert ranks[0]["sharded scale"]["shape"] == (32, 32)
    assert ranks[0]["uneven"]["shape"] == (33, 33)


def test_uneven_shards_are_measured_whole(ranks: list[dict[str, Result]]) -> None:
    want = alone("scale", 33, base=lambda: Small(11))
    assert close(ranks[0]["uneven"]["start"], want["start"], 1e-6)


def test_a_base_that_differs_between_ranks_is_sent_by_the_first(ranks: list[dict[str, Result]]) -> None:
    torch.manual_seed(0)
    measured = resolve_base(Small(8), Small()).measured
    for name in ("net.0.weight", "net.2.weight"):
        ratio = {"net.0.weight": 1.0, "net.2.weight": 0.5}[name]
        assert rms(ranks[1]["differing base"]["start"][name]) == pytest.approx(ratio * measured[name].rms, rel=1e-5)


def test_meta_parameters_are_drawn_as_unsharded_ones(ranks: list[dict[str, Result]]) -> None:
    got, want = ranks[0]["meta"], alone("draw", base=lambda: Small(8))
    assert equal(got["start"], want["start"])
    assert close(got["end"], want["end"], 1e-4)


def test_meta_base_run_is_drawn_too(ranks: list[dict[str, Result]]) -> None:
    """Lightning's own draws for meta parameters give every rank the same shard."""
    start = ranks[0]["meta base run"]["start"]["net.2.weight"]
    assert not torch.equal(start[:16], start[16:])
    assert torch.linalg.matrix_rank(start) == 32


def test_sharded_run_resumes_bit_for_bit(ranks: list[dict[str, Result]]) -> None:
    assert equal(ranks[0]["resumed"]["end"], ranks[0]["resumed"]["whole"])
    assert equal(ranks[0]["resumed"]["end"], ranks[0]["sharded draw"]["end"])
    assert len(ranks[0]["resumed"]["losses"]) == 2


def test_sharded_run_under_another_plan_is_refused(ranks: list[dict[str, Result]]) -> None:
    for rank in ranks:
        assert "net.0.weight: fan_out 32/16 (other: 32/8)" in rank["refused"]["error"]


def test_meta_module_that_trains_again_keeps_its_values(ranks: list[dict[str, Result]]) -> None:
    assert equal(ranks[0]["twice"]["first"], ranks[0]["twice"]["second"])


def test_the_first_rank_logs(ranks: list[dict[str, Result]], folder: Path) -> None:
    (written,) = folder.rglob("plan.json")
    assert json.loads(written.read_text())["rules"] == "mup"


LAUNCHED = """
import sys, torch, warnings
import lightning as L
from lightning_mup import Parametrize
from tests.distributed.ranks import Small, fit

class Ended(L.Callback):
    def teardown(self, trainer, module, stage):  # gloo's threads may abort a process that ends with them
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    strategy, file = sys.argv[1:]
    module = Small()
    if strategy == "ddp":  # this script runs once for each rank
        result = fit(module, Parametrize(lambda: Small(8), initialize="draw"), strategy)
        if result.pop("trainer").global_rank == 0:
            torch.save(result["end"], file)
        torch.distributed.destroy_process_group()
    else:  # the processes hand their weights back to this one
        L.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_steps=4, logger=False, enable_checkpointing=False,
            callbacks=[Parametrize(lambda: Small(8), initialize="draw"), Ended()], enable_progress_bar=False,
        ).fit(module)
        torch.save({name: p.detach() for name, p in module.named_parameters()}, file)
"""


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_processes_that_lightning_launches(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    python(str(script), strategy, str(tmp_path / "end.pt"))
    assert close(torch.load(tmp_path / "end.pt"), alone("draw")["end"], 1e-4)


def test_several_trainers_leave_no_process_group() -> None:
    L.Trainer(accelerator="cpu", logger=False, max_steps=0, enable_checkpointing=False).fit(Small())
    assert not torch.distributed.is_initialized()
