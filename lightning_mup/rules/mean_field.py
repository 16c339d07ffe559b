"""Mean-field parametrization: unit weights under multipliers; in function space the same as ``mup``."""

from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import Row, Rules
from lightning_mup.core.spec import Role

_HIDDEN = Power(fan_in=-1 / 2)
_OUTPUT = Power(fan_in=-1)

# Wanted update and gradient of the bare weight: mup's, divided and multiplied by the forward multiplier.
MEAN_FIELD = Rules(
    name="mean_field",
    rows={
        Role.INPUT: Row(update_norm=SPECTRAL, weight_decay=Power(fan_out=-1), grad_rms=Power(fan_out=-1)),
        Role.HIDDEN: Row(
            update_norm=SPECTRAL / _HIDDEN,
            weight_decay=Power(fan_in=-1),
            grad_rms=Power(fan_out=-1) * _HIDDEN,
            forward=_HIDDEN,
        ),
        Role.OUTPUT: Row(
            update_norm=SPECTRAL / _OUTPUT,
            weight_decay=Power(fan_in=-1),
            grad_rms=Power(fan_out=-1) * _OUTPUT,
            forward=_OUTPUT,
        ),
        Role.VECTOR: Row(update_norm=SPECTRAL, weight_decay=Power(fan_out=-1), grad_rms=Power(fan_out=-1)),
        Role.SCALAR: Row(update_norm=SPECTRAL, grad_rms=Power(fan_out=-1)),
    },
    tied_readout=Power(fan_out=-1),
    reference="Mei et al. 2018 (arXiv:1804.06561); Everett et al. 2024 (arXiv:2407.05872), 'mean-field'",
)
