"""The maximal-update parametrization in its spectral form."""

from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import Row, Rules
from lightning_mup.core.spec import Role

# Weight decay ~ 1/width for every parameter, embeddings and readout too: arXiv:2512.05620, section 4.
MUP = Rules(
    name="mup",
    rows={
        Role.INPUT: Row(
            update_norm=SPECTRAL,
            weight_decay=Power(fan_out=-1),
            grad_rms=Power(fan_out=-1),
        ),
        Role.HIDDEN: Row(
            init_std=Power(fan_in=-1 / 2),
            update_norm=SPECTRAL,
            weight_decay=Power(fan_in=-1),
            grad_rms=Power(fan_out=-1),
        ),
        Role.OUTPUT: Row(
            init_std=Power(fan_in=-1),
            update_norm=SPECTRAL,
            weight_decay=Power(fan_in=-1),
            grad_rms=Power(fan_out=-1),
        ),
        Role.VECTOR: Row(
            update_norm=SPECTRAL,
            weight_decay=Power(fan_out=-1),
            grad_rms=Power(fan_out=-1),
        ),
        Role.SCALAR: Row(update_norm=SPECTRAL, grad_rms=Power(fan_out=-1)),
    },
    # An embedding's entries are Theta(1), a readout's Theta(1/width): the shared matrix keeps the embedding's size.
    tied_readout=Power(fan_out=-1),
    reference="Yang et al. 2022 (arXiv:2203.03466), Table 3; Qiu et al. 2025 (arXiv:2512.05620), Tables 1 and 2",
)
