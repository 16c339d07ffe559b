"""Stochastic gradient descent, with or without momentum."""

import torch

from lightning_mup.core.method import Method
from lightning_mup.core.power import Power

SGD = Method(
    name="sgd",
    update_norm=Power(fan_in=1 / 2, fan_out=-1 / 2, depth=-1),
    optimizers=(torch.optim.SGD,),
    build=torch.optim.SGD,
    reference="Yang et al. 2022 (arXiv:2203.03466), Table 3; arXiv:2512.05620, Table 1: L fan_out/fan_in",
)
