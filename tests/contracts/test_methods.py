"""Every declared optimizer is measured, and its declaration compared with what was found."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.core.measure import Measurement, measure, measure_update_norm
from lightning_mup.core.method import Method, all_methods
from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.rules import find_rules
from lightning_mup.core.scaling import plan
from lightning_mup.core.spec import Dim, ParamSpec, Role

TOLERANCE = 0.1
# Early training: aligned gradients of rank 4, epsilon negligible, eighth step (RAdam is rectified from the sixth on).
SPEC = ParamSpec("w", Role.HIDDEN, (512, 512), Dim(512, 64), Dim(512, 64))


def _made(method: Method, params: list[nn.Parameter]) -> Optimizer:
    make: Callable[..., Optimizer] | None = method.optimizers[0] if method.optimizers else method.build
    assert make is not None
    plain = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(make).parameters else {}
    return make(params, lr=0.01, **plain)


@functools.cache
def _measured(name: str) -> Measurement:
    method = all_methods()[name]
    return measure_update_norm(lambda params: _made(method, params), own_factor=method.own_factor)


def _disagreements(method: Method, found: Measurement) -> list[str]:
    declared = method.update_norm if isinstance(method.update_norm, Power) else method.update_norm(SPEC)
    claims = {name: float(getattr(declared, name)) for name in ("fan_in", "fan_out", "depth")}
    claims["weight"] = float(method.weight_degree)
    return [name for name, claim in claims.items() if abs(claim - found.fitted[name]) > TOLERANCE]


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_update_is_as_large_as_declared(name: str) -> None:
    assert _disagreements(all_methods()[name], _measured(name)) == []


@pytest.mark.parametrize("name", sorted(all_methods()))
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
def test_wrong_declaration_is_found(name: str, wrong: Power, at: str) -> None:
    method = all_methods()[name]
    declared = method.update_norm if isinstance(method.update_norm, Power) else method.update_norm(SPEC)
    assert _disagreements(replace(method, update_norm=declared * wrong), _measured(name)) == [at]


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_wrong_weight_degree_is_found(name: str) -> None:
    method = all_methods()[name]
    wrong = replace(method, weight_degree=1 - method.weight_degree)
    assert _disagreements(wrong, _measured(name)) == ["weight"]


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_rule_from_measurement_is_the_declared_one(name: str) -> None:
    """The fitted exponents come out as the very fractions that are declared."""
    method, found = all_methods()[name], _measured(name)
    made = found.method(eps=method.eps)
    assert made.update_norm == (
        method.update_norm if isinstance(method.update_norm, Power) else method.update_norm(SPEC)
    )
    assert (made.weight_degree, made.optimizers) == (method.weight_degree, method.optimizers)
    row = find_rules("mup").rows[Role.HIDDEN]
    assert made.natural(SPEC, row) == method.natural(SPEC, row)


class Lion(Optimizer):
    """Sign of a momentum (arXiv:2302.06675), which nobody declared."""

    def __init__(self, params: list[nn.Parameter], lr: float = 1e-4, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                p.sub_(momentum.sign(), alpha=group["lr"])
        return loss


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
