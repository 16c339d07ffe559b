"""What the run that a configuration names would cost, from the shapes of its model alone."""

from __future__ import annotations

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_mup.budget import budget_steps, count, training_flops
from lightning_mup.train import model_of


def run_flops(config: DictConfig) -> float:
    """Return the floating-point operations of a whole run: ``steps x tokens per step x FLOPs per token``.

    They are those that the run itself will record. The model is built on the meta device, without memory for weights.

    Args:
        config: a composed ``train`` configuration.

    Raises:
        ValueError: no budget, or several, are given.

    Examples:
        >>> from hydra import compose, initialize_config_module
        >>> with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        ...     small, wide = (compose("train", [f"model.net.width={width}"]) for width in (64, 128))
        >>> f"{run_flops(small):.4g}", f"{run_flops(wide):.4g}"
        ('5.56e+11', '1.917e+12')
    """
    data = instantiate(config.data, _convert_="all")
    with torch.device("meta"):
        module = model_of(config)
    tokens_per_step = data.batch_size * data.context * config.trainer.accumulate_grad_batches
    steps = budget_steps(config.budget, params=count(module), tokens_per_step=tokens_per_step)
    taken = min(steps, config.trainer.max_steps or steps)
    return float(taken * tokens_per_step * training_flops(module.net, data.context))
