"""Schedules of the paper's authors: every stored factor, by the pure function and by a torch scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_mup.schedules import Fraction, Schedule, Steps, constant, linear

HERE = Path(__file__).parent
CASES = json.loads((HERE / "schedules.json").read_text())["schedules"]
TOLERANCE = 1e-9  # the manifest's for float64


def scheduler_of(case: dict[str, Any]) -> LambdaLR:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    total, warmup = Steps(case["total_steps"]), Steps(case["warmup_steps"])
    if case["kind"] == "const":
        return constant(optimizer, total=total, warmup=warmup)
    assert case["kind"] == "linear"
    return linear(optimizer, total=total, warmup=warmup, decay=Fraction(case["decay_fraction"]))


def name(case: dict[str, Any]) -> str:
    return f"{case['kind']}-{case['decay_fraction']}-{case['warmup_steps']}-{case['total_steps']}"


def test_all_are_here() -> None:
    assert len(CASES) == 7
    assert sum(len(case["factor_per_step"]) for case in CASES) == 158


@pytest.mark.parametrize("case", CASES, ids=name)
def test_factors(case: dict[str, Any]) -> None:
    scheduler = scheduler_of(case)
    (factor,) = scheduler.lr_lambdas
    assert isinstance(factor, Schedule)
    rates = []
    for _ in case["factor_per_step"]:
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    wanted = pytest.approx(case["factor_per_step"], rel=TOLERANCE, abs=1e-12)
    assert rates == wanted
    assert [factor(step) for step in range(len(rates))] == wanted
    assert (rates[0] == 0) == (case["warmup_steps"] > 0)
