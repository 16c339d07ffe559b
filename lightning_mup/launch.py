"""One job of a Hydra multirun that trains in several processes: run it as a single run in a process of its own.

Lightning starts the processes of the further devices with the command line of the first. In a multirun that is the
command of all jobs: each further process would begin a multirun of its own, the variables that name its rank and its
process group would stay behind for the next job, and a rank that fails would take the whole multirun with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf

from lightning_mup.sweep_axes import quoted

RANK_VARIABLES = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 30.0
"""Seconds that a run gets to end by itself when the multirun is interrupted."""


class ApartError(RuntimeError):
    """A job that was run in a process of its own failed; its messages stand above."""


def runs_apart(devices: object) -> bool:
    """Return whether this is a job of a multirun that would start further processes itself.

    Under Slurm and torchrun it would not: there the processes are there already.

    Args:
        devices: the Trainer's ``devices``; anything but 1 counts as several.

    Examples:
        >>> runs_apart(2)  # not within a multirun
        False
    """
    if str(devices) == "1" or not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().job, "num"):
        return False
    return not (SLURMEnvironment.detect() or TorchElasticEnvironment.detect())


def run_apart(module: str, *, expects: str | Path) -> None:
    """Run this job of a multirun as ``python -m module`` with the job's own overrides, in the job's folder.

    Args:
        module: has the Hydra program; runs it as ``__main__``.
        expects: a file that a run which ended well leaves; relative to the job's folder.

    Raises:
        ApartError: the run failed, or did not leave the file.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    code = _wait(subprocess.Popen(command(module, hydra), cwd=hydra.runtime.cwd, env=environment(os.environ)))  # noqa: S603 - this very program
    if code != 0:
        raise ApartError(f"{module} ended with exit code {code} in {folder}; what it said stands above")
    if not (folder / expects).exists():
        raise ApartError(f"{module} ended without {folder / expects}; run the same command again to go on")


def command(module: str, hydra: HydraConf) -> list[str]:
    """Return the command line of a job as a single run.

    Args:
        module: has the Hydra program.
        hydra: the job's ``hydra`` node.
    """
    sources = {source.provider: f"{source.schema}://{source.path}" for source in hydra.runtime.config_sources}
    flags = [f"--config-path={sources['main']}", f"--config-name={hydra.job.config_name}"]
    if "command-line" in sources:
        flags.append(f"--config-dir={sources['command-line'].removeprefix('file://')}")
    folder = quoted(str(hydra.runtime.output_dir))
    own = ["hydra.mode=RUN", f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
    given = cast(dict[str, list[str]], OmegaConf.to_container(cast(DictConfig, hydra.overrides), resolve=False))
    return [sys.executable, "-m", module, *flags, *given["hydra"], *given["task"], *own]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those that would make a process a rank of somebody else's group.

    Examples:
        >>> environment({"PATH": "/bin", "LOCAL_RANK": "1", "PL_GLOBAL_SEED": "3"})
        {'PATH': '/bin'}
    """
    return {key: value for key, value in inherited.items() if key not in RANK_VARIABLES and not key.startswith("PL_")}


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except BaseException:  # also an interrupt, which leaves no run behind
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
