"""RecordRun: what a run is, what it spent and how it ended, in files that the analysis reads."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Status = Literal["finished", "diverged"]
RUN, RESULT = "run.json", "result.json"
_TAIL = 0.1
"""Last share of the steps, over whose losses the training loss of a run is averaged."""


class RecordRun(Callback):
    """Write ``run.json`` when training starts and ``result.json`` when :meth:`finish` is called.

    It logs what has been spent beside every logged step: ``tokens = steps x tokens_per_step``, ``flops = tokens x
    flops_per_token``, and ``seconds`` of training, which go on counting after a resume. At a logged step whose loss is
    not finite, it ends the training: the run has ``diverged``. That leaves the loss on its device in between.

    Args:
        folder: the run's folder.
        facts: what the run is, as plain values; ``method``, ``rules``, ``width``, ``lr``, ... are what
            :func:`lightning_mup.analysis.runs.read_runs` reads.
        tokens_per_step: tokens of one optimizer step, over all ranks (> 0).
        flops_per_token: of a forward and a backward pass (>= 0).

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> folder, model = Path(tempfile.mkdtemp()), BoringModel()
        >>> record = RecordRun(folder, {"method": "sgd", "lr": 0.1}, tokens_per_step=32, flops_per_token=6e3)
        >>> trainer = Trainer(
        ...     max_steps=3,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ...     callbacks=[record],
        ... )
        >>> trainer.fit(model)
        >>> result = record.finish(trainer)
        >>> result["status"], result["step"], result["tokens"], result["flops"]
        ('finished', 3, 96, 576000.0)
        >>> json.loads((folder / "run.json").read_text())
        {'method': 'sgd', 'lr': 0.1}
    """

    def __init__(
        self, folder: str | Path, facts: Mapping[str, object], *, tokens_per_step: int, flops_per_token: float = 0.0
    ) -> None:
        if not (tokens_per_step > 0 and flops_per_token >= 0):
            raise ValueError(
                f"tokens_per_step must be > 0 and flops_per_token >= 0, got {tokens_per_step!r} and {flops_per_token!r}"
            )
        self.folder, self.facts = Path(folder), dict(facts)
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.status: Status = "finished"
        self._before, self._since = 0.0, math.nan
        self._losses: Tensor | None = None
        self._count = 0

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self.status, self._before, self._losses, self._count = "finished", 0.0, None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the run is, and start the clock."""
        if trainer.is_global_zero:
            write_json(self.folder / RUN, self.facts)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returned
        batch: object,
        batch_idx: int,
    ) -> None:
        """Count, and look at the loss where it is logged anyway."""
        loss = outputs["loss"].detach() if isinstance(outputs, Mapping) else outputs.detach()
        if trainer.global_step > (1 - _TAIL) * trainer.max_steps:
            scaled = loss.double() * trainer.accumulate_grad_batches
            self._losses = scaled if self._losses is None else self._losses + scaled
            self._count += 1
        spent = self.spent(trainer.global_step)
        pl_module.log_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in spent.items()})
        if trainer._logger_connector.should_update_logs and not math.isfinite(loss.item()):
            self.status, trainer.should_stop = "diverged", True

    def spent(self, step: int) -> dict[str, float]:
        """Return tokens, FLOPs and seconds after a number of steps."""
        tokens = step * self.tokens_per_step
        return {"tokens": tokens, "flops": tokens * self.flops_per_token, "seconds": self._seconds()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._before, self._since = self._seconds(), math.nan

    # -- what ---------------------------------------------------------------------------------------------------------

    def finish(self, trainer: Trainer, *, status: Status | None = None) -> dict[str, Any]:
        """Write ``result.json`` and return what it holds.

        Args:
            trainer: the Trainer, after ``fit`` and, for the loss that runs are compared by, ``validate``.
            status: ``"diverged"`` where that is known from elsewhere, such as an exception.
        """
        self.status = status or self.status
        validated = trainer.callback_metrics.get("val/loss")
        if validated is not None and not math.isfinite(validated):
            self.status = "diverged"
        step = trainer.global_step
        result = {
            "status": self.status,
            "step": step,
            **self.spent(step),
            "train_loss": self._train_loss(trainer),
            "val_loss": None if validated is None or self.status == "diverged" else float(validated),
        }
        _write_result(self.folder, result)
        return result

    def _train_loss(self, trainer: Trainer) -> float | None:
        if self._losses is None or self.status == "diverged":
            return None
        mean: Tensor = trainer.strategy.reduce(self._losses / self._count, reduce_op="mean")
        return float(mean)

    def _seconds(self) -> float:
        return self._before + (0.0 if math.isnan(self._since) else time.perf_counter() - self._since)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return seconds and losses so far."""
        losses = None if self._losses is None else self._losses.cpu()
        return {"seconds": self._seconds(), "losses": losses, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._before, self._count = state_dict["seconds"], state_dict["count"]
        self._losses = state_dict["losses"]


@rank_zero_only
def _write_result(folder: Path, result: Mapping[str, object]) -> None:
    write_json(folder / RESULT, result)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a file at once: it is there whole, or as it was.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.json"
        >>> write_json(path, {"lr": 0.1})
        >>> json.loads(path.read_text())
        {'lr': 0.1}
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)
