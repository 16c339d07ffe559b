"""Adafactor of torch: a factored second moment, and steps relative to the weight's RMS."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

# torch multiplies by min(lr, 1/sqrt(step)): the multiplier has its effect while lr is the smaller of the two.
ADAFACTOR = Method(
    name="adafactor",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.Adafactor,),
    eps={"eps": (Size(grad=1), Size(weight=1))},
    weight_degree=1,
    reference="Shazeer & Stern 2018 (arXiv:1804.04235), Algorithm 4",
)
