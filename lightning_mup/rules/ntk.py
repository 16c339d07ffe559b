"""Neural-tangent parametrization: unit weights under 1/sqrt(fan_in) multipliers, one learning rate for all layers."""

from lightning_mup.core.power import Power
from lightning_mup.core.rules import Row, Rules
from lightning_mup.core.spec import Role

NTK = Rules(
    name="ntk",
    rows={
        Role.INPUT: Row(update_norm=None),
        Role.HIDDEN: Row(update_norm=None, forward=Power(fan_in=-1 / 2)),
        Role.OUTPUT: Row(update_norm=None, forward=Power(fan_in=-1 / 2)),
        Role.VECTOR: Row(update_norm=None),
        Role.SCALAR: Row(update_norm=None),
    },
    tied_readout=Power(fan_out=-1 / 2),
    reference="Jacot et al. 2018 (arXiv:1806.07572); Everett et al. 2024 (arXiv:2407.05872), 'NTK', global rate",
)
