"""Hyperparameters tuned on a small proxy, carried over to a large model: callbacks for PyTorch Lightning."""

from lightning_mup.callbacks.coordinate_check import CoordinateCheck, coordinate_check
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.core.base import Base
from lightning_mup.core.layout import Layout
from lightning_mup.core.measure import measure, measure_update_norm
from lightning_mup.core.method import Method, Size, all_methods
from lightning_mup.core.multipliers import install_multipliers
from lightning_mup.core.plan import ParamPlan, Plan
from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import Row, Rules, all_rules
from lightning_mup.core.scaling import Choices, plan
from lightning_mup.core.spec import Dim, ParamSpec, Role

__all__ = [
    "SPECTRAL",
    "Base",
    "Choices",
    "CoordinateCheck",
    "Dim",
    "Layout",
    "Method",
    "ParamPlan",
    "ParamSpec",
    "Parametrize",
    "Plan",
    "Power",
    "Role",
    "Row",
    "Rules",
    "Size",
    "all_methods",
    "all_rules",
    "coordinate_check",
    "install_multipliers",
    "measure",
    "measure_update_norm",
    "plan",
]
