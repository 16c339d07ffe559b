"""Standard parametrization: PyTorch's usual initialization, one learning rate for all layers."""

from lightning_mup.core.power import Power
from lightning_mup.core.rules import Row, Rules
from lightning_mup.core.spec import Role

SP = Rules(
    name="sp",
    rows={
        Role.INPUT: Row(update_norm=None),
        Role.HIDDEN: Row(init_std=Power(fan_in=-1 / 2), update_norm=None),
        Role.OUTPUT: Row(init_std=Power(fan_in=-1 / 2), update_norm=None),
        Role.VECTOR: Row(update_norm=None),
        Role.SCALAR: Row(update_norm=None),
    },
    reference="Yang et al. 2022 (arXiv:2203.03466), section 2; Everett et al. 2024 (arXiv:2407.05872), 'standard'",
)
