"""Every method trains through Lightning, and a run that is resumed ends bit for bit where one that was not ends."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lightning_mup import SGD, SOAP, Adam, AdamAtan2, AdaMuon, AdamW, Muon, Parametrize, Shampoo, StackedOptimizer
from tests.lightning.helpers import Net, trainer, values
from tests.lightning.test_resume import Trained

STEPS, MIDDLE, WIDTH = 10, 6, 32  # an epoch has 8 steps
OFTEN = {"precondition_every": 2}
SOON = {**OFTEN, "warmup_steps": 3}
METHODS: dict[str, tuple[str, float, dict[str, Any]]] = {
    # name, learning rate and options
    "sgd": ("sgd", 0.3, {"momentum": 0.9}),
    "adam": ("adam", 0.01, {}),
    "adamw": ("adamw", 0.01, {}),
    "adam_atan2": ("adam_atan2", 0.01, {}),
    "muon": ("muon", 0.03, {"adam": {"betas": (0.9, 0.95)}}),
    "spectral muon": ("muon", 0.03, {"spectral_norm": True}),
    "muon_adam": ("muon_adam", 0.01, {}),
    "adamuon": ("adamuon", 0.01, {}),
    "shampoo": ("shampoo", 0.1, OFTEN),
    "grafted shampoo": ("shampoo", 0.01, {"graft": "adam", **OFTEN}),
    "shampoo2": ("shampoo2", 0.01, {"matrix_eps": 1e-2, **OFTEN}),
    "soap": ("soap", 0.01, {"eps": 1e-3, **SOON}),
    "blocked soap": ("soap", 0.01, {"block_size": 8, **SOON}),
}
DECAYING = [name for name in METHODS if name != "adam"]  # whose weight decay is a term of the gradient


def supplied(name: str, base: Callable[[], Net] = lambda: Trained(16)) -> Parametrize:
    method, lr, options = METHODS[name]
    weight_decay = 1e-3 if name in DECAYING else 0.0
    return Parametrize(base, method=method, lr=lr, weight_decay=weight_decay, options=options)


def fit(parametrize: Parametrize, module: Any, *callbacks: Callback, resume: Any = None, **kwargs: Any) -> Any:
    ran = trainer(parametrize, *callbacks, **{"steps": STEPS, **kwargs})
    ran.fit(module, ckpt_path=resume)
    return module


def built(make: Callable[[L.LightningModule], Any] = lambda module: None, seed: int = 0) -> Trained:
    torch.manual_seed(seed)
    return Trained(WIDTH, make=make)


def optimizer_of(module: Trained) -> Optimizer:
    return module.trainer.optimizers[0]


def assert_same_end(one: Trained, other: Trained) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    ours, theirs = (optimizer_of(module).state_dict() for module in (one, other))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", METHODS)
def test_supplied_method_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def run(seed: int, **kwargs: Any) -> Trained:
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=MIDDLE, save_top_k=-1)
        return fit(supplied(name), built(seed=seed), saving, enable_checkpointing=True, **kwargs)

    whole, resumed = run(0), run(1, resume=tmp_path / f"step={MIDDLE}.ckpt")
    assert isinstance(optimizer_of(whole), StackedOptimizer)
    assert_same_end(whole, resumed)


def loss_of(module: Net) -> float:
    return float(sum(module.loss(batch).detach() for batch in module.train_dataloader())) / 8


@pytest.mark.parametrize("name", METHODS)
def test_supplied_method_learns(name: str) -> None:
    torch.manual_seed(0)
    before = Net(WIDTH)
    fit(supplied(name, lambda: Net(16)), before, steps=0)
    torch.manual_seed(0)
    module, parametrize = Net(WIDTH), supplied(name, lambda: Net(16))
    fit(parametrize, module, steps=40)
    assert loss_of(module) < 0.8 * loss_of(before)
    methods = {param.spec.name: param.method for param in parametrize.plan.params}
    states = {n: set(optimizer_of(module).state[p]) for n, p in module.named_parameters()}
    adams = {n for n, keys in states.items() if keys == {"step", "adam/m", "adam/v"}}
    assert adams == {n for n, method in methods.items() if method in ("adam", "adamw", "adam_atan2")}


def in_module(make: Callable[..., StackedOptimizer]) -> Callable[[L.LightningModule], dict[str, Any]]:
    """The module's own ``configure_optimizers``, with groups of its own and a schedule of each step."""

    def configure(module: L.LightningModule) -> dict[str, Any]:
        named = list(module.named_parameters())
        groups = [{"params": named[:3], "name": "front"}, {"params": named[3:], "name": "back", "weight_decay": 0.0}]
        optimizer = make(groups, lr=0.01, weight_decay=1e-3)
        schedule = lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return configure


OWN: dict[str, Callable[..., StackedOptimizer]] = {
    "sgd": lambda groups, **common: SGD(groups, momentum=0.9, **common),
    "adam": Adam,
    "adamw": AdamW,
    "adam_atan2": AdamAtan2,
    "muon": lambda groups, **common: Muon(groups, routes={"output": "adam"}, **common),
    "adamuon": AdaMuon,
    "shampoo": lambda groups, **common: Shampoo(groups, graft="adam", **OFTEN, **common),
    "soap": lambda groups, **common: SOAP(groups, block_size=8, spectral_norm=True, **SOON, **common),
}


@pytest.mark.parametrize("name", OWN)
def test_own_optimizer_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Clipped and accumulated, under a schedule that turns rate and momentum, saved by hand."""

    def run(steps: int, seed: int = 0, **kwargs: Any) -> Trained:
        module, parametrize = built(in_module(OWN[name]), seed), Parametrize(lambda: Trained(16))
        clipped = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
        return fit(parametrize, module, steps=steps, **clipped, **kwargs)

    path = tmp_path / "middle.ckpt"
    run(MIDDLE).trainer.save_checkpoint(path)
    whole, resumed = run(STEPS), run(STEPS, seed=1, resume=path)
    assert_same_end(whole, resumed)
    rates = [module.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() for module in (whole, resumed)]
    assert rates[0] == rates[1]
    assert all(group["lr"] == group["lr_at_base"] * group["lr_mult"] for group in optimizer_of(whole).param_groups)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", METHODS)
def test_low_precision(name: str, precision: str) -> None:
    module = fit(supplied(name), built(), steps=4, precision=precision)
    plain = fit(supplied(name), built(), steps=0, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    moved = {n for n, p in values(module).items() if not torch.equal(p, values(plain)[n])}
    assert {n for n, p in module.named_parameters() if p.ndim > 1} <= moved
    held: list[Tensor] = [value for state in optimizer_of(module).state.values() for value in state.values()]
    assert {value.dtype for value in held} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in held)
