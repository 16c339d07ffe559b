"""What an installed method must do under Lightning. `test_one_file.py` runs this by name, where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_mup import Parametrize, plan
from tests.lightning.helpers import Net, same, trainer
from tests.lightning.test_resume import Resumable

STEPS, SAVED_AT = 18, 11  # in the middle of the second epoch


class Trained(Net):
    def train_dataloader(self) -> DataLoader[Any]:
        return Resumable(super().train_dataloader().dataset)


def fit(folder: Path, resume: Path | None = None) -> Net:
    torch.manual_seed(0)
    module = Trained(64)
    parametrize = Parametrize(lambda: Trained(16), method="whitened", lr=0.05, weight_decay=1e-3)
    saving = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED_AT)
    ran = trainer(parametrize, saving, steps=STEPS, enable_checkpointing=True)
    ran.fit(module, ckpt_path=resume)
    assert ran.global_step == STEPS
    return module


def test_whitened_is_planned() -> None:
    rows = {row.spec.name: row for row in plan(Net(64), lambda: Net(16), method="whitened").params}
    assert {row.method for row in rows.values()} == {"whitened"}
    rates = {name: row.lr for name, row in rows.items() if name.endswith("weight")}
    assert rates == {"net.0.weight": 2.0, "net.2.weight": 1.0, "net.4.weight": 0.5}  # (fan_out/fan_in)^1/2 at 4 times


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_whitened_is_trained_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    batch = next(iter(Net().train_dataloader()))
    assert whole.loss(batch) < 0.7 * Net(64).loss(batch)
    saved = tmp_path / "saved.ckpt"
    (state,) = torch.load(saved, weights_only=True)["optimizer_states"]
    assert {key for entry in state["state"].values() for key in entry} == {"whiten/ema", "step"}
    assert {float(entry["step"]) for entry in state["state"].values()} == {SAVED_AT}
    resumed = fit(tmp_path, saved)
    assert same(resumed, whole)
    ours, theirs = (module.trainer.optimizers[0] for module in (resumed, whole))
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert all(torch.equal(value, theirs.state[q][key]) for key, value in ours.state[p].items())
