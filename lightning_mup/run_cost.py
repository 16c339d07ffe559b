"""What the run that a configuration names would cost, from the shapes of its model alone."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_mup.train import extent_of, shape_of


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
    return extent_of(config, instantiate(config.data, _convert_="all"), shape_of(config)).flops
