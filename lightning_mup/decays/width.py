"""Decay that falls as 1/width, for every parameter; the rule of the paper that this package implements."""

from lightning_mup.core.decay import DecayPolicy, width_powers

WIDTH = DecayPolicy(
    name="width",
    powers=width_powers(-1),
    reference="Qiu et al. 2025 (arXiv:2512.05620), section 4; Xiao 2024 (arXiv:2409.15156)",
)
