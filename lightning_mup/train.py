"""Training by Hydra: one configuration, one run, in one folder that the same command goes on with.

``lightning-mup train method=muon model.net.width=256``, or ``python -m lightning_mup.train``. What it writes is what
:mod:`lightning_mup.analysis` reads: ``run.json``, ``metrics.jsonl``, ``plan.json``, ``result.json``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_mup.budget import budget_steps, count, training_flops
from lightning_mup.callbacks.record_run import RESULT, RUN, RecordRun, Status
from lightning_mup.core.finite import NonFiniteGradientError
from lightning_mup.core.method import find_method
from lightning_mup.core.plan import Plan
from lightning_mup.core.registry import near
from lightning_mup.core.scaling import Choices, plan
from lightning_mup.language import LanguageModel
from lightning_mup.launch import run_apart, runs_apart
from lightning_mup.run_log import RunLog
from lightning_mup.strategies.sharded_checkpoint import last
from lightning_mup.sweep_axes import shortened_name
from lightning_mup.tracking import close

log = logging.getLogger(__name__)
OmegaConf.register_new_resolver("shortened", shortened_name, replace=True)  # of conf/train.yaml

_WHERE = (
    "folder",
    "verbose",
    "logger",
    "callbacks",
    "launcher",
    "sweep",
    "trainer.enable_",
    "trainer.profiler",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.plugins",
    "data.workers",
)
"""Keys that say where and how a run is carried out, not what its numbers are."""
_SHOWN = 6


@hydra.main(config_path="pkg://lightning_mup.conf", config_name="train", version_base="1.3")
def main(config: DictConfig) -> float:
    """Train as configured; return the validation loss, or inf where the run diverged."""
    if runs_apart(config.trainer.devices):
        run_apart("lightning_mup.train", expects=RESULT)
    with _saying(config.verbose), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning calls what torch 2.13 deprecates
        return train(config)


def train(config: DictConfig) -> float:
    """Carry out one run in ``config.folder``, going on where an earlier one was interrupted.

    Args:
        config: a composed ``train`` configuration.

    Returns:
        The validation loss in nats per token, or inf where the run diverged.

    Raises:
        ValueError: the folder holds another run, or something in the configuration does not fit.
    """
    folder = Path(config.folder)
    facts = flattened(config)
    check_folder(folder, facts)
    if (folder / RESULT).exists():
        loss = _value(json.loads((folder / RESULT).read_text()))
        _say(f"{folder.name}: was finished before, val/loss {loss:.4f}")
        return loss
    seed_everything(config.seed, workers=True, verbose=False)
    run = build(config)
    saved = last(folder / "checkpoints" / "last.ckpt")
    status: Status | None = None
    try:
        run.trainer.fit(run.module, datamodule=run.data, ckpt_path=str(saved) if saved else None)
        if run.record.status == "finished":
            run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    except NonFiniteGradientError as error:
        rank_zero_info(f"diverged: {error}")
        status = "diverged"
    finally:
        close(run.trainer.loggers)
    result = run.record.finish(run.trainer, status=status)
    _say(f"{folder.name}: {result['status']} at step {result['step']}, val/loss {_value(result):.4f}")
    return _value(result)


@dataclass(frozen=True)
class Run:
    """What a configuration names, built.

    Args:
        trainer: the Trainer, with all callbacks and loggers.
        module: the LightningModule.
        data: the LightningDataModule.
        record: the callback that writes what the run was.
    """

    trainer: Trainer
    module: LanguageModel
    data: LightningDataModule
    record: RecordRun


@dataclass(frozen=True)
class Extent:
    """How long a run is, and what it takes.

    Args:
        tokens_per_step: tokens of one optimizer step, over all ranks.
        steps: steps that the budget pays for, the length of the schedule.
        last_step: step after which training stops.
        flops_per_token: floating-point operations of a forward and a backward pass.
    """

    tokens_per_step: int
    steps: int
    last_step: int
    flops_per_token: float

    @property
    def flops(self) -> float:
        """Floating-point operations of the run."""
        return self.last_step * self.tokens_per_step * self.flops_per_token


def extent_of(config: DictConfig, data: Any, shape: LanguageModel) -> Extent:  # noqa: ANN401 - any data module
    """Return how long a configuration's run is, without running it.

    Args:
        config: the configuration.
        data: its data module, with ``batch_size`` and ``context``.
        shape: its module, see :func:`shape_of`.

    Raises:
        ValueError: no budget, or several, are given.
    """
    tokens_per_step = data.batch_size * data.context * config.trainer.accumulate_grad_batches
    steps = budget_steps(config.budget, params=count(shape), tokens_per_step=tokens_per_step)
    last_step = min(steps, config.trainer.max_steps or steps)
    return Extent(tokens_per_step, steps, last_step, training_flops(shape.net, data.context))


def build(config: DictConfig) -> Run:
    """Build data, module, callbacks, loggers and Trainer.

    Raises:
        ValueError: no budget, or several, are given.
    """
    data, shape = instantiate(config.data, _convert_="all"), shape_of(config)
    extent = extent_of(config, data, shape)
    tokens_per_step, steps, last_step = extent.tokens_per_step, extent.steps, extent.last_step
    flops = extent.flops_per_token
    facts = {**describe(config, shape), "tokens_per_step": tokens_per_step, "flops_per_token": flops}
    facts |= {"max_steps": last_step, "context": data.context, "data": data.fingerprint, "config": flattened(config)}
    record = RecordRun(config.folder, facts, tokens_per_step=tokens_per_step, flops_per_token=flops)
    schedule = functools.partial(instantiate(config.schedule), total=steps, tokens_per_step=tokens_per_step)
    parametrize = instantiate(config.parametrize, _convert_="all")(base=flattened(config.model.base), schedule=schedule)
    others = [instantiate(part, _convert_="all") for part in (*config.callbacks.values(), config.weight_decay) if part]
    loggers: list[Logger] = [
        RunLog(config.folder),
        *(instantiate(logger, _convert_="all") for logger in config.logger.values()),
    ]
    trainer = instantiate(
        # Without an interval of its own, validation comes once, after fitting.
        {"val_check_interval": last_step + 1, **_given(config.trainer)},
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        max_steps=last_step,
        callbacks=[parametrize, *others, record],
        logger=loggers,
        default_root_dir=config.folder,
    )
    for logger in loggers:
        logger.log_hyperparams(flattened(config))
    return Run(trainer, model_of(config), data, record)


def recommendation(path: Path) -> dict[str, object]:
    """Return what a report's ``recommended.yaml`` holds."""
    return cast(dict[str, object], OmegaConf.to_container(OmegaConf.load(path)))


