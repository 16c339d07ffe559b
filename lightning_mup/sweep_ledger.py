"""The ledger of sweeps that Hydra's own sweeper runs (``--multirun a=1,2``): a Hydra callback books each job."""

from __future__ import annotations

import math
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_mup.ledger import Status, book, ledger_of


class BookJobs(Callback):
    """Add each job of a multirun to the ledger as it ends, in the job's own process; single runs are not booked.

    The sweepers of :mod:`lightning_mup.sweep` book their jobs themselves.

    Args:
        ledger: the file; ``ledger.jsonl`` beside the sweep's folder if None.

    Examples:
        >>> from hydra.utils import instantiate
        >>> instantiate({"_target_": "lightning_mup.sweep_ledger.BookJobs", "ledger": "all.jsonl"}).ledger
        'all.jsonl'
    """

    def __init__(self, ledger: str | None = None) -> None:
        self.ledger = ledger

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Book a job of a multirun; one that was skipped because it is booked already adds nothing.

        Args:
            config: the job's configuration with its ``hydra`` node.
            job_return: what the job returned, its loss, or the exception that ended it.
            kwargs: what later versions of Hydra may add.

        Raises:
            ValueError: the ledger cannot be read.
        """
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        sweep = folder.parents[len(Path(config.hydra.sweep.subdir).parts) - 1]
        book(self.ledger or ledger_of(sweep), sweep, {folder: _status(job_return)})


def _status(returned: JobReturn) -> Status:
    if returned.status != JobStatus.COMPLETED:
        return "failed"
    loss = returned.return_value
    return "finished" if loss is None or math.isfinite(loss) else "diverged"
