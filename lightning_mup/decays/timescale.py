"""Decay by the time scale over which AdamW averages its updates, in tokens or as a share of the run."""

from lightning_mup.core.decay import DecayPolicy, width_powers

# Weights are an average of the updates over 1/lambda steps. Size enters through the length of the run alone.
TIMESCALE = DecayPolicy(
    name="timescale",
    powers=width_powers(0),
    takes=("timescale", "timescale_tokens"),
    reference="Wang & Aitchison 2024 (arXiv:2405.13698); Bergsma et al. 2025, 'Power Lines' (arXiv:2505.13738)",
)