def log_report(config: DictConfig, rows: Sequence[Mapping[str, object]], folder: Path) -> None:
    """Hand a report's table and pictures to W&B, where the runs have it as a logger.

    Args:
        config: that of the sweep.
        rows: the table.
        folder: of the report.
    """
    if "wandb" not in config.logger:
        return
    placed = OmegaConf.merge(config, {"folder": str(folder)})
    logger = instantiate(placed.logger.wandb, job_type="report", name=f"{config.name} report")
    logger.log_table("transfer", columns=list(rows[0]), data=[list(row.values()) for row in rows])
    if (picture := folder / "report.png").exists():
        logger.log_image("report", [str(picture)])
    close([logger])


# -- what a configuration says ----------------------------------------------------------------------------------------


def plan_of(config: DictConfig) -> Plan:
    """Return the plan of a configuration's model and method, without building more than shapes."""
    found = find_method(config.method.optimizer)
    options = cast(dict[str, object], OmegaConf.to_container(config.method.options, resolve=True))
    multipliers = cast(dict[str, float], OmegaConf.to_container(config.method.lr_multipliers, resolve=True))
    return plan(
        shape_of(config),
        flattened(config.model.base),
        rules=list(config.rules.names),
        method=found,
        settings={**found.preset, **options},
        choices=Choices(
            lr_multipliers=multipliers,
            lr_powers=instantiate(config.parametrize.lr_powers, _convert_="all"),
            eps=config.parametrize.eps,
        ),
    )


