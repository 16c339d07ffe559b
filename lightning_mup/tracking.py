"""W&B as a sink: one run per folder, offline where it must be, with tokens or FLOPs as the x-axis."""

from __future__ import annotations

import netrc
import os
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_mup.core.registry import near

if TYPE_CHECKING:
    from wandb import Run
    from wandb.sdk.lib import RunDisabled

Mode = Literal["auto", "online", "offline"]
XAxis = Literal["tokens", "flops"]
_ID = "wandb_id"
_SERVER = "https://api.wandb.ai"
_PATIENCE = 3.0  # seconds


class WandbRun(WandbLogger):
    """A W&B run that belongs to a folder, so that a requeued or resumed job goes on in it.

    Its id is drawn once and kept in the folder. Losses and sizes are drawn against ``tokens`` or ``flops``, which
    :class:`~lightning_mup.RecordRun` logs; the plan arrives as a table, the configuration flattened.

    Args:
        folder: the run's folder.
        project: W&B project.
        group: what the run is one of, such as a sweep.
        job_type: its kind within the group, such as the method.
        name: as shown; the folder's name if not given.
        mode: ``"auto"`` is online where an account is set up and the server answers, else offline; ``wandb sync``
            uploads offline runs later. The environment's ``WANDB_MODE`` comes before ``"auto"``.
        checkpoints: keep checkpoints as artifacts, which needs ``"online"``.
        x_axis: ``"tokens"`` or ``"flops"``.

    Raises:
        ValueError: a setting is unknown, or checkpoints are to be kept offline.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> WandbRun(folder, mode="offline").version == WandbRun(folder, mode="offline").version
        True
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str = "lightning_mup",
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        mode: Mode = "auto",
        checkpoints: bool = False,
        x_axis: XAxis = "tokens",
    ) -> None:
        for key, value, allowed in (("mode", mode, get_args(Mode)), ("x_axis", x_axis, get_args(XAxis))):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {allowed}, got {value!r}{near(value, allowed)}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        offline = is_offline(mode)
        if offline and checkpoints:
            raise ValueError(
                f"checkpoints=True needs W&B online, but mode={mode!r} is offline here; leave one of them out"
            )
        super().__init__(
            name=name or folder.name,
            save_dir=folder,
            id=_id(folder),
            project=project,
            offline=offline,
            log_model=checkpoints,
            group=group,
            job_type=job_type,
            resume=None if offline else "allow",
        )
        self.x_axis = x_axis

    @property
    @rank_zero_experiment
    def experiment(self) -> Run | RunDisabled:
        """The W&B run, begun at first use."""
        fresh = self._experiment is None
        run = cast("Run | RunDisabled", super().experiment)
        if fresh:
            for axis in get_args(XAxis):
                run.define_metric(axis)
            for metrics in ("train/*", "val/*", "weight/*", "update/*", "feature/*", "logits/*"):
                run.define_metric(metrics, step_metric=self.x_axis, step_sync=True)
        return run


def is_offline(mode: Mode) -> bool:
    """Return whether W&B is to write files alone.

    Examples:
        >>> is_offline("offline"), is_offline("online")
        (True, False)
    """
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "online"
    if mode != "auto":
        return mode == "offline"
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or _SERVER)
    missing = "no account" if not _has_account(str(server.hostname)) else None
    missing = missing or (None if _answers(server.hostname, server.port or 443) else "no network")
    if missing:
        rank_zero_info(f"W&B: {missing}, so this run is offline; upload it later by 'wandb sync'.")
    return missing is not None


def close(loggers: Iterable[Logger]) -> None:
    """End the W&B runs among the loggers, or the next run of this process would join them.

    Examples:
        >>> close([])
    """
    ended = [logger for logger in loggers if isinstance(logger, WandbLogger) and logger._experiment is not None]
    for logger in ended:
        logger.experiment.finish()
    if any(logger._offline for logger in ended):
        import wandb

        wandb.teardown()  # offline, finish() returns before the file is written, which a short run may never be


def _has_account(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(host: str | None, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


def _id(folder: Path) -> str:
    """Return the folder's id; whoever comes first draws it."""
    path = folder / _ID
    try:
        with path.open("x") as file:
            file.write(uuid.uuid4().hex[:12])
    except FileExistsError:
        pass
    return path.read_text()
