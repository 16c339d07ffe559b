"""Gradient over the root of the sum of its squares."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

ADAGRAD = Method(
    name="adagrad",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.Adagrad,),
    eps={"eps": Size(grad=1)},
    decay="l2",
    reference="Duchi et al. 2011; scales as Adam",
)