def base_config(config: DictConfig) -> DictConfig:
    """Return the configuration of the base run: the same, with the arguments of ``model.base`` in ``model.net``.

    Raises:
        ValueError: an argument of ``model.base`` is none of the network's.
    """
    base, net = flattened(config.model.base), flattened(config.model.net)
    for key in base.keys() - net.keys():
        raise ValueError(f"model.base.{key} is no argument of model.net{near(key, net)}; there are: {', '.join(net)}")
    return cast(DictConfig, OmegaConf.merge(config, {"model": {"net": _nested(base)}}))


class _ConfiguredModel(LanguageModel):
    """A language model that can be built again in other sizes: its network's arguments are its hyperparameters.

    Args:
        net: ``_target_`` and arguments of the network, those of nested objects under dotted keys.
    """

    def __init__(self, **net: Any) -> None:  # noqa: ANN401 - whatever the network takes
        super().__init__(instantiate(_nested(net)))
        self.save_hyperparameters(logger=False)


def model_of(config: DictConfig) -> _ConfiguredModel:
    """Build the module of a configuration."""
    return _ConfiguredModel(**flattened(config.model.net))


def shape_of(config: DictConfig) -> _ConfiguredModel:
    """Build the module of a configuration on the meta device: shapes alone, without memory for weights."""
    with torch.device("meta"):
        return model_of(config)


def describe(config: DictConfig, module: nn.Module) -> dict[str, object]:
    """Return what the run is, for ``run.json``."""
    base = base_config(config)
    return {
        "name": config.name,
        "method": config.method.name,
        "rules": ", ".join([" x ".join(config.rules.names), *_told(config)]),
        "width": config.model.width,
        "depth": config.model.depth,
        "base_width": base.model.width,
        "base_depth": base.model.depth,
        "lr": config.method.lr,
        "weight_decay": (config.weight_decay or {}).get("weight_decay", 0.0),
        "seed": config.seed,
        "params": count(module),
        "non_embedding_params": count(module, embeddings=False),
        "versions": {name: importlib.metadata.version(name) for name in ("lightning_mup", "lightning", "torch")},
    }


def _told(config: DictConfig) -> list[str]:
    """Return what tells runs apart that decay by another policy than the default, or are a variant."""
    policy = "width" if config.weight_decay is None else config.weight_decay.policy
    return [*([] if policy == "width" else [f"decay {policy}"]), *([config.variant] if config.variant else [])]


def flattened(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as dotted keys and plain values.

    Examples:
        >>> flattened(OmegaConf.create({"net": {"width": 64}, "seed": 0}))
        {'net.width': 64, 'seed': 0}
    """
    found: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, part in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), part)
        else:
            found[prefix] = value

    walk("", OmegaConf.to_container(config, resolve=True))
    return found


def _nested(flat: Mapping[str, object]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found


def check_folder(folder: Path, facts: Mapping[str, object]) -> None:
    """Check that a folder is new, or holds this very run.

    Raises:
        ValueError: it holds another run; the message shows where they differ.
    """
    if not (folder / RUN).exists():
        return
    there = json.loads((folder / RUN).read_text())["config"]
    here = json.loads(json.dumps(facts))
    keys = [key for key in {**there, **here} if not key.startswith(_WHERE) and there.get(key) != here.get(key)]
    if keys:
        shown = ", ".join(f"{key}={here.get(key)} (there: {there.get(key)})" for key in keys[:_SHOWN])
        raise ValueError(f"{folder} holds another run: {shown}; give another name= or folder=, or delete it")


def _given(settings: DictConfig) -> dict[str, object]:
    return {str(key): value for key, value in settings.items() if value is not None}


def _built(parts: Iterable[DictConfig | None]) -> list[Any]:
    return [instantiate(part, _convert_="all") for part in parts if part]


@contextmanager
def _saying(verbose: bool) -> Iterator[None]:
    """Have Lightning's loggers, and with them our callbacks, say what they do, or warn only."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@rank_zero_only
def _say(message: str) -> None:
    log.info(message)


def _value(result: Mapping[str, Any]) -> float:
    return math.inf if result["val_loss"] is None else float(result["val_loss"])


if __name__ == "__main__":
    main()
