"""Print the script that Slurm would get for a run or a sweep, without submitting anything."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_mup.compose_errors import composed, explain
from lightning_mup.sweep import Sweep, from_words

EXAMPLE = (
    "example: lightning-mup slurm experiment=llama_190m hydra.launcher.partition=gpu > job.sh; then: sbatch job.sh"
)

_LAUNCHER = "launcher=submitit_slurm"
_FLAGS = {
    "name": "job-name",
    "nodes": "nodes",
    "tasks_per_node": "ntasks-per-node",
    "gpus_per_node": "gpus-per-node",
    "cpus_per_task": "cpus-per-task",
    "timeout_min": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
}
"""Setting of the launcher -> flag of sbatch."""
_BEFORE_INIT = {"submitit_folder", "max_num_timeout"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of ``lightning-mup slurm``.

    Args:
        parser: the command's parser.
    """
    what = "as of lightning-mup train; resources are hydra.launcher.KEY=VALUE"
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=what)
    parser.add_argument("-m", "--multirun", action="store_true", help="one job for each combination of all lists")


def run(args: argparse.Namespace) -> int:
    """Print the script; return 0.

    Args:
        args: parsed words.

    Raises:
        ValueError: the words do not compose.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> run(parser.parse_args(["method=muon", "trainer.devices=4", "hydra.launcher.timeout_min=90"]))
        #!/bin/bash
        #SBATCH --job-name=train
        #SBATCH --nodes=1
        #SBATCH --ntasks-per-node=4
        #SBATCH --gpus-per-node=4
        #SBATCH --cpus-per-task=4
        #SBATCH --time=90
        #SBATCH --mem=32G
        #SBATCH --requeue
        #SBATCH --signal=USR1@120
        #SBATCH --open-mode=append
        #SBATCH --output=slurm-%j.out
        <BLANKLINE>
        srun python -m lightning_mup.train method=muon trainer.devices=4
        0
    """
    words = list(args.words)
    chosen = [word for word in words if word.startswith("launcher=")]
    if chosen not in ([], [_LAUNCHER]):
        raise ValueError(f"{chosen[-1]} is not for Slurm; leave it out, or give {_LAUNCHER}")
    _check_installed()
    try:
        config, sweep = from_words([word for word in words if word not in chosen] + [_LAUNCHER])
    except HydraException as error:
        raise ValueError(explain(error, config=composed(words))) from error
    HydraConfig.instance().set_config(config)
    launcher = cast(dict[str, Any], OmegaConf.to_container(config.hydra.launcher, resolve=True))
    if args.multirun or sweep is not None or config.hydra.mode == RunMode.MULTIRUN:
        print(sweep_script(launcher, jobs=_jobs(config, sweep)))
    else:
        print(run_script(launcher, words))
    return 0


def _check_installed() -> None:
    for module in ("submitit", "hydra_plugins.hydra_submitit_launcher"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"Slurm needs {module}; pip install 'lightning_mup[slurm]'")


def _jobs(config: DictConfig, sweep: Sweep | None) -> int:
    if sweep is not None:
        return len(sweep.next_jobs())
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    return math.prod(len(list(o.sweep_string_iterator())) for o in overrides if o.is_discrete_sweep())


def run_script(launcher: Mapping[str, Any], words: Sequence[str]) -> str:
    """Return a script for one run, which Lightning ends, saves and requeues when the signal comes.

    Args:
        launcher: settings of ``conf/launcher/submitit_slurm.yaml``.
        words: overrides; those of Hydra itself are left out.
    """
    flags = {flag: launcher[key] for key, flag in _FLAGS.items() if launcher.get(key) is not None}
    if launcher.get("mem_gb") is not None:
        flags["mem"] = f"{launcher['mem_gb']}G"
    flags |= cast(dict[str, Any], launcher.get("additional_parameters") or {})
    flags |= {"signal": f"USR1@{launcher['signal_delay_s']}", "open-mode": "append", "output": "slurm-%j.out"}
    lines = [f"#SBATCH --{flag}" if value is True else f"#SBATCH --{flag}={value}" for flag, value in flags.items()]
    elsewhere = ("hydra.", "hydra/", "launcher=", "trainer.num_nodes=")
    own = [word for word in words if not word.lstrip("+").startswith(elsewhere)]
    nodes = [f"++trainer.num_nodes={launcher['nodes']}"] * (launcher["nodes"] > 1)
    command = shlex.join(["srun", "python", "-m", "lightning_mup.train", *own, *nodes])
    return "\n".join(["#!/bin/bash", *lines, "", *(launcher.get("setup") or ()), command])


def sweep_script(launcher: Mapping[str, Any], *, jobs: int) -> str:
    """Return the script that submitit writes for a round of jobs, which it requeues itself.

    Args:
        launcher: settings of ``conf/launcher/submitit_slurm.yaml``.
        jobs: of the first round.
    """
    from submitit import SlurmExecutor

    class Written(SlurmExecutor):
        """Writes scripts where there is no Slurm, too."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Written(
        Path(launcher["submitit_folder"]), max_num_timeout=launcher["max_num_timeout"], python=sys.executable
    )
    given = {key: value for key, value in launcher.items() if value is not None and not key.startswith("_")}
    given = {key: value for key, value in given.items() if key not in _BEFORE_INIT}
    executor._internal_update_parameters(**executor._convert_parameters(given))
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return str(executor._make_submission_file_text(executor._submitit_command_str, uid=""))
