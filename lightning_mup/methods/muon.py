"""Muon of torch: orthogonalized momentum, whose own shape factor is divided out."""

import math

import torch

from lightning_mup.core.method import Method, Settings, Size
from lightning_mup.core.power import Power


def _shape_factor(settings: Settings, fan_out: int, fan_in: int) -> float:
    if settings.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * math.sqrt(max(fan_out, fan_in))  # arXiv:2502.16982, equation 4
    return math.sqrt(max(1.0, fan_out / fan_in))


MUON = Method(
    name="muon",
    update_norm=Power(),
    optimizers=(torch.optim.Muon,),
    # The gradient is divided by its Frobenius norm, which epsilon bounds from below.
    eps={"eps": Size(grad=1, factor=Power(fan_in=1 / 2, fan_out=1 / 2))},
    own_factor=_shape_factor,
    reference="Jordan et al. 2024; arXiv:2512.05620, Table 1: sqrt(fan_out/fan_in), epsilon sqrt(fan_in/fan_out)/L",
)
