"""Adam with decoupled weight decay."""

import torch

from lightning_mup.core.method import Method, Size
from lightning_mup.core.power import Power

# The batch power of epsilon is the authors' code's (sampling noise falls as 1/sqrt(batch)), not in the paper.
ADAMW = Method(
    name="adamw",
    update_norm=Power(fan_in=1 / 2, fan_out=1 / 2),
    optimizers=(torch.optim.AdamW,),
    eps={"eps": Size(grad=1, factor=Power(batch=-1 / 2))},
    decay="coupled",
    build=torch.optim.AdamW,
    reference="Loshchilov & Hutter 2019 (arXiv:1711.05101); scales as Adam",
)
