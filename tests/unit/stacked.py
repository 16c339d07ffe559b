"""The public optimizers under two or three settings each, parameters of many shapes, and gradients that repeat."""

# ruff: noqa: ANN401 - settings are whatever an optimizer takes

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mup import SGD, SOAP, Adam, AdamAtan2, AdaMuon, AdamW, Muon, Shampoo, StackedOptimizer
from tests.models import generator

Group = dict[str, Any]

# Renewals at steps that a test of six steps sees.
OFTEN = {"precondition_every": 2}
SOON = {**OFTEN, "warmup_steps": 2}
CASES: dict[str, tuple[type[StackedOptimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"momentum": 0.9}),
    "sgd spectral": (SGD, {"momentum": 0.9, "debias": False, "spectral_norm": True}),
    "adam": (Adam, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
    "adam grafted": (Adam, {"graft": "sgd"}),
    "adamw": (AdamW, {"weight_decay": 1e-3}),
    "adamw spectral": (AdamW, {"spectral_norm": True}),
    "adam_atan2": (AdamAtan2, {"weight_decay": 0.1, "decay": "coupled"}),
    "adam_atan2 grafted": (AdamAtan2, {"graft": "muon"}),
    "muon": (Muon, {"weight_decay": 1e-3, "adam": {"betas": (0.8, 0.9)}}),
    "muon spectral": (Muon, {"nesterov": False, "spectral_norm": True}),
    "muon grafted": (Muon, {"graft": "adam"}),
    "adamuon": (AdaMuon, {"weight_decay": 1e-3}),
    "adamuon spectral": (AdaMuon, {"rms_align": True, "spectral_norm": True}),
    "shampoo": (Shampoo, {"weight_decay": 1e-3, **OFTEN}),
    "shampoo blocked": (Shampoo, {"block_size": 8, "exponent": (0.25, 0.5), "root": "newton", **OFTEN}),
    "shampoo grafted": (Shampoo, {"graft": "adam", "exponent": 0.5, "spectral_norm": True, **OFTEN}),
    "soap": (SOAP, {"weight_decay": 1e-3, **SOON}),
    "soap blocked": (SOAP, {"block_size": 8, "warmup": "qr", **SOON}),
    "soap spectral": (SOAP, {"max_preconditioned_dim": 16, "spectral_norm": True, **SOON}),
}
LR = 0.05


class Mixed(nn.Module):
    """Two pairs of one shape, and one of every kind of parameter that is arranged in its own way.

    Sides are multiples of 16, so that a matrix gives the same bits wherever it lies in a stack.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = {
            "first": (32, 16),
            "second": (32, 16),
            "bias": (32,),
            "other": (32,),
            "scale": (),
            "conv": (16, 4, 2, 2),
        }
        shapes |= {"embedding": (16, 32), "qkv": (48, 16), "experts": (2, 16, 32)}
        for i, (name, shape) in enumerate(shapes.items()):
            drawn = torch.randn(shape, generator=generator(100 + i))
            self.register_parameter(name, nn.Parameter(drawn.to(dtype)))

    def groups(self) -> list[Group]:
        """Groups that say how each kind of parameter is matrices."""
        own = {"embedding": {"axes": ((1,), (0,)), "lookup": True}, "qkv": {"split": 3}}
        own |= {"experts": {"axes": ((1,), (2,))}}
        named = dict(self.named_parameters())
        alike = [(name, p) for name, p in named.items() if name not in own]
        return [{"params": alike}, *({"params": [(name, named[name])], **said} for name, said in own.items())]


def make(case: str, params: Any, **more: Any) -> StackedOptimizer:
    cls, settings = CASES[case]
    return cls(params, lr=LR, **{**settings, **more})


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    drawn = generator(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=drawn).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients(params_of(optimizer), step)
        optimizer.step()


def matrices(count: int, shape: tuple[int, ...] = (32, 16), seed: int = 0, **kwargs: Any) -> list[nn.Parameter]:
    drawn = generator(seed)
    return [nn.Parameter(torch.randn(shape, generator=drawn, **kwargs)) for _ in range(count)]


def twins(params: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state by parameter, copied."""
    return [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params_of(optimizer)]


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Weights and state of two optimizers are the same bits."""
    assert_equal(params_of(ours), params_of(theirs))
    for one, other in zip(state_of(ours), state_of(theirs), strict=True):
        assert one.keys() == other.keys()
        assert_equal(one.values(), other.values())


def assert_equal(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
