"""Schedules in steps, tokens and fractions: formulas, equivalences, checkpoints, and runs under a plan."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_mup import Muon, Parametrize
from lightning_mup.horizon import sqrt_batch
from lightning_mup.schedules import (
    Fraction,
    Schedule,
    Steps,
    Tokens,
    as_steps,
    constant,
    cosine,
    linear,
    power,
    schedule,
    wsd,
)
from tests.lightning.helpers import BASE, Net, Rated, Rates, trainer, values

SHAPES = ("linear", "cosine", "1-sqrt")
PER_STEP = 4096
Make = Callable[[torch.optim.Optimizer], LambdaLR]


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)


# -- formulas


def reference(
    shape: str, total: int, warmup: int, decay: float, floor: float, plateau: float = math.inf, exponent: float = 0.0
) -> Tensor:
    """Written from the formulas, in float64 and over the whole run and ten more steps."""
    t = torch.arange(total + 11, dtype=torch.float64)
    start = total - decay
    y = ((t - start) / decay).clamp(0, 1) if decay else torch.zeros_like(t)  # how much of the decay is over
    down = {"linear": 1 - y, "cosine": (1 + torch.cos(torch.pi * y)) / 2, "1-sqrt": 1 - y.sqrt()}[shape]
    law = (t / plateau).clamp(min=1) ** exponent
    stable = law * ((1 - floor) * down + floor)
    return torch.where(t < warmup, t / max(warmup, 1), stable)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 1.0), (7, 1.0), (7, 0.3), (0, 0.0), (99, 1.0)])
def test_shapes_against_the_formulas(shape: Any, floor: float, warmup: int, decay: float) -> None:
    factor = schedule(shape, total=100, warmup=warmup, decay=Fraction(decay), floor=floor)
    want = reference(shape, 100, warmup, decay * (100 - warmup), floor)
    got = torch.tensor([factor(step) for step in range(111)], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=2e-8 if shape == "1-sqrt" else 1e-12)  # sqrt of rounding


def test_constructors_against_the_formulas() -> None:
    made: dict[str, tuple[LambdaLR, Tensor]] = {
        "constant": (constant(sgd(), warmup=5), reference("linear", 50, 5, 0, 0.0)),
        "linear": (linear(sgd(), total=50, warmup=5, decay=Steps(9)), reference("linear", 50, 5, 9, 0.0)),
        "cosine": (cosine(sgd(), total=50, warmup=5, floor=0.1), reference("cosine", 50, 5, 45, 0.1)),
        "wsd": (wsd(sgd(), total=50, warmup=5, decay=Steps(8)), reference("1-sqrt", 50, 5, 8, 0.0)),
        "power": (power(sgd(), plateau=10, warmup=5), reference("linear", 50, 5, 0, 0.0, 10, -0.51)),
        "power, decayed": (
            power(sgd(), plateau=10, warmup=5, total=50, decay=Steps(8), exponent=-0.3),
            reference("linear", 50, 5, 8, 0.0, 10, -0.3),
        ),
    }
    for scheduler, want in made.values():
        assert type(scheduler) is LambdaLR
        rates = []
        for _ in want:
            rates.append(scheduler.optimizer.param_groups[0]["lr"])
            scheduler.optimizer.step()
            scheduler.step()
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), want, rtol=1e-12, atol=1e-12)


runs = st.integers(1, 300).flatmap(
    lambda total: st.tuples(
        st.just(total), st.integers(0, total - 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(SHAPES)
    )
)


@settings(deadline=None, max_examples=60)
@given(runs)
def test_factors_rise_then_fall_between_0_and_1(run: tuple[int, int, float, float, Any]) -> None:
    total, warmup, decay, floor, shape = run
    factor = schedule(shape, total=total, warmup=warmup, decay=Fraction(decay), floor=floor)
    rates = [factor(step) for step in range(total + 5)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] == (0.0 if warmup else 1.0)
    assert rates[warmup] == 1.0
    assert sorted(rates[: warmup + 1]) == rates[: warmup + 1]
    assert all(after <= before + 1e-12 for before, after in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    if factor.decay:
        assert rates[total:] == [floor] * 5


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 10**6), st.integers(1, 10**5), st.sampled_from(SHAPES))
def test_steps_tokens_and_fractions_agree(warmup: int, more: int, per_step: int, shape: Any) -> None:
    total = warmup + more
    in_steps = schedule(shape, total=total, warmup=warmup, decay=Steps(more))
    in_tokens = schedule(
        shape,
        total=Tokens(total * per_step),
        warmup=Tokens(warmup * per_step),
        decay=Tokens(more * per_step),
        tokens_per_step=per_step,
    )
    in_fractions = schedule(shape, total=Steps(total), warmup=Fraction(warmup / total), decay=Fraction(1.0))
    assert in_steps == in_tokens == in_fractions == schedule(shape, total=total, warmup=Steps(warmup))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2000), st.integers(1, 3 * 10**5), st.sampled_from(SHAPES))
def test_another_batch_size_gives_the_same_rate_at_the_same_token(step: int, warmup: int, shape: Any) -> None:
    half, whole = (
        schedule(shape, total=Tokens(10**6), warmup=Tokens(warmup), decay=Fraction(0.5), tokens_per_step=per_step)
        for per_step in (500, 1000)
    )
    assert half(2 * step) == pytest.approx(whole(step), rel=1e-12, abs=1e-7)


def test_durations_are_not_rounded_but_rid_of_rounding_errors() -> None:
    assert as_steps(Tokens(10**6), tokens_per_step=PER_STEP) == 244.140625
    assert 0.07 * 100 != 7
    assert as_steps(Fraction(0.07), whole=100) == 7
    assert Tokens(1e9) == Tokens(10**9)  # type: ignore[arg-type]
    assert repr(Tokens(1e9)) == "Tokens(n=1000000000)"  # type: ignore[arg-type]


# -- schedulers


def test_schedules_are_values() -> None:
    factor = schedule("cosine", total=100, warmup=10)
    for copied in (copy.deepcopy(factor), pickle.loads(pickle.dumps(factor))):  # noqa: S301
        assert copied == factor
        assert hash(copied) == hash(factor)
        assert copied(55) == factor(55)
    with pytest.raises(AttributeError):
        factor.total = 3.0  # type: ignore[misc]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")  # so with any scheduler's copy
def test_schedulers_can_be_copied(copied: Callable[[Any], Any]) -> None:
    scheduler = power(sgd(0.1), plateau=2)
    other = copied(scheduler)
    for each in (scheduler, other):
        for _ in range(5):
            each.optimizer.step()
            each.step()
    assert other.get_last_lr() == scheduler.get_last_lr() == [0.1 * (5 / 2) ** -0.51]


def test_state_is_small_and_loads_with_weights_only() -> None:
    scheduler = linear(sgd(0.1), total=Tokens(10**9), warmup=Fraction(0.01), tokens_per_step=PER_STEP)
    for _ in range(3):
        scheduler.optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    assert len(pickle.dumps(state)) < 300
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    other = linear(sgd(0.1), total=Tokens(10**9), warmup=Fraction(0.01), tokens_per_step=PER_STEP)
    other.load_state_dict(loaded)
    for each in (scheduler, other):
        each.optimizer.step()
        each.step()
    assert other.get_last_lr() == scheduler.get_last_lr()
    assert other.last_epoch == 4


def test_resumed_scheduler_follows_the_code_not_the_checkpoint() -> None:
    """The decay of a WSD run branches off a checkpoint of its stable part."""
    stable = wsd(sgd(), total=1000, decay=Steps(100))
    for _ in range(50):
        stable.optimizer.step()
        stable.step()
    branch = wsd(sgd(), total=60, decay=Steps(10), shape="linear")
    branch.load_state_dict(stable.state_dict())
    rates = []
    for _ in range(10):
        branch.optimizer.step()
        branch.step()
        rates += branch.get_last_lr()
    assert rates == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-12)
    assert stable.lr_lambdas[0] == schedule("1-sqrt", total=1000, decay=Steps(100))


def test_rate_may_be_a_tensor() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))
    scheduler = linear(optimizer, total=4)
    held = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.375


# -- under a plan

STEPS, MIDDLE = 16, 8  # an epoch has 8 steps
MAKES: dict[str, Make] = {
    "constant": functools.partial(constant, warmup=3),
    "linear": functools.partial(
        linear, total=Tokens(STEPS * 8), warmup=Tokens(20), tokens_per_step=8, decay=Fraction(0.5)
    ),
    "cosine": functools.partial(cosine, total=Steps(STEPS), warmup=Fraction(0.25), floor=0.1),
    "wsd": functools.partial(wsd, total=STEPS, decay=Steps(6)),
    "power": functools.partial(power, plateau=4, warmup=2, total=STEPS, decay=Fraction(0.2)),
}


def own(make: Make) -> tuple[Net, Parametrize]:
    def configure(module: Net) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    return Net(make=configure), Parametrize(BASE)


def supplied(make: Make) -> tuple[Net, Parametrize]:
    return Net(), Parametrize(BASE, method="muon", lr=0.02, weight_decay=1e-3, schedule=make)


def fitted(run: tuple[Net, Parametrize], rated: Rated, steps: int, resume: Path | None = None) -> tuple[Net, Any]:
    module, parametrize = run
    ran = trainer(parametrize, rated, steps=steps)
    ran.fit(module, ckpt_path=resume)
    return module, ran


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("way", [own, supplied])
def test_rates_are_multiples_and_a_resume_gives_the_same_bits(way: Any, name: str, tmp_path: Path) -> None:
    make, whole, parts = MAKES[name], Rated(), Rated()
    torch.manual_seed(0)
    _, ran = fitted(way(make), whole, STEPS)
    torch.manual_seed(0)
    _, first = fitted(way(make), parts, MIDDLE)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["global_step"] == MIDDLE
    _, second = fitted(way(make), parts, STEPS, tmp_path / "middle.ckpt")
    assert parts.rates == whole.rates
    groups = ran.optimizers[0].param_groups
    assert len({group["lr_mult"] for group in groups}) > 1
    factor = make(sgd()).lr_lambdas[0]
    want: Rates = [[0.02 * factor(step) * group["lr_mult"] for group in groups] for step in range(STEPS)]
    assert whole.rates == want  # bit for bit: the factor at the base, the multiplier on top
    assert second.lr_scheduler_configs[0].scheduler.get_last_lr() == [g["lr"] for g in groups]


class Still(Net):
    """Has gradients, all of them zero."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return 0.0 * super().loss(batch)


