"""Metrics of weights and updates, as torchmetrics; the same as functions in ``lightning_mup.metrics.functional``."""

from lightning_mup.metrics.matrices import (
    RMS,
    Alignment,
    DecayTimescale,
    EffectiveLearningRate,
    RelativeUpdate,
    SpectralNorm,
    StableRank,
)

__all__ = [
    "RMS",
    "Alignment",
    "DecayTimescale",
    "EffectiveLearningRate",
    "RelativeUpdate",
    "SpectralNorm",
    "StableRank",
]
