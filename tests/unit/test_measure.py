import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_mup.core.measure import measure, measure_update_norm
from lightning_mup.core.method import Method, Settings, Size
from lightning_mup.core.power import Power
from lightning_mup.core.trial import Factory

SMALL = (16, 32, 64)


Change = Callable[[Tensor, Tensor], Tensor]


class Custom(SGD):
    """Gradient descent with any function of (gradient, weight) as its update."""

    def __init__(self, params: list[nn.Parameter], change: Change, **more: object) -> None:
        super().__init__(params, lr=1e-4)
        self.change = change
        self.param_groups[0].update(more)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for p in self.param_groups[0]["params"]:
            assert p.grad is not None
            p.sub_(self.change(p.grad, p), alpha=self.param_groups[0]["lr"])


def custom(change: Change, **more: object) -> Factory:
    return lambda params: Custom(params, change, **more)


@pytest.mark.parametrize(
    ("change", "power", "weight_degree"),
    [
        (lambda g, w: g, Power(fan_in=1 / 2, fan_out=-1 / 2, depth=-1), 0),
        (lambda g, w: g / g.norm(), Power(), 0),
        (lambda g, w: g / g.norm() * w.norm(), Power(fan_in=1 / 2, fan_out=1 / 2), 1),  # LAMB's trust ratio
        (lambda g, w: g / g.norm() ** 0.5, Power(fan_in=1 / 4, fan_out=-1 / 4, depth=-1 / 2), 0),
        (lambda g, w: g / g.norm() ** (2 / 3), Power(fan_in=1 / 6, fan_out=-1 / 6, depth=-1 / 3), 0),
        (lambda g, w: g * g.shape[1], Power(fan_in=3 / 2, fan_out=-1 / 2, depth=-1), 0),
        (lambda g, w: g / g.norm() / w.square().mean(), Power(), -2),
    ],
)
def test_exponents_are_found(change: Change, power: Power, weight_degree: int) -> None:
    found = measure_update_norm(custom(change), widths=SMALL)
    declared, fitted = (
        [float(x) for x in exponents] for exponents in (power.exponents[:3], list(found.fitted.values())[:3])
    )
    assert fitted == pytest.approx(declared, abs=0.01)
    assert found.weight_degree == weight_degree
    assert [float(x) for x in found.power.exponents[:3]] == pytest.approx(declared, abs=0.01)
    assert found.residual < 0.01


@pytest.mark.parametrize(
    "change",
    [
        lambda g, w: g if g.shape[0] > 128 else g * 10,
        lambda g, w: g.clamp(-8, 8),
        lambda g, w: g + 4 * w,
        lambda g, w: g / g.norm() * math.sqrt(max(1.0, g.shape[0] / g.shape[1])),
    ],
    ids=["threshold", "clipping", "hidden decay", "shape factor"],
)
def test_what_is_no_monomial_is_refused_with_its_residual(change: Change) -> None:
    with pytest.raises(ValueError, match=r"Custom is no monomial .* off by \d\.\d+ in log norm \(allowed 0\.1\)"):
        measure(custom(change))


def test_own_factor_is_divided_out_and_kept() -> None:
    def factor(settings: Settings, fan_out: int, fan_in: int) -> float:
        return float(str(settings["boost"])) * math.sqrt(max(1.0, fan_out / fan_in))

    def change(g: Tensor, w: Tensor) -> Tensor:
        return g / g.norm() * factor({"boost": 3}, *g.shape)

    method = measure(custom(change, boost=3), own_factor=factor, widths=SMALL)
    assert (method.update_norm, method.own_factor) == (Power(), factor)


def test_learning_rate_cancels() -> None:
    slow, fast = (measure_update_norm(lambda p, lr=lr: SGD(p, lr=lr), widths=SMALL) for lr in (1e-2, 1.0))
    for one, two in zip(slow.trials, fast.trials, strict=True):
        assert one.norm == pytest.approx(two.norm, rel=1e-3)
    assert len(slow.trials) == 3 * 3 + 4 + 3


