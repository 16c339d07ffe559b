"""Both ways to an optimizer: the module's own groups are split as they are built, or the callback supplies one."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mup import Method, Parametrize, Power, all_methods, plan
from tests.lightning.helpers import BASE, Net, rms, same, trainer, values

TORCH = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and cls in {c for method in all_methods().values() for c in method.optimizers}
}
EVERYWHERE = {name: cls for name, cls in TORCH.items() if name != "Muon"}  # Muon takes matrices alone


def fitted(make: Callable[[Net], Any], steps: int = 1, **kwargs: Any) -> tuple[Parametrize, Net]:
    parametrize, module = Parametrize(BASE, **kwargs), Net(make=make)
    trainer(parametrize, steps=steps).fit(module)
    return parametrize, module


def groups_of(module: Net) -> list[dict[str, Any]]:
    return module.trainer.optimizers[0].param_groups


@pytest.mark.parametrize("name", EVERYWHERE)
def test_module_keeps_its_own_optimizer(name: str) -> None:
    parametrize, module = fitted(lambda m: EVERYWHERE[name](m.parameters(), lr=0.01), steps=2)
    names = {id(p): n for n, p in module.named_parameters()}
    assert type(module.trainer.optimizers[0]) is EVERYWHERE[name]
    seen = [names[id(p)] for group in groups_of(module) for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups_of(module):
        assert group["lr"] == group["lr_at_base"] * group["lr_mult"] == 0.01 * group["lr_mult"]
        for p in group["params"]:
            assert parametrize.plan[names[id(p)]].lr == group["lr_mult"]
            assert parametrize.plan[names[id(p)]].spec.role.value == group["role"]
    assert len({group["name"] for group in groups_of(module)}) == len(groups_of(module))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_plan_is_the_one_that_plan_gives(name: str) -> None:
    parametrize, _ = fitted(lambda m: EVERYWHERE[name](m.parameters(), lr=0.01))
    method = next(method for method in all_methods().values() if EVERYWHERE[name] in method.optimizers)
    settings = {"decay": method.decay, **EVERYWHERE[name]([nn.Parameter(torch.ones(1))], lr=0.01).defaults}
    assert parametrize.plan.digest() == plan(Net(64), BASE, method=method.name, settings=settings).digest()


@pytest.mark.parametrize(("name", "setting"), [("Adam", "eps"), ("Adafactor", "eps"), ("RMSprop", "eps")])
def test_epsilon_is_multiplied(name: str, setting: str) -> None:
    parametrize, module = fitted(lambda m: EVERYWHERE[name](m.parameters(), lr=0.01))
    default = EVERYWHERE[name]([nn.Parameter(torch.ones(1))]).defaults[setting]
    hidden = next(group for group in groups_of(module) if group["role"] == "hidden")
    factor = parametrize.plan["net.2.weight"].eps[setting]
    if isinstance(default, tuple):  # Adafactor: (None, relative to the weight)
        assert hidden[setting] == (None, default[1] * factor[1])
    else:
        assert hidden[setting] == default * factor
        assert factor == 0.25


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}, {"capturable": False, "amsgrad": True}])
def test_implementations_of_torch(settings: dict[str, bool]) -> None:
    _, module = fitted(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, **settings), steps=3)
    _, plain = fitted(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), steps=0)
    assert not same(module, plain)
    for key, value in settings.items():
        assert all(group[key] == value for group in groups_of(module))


def two_groups(module: Net) -> Optimizer:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1, "name": "matrices"},
            {"params": rest, "lr": 0.02, "weight_decay": 0.0, "name": "rest"},
        ],
        lr=0.01,
    )


def test_users_groups_keep_their_settings() -> None:
    _, module = fitted(two_groups)
    got = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups_of(module)}
    assert got == {
        "matrices: input": (0.01, pytest.approx(0.1 * 0.25)),
        "matrices: hidden x0.25": (0.01 * 0.25, pytest.approx(0.1)),
        "matrices: output x0.25": (0.01 * 0.25, pytest.approx(0.1)),
        "rest: vector": (0.02, 0.0),
        "rest: vector (2)": (0.02, 0.0),
    }


def test_named_parameters_keep_their_names() -> None:
    _, module = fitted(lambda m: torch.optim.SGD(m.named_parameters(), lr=0.1))
    own = {name: p for name, p in module.named_parameters()}
    for group in groups_of(module):
        assert [own[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]


def test_empty_groups_stay() -> None:
    _, module = fitted(lambda m: torch.optim.SGD([{"params": []}, {"params": m.parameters()}], lr=0.1))
    assert [(group["role"], group["given_group"]) for group in groups_of(module)][:2] == [("empty", 0), ("input", 1)]


def test_sets_stay_torchs_error() -> None:
    with pytest.raises(TypeError, match="ordered collections"):
        fitted(lambda m: torch.optim.SGD([{"params": set(m.parameters())}], lr=0.1))


def test_frozen_parameters_have_no_row_and_do_not_move() -> None:
    def make(module: Net) -> Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    module = Net(make=make)
    module.net[0].requires_grad_(False)
    before = values(module)
    parametrize = Parametrize(BASE)
    trainer(parametrize).fit(module)
    assert "net.0.weight" not in [param.spec.name for param in parametrize.plan.params]
    assert torch.equal(module.net[0].weight, before["net.0.weight"])
    assert [group["name"] for group in groups_of(module)].count("frozen") == 1


def test_parameters_without_an_optimizer_are_in_the_plan() -> None:
    parametrize, _ = fitted(lambda m: torch.optim.SGD(m.net[0].parameters(), lr=0.1))
    assert (parametrize.plan["net.0.weight"].method, parametrize.plan["net.2.weight"].method) == ("sgd", "")


def test_no_optimizer_at_all() -> None:
    with pytest.warns(UserWarning, match="run with no optimizer"):
        parametrize, _ = fitted(lambda m: None)
    assert {param.method for param in parametrize.plan.params} == {""}


class TwoOptimizers(Net):
    def __init__(self, make: Callable[[Net], Any], width: int = 64) -> None:
        super().__init__(width, make, automatic=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


def muon_and_adam(module: Net) -> list[Optimizer]:
    matrices = [p for p in module.parameters() if p.ndim == 2]
    rest = [p for p in module.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.Adam(rest, lr=0.01)]


def test_each_of_two_optimizers_is_split() -> None:
    parametrize, module = Parametrize(lambda: TwoOptimizers(muon_and_adam, 16)), TwoOptimizers(muon_and_adam)
    trainer(parametrize).fit(module)
    methods = {param.spec.name: param.method for param in parametrize.plan.params}
    assert methods == {n: "muon" if p.ndim == 2 else "adam" for n, p in module.named_parameters()}
    muon, adam = module.trainer.optimizers
    assert {group["role"] for group in muon.param_groups} == {"input", "hidden", "output"}
    assert {group["role"] for group in adam.param_groups} == {"vector"}
    assert all(g["lr"] == base * g["lr_mult"] for o, base in ((muon, 0.02), (adam, 0.01)) for g in o.param_groups)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_weight_decay_without_gradients_removes_what_the_plan_says(name: str) -> None:
    class Still(Net):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return 0.0 * super().loss(batch)

    lr, decay = 0.1, 0.02
    module = Still(make=lambda m: TORCH[name](m.parameters(), lr=lr, weight_decay=decay))
    parametrize = Parametrize(BASE, initialize="keep")
    before = values(module)
    trainer(parametrize, steps=1).fit(module)
    removed = {n: 1 - rms(p) / rms(before[n]) for n, p in module.named_parameters()}
    wanted = {n: lr * decay * parametrize.plan[n].weight_decay for n in removed}
    assert removed == pytest.approx(wanted, rel=1e-3)
    assert len(set(wanted.values())) == 2


@pytest.mark.parametrize("method", ["sgd", "adamw"])
@pytest.mark.parametrize("lr", [0.1, 0.001])
def test_supplied_weight_decay_is_independent_of_the_rate(method: str, lr: float) -> None:
    class Still(Net):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return 0.0 * super().loss(batch)

    module = Still()
    before = values(module)
    parametrize = Parametrize(BASE, method=method, lr=lr, weight_decay=0.005, initialize="keep")
    trainer(parametrize, steps=1).fit(module)
    for name, p in module.named_parameters():
        assert 1 - rms(p) / rms(before[name]) == pytest.approx(0.005 * parametrize.plan[name].weight_decay, rel=1e-3)


@pytest.mark.parametrize("method", ["sgd", "adam", "adamw"])
def test_supplied_optimizer_equals_the_modules_own(method: str) -> None:
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[method]
    torch.manual_seed(1)
    _, own = fitted(lambda m: cls(m.parameters(), lr=0.01, weight_decay=0.0), steps=3)
    torch.manual_seed(1)
    parametrize, supplied = fitted(lambda m: None, steps=3, method=method, lr=0.01)
    for ours, theirs in zip(supplied.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {param.method for param in parametrize.plan.params} == {method}


def test_supplied_optimizer_takes_options() -> None:
    _, module = fitted(lambda m: None, method="adam", lr=0.01, options={"betas": (0.8, 0.9)})
    assert all(group["betas"] == (0.8, 0.9) for group in groups_of(module))


def test_supplied_optimizer_replaces_the_modules_own() -> None:
    class Without(Net):
        def configure_optimizers(self) -> Any:
            raise NotImplementedError

    parametrize = Parametrize(BASE, method="sgd", lr=0.1)
    trainer(parametrize).fit(Without())
    assert {param.method for param in parametrize.plan.params} == {"sgd"}


def test_supplied_schedule_may_be_lightnings_dict() -> None:
    def schedule(optimizer: Optimizer) -> dict[str, Any]:
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "epoch"}

    parametrize = Parametrize(BASE, method="sgd", lr=0.1, schedule=schedule)
    ran = trainer(parametrize, steps=16)
    ran.fit(Net())
    assert {group["lr"] / group["lr_mult"] for group in ran.optimizers[0].param_groups} == {0.025}


@pytest.mark.parametrize("method", [None, "sgd"])
def test_lr_multiplier_per_role_is_a_hyperparameter_of_the_base(method: str | None) -> None:
    def make(module: Net) -> Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    own = {} if method is None else {"method": method, "lr": 0.1}
    plain, _ = fitted(make, **own)
    multiplied, module = fitted(make, lr_multipliers={"embedding": 0.1, "net.4.weight": 3.0}, **own)
    ratio = {p.spec.name: p.lr / plain.plan[p.spec.name].lr for p in multiplied.plan.params}
    assert ratio == pytest.approx({**dict.fromkeys(ratio, 1.0), "net.0.weight": 0.1, "net.4.weight": 3.0})
    assert all(multiplied.plan[n].weight_decay == plain.plan[n].weight_decay for n in ratio)
    rates = {group["role"]: group["lr"] for group in groups_of(module)}
    assert rates["input"] == pytest.approx(0.1 * 0.1 * 4)


class Doubled(torch.optim.SGD):
    """A subclass keeps its class's declaration."""


class Undeclared(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None if closure is None else closure()


def test_subclasses_keep_the_declaration() -> None:
    parametrize, _ = fitted(lambda m: Doubled(m.parameters(), lr=0.1))
    assert {param.method for param in parametrize.plan.params} == {"sgd"}


def test_optimizers_may_be_declared() -> None:
    mine = Method(name="mine", update_norm=Power(fan_in=1), optimizers=(Undeclared,))
    subclass = type("Sub", (Undeclared,), {})
    for cls in (Undeclared, subclass):
        parametrize, _ = fitted(lambda m, cls=cls: cls(m.parameters()), declare=[mine])
        assert {param.method for param in parametrize.plan.params} == {"mine"}
        assert parametrize.plan["net.2.weight"].lr == 0.25


def test_base_run_trains_as_without_the_callback() -> None:
    trained = []
    for callbacks in ([], [Parametrize("self")], [Parametrize({"width": 64})]):
        torch.manual_seed(1)
        module = Net(make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
        trainer(*callbacks, steps=3).fit(module)
        trained.append(module)
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
