"""The files of a run: whole lines, whatever kills it; and what it spent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mup.callbacks.record_run import RecordRun
from lightning_mup.language import LanguageModel
from lightning_mup.run_log import RunLog


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    RunLog(tmp_path).log_metrics({"a": 1.0}, step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "a"')
    RunLog(tmp_path).log_metrics({"a": 3.0}, step=1)
    assert lines(tmp_path) == [{"step": 0, "a": 1}, {"step": 1, "a": 3}]


def test_a_file_that_is_half_a_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    RunLog(tmp_path).log_metrics({"a": 1.0}, step=0)
    assert lines(tmp_path) == [{"step": 0, "a": 1}]


@pytest.mark.parametrize(("value", "written"), [(math.nan, "nan"), (-math.inf, "-inf"), (0.1, 0.1), (2.0**53, 2**53)])
def test_numbers(tmp_path: Path, value: float, written: object) -> None:
    RunLog(tmp_path).log_metrics({"a": value}, step=0)
    assert lines(tmp_path)[0]["a"] == written


class Losses(LanguageModel):
    """Its loss at batch i is i, or nan from some batch on."""

    def __init__(self, nan_from: int = 10**9) -> None:
        super().__init__(nn.Linear(2, 2), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        self.nan_from = nan_from

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).sum() * 0 + batch_idx
        loss = loss * (math.nan if batch_idx >= self.nan_from else 1)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", batch.sum() * 0 + 7.5)


DATA = DataLoader(torch.ones(4, 2))


def run(folder: Path, module: L.LightningModule, *, steps: int = 40, **settings: object) -> tuple[RecordRun, L.Trainer]:
    record = RecordRun(folder, {"lr": 0.1}, tokens_per_step=10**9, flops_per_token=1e11)
    callbacks = [record, ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=5)]
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=RunLog(folder),
        callbacks=callbacks,
        log_every_n_steps=5,
        num_sanity_val_steps=0,
        val_check_interval=1000,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for key, value in settings.items():
        setattr(trainer, key, value)
    last = folder / "last.ckpt"
    trainer.fit(module, DataLoader(torch.ones(1000, 2)), DATA, ckpt_path=str(last) if last.exists() else None)
    return record, trainer


def test_what_was_spent_stands_beside_the_loss_exactly(tmp_path: Path) -> None:
    run(tmp_path, Losses())
    logged = [line for line in lines(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in logged] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert all(line["tokens"] == (line["step"] + 1) * 10**9 for line in logged)  # type: ignore[operator]
    assert all(line["flops"] == (line["step"] + 1) * 10**9 * 1e11 for line in logged)  # type: ignore[operator]
    seconds = [line["seconds"] for line in logged]
    assert seconds == sorted(seconds, key=float)


def test_training_loss_is_the_mean_of_the_last_tenth(tmp_path: Path) -> None:
    record, trainer = run(tmp_path, Losses())
    result = record.finish(trainer)
    assert result["train_loss"] == (36 + 37 + 38 + 39) / 4
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_training_loss_under_accumulation(tmp_path: Path) -> None:
    record, trainer = run(tmp_path, Losses(), steps=20, accumulate_grad_batches=2)
    assert record.finish(trainer)["train_loss"] == (37 + 38 + 39) / 3  # steps 19 and 20; 18 ends with batch 36


def test_validation_loss(tmp_path: Path) -> None:
    module = Losses()
    record, trainer = run(tmp_path, module, steps=5)
    assert record.finish(trainer)["val_loss"] is None
    trainer.validate(module, DATA, verbose=False)
    assert record.finish(trainer)["val_loss"] == 7.5


def test_divergence_ends_the_run_at_a_logged_step(tmp_path: Path) -> None:
    record, trainer = run(tmp_path, Losses(nan_from=12))
    result = record.finish(trainer)
    assert (result["status"], result["step"], result["val_loss"], result["train_loss"]) == ("diverged", 15, None, None)


class Breaks(Losses):
    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 38:
            raise RuntimeError("the machine is gone")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(tmp_path, Breaks())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["RecordRun"]
    saved["seconds"] += 1000
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    torch.save({**checkpoint, "callbacks": {**checkpoint["callbacks"], "RecordRun": saved}}, tmp_path / "last.ckpt")
    record, trainer = run(tmp_path, Losses())
    assert record.finish(trainer)["train_loss"] == (36 + 37 + 38 + 39) / 4
    assert record.spent(40)["seconds"] > 1000


def test_facts(tmp_path: Path) -> None:
    run(tmp_path, Losses(), steps=1)
    assert json.loads((tmp_path / "run.json").read_text()) == {"lr": 0.1}


@pytest.mark.parametrize(("tokens", "flops"), [(0, 0.0), (1, -1.0), (1, math.nan)])
def test_numbers_out_of_range(tmp_path: Path, tokens: int, flops: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_step must be > 0 and flops_per_token >= 0"):
        RecordRun(tmp_path, {}, tokens_per_step=tokens, flops_per_token=flops)
