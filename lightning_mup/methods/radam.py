"""Rectified Adam; its first unrectified steps (five at beta2 = 0.999) are SGD's."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

RADAM = Method(
    name="radam",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.RAdam,),
    eps={"eps": Size(grad=1)},
    decay="l2",
    reference="Liu et al. 2020 (arXiv:1908.03265); scales as Adam once rectified",
)
