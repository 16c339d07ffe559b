"""Depth-muP: residual branches times 1/sqrt(L), for blocks of one layer."""

from lightning_mup.core.rules import Rules, depth_rows

DEPTH_MUP = Rules(
    name="depth_mup",
    rows=depth_rows(alpha=0.5),
    onto="mup",
    reference="Yang et al. 2023 (arXiv:2310.02244); Bordelon et al. 2023 (arXiv:2309.16620)",
)
