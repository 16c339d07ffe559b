"""Gradient over its running root mean square."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

RMSPROP = Method(
    name="rmsprop",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.RMSprop,),
    eps={"eps": Size(grad=1)},
    decay="l2",
    reference="Hinton 2012, lecture 6e; scales as Adam",
)
