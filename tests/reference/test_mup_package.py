"""Against microsoft/mup 1.0.0: the same multipliers and initial sizes, and the same training, up to abc-equivalence.

mup keeps a readout's weight w at constant size and multiplies its input by 1/r (r = fan-in ratio). With W = w/r the
layer is ours, and by the abc-symmetry a rate eta of w is a rate eta/r (Adam) or eta/r^2 (SGD) of W.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mup import MuAdam, MuReadout, MuSGD, set_base_shapes
from torch import nn

import lightning_mup
from lightning_mup.core.base import Measured
from tests.models import VOCABULARY, generator, markov_text

Factory = Callable[[int, type[nn.Linear]], nn.Module]


def mlp(width: int, readout: type[nn.Linear] = nn.Linear) -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 2 * width), nn.Tanh(), readout(2 * width, VOCABULARY)
    )


class Transformer(nn.Module):
    def __init__(self, width: int, readout: type[nn.Linear]) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 16, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.readout = readout(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.readout(self.encoder(self.embedding(tokens)))


MODELS: dict[str, Factory] = {"mlp": mlp, "transformer": Transformer}
OPTIMIZERS = {
    "adam": (MuAdam, torch.optim.Adam, {"lr": 1e-2, "eps": 1e-30}, 1),
    "sgd": (MuSGD, torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}, 2),
}


def mu_model(factory: Factory, width: int, base_width: int) -> nn.Module:
    model = factory(width, MuReadout)
    set_base_shapes(model, factory(base_width, MuReadout), delta=factory(2 * base_width, MuReadout))
    return model


def readout_of(model: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, MuReadout))


def batches(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if name == "transformer":
        text = markov_text(8, 9)
        return [(text[:, :-1], text[:, 1:].flatten())] * 5
    x = torch.randn(5, 32, 16, generator=generator(0), dtype=torch.float64)
    return [(xs, torch.arange(32) % VOCABULARY) for xs in x]


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> list[float]:
    found = []
    for x, y in batches(name):
        loss = F.cross_entropy(model(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_multipliers_equal_mup(name: str, method: str) -> None:
    mu_optimizer, _, settings, power = OPTIMIZERS[method]
    model = mu_model(MODELS[name], 128, 32)
    made = lightning_mup.plan(MODELS[name](128, nn.Linear), lambda: MODELS[name](32, nn.Linear), method=method)
    theirs = {
        id(p): group["lr"]
        for group in mu_optimizer(model.parameters(), **settings).param_groups
        for p in group["params"]
    }
    readout = readout_of(model)
    for parameter_name, parameter in model.named_parameters():
        fold = made[parameter_name].spec.fan_in.ratio ** -power if parameter_name == readout else 1.0
        want = theirs[id(parameter)] / settings["lr"] * fold
        assert made[parameter_name].lr == pytest.approx(want, rel=1e-12), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_initial_sizes_equal_mup(name: str) -> None:
    base, width = 64, 512
    model = mu_model(MODELS[name], width, base)
    small = dict(mu_model(MODELS[name], base, base).named_parameters())
    made = lightning_mup.plan(MODELS[name](width, nn.Linear), lambda: MODELS[name](base, nn.Linear))
    readout = readout_of(model)
    compared = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel() < 1000 or small[parameter_name].numel() < 1000:
            continue  # sampling noise of a short vector
        fold = 1 / made[parameter_name].spec.fan_in.ratio if parameter_name == readout else 1.0
        ratio = Measured.of(parameter).rms * fold / Measured.of(small[parameter_name]).rms
        assert made[parameter_name].init == pytest.approx(ratio, rel=0.03), parameter_name
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_mup(name: str, method: str) -> None:
    mu_optimizer, plain_optimizer, settings, _ = OPTIMIZERS[method]
    theirs = mu_model(MODELS[name], 128, 32).double()
    readout = readout_of(theirs)
    made = lightning_mup.plan(MODELS[name](128, nn.Linear), lambda: MODELS[name](32, nn.Linear), method=method)
    ours = MODELS[name](128, nn.Linear).double()
    state = copy.deepcopy(theirs.state_dict())
    state[readout] /= made[readout].spec.fan_in.ratio
    ours.load_state_dict(state)
    groups = [{"params": [p], "lr": settings["lr"] * made[n].lr} for n, p in ours.named_parameters()]
    want = losses(theirs, mu_optimizer(theirs.parameters(), **settings), name)
    assert losses(ours, plain_optimizer(groups, **settings), name) == pytest.approx(want, rel=1e-9)
    flat = copy.deepcopy(ours)
    flat.load_state_dict(state)
    assert losses(flat, plain_optimizer(flat.parameters(), **settings), name) != pytest.approx(want, rel=1e-3)
