"""Decay that keeps the gain of a layer: for AdamW the coupled value grows as the square root of width."""

from lightning_mup.core.decay import DecayPolicy
from lightning_mup.core.power import Power
from lightning_mup.core.spec import Role

# The paper's rule is for the coupled value, wd ~ d^(1/2); one step removes lr wd, and lr ~ 1/d. It decays matrices that
# grow on both sides alone ("matrix-like"); what grows on one side at most ("vector-like") has wd = 0.
SQRT = DecayPolicy(
    name="sqrt",
    powers={
        Role.INPUT: None,
        Role.HIDDEN: Power(fan_in=-1) * Power(fan_in=1 / 2),
        Role.OUTPUT: None,
        Role.VECTOR: None,
        Role.SCALAR: None,
    },
    reference="Fan et al. 2025 (arXiv:2510.15262), 'Robust Layerwise Scaling Rules by Proper Weight Decay Tuning'",
)
