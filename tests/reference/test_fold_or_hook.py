"""abc-symmetry: a forward multiplier folded into init, rate, epsilon and decay trains exactly as one that is hooked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from lightning_mup.core.base import Base, resolve_base
from lightning_mup.core.groups import GroupSplitter
from lightning_mup.core.multipliers import install_multipliers
from lightning_mup.core.scaling import Choices, Scaling
from tests.models import MLP, ResidualMLP, TransformerLM

STEPS = 20
MODELS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, int], tuple[int, int]]] = {
    # name: factory, target (width, depth), base; ratios are powers of 4, so that Muon's bfloat16 scales exactly
    "mlp": (MLP, (64, 2), (16, 2)),
    "residual": (ResidualMLP, (32, 8), (32, 2)),
    "transformer": (TransformerLM, (32, 4), (32, 1)),
}
RULES = {"mlp": ["ntk", "mean_field"], "residual": ["complete_p", "depth_mup"], "transformer": ["complete_p"]}
CASES = [(model, rules) for model, choices in RULES.items() for rules in choices]


def sgd(parameters: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01)]


def adam(parameters: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(parameters, lr=2e-3, eps=1e-3, weight_decay=0.01)]


def adamw(parameters: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, lr=2e-3, eps=1e-3, weight_decay=0.1)]


def muon(parameters: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=2e-3, eps=1e-3), torch.optim.SGD(rest, lr=0.02)]


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "muon": muon}


def scaling_of(model: nn.Module, base: Base, rules: str, multipliers: str) -> Scaling:
    return Scaling.read(model, base, rules, Choices(multipliers=multipliers))


def train(
    model: nn.Module, scaling: Scaling, make: Callable[..., list[torch.optim.Optimizer]]
) -> list[dict[str, Tensor]]:
    install_multipliers(model, map(scaling.initial, scaling.specs))
    names = {id(p): n for n, p in model.named_parameters()}
    with GroupSplitter(scaling, names) as splitter:
        optimizers = make(model.parameters())
    splitter.finish()
    path = []
    for step, batch in zip(range(STEPS), _forever(model), strict=False):
        loss = model.training_step(batch, step)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        path.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return path


def _forever(model: nn.Module) -> Iterable[list[Tensor]]:
    while True:
        for batch in model.train_dataloader():
            yield [x.double() if x.is_floating_point() else x for x in batch]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.LightningModule.log", lambda *args, **kwargs: None)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "rules"), CASES)
def test_folded_and_hooked_train_alike(name: str, rules: str, optimizer: str) -> None:
    factory, target, small = MODELS[name]
    hooked = factory(*target).double()
    base = resolve_base(lambda: factory(*small), hooked)
    hook, fold = (scaling_of(hooked, base, rules, how) for how in ("hook", "fold"))
    factors = {spec.name: fold.multiplier(spec) for spec in fold.specs}
    assert any(factor != 1 for factor in factors.values())
    folded, unscaled = copy.deepcopy(hooked), copy.deepcopy(hooked)
    with torch.no_grad():
        for parameter_name, parameter in folded.named_parameters():
            parameter.mul_(factors[parameter_name])
    want = train(hooked, hook, OPTIMIZERS[optimizer])
    got = train(folded, fold, OPTIMIZERS[optimizer])
    for there, here in zip(want, got, strict=True):
        for parameter_name, factor in factors.items():
            error = (here[parameter_name] - factor * there[parameter_name]).norm()
            assert error <= 1e-10 * here[parameter_name].norm(), parameter_name
    moved = sum(bool((want[-1][n] != p).any()) for n, p in unscaled.named_parameters())
    assert moved == len(factors)


def test_a_wrong_exponent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mup.core.method.Method.fold_exponent", lambda self, spec, settings: 0.0)
    with pytest.raises(AssertionError):
        test_folded_and_hooked_train_alike("residual", "complete_p", "sgd")
