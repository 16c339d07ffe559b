"""Adam under the infinity norm."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

ADAMAX = Method(
    name="adamax",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.Adamax,),
    eps={"eps": Size(grad=1)},
    decay="l2",
    reference="Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 2; scales as Adam",
)