class Started(Callback):
    """Notes the values with which training starts."""

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        self.values = values(module)


@pytest.mark.parametrize("name", MAKES)
def test_independent_decay_of_muon_follows_the_schedule_under_a_plan(name: str) -> None:
    torch.manual_seed(0)
    parametrize = Parametrize(BASE, method="muon", lr=0.02, weight_decay=4e-3, schedule=MAKES[name])
    module, started = Still(), Started()
    ran = trainer(parametrize, started, steps=STEPS)
    ran.fit(module)
    factor = MAKES[name](sgd()).lr_lambdas[0]
    decays = {id(p): g["weight_decay"] for g in ran.optimizers[0].param_groups for p in g["params"]}
    assert len(decays) == len(started.values)
    assert 1e-3 in decays.values()  # the plan has its own rule for the width, 4 times the base's
    for n, p in module.named_parameters():
        kept = math.prod(1 - factor(step) * decays[id(p)] for step in range(STEPS))
        torch.testing.assert_close(p.detach().double(), kept * started.values[n].double(), rtol=1e-5, atol=0)


def test_rules_on_the_peak_leave_independent_decay_alone() -> None:
    ends = []
    for peak in (0.02, 0.02 * sqrt_batch(1024, 64)):
        param = nn.Parameter(torch.full((4, 4), 2.0))
        optimizer = Muon([param], lr=peak, weight_decay=5e-3)
        scheduler = cosine(optimizer, total=20, warmup=5)
        for _ in range(20):
            param.grad = torch.zeros(4, 4)
            optimizer.step()
            scheduler.step()
        ends.append(param.detach())
    kept = math.prod(1 - 5e-3 * scheduler.lr_lambdas[0](step) for step in range(20))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
    assert ends[0] == pytest.approx(torch.full((4, 4), 2 * kept), rel=1e-6)
    assert kept < 0.96


