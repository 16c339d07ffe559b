"""Adam, with weight decay as an L2 term in the gradient."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

# The batch power of epsilon is the authors' code's (sampling noise falls as 1/sqrt(batch)), not in the paper.
ADAM = Method(
    name="adam",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.Adam,),
    eps={"eps": Size(grad=1, factor=Power(batch=-1 / 2))},
    decay="l2",
    build=torch.optim.Adam,
    reference="Kingma & Ba 2015 (arXiv:1412.6980); arXiv:2512.05620, Table 1: 1/fan_in, epsilon 1/(L fan_out)",
)
