"""Coordinate check of the matrix methods: right declarations are flat over widths 64 to 512, published wrong ones not.

The rules speak of widths far above the number of things that a batch tells apart. Whitening without damping raises
every direction to one size, those of mere noise too, so that the count of directions, which at these widths still
grows, shows in the slopes. Hence SOAP, Shampoo with exponent 1/2, and grafting are damped here, relative to the largest
eigenvalue; without, they reach the slopes of README's Evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from lightning_mup.analysis.coordinate import CoordinateReport
from lightning_mup.callbacks.coordinate_check import coordinate_check
from lightning_mup.core.method import Method, Settings, find_method
from lightning_mup.core.power import Power
from tests.lightning.test_coordinate_check import WIDTHS, Text, sweep

TOLERANCE = 0.15
DAMPED = {"relative_eps": True, "eps": 0.1, "warmup_steps": 10}  # SOAP, renewed at every step


@dataclass(frozen=True, slots=True)
class Case:
    """A method with its settings, at a learning rate that moves every layer by the tenth step."""

    method: str | Method
    lr: float
    options: Settings = field(default_factory=dict)
    seeds: int = 2

    def check(self) -> CoordinateReport:
        how = replace(sweep(self.seeds, updates=False), options=self.options, tolerance=TOLERANCE)
        return coordinate_check(Text, widths=WIDTHS, method=self.method, lr=self.lr, sweep=how)


FLAT = {
    "muon": Case("muon", 0.03),
    "muon_adam": Case("muon_adam", 0.003),
    "adamuon": Case("adamuon", 0.001, {"routes": {"input": "adam", "output": "adam"}}),
    "shampoo": Case("shampoo", 0.03, {"precondition_every": 1}),
    # It divides by the gradient's size, which differs between seeds as much as between widths.
    "shampoo2": Case("shampoo2", 1e-4, {"precondition_every": 5, "matrix_eps": 1e-2}, seeds=6),
    "grafted shampoo": Case("shampoo", 0.001, {"precondition_every": 1, "matrix_eps": 1e-2, "graft": "adam"}),
    "blocked soap": Case("soap", 0.001, {"block_size": 64, **DAMPED}),
    "spectral soap": Case("soap", 0.003, {"spectral_norm": True, **DAMPED}),
}
MUON = find_method("muon")
WRONG = {
    "kimi": Case(replace(MUON, update_norm=Power(fan_in=-1 / 2)), 0.01, seeds=1),
    "as adam": Case(replace(MUON, update_norm=Power(fan_in=1 / 2, fan_out=1 / 2)), 0.03, seeds=1),
}


def slopes_at_end(report: CoordinateReport) -> dict[str, float]:
    assert report.steps == tuple(range(1, 11))
    assert {s.note for s in report.slopes} == {""}
    return {s.layer: s.slope for s in report.slopes if s.step == 10}


@pytest.mark.parametrize("case", FLAT.values(), ids=FLAT)
def test_declared_methods_are_flat_in_width(case: Case) -> None:
    report = case.check()
    assert max(map(abs, slopes_at_end(report).values())) < TOLERANCE, report.table()


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_published_wrong_scalings_fail(case: Case) -> None:
    """Liu et al. 2025 scale Muon by sqrt(max(fan_in, fan_out)); others give it the learning rates of Adam."""
    assert max(map(abs, slopes_at_end(case.check()).values())) > 1.5 * TOLERANCE
