"""The data module under a real Trainer: what is trained on after a resume, on two ranks, and on later fits."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_mup.data.files import TokenWriter
from lightning_mup.data.module import TokenDataModule
from lightning_mup.data.shards import TokenShards
from tests.lightning.helpers import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the others save nothing
]

CONTEXT, BATCH = 4, 4
WINDOWS = 26  # six batches and a half: epochs' ends fall into batches
Rows = list[list[int]]


class Seen(L.LightningModule):
    """Notes the first token of each window that it is trained on and validated by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: Rows = []
        self.validated: Rows = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.trained.append(batch[:, 0].tolist())
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(batch[:, 0].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(folder: Path, **settings: Any) -> TokenDataModule:
    for name, windows in (("train", WINDOWS), ("val", 11)):
        if not (folder / f"{name}.tokens").exists():
            with TokenWriter(folder / f"{name}.tokens", vocab_size=200) as writer:
                writer.append(range(windows * CONTEXT + 1))
    source = TokenShards(str(folder / "train.tokens"), str(folder / "val.tokens"))
    return TokenDataModule(source, **{"vocab_size": 200, "context": CONTEXT, "batch_size": BATCH, **settings})


def fit(
    folder: Path, *callbacks: Callback, module: Seen | None = None, resume: Path | None = None, **kwargs: Any
) -> Seen:
    """Train, with data settings under ``data``."""
    module, served = module or Seen(), data(folder, **kwargs.pop("data", {}))
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    kwargs = {"enable_checkpointing": saves, "limit_val_batches": 0, **kwargs}
    trainer(*callbacks, **kwargs).fit(module, datamodule=served, ckpt_path=resume)
    return module


def every(steps: int, folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


STEPS = 20  # three of Lightning's epochs of six, and two steps


@pytest.fixture
def whole(tmp_path: Path) -> Rows:
    return fit(tmp_path, every(1, tmp_path / "saved"), steps=STEPS).trained


def test_epochs_hold_every_window_once(whole: Rows) -> None:
    flat = [start for batch in whole for start in batch]
    for epoch in range(len(flat) // WINDOWS):
        assert sorted(flat[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == [CONTEXT * n for n in range(WINDOWS)]


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11, 12, 13, 18, 19])
def test_resumed_run_repeats_and_skips_nothing(step: int, whole: Rows, tmp_path: Path) -> None:
    resumed = fit(tmp_path, resume=tmp_path / "saved" / f"step={step}.ckpt", steps=STEPS)
    assert resumed.trained == whole[step:]


def test_resumed_at_every_step_with_validation(tmp_path: Path) -> None:
    """Validations inside and at the end of epochs: checkpoints are written before and after them."""
    kwargs: dict[str, Any] = {"steps": 13, "val_check_interval": 3, "num_sanity_val_steps": 1, "limit_val_batches": 1.0}
    whole = fit(tmp_path, every(1, tmp_path / "saved"), **kwargs).trained
    for step in range(1, 13):
        resumed = fit(tmp_path, resume=tmp_path / "saved" / f"step={step}.ckpt", **kwargs)
        assert resumed.trained == whole[step:], step


@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_at_an_epochs_end_by_epochs(epoch: int, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    whole = fit(tmp_path, saving, steps=-1, max_epochs=3).trained
    assert len(whole) == 3 * (WINDOWS // BATCH)
    resumed = fit(tmp_path, resume=tmp_path / "saved" / f"epoch={epoch}.ckpt", steps=-1, max_epochs=3)
    assert resumed.trained == whole[(epoch + 1) * 6 :]


def test_accumulated_steps_are_whole_and_resumed(tmp_path: Path) -> None:
    """Six batches are four and two over, which Lightning would make a smaller step of: an epoch is four."""
    kwargs: dict[str, Any] = {"steps": 5, "accumulate_grad_batches": 4}
    served = data(tmp_path)
    ran = trainer(every(1, tmp_path / "saved"), enable_checkpointing=True, **kwargs)
    module = Seen()
    ran.fit(module, datamodule=served)
    assert (ran.num_training_batches, len(module.trained)) == (4, 20)
    assert served.tokens_per_step == 4 * BATCH * CONTEXT
    assert module.trained == fit(tmp_path, steps=20).trained
    for step in (1, 2, 3, 4):
        resumed = fit(tmp_path, resume=tmp_path / "saved" / f"step={step}.ckpt", **kwargs)
        assert resumed.trained == module.trained[4 * step :]


class Killed(Callback):
    """Fails in the middle of a step."""

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        """After the batch was handed out, before it was trained on."""
        if trainer.global_step == 8:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*was called without a model")  # Lightning's, wherever there is such a callback
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_batch_of_a_broken_step_comes_again(whole: Rows, tmp_path: Path) -> None:
    saving = OnExceptionCheckpoint(tmp_path / "broken", "broken")
    module = Seen()
    with pytest.raises(SystemExit):
        fit(tmp_path, Killed(), saving, module=module, steps=STEPS)
    assert module.trained == whole[:9]
    assert fit(tmp_path, resume=tmp_path / "broken" / "broken.ckpt", steps=STEPS).trained == whole[8:]


def test_order_goes_on_under_another_batch_size(whole: Rows, tmp_path: Path) -> None:
    resumed = fit(tmp_path, resume=tmp_path / "saved" / "step=8.ckpt", steps=10, data={"batch_size": 2})
    assert [start for batch in resumed.trained for start in batch] == whole[8]  # two steps of half the size


def test_workers_resume_alike(whole: Rows, tmp_path: Path) -> None:
    """What the workers have read ahead is not counted."""
    resumed = fit(tmp_path, resume=tmp_path / "saved" / "step=8.ckpt", steps=11, data={"workers": 2})
    assert resumed.trained == whole[8:11]


@pytest.mark.parametrize("setting", [{"seed": 1}, {"context": 3}])
def test_other_order_is_refused(setting: dict[str, int], whole: Rows, tmp_path: Path) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"has {name} .*, this data {value}: the order of windows cannot go on"):
        fit(tmp_path, resume=tmp_path / "saved" / "step=8.ckpt", steps=STEPS, data=setting)


def test_other_data_is_refused(whole: Rows, tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "train.tokens", vocab_size=200) as writer:
        writer.append([7] * 105)
    with pytest.raises(ValueError, match="has fingerprint"):
        fit(tmp_path, resume=tmp_path / "saved" / "step=8.ckpt", steps=STEPS)


def test_checkpoint_holds_plain_values(whole: Rows, tmp_path: Path) -> None:
    saved = torch.load(tmp_path / "saved" / "step=7.ckpt", weights_only=True)["TokenDataModule"]
    fingerprint = data(tmp_path).fingerprint
    assert saved == {"windows": 7 * BATCH, "fingerprint": fingerprint, "context": CONTEXT, "seed": 0}


def test_second_fit_of_one_trainer_goes_on_and_of_another_begins_again(whole: Rows, tmp_path: Path) -> None:
    served, module = data(tmp_path), Seen()
    ran = trainer(steps=8)
    ran.fit(module, datamodule=served)
    ran.fit_loop.epoch_loop.max_steps = 12
    ran.fit(module, datamodule=served)
    assert module.trained == whole[:12]
    trainer(steps=3).fit(module, datamodule=served)
    assert module.trained[12:] == whole[:3]


def test_limited_epochs_go_on_through_the_data(whole: Rows, tmp_path: Path) -> None:
    assert fit(tmp_path, steps=9, limit_train_batches=4).trained == whole[:9]


def test_overfitting_repeats_the_same_batches(whole: Rows, tmp_path: Path) -> None:
    assert fit(tmp_path, steps=6, overfit_batches=2).trained == whole[:2] * 3


def test_validation_is_the_same_each_time(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"steps": 12, "val_check_interval": 3, "limit_val_batches": 1.0, "num_sanity_val_steps": 0}
    seen = [fit(tmp_path, data={"seed": seed}, **kwargs).validated for seed in (0, 1)]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4 * (11 // BATCH)
    assert seen[0][:2] * 4 == seen[0]
    one = fit(tmp_path, data={"val_batches": 1}, **kwargs).validated
    assert one == seen[0][:1] * 4


def test_validating_alone_and_after_a_fit(tmp_path: Path) -> None:
    module, served = Seen(), data(tmp_path)
    trainer().validate(module, datamodule=served, verbose=False)
    alone = module.validated.copy()
    ran = trainer(every(1, tmp_path / "saved"), enable_checkpointing=True, num_sanity_val_steps=0)
    ran.fit(module, datamodule=served)
    module.validated.clear()
    ran.validate(module, datamodule=served, ckpt_path=tmp_path / "saved" / "step=1.ckpt", verbose=False)
    assert module.validated == alone
    assert len(alone) == 2


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training needs at least 27 windows of 4 tokens, got 26 from 105 tokens"):
        data(tmp_path, batch_size=27).setup("fit")
    with pytest.raises(ValueError, match="validation needs at least 12 windows"):
        data(tmp_path, batch_size=12).val_dataloader()
    with pytest.raises(ValueError, match="context must be from 1 to 104 for 105 tokens, got 105"):
        data(tmp_path, context=105).setup("fit")


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for name, value in (("context", 0), ("batch_size", 0), ("val_batches", 0), ("vocab_size", 0), ("workers", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            data(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"vocabulary of 200, but vocab_size is 100"):
        data(tmp_path, vocab_size=100).setup("fit")
    with pytest.raises(ValueError, match="is not set up"):
        data(tmp_path).train_dataloader()


# -- two ranks ------------------------------------------------------------------------------------------------------


class Noted(Callback):
    """Writes what each rank was trained on."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """After the last step."""
        torch.save({"train": module.trained, "val": module.validated}, f"{self.path}-{trainer.global_rank}.pt")


def two_ranks(folder: Path) -> None:
    """Train on two ranks, of which the first run is resumed; with the sampler that Lightning would put in."""
    warnings.filterwarnings("ignore")
    two: dict[str, Any] = {
        "strategy": "ddp_fork",
        "devices": 2,
        "val_check_interval": 5,
        "limit_val_batches": 1.0,
        "num_sanity_val_steps": 0,
    }
    for name, steps, resume in (("first", 8, None), ("resumed", 14, folder / "saved" / "step=8.ckpt")):
        callbacks = [every(1, folder / "saved"), Noted(folder, name)]
        fit(folder, *callbacks, steps=steps, resume=resume, **two)


def test_two_ranks_share_the_batches_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tests.lightning.test_data_module", str(tmp_path)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    alone = fit(tmp_path, steps=14, val_check_interval=5, num_sanity_val_steps=0, limit_val_batches=1.0)
    for kind, want in (("train", alone.trained), ("val", alone.validated[:2])):
        parts = [torch.load(tmp_path / f"first-{rank}.pt")[kind] for rank in range(2)]
        joined = [one + other for one, other in zip(*parts, strict=True)]
        assert joined[: len(want)] == want[: len(joined)], kind
    resumed = [torch.load(tmp_path / f"resumed-{rank}.pt")["train"] for rank in range(2)]
    assert [one + other for one, other in zip(*resumed, strict=True)] == alone.trained[8:]
    back = fit(tmp_path, steps=14, resume=tmp_path / "saved" / "step=8.ckpt")
    assert back.trained == alone.trained[8:]  # from two ranks to one


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_ranks(Path(sys.argv[1]))