def test_random_state_grad_mode_and_device_of_the_caller_do_not_matter() -> None:
    before = torch.get_rng_state()
    with torch.no_grad(), torch.device("meta"):
        found = measure_update_norm(custom(lambda g, w: g + 1e-6 * torch.randn_like(g)), widths=SMALL)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert measure_update_norm(custom(lambda g, w: g + 1e-6 * torch.randn_like(g)), widths=SMALL).trials == found.trials


def test_epsilon_is_told_or_guessed() -> None:
    assert measure(lambda p: SGD(p, lr=0.1), widths=SMALL).eps == {}
    plain = custom(lambda g, w: g, eps=1e-8)
    assert measure(plain, widths=SMALL).eps == {"eps": Size(grad=1)}
    assert measure(plain, eps={"eps": Size(grad=2)}, widths=SMALL).eps == {"eps": Size(grad=2)}
    pair = custom(lambda g, w: g, eps=(1e-8, 1e-3))
    assert measure(pair, eps={}, widths=SMALL).eps == {}
    with pytest.raises(ValueError, match=r"eps=\(1e-08, 0.001\) of Custom is no plain number"):
        measure(pair, widths=SMALL)


def test_epsilon_that_sets_the_size_of_the_update_must_be_told() -> None:
    with pytest.raises(ValueError, match=r"eps=1e-06 of Adadelta matters .* power 0\.(49|50)"):
        measure(lambda p: torch.optim.Adadelta(p, lr=0.1))
    assert measure(lambda p: torch.optim.Adadelta(p, lr=0.1), eps={}).eps == {}


def test_method_carries_what_was_said() -> None:
    method = measure(lambda p: SGD(p, lr=0.1), name="mine", decay="l2", widths=SMALL)
    assert (method.name, method.decay, method.optimizers) == ("mine", "l2", (SGD,))
    assert method.reference.startswith("measured: fan_in^0.500 fan_out^-0.500 depth^-1.000 weight^0.000, residual 0.")


def test_declaration_can_be_pasted() -> None:
    found = measure_update_norm(lambda p: torch.optim.RMSprop(p, lr=0.1))
    names = {"Method": Method, "Power": Power, "Size": Size, "RMSprop": torch.optim.RMSprop}
    pasted = eval(found.declaration(), names)  # noqa: S307 - text of our own
    assert (pasted.update_norm, pasted.eps, pasted.weight_degree) == (
        found.method().update_norm,
        found.method().eps,
        found.method().weight_degree,
    )


def test_weight_degree_must_be_whole() -> None:
    found = measure_update_norm(custom(lambda g, w: g / g.norm() * w.norm() ** 0.5), widths=SMALL)
    with pytest.raises(ValueError, match=r"to the power 0\.500; only integers"):
        found.method()


class Lrless(Optimizer):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (torch.optim.AdamW, r"AdamW has weight_decay=0\.01.*build it with weight_decay=0"),
        (torch.optim.LBFGS, r"LBFGS cannot be measured.*closure"),
        (torch.optim.SparseAdam, r"SparseAdam cannot be measured.*does not support dense"),
        (lambda p: SGD(p, lr=0.0), r"SGD must hold a learning rate > 0.*lr=0\.0"),
        (Lrless, r"Lrless must hold a learning rate > 0.*lr=None"),
        (custom(lambda g, w: g * 0), r"Custom made a step of norm 0\.0"),
        (custom(lambda g, w: g * math.inf), r"Custom made a step of norm"),
    ],
)
def test_what_cannot_be_measured_is_refused(factory: Factory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(factory, widths=SMALL)


def test_factory_must_return_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"must return a torch optimizer, got 3"):
        measure(lambda p: 3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"widths": (64,)}, "widths must be at least two sizes >= 8"),
        ({"widths": (4, 64)}, r"got \(4, 64\)"),
        ({"depths": (1,)}, "depths must be at least two"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
    ],
)
def test_too_few_sizes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_update_norm(lambda p: SGD(p, lr=0.1), **sizes)
