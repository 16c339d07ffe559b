"""Monomials are a group, and evaluation is a homomorphism."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.core.power import RATIOS, Power

exponents = st.fractions(min_value=-3, max_value=3, max_denominator=4)
powers = st.builds(Power, **dict.fromkeys(RATIOS, exponents))
ratios = st.fixed_dictionaries(dict.fromkeys(RATIOS, st.floats(min_value=0.01, max_value=100)))


@given(powers, powers, powers)
def test_group(a: Power, b: Power, c: Power) -> None:
    one = Power()
    assert a * (b * c) == (a * b) * c
    assert a * b == b * a
    assert a * one == a
    assert a / a == one
    assert a / b == a * b**-1
    assert (a * b) ** 2 == a**2 * b**2


@given(powers, powers, ratios)
def test_evaluation_multiplies(a: Power, b: Power, at: dict[str, float]) -> None:
    assert (a * b).evaluate(**at) == pytest.approx(a.evaluate(**at) * b.evaluate(**at), rel=1e-9)
    assert (a**-1).evaluate(**at) == pytest.approx(1 / a.evaluate(**at), rel=1e-9)


@given(powers)
def test_one_at_the_base(a: Power) -> None:
    assert a.evaluate() == 1.0


@given(powers, ratios)
def test_against_logarithms(a: Power, at: dict[str, float]) -> None:
    want = math.exp(sum(float(e) * math.log(at[name]) for name, e in zip(RATIOS, a.exponents, strict=True)))
    assert a.evaluate(**at) == pytest.approx(want, rel=1e-9)


def test_floats_are_taken_as_the_fractions_they_mean() -> None:
    assert Power(fan_in=-0.5).fan_in == Fraction(-1, 2)
    assert Power(depth=1 / 3).depth == Fraction(1, 3)


@pytest.mark.parametrize("bad", ["1/2", None, True, 1j])
def test_an_exponent_must_be_a_number(bad: object) -> None:
    with pytest.raises(TypeError, match=r"exponent fan_in must be a number, got .*; write Power\(fan_in=-0\.5\)"):
        Power(fan_in=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_ratio_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=f"ratio depth must be positive and finite, got {bad}"):
        Power().evaluate(depth=bad)