# -- errors


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Steps(-1), "Steps takes a whole number >= 0, got -1"),
        (lambda: Tokens(1.5), "got 1.5; for a part of the run write Fraction"),
        (lambda: Steps(math.inf), "got inf"),
        (lambda: Fraction(1.5), r"Fraction must be in \[0, 1\], got 1.5"),
        (lambda: Fraction(math.nan), "got nan"),
        (lambda: schedule("liner", total=3), "got 'liner'; did you mean 'linear'"),
        (lambda: schedule("sqrt", total=3), "got 'sqrt'; did you mean '1-sqrt'"),
        (lambda: wsd(sgd(), total=3, decay=1, shape="cosin"), "got 'cosin'; did you mean 'cosine'"),
        (lambda: schedule("linear"), "shape 'linear' needs total, got None"),
        (lambda: schedule("constant", floor=0.1), "constant schedule has no decay, got decay=None, floor=0.1"),
        (lambda: schedule("constant", decay=3), "constant schedule has no decay, got decay=3"),
        (lambda: linear(sgd(), total=Fraction(0.5)), r"total is what fractions are of, got Fraction\(x=0.5\)"),
        (lambda: constant(sgd(), warmup=Fraction(0.5)), r"warmup=Fraction\(x=0.5\) is a fraction of a total"),
        (lambda: linear(sgd(), total=Tokens(5)), r"total=Tokens\(n=5\) needs tokens_per_step >= 1, got None"),
        (lambda: linear(sgd(), total=Tokens(5), tokens_per_step=0), "needs tokens_per_step >= 1, got 0"),
        (lambda: linear(sgd(), total=5, warmup=5), r"warmup must be in \[0, total=5.0\), got 5.0 steps"),
        (lambda: linear(sgd(), total=5, warmup=9, decay=2), r"warmup must be in \[0, total=5.0\), got 9.0"),
        (lambda: linear(sgd(), total=0), r"warmup must be in \[0, total=0.0\)"),
        (lambda: linear(sgd(), total=9, warmup=5, decay=5), r"decay must be in \[0, total - warmup=4.0\], got 5.0"),
        (lambda: cosine(sgd(), total=9, floor=-0.1), r"floor must be in \[0, 1\], got -0.1"),
        (lambda: power(sgd(), plateau=9, exponent=0.5), "exponent must be <= 0, got 0.5"),
        (lambda: power(sgd(), plateau=0), "plateau must be > 0 and >= warmup=0.0, got 0.0"),
        (lambda: power(sgd(), plateau=4, warmup=5), "plateau must be > 0 and >= warmup=5.0, got 4.0"),
        (lambda: power(sgd(), plateau=4, decay=5), "needs total, got None"),
        (lambda: Schedule("linear", decay=5), "decay=5 steps end at total, got total=None"),
        (lambda: Schedule("linear", warmup=math.nan), "got nan"),
    ],
)
def test_what_is_wrong_is_said(made: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: linear(sgd(), total=100, warmup=0.1), r"got 0.1; did you mean Fraction\(0.1\)\?"),
        (lambda: linear(sgd(), total="100"), r"total must be Steps\(n\), .* got '100'"),
        (lambda: linear(sgd(), total=True), "got True"),
        (lambda: Steps("3"), "Steps takes a number, got '3'"),
        (lambda: Fraction(True), "Fraction takes a number, got True"),
    ],
)
def test_wrong_types_are_said(made: Callable[[], object], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        made()
