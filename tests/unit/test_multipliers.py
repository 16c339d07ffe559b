"""Forward multipliers by hooks: on what, with which factor, and what is refused."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mup.core.multipliers import ForwardMultiplier, InputMultiplier, install_multipliers, silent
from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.spec import ParamSpec, Role


def rows(model: nn.Module, **factors: float) -> list[ParamPlan]:
    """Rows with forward multipliers by name, dots written as two underscores."""
    given = {name.replace("__", "."): factor for name, factor in factors.items()}
    return [
        ParamPlan(ParamSpec(name, Role.HIDDEN, tuple(p.shape)), forward=given.get(name, 1.0))
        for name, p in model.named_parameters()
    ]


def multiplied(model: nn.Module, **factors: float) -> nn.Module:
    """A copy with the factors in the weights."""
    other = copy.deepcopy(model)
    for name, factor in factors.items():
        other.get_parameter(name.replace("__", ".")).data.mul_(factor)
    return other


CASES: dict[str, tuple[nn.Module, dict[str, float], Tensor]] = {
    "linear": (nn.Linear(3, 2), {"weight": 0.5}, torch.randn(4, 3)),
    "linear with bias": (nn.Linear(3, 2), {"weight": 0.5, "bias": 0.5}, torch.randn(4, 3)),
    "without bias": (nn.Linear(3, 2, bias=False), {"weight": 0.5}, torch.randn(4, 3)),
    "convolution": (nn.Conv2d(3, 2, 3, padding=1), {"weight": 0.5}, torch.randn(1, 3, 5, 5)),
    "transposed": (nn.ConvTranspose1d(3, 2, 3), {"weight": 0.5}, torch.randn(1, 3, 5)),
    "embedding": (nn.Embedding(5, 2), {"weight": 0.5}, torch.tensor([1, 4])),
    "norm": (nn.LayerNorm(3), {"weight": 0.5, "bias": 0.5}, torch.randn(4, 3)),
    "inside": (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), {"2__weight": 0.5}, torch.randn(4, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_hook_does_what_a_multiplied_weight_does(name: str) -> None:
    model, factors, x = CASES[name]
    model = copy.deepcopy(model)
    want = multiplied(model, **factors)(x)
    hooks = install_multipliers(model, rows(model, **factors))
    assert torch.allclose(model(x), want, atol=1e-6)
    assert all(hook.ran for hook in hooks.values())


def test_out_projection_of_torchs_attention() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(model.out_proj.bias)
    x, factors = torch.randn(1, 5, 8), {"out_proj__weight": 0.5, "out_proj__bias": 0.5}
    want = multiplied(model, **factors)(x, x, x)[0]
    install_multipliers(model, rows(model, **factors))
    assert torch.allclose(model(x, x, x)[0], want, atol=1e-6)


def test_inputs_may_be_given_by_keyword() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    want = multiplied(model, weight=0.5)(x)
    install_multipliers(model, rows(model, weight=0.5))
    assert torch.allclose(model(input=x), want, atol=1e-6)


REFUSED: dict[str, tuple[nn.Module, dict[str, float]]] = {
    "attention": (nn.MultiheadAttention(8, 2, bias=False), {"in_proj_weight": 0.5, "out_proj__weight": 0.5}),
    "its projection without its bias": (nn.MultiheadAttention(8, 2), {"out_proj__weight": 0.5}),
    "recurrent": (nn.LSTM(3, 4, bias=False), {"weight_ih_l0": 0.5, "weight_hh_l0": 0.5}),
    "gain alone": (nn.LayerNorm(3), {"weight": 0.5}),
    "bias alone": (nn.Linear(3, 2), {"bias": 0.5}),
    "two factors": (nn.Linear(3, 2), {"weight": 0.5, "bias": 0.25}),
    "unknown module": (nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 2))}), {"w": 0.5}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_hook_can_do_is_refused(name: str) -> None:
    model, factors = REFUSED[name]
    with pytest.raises(ValueError, match=r"module '.*' \(\w+\) needs .*forward multipliers \{.*0.5.*'fold'"):
        install_multipliers(model, rows(model, **factors))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


class Readout(nn.Module):
    def __init__(self, readout: nn.Module) -> None:
        super().__init__()
        self.embedding, self.readout = nn.Embedding(4, 3), readout
        self.readout.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        return self.readout(self.embedding(x))


def readout_rows(model: nn.Module) -> list[ParamPlan]:
    spec = ParamSpec("embedding.weight", Role.INPUT, (4, 3), readout=("readout",))
    return [ParamPlan(spec, readout=0.25)]


@pytest.mark.parametrize("bias", [True, False])
def test_tied_readouts_multiply_the_weight_alone(bias: bool) -> None:
    model, x = Readout(nn.Linear(3, 4, bias=bias)), torch.arange(4)
    shift = model.readout.bias if bias else 0.0
    want = 0.25 * (model(x) - shift) + shift
    install_multipliers(model, readout_rows(model))
    assert torch.allclose(model(x), want)


def test_hooks_are_installed_once_and_survive_copies() -> None:
    model = Readout(nn.Linear(3, 4))
    first = install_multipliers(model, readout_rows(model))
    again = install_multipliers(model, readout_rows(model))
    assert first == again
    clone = copy.deepcopy(model)
    install_multipliers(clone, readout_rows(clone))
    assert len(clone.readout._forward_pre_hooks) == len(model.readout._forward_pre_hooks) == 1


def test_another_factor_is_refused() -> None:
    model = nn.Linear(3, 2)
    install_multipliers(model, rows(model, weight=0.5))
    with pytest.raises(ValueError, match=r"'' is multiplied by 0\.5 already, the plan says 0\.25; give"):
        install_multipliers(model, rows(model, weight=0.25))


def test_silence_is_heard_where_gradients_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    hooks: dict[str, ForwardMultiplier] = {"0": ForwardMultiplier(0.5), "1": InputMultiplier(0.5)}
    assert silent(model, hooks) == []
    (model[1].weight.sum() + model[0].weight.sum()).backward()
    hooks["0"].ran = True
    assert silent(model, hooks) == ["1"]


def test_only_the_first_of_several_outputs_is_multiplied() -> None:
    one, two = ForwardMultiplier(0.5)(nn.Identity(), (), (torch.ones(1), torch.ones(1)))
    assert (one.item(), two.item()) == (0.5, 1.0)


def test_only_the_first_of_several_inputs_is_multiplied() -> None:
    (one, two), kwargs = InputMultiplier(0.5)(nn.Identity(), (torch.ones(1), torch.ones(1)), {"size": 3})
    assert (one.item(), two.item(), kwargs) == (0.5, 1.0, {"size": 3})
    model, x = nn.ConvTranspose1d(3, 2, 3, stride=2), torch.randn(1, 3, 5)
    want = multiplied(model, weight=0.5)(x, [12])
    install_multipliers(model, rows(model, weight=0.5))
    assert torch.allclose(model(x, [12]), want, atol=1e-6)
