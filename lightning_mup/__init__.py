"""Hyperparameters tuned on a small proxy, carried over to a large model: callbacks for PyTorch Lightning."""

from lightning_mup.callbacks.coordinate_check import CoordinateCheck, coordinate_check
from lightning_mup.callbacks.grafting import Grafting
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.callbacks.record_run import RecordRun
from lightning_mup.callbacks.spectral_normalization import SpectralNormalization
from lightning_mup.callbacks.watch_updates import WatchUpdates
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.base import Base
from lightning_mup.core.factors import multipliers
from lightning_mup.core.grafted import Grafted
from lightning_mup.core.layout import Layout
from lightning_mup.core.measure import measure, measure_update_norm
from lightning_mup.core.method import Method, Size, all_methods
from lightning_mup.core.multipliers import install_multipliers
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.plan import ParamPlan, Plan
from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import Row, Rules, all_rules
from lightning_mup.core.scaling import Choices, plan
from lightning_mup.core.spec import Dim, ParamSpec, Role
from lightning_mup.methods.adam import Adam
from lightning_mup.methods.adam_atan2 import AdamAtan2
from lightning_mup.methods.adamuon import AdaMuon
from lightning_mup.methods.adamw import AdamW
from lightning_mup.methods.muon import Muon
from lightning_mup.methods.sgd import SGD
from lightning_mup.methods.shampoo import Shampoo
from lightning_mup.methods.soap import SOAP
from lightning_mup.run_log import RunLog
from lightning_mup.strategies.mup_ddp import MupDDPStrategy
from lightning_mup.strategies.mup_fsdp import MupFSDPStrategy

__all__ = [
    "SGD",
    "SOAP",
    "SPECTRAL",
    "AdaMuon",
    "Adam",
    "AdamAtan2",
    "AdamW",
    "Base",
    "Choices",
    "CoordinateCheck",
    "Dim",
    "Grafted",
    "Grafting",
    "Layout",
    "Method",
    "Muon",
    "MupDDPStrategy",
    "MupFSDPStrategy",
    "ParamPlan",
    "ParamSpec",
    "Parametrize",
    "Plan",
    "Power",
    "RecordRun",
    "Role",
    "Row",
    "Rules",
    "RunLog",
    "Shampoo",
    "Size",
    "SpectralNormalization",
    "StackedOptimizer",
    "WatchUpdates",
    "WeightDecay",
    "all_methods",
    "all_rules",
    "coordinate_check",
    "install_multipliers",
    "measure",
    "measure_update_norm",
    "multipliers",
    "plan",
]
