"""CompleteP: residual branches times 1/L, for blocks of two or more layers (transformers)."""

from lightning_mup.core.rules import Rules, depth_rows

COMPLETE_P = Rules(
    name="complete_p",
    rows=depth_rows(alpha=1.0),
    onto="mup",
    reference="Dey et al. 2025 (arXiv:2505.01618), alpha = 1; Qiu et al. 2025 (arXiv:2512.05620), section 3.2",
)
