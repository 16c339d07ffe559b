"""Parametrize any LightningModule by one callback, and check that it is right."""

from recipes.any_lightning_module.tiny_lm import TinyLM

__all__ = ["TinyLM"]
