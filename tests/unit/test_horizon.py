"""Batch, horizon and time-scale rules: what they say, besides the numbers in their docstrings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.horizon import (
    horizon,
    linear_batch,
    power_lines_weight_decay,
    power_plateau,
    sqrt_batch,
    step_law,
    timescale_steps,
    timescale_weight_decay,
)
from lightning_mup.schedules import Fraction, Steps, Tokens, power

sizes = st.floats(1e-3, 1e12)


@given(sizes, sizes, sizes)
def test_factors_are_one_at_the_base_and_compose(a: float, b: float, c: float) -> None:
    for rule in (sqrt_batch, linear_batch, lambda x, y: horizon(x, y, exponent=0.32)):
        assert rule(a, a) == 1
        assert rule(a, b) * rule(b, c) == pytest.approx(rule(a, c), rel=1e-12)
    assert horizon(a, b) == 1
    assert sqrt_batch(a, b) ** 2 == pytest.approx(linear_batch(a, b), rel=1e-12)


def test_exponents_of_the_step_law() -> None:
    at = step_law(1e9, 1e11)
    assert step_law(1e10, 1e11).lr / at.lr == pytest.approx(10**-0.713, rel=1e-12)
    assert step_law(1e9, 1e12).lr / at.lr == pytest.approx(10**0.307, rel=1e-12)
    assert step_law(1e10, 1e12).batch_tokens / at.batch_tokens == pytest.approx(10**0.571, rel=1e-12)
    assert step_law(1, 1).lr == 1.79
    assert step_law(1, 1).batch_tokens == 0.58


def test_plateau_is_where_the_power_law_meets_the_peak() -> None:
    """The Power scheduler's own rate, min(peak, B a n^b), step by step."""
    peak, batch, length = 0.02, 128, 2**12
    plateau = Tokens(round(power_plateau(peak, batch)))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    (factor,) = power(optimizer, plateau=plateau, tokens_per_step=batch * length).lr_lambdas
    steps = [1, 10, 1000, 1104, 1105, 2000, 100000]
    want = [min(peak, batch * 4.6 * (step * batch * length) ** -0.51) for step in steps]
    assert [peak * factor(step) for step in steps] == pytest.approx(want, rel=1e-8)
    assert want[0] == peak > want[-1]


def test_time_scale_is_that_of_the_moving_average() -> None:
    """What the weights keep of an update after tau steps is 1/e."""
    decay = timescale_weight_decay(Steps(10**5))
    assert (1 - decay) ** 10**5 == pytest.approx(1 / math.e, rel=1e-5)
    assert timescale_steps(decay) == pytest.approx(10**5, rel=1e-12)


def test_time_scales_in_tokens_and_fractions() -> None:
    small, large = (timescale_weight_decay(Tokens(10**8), tokens_per_step=per_step) for per_step in (1000, 4000))
    assert large == pytest.approx(4 * small)  # ~ batch
    short, long = (timescale_weight_decay(Fraction(0.2), total=total) for total in (1000, 4000))
    assert short == pytest.approx(4 * long)  # ~ 1 / steps
    in_tokens = timescale_weight_decay(Fraction(0.2), total=Tokens(10**6), tokens_per_step=1000)
    assert in_tokens == short


def test_power_lines_weight_decay_grows_as_the_batch_at_fixed_tokens() -> None:
    """tau = B / (eta wd T) and S = T / B, so that eta wd = 1 / (tau S)."""
    tokens, batch = 1e9, 1e5
    for times in (1, 2, 8):
        decay = power_lines_weight_decay(20, tokens / (times * batch))
        assert batch * times / (decay * tokens) == pytest.approx(1.08 * 20**-0.527, rel=1e-12)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: sqrt_batch(0, 1), "batch must be positive and finite, got 0"),
        (lambda: linear_batch(1, -1), "base_batch must be positive and finite, got -1"),
        (lambda: horizon(math.inf, 1), "tokens must be positive and finite, got inf"),
        (lambda: horizon(2, 1, exponent=-0.3), r"exponent must be in \[0, 1\), got -0.3"),
        (lambda: step_law(0, 1), "parameters must be positive"),
        (lambda: power_plateau(0.1, 1, exponent=0.5), "exponent must be < 0, got 0.5"),
        (lambda: timescale_steps(0), r"weight_decay must be in \(0, 1\), got 0"),
        (lambda: timescale_weight_decay(1), "timescale must be above 1 step, got 1.0"),
        (lambda: timescale_weight_decay(Fraction(0.1)), "give total"),
        (lambda: power_lines_weight_decay(20, 2), "which must be above 1; train for more steps"),
    ],
)
def test_what_is_wrong_is_said(made: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made()
