"""The claim itself: under mup the best learning rate stays where it is as width grows, under sp and ntk it does not."""

import pytest

from tests.reference.transfer import drift

WIDTHS, GRID, SEEDS = (64, 128, 256, 512), range(-11, -2), (0, 1)


@pytest.mark.parametrize("rules", ["mup", "mean_field"])
def test_the_best_learning_rate_stays(rules: str) -> None:
    slope, best = drift(rules, WIDTHS, GRID, SEEDS)
    assert abs(slope) < 0.15, f"log2 optima {best}"


@pytest.mark.parametrize("rules", ["sp", "ntk"])
def test_the_best_learning_rate_drifts(rules: str) -> None:
    slope, best = drift(rules, WIDTHS, GRID, SEEDS)
    assert slope < -0.3, f"log2 optima {best}"


def test_a_grid_that_does_not_bracket_the_optimum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at the edge of the grid -11\.\.-9; widen it"):
        drift("mup", (64,), range(-11, -8), (0,))
