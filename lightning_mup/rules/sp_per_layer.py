"""Standard initialization with a learning rate per layer, for full alignment."""

from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import Row, Rules
from lightning_mup.core.spec import Role

# A readout of standard deviation fan_in^-1/2 sends gradients back that are sqrt(width) larger than mup's.
SP_PER_LAYER = Rules(
    name="sp_per_layer",
    rows={
        Role.INPUT: Row(update_norm=SPECTRAL, grad_rms=Power(fan_out=-1 / 2)),
        Role.HIDDEN: Row(init_std=Power(fan_in=-1 / 2), update_norm=SPECTRAL, grad_rms=Power(fan_out=-1 / 2)),
        Role.OUTPUT: Row(init_std=Power(fan_in=-1 / 2), update_norm=SPECTRAL, grad_rms=Power(fan_out=-1)),
        Role.VECTOR: Row(update_norm=SPECTRAL, grad_rms=Power(fan_out=-1 / 2)),
        Role.SCALAR: Row(update_norm=SPECTRAL, grad_rms=Power(fan_out=-1 / 2)),
    },
    reference="Everett et al. 2024 (arXiv:2407.05872), standard parametrization, full alignment",
)
