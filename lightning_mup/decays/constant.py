"""The same fraction at every width: AdamW's decay under mup when the coupled value grows with width."""

from lightning_mup.core.decay import DecayPolicy, width_powers

CONSTANT = DecayPolicy(
    name="constant",
    powers=width_powers(0),
    reference="Kosson et al. 2025 (arXiv:2510.19093); the mup package of arXiv:2203.03466 (coupled decay x width)",
)
