"""Adam with Nesterov momentum."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

NADAM = Method(
    name="nadam",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.NAdam,),
    eps={"eps": Size(grad=1)},
    decay="l2",
    reference="Dozat 2016; scales as Adam",
)
