"""Every declared optimizer is measured, and its declaration compared with what was found."""

import functools
import inspect
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.core.blocking import block_ratios
from lightning_mup.core.measure import Measurement, measure, measure_update_norm
from lightning_mup.core.method import Method, all_methods
from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import find_rules
from lightning_mup.core.scaling import plan
from lightning_mup.core.spec import Dim, ParamSpec, Role
from lightning_mup.core.trial import Trial, run
from tests.models import Lion

TOLERANCE = 0.1
# Early training: aligned gradients of rank 4, epsilon negligible, eighth step (RAdam is rectified from the sixth on).
SPEC = ParamSpec("w", Role.HIDDEN, (512, 512), Dim(512, 64), Dim(512, 64))


CLASSES = [(name, cls) for name, method in sorted(all_methods().items()) for cls in method.optimizers]
IDS = [f"{cls.__module__.split('.')[0]}-{name}" for name, cls in CLASSES]
HEAVY = ("shampoo", "soap")  # eigendecompositions of side 512: the ends of the range are enough


@functools.cache
def _measured(name: str, cls: type[Optimizer]) -> Measurement:
    plain = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(cls).parameters else {}
    widths = (64, 512) if name in HEAVY else (64, 128, 256, 512)
    own_factor = all_methods()[name].own_factor
    return measure_update_norm(lambda params: cls(params, lr=0.01, **plain), own_factor=own_factor, widths=widths)


def _declared(method: Method) -> Power:
    return method.declared(SPEC, method.defaults)


def _disagreements(method: Method, found: Measurement) -> list[str]:
    declared = _declared(method)
    claims = {name: float(getattr(declared, name)) for name in ("fan_in", "fan_out", "depth")}
    claims["weight"] = float(method.weight_degree)
    return [name for name, claim in claims.items() if abs(claim - found.fitted[name]) > TOLERANCE]


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=IDS)
def test_update_is_as_large_as_declared(name: str, cls: type[Optimizer]) -> None:
    assert _disagreements(all_methods()[name], _measured(name, cls)) == []


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=IDS)
@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        (Power(fan_in=1 / 4), "fan_in"),
        (Power(fan_in=-1 / 2), "fan_in"),
        (Power(fan_out=1 / 2), "fan_out"),
        (Power(fan_out=-1 / 4), "fan_out"),
        (Power(depth=-1), "depth"),
        (Power(depth=1 / 2), "depth"),
    ],
    ids=str,
)
def test_wrong_declaration_is_found(name: str, cls: type[Optimizer], wrong: Power, at: str) -> None:
    method = all_methods()[name]
    declared = _declared(method)
    assert _disagreements(replace(method, update_norm=declared * wrong), _measured(name, cls)) == [at]


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=IDS)
def test_wrong_weight_degree_is_found(name: str, cls: type[Optimizer]) -> None:
    method = all_methods()[name]
    wrong = replace(method, weight_degree=1 - method.weight_degree)
    assert _disagreements(wrong, _measured(name, cls)) == ["weight"]


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=IDS)
def test_rule_from_measurement_is_the_declared_one(name: str, cls: type[Optimizer]) -> None:
    """The fitted exponents come out as the very fractions that are declared."""
    method, found = all_methods()[name], _measured(name, cls)
    made = found.method(eps={})
    # At one size, blocks and size cannot be told apart, and no blocks are on.
    assert made.update_norm == replace(_declared(method), blocks_in=0, blocks_out=0)
    assert (made.weight_degree, made.optimizers) == (method.weight_degree, (cls,))
    row = find_rules("mup").rows[Role.HIDDEN]
    assert (made.natural(SPEC, row, {}) / method.natural(SPEC, row, method.defaults)).evaluate(fan_in=8, fan_out=2) == 1


SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("shampoo", {"exponent": 0.5}),
    ("shampoo", {"exponent": (0.25, 0.5)}),
    ("shampoo", {"graft": "adam", "exponent": 0.5}),
    ("shampoo", {"block_size": 32}),
    ("shampoo", {"max_preconditioned_dim": 100}),
    ("soap", {"max_preconditioned_dim": 100}),
    ("soap", {"block_size": 8}),
    ("soap", {"spectral_norm": True}),
    ("muon", {"graft": "sgd"}),
    ("adamuon", {"rms_align": True}),
    ("adamw", {"spectral_norm": True}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_declaration_follows_the_settings(name: str, settings: dict[str, object]) -> None:
    """Update of a matrix at twice to four times the base's sides, over the one at the base."""
    method = all_methods()[name]
    assert method.build is not None
    one_sided = "max_preconditioned_dim" in settings  # the input side
    sizes = [Trial(64, 128), Trial(64, 256)] if one_sided else [Trial(64, 64), Trial(128, 256)]
    here, there = (run(lambda params: method.build(params, lr=0.01, **settings), trial, 8, None) for trial in sizes)
    spec = ParamSpec(
        "w",
        Role.HIDDEN,
        (there.fan_out, there.fan_in),
        Dim(there.fan_in, here.fan_in),
        Dim(there.fan_out, here.fan_out),
    )
    full = {**method.defaults, **settings}
    claimed = spec.evaluate(method.declared(spec, full), blocks=block_ratios(spec, full))
    doublings = math.log2(there.fan_in * there.fan_out / here.fan_in / here.fan_out)
    assert abs(math.log2(there.norm / here.norm / claimed)) / doublings < TOLERANCE


class Lit(LightningModule):
    def __init__(self, width: int, optimizer: type[Optimizer] = Lion) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(8, 8), batch_size=4)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(list(self.parameters()), lr=0.01)


def _fit(module: Lit, **options: object) -> Parametrize:
    parametrize = Parametrize(base=lambda: Lit(16, module.optimizer), **options)
    trainer = Trainer(barebones=True, max_steps=2, accelerator="cpu", callbacks=[parametrize])
    trainer.fit(module)
    return parametrize


@pytest.mark.parametrize("optimizer", [Lion, torch.optim.Rprop])
def test_undeclared_optimizer_trains_with_a_measured_rule(optimizer: type[Optimizer]) -> None:
    method = measure(lambda params: optimizer(params, lr=0.01))
    assert method.update_norm == Power(fan_in=1 / 2, fan_out=1 / 2)
    assert SPECTRAL / method.update_norm == Power(fan_in=-1)

    module = Lit(64, optimizer)
    done = _fit(module, declare=[method])
    assert done.plan is not None
    rates = {row.spec.name: row.lr for row in done.plan.params if row.spec.name.endswith("weight")}
    assert rates == {"net.0.weight": 1.0, "net.2.weight": 0.25, "net.4.weight": 0.25}
    assert {row.method for row in done.plan.params} == {optimizer.__name__.lower()}


def test_undeclared_optimizer_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no scaling rule .*Lion.*lightning_mup\.measure\(.*declare="):
        _fit(Lit(64))


def test_plan_takes_a_measured_method() -> None:
    method = measure(Lion, name="lion!")
    made = plan(nn.Linear(64, 2), base=lambda: nn.Linear(16, 2), method=method)
    assert (made["weight"].lr, made["weight"].method) == (0.25, "lion!")
