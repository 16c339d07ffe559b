"""Grafted: the length of one optimizer's step in the direction of another's, compared with the two run apart."""

# ruff: noqa: ANN401 - settings are whatever an optimizer takes

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_mup as mup
from lightning_mup.core.graft_parts import Blocks, Place, move
from lightning_mup.core.grafted import Grafted
from lightning_mup.core.method import method_of
from tests.models import generator

SHAPES = [(6, 4), (3, 8), (5, 5)]
Make = Callable[[list[nn.Parameter]], Optimizer]


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    draw = generator(0)
    return [
        nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in shapes or SHAPES
    ]


def gradients(params: list[nn.Parameter], step: int) -> None:
    draw = generator(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=draw, dtype=torch.float64) * 1e-2).to(p.dtype)


def sgd(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)  # decays by default


def grafted(params: list[nn.Parameter], direction: Make = sgd, magnitude: Make = adamw, **settings: Any) -> Grafted:
    return Grafted(direction=direction(params), magnitude=magnitude(params), **settings)


def plain(make: Make, params: list[nn.Parameter]) -> Optimizer:
    optimizer = make(params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def steps_apart(make: Make, params: list[nn.Parameter], states: dict[Make, Any]) -> list[Tensor]:
    """Return by how much an optimizer of its own, without decay, moves copies of the parameters."""
    if make not in states:
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        states[make] = copies, plain(make, copies)
    copies, optimizer = states[make]
    for c, p in zip(copies, params, strict=True):
        c.data.copy_(p.data)
        c.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()
    return [(c - p).detach() for c, p in zip(copies, params, strict=True)]


DIRECTIONS: dict[str, Make] = {
    "sgd": sgd,
    "muon": lambda params: torch.optim.Muon(params, lr=0.02),
    "soap": lambda params: mup.SOAP(params, lr=0.01),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),  # looks at the weights
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_adamws_norm_in_anothers_direction(name: str) -> None:
    params, states = weights(), {}
    optimizer = grafted(params, DIRECTIONS[name], weight_decay_off(adamw))
    for step in range(5):
        gradients(params, step)
        directions = steps_apart(DIRECTIONS[name], params, states)
        lengths = steps_apart(adamw, params, states)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, b, d, m in zip(params, before, directions, lengths, strict=True):
            moved = (p - b).detach()
            assert moved.norm() == pytest.approx(float(m.norm()), rel=1e-6)
            assert float((moved * d).sum() / moved.norm() / d.norm()) > 0.999999


def weight_decay_off(make: Make) -> Make:
    return lambda params: plain(make, params)


@pytest.mark.parametrize("settings", [{}, {"block_size": 3}, {"betas": (0.8, 0.9)}])
def test_native_graft_is_the_generic_one(settings: dict[str, Any]) -> None:
    """``SOAP(graft="adam")`` against any two optimizers that happen to be SOAP and Adam."""
    ours, theirs = weights(), weights()
    betas = settings.get("betas", (0.9, 0.95))
    native = mup.SOAP(ours, lr=0.01, graft="adam", weight_decay=1e-3, **settings)
    generic = grafted(
        theirs,
        lambda params: mup.SOAP(params, lr=0.3, **settings),
        lambda params: mup.Adam(params, lr=0.01, betas=betas, weight_decay=1e-3, decay="independent"),
    )
    for step in range(8):
        gradients(ours, step)
        gradients(theirs, step)
        native.step()
        generic.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_per_block_and_per_group() -> None:
    for per, size in (("block", 2), ("group", None)):
        params, states = weights((4, 6), (4, 4)), {}
        optimizer = grafted(params, magnitude=weight_decay_off(adamw), per=per, block_size=size)
        gradients(params, 0)
        directions, lengths = (steps_apart(make, params, states) for make in (sgd, adamw))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = [(p - b).detach() for p, b in zip(params, before, strict=True)]
        if per == "block":
            for got, d, m in zip(moved, directions, lengths, strict=True):
                for rows in (slice(0, 2), slice(2, 4)):
                    torch.testing.assert_close(got[rows, :2], d[rows, :2] * m[rows, :2].norm() / d[rows, :2].norm())
        else:
            whole = [torch.cat([x.flatten() for x in xs]) for xs in (moved, directions, lengths)]
            torch.testing.assert_close(whole[0], whole[1] * whole[2].norm() / whole[1].norm())


@pytest.mark.parametrize(("decay", "removed"), [(None, 1e-2 * 0.1 * 0.5), ("independent", 0.1 * 0.5)])
def test_leaders_decay_is_beside_the_step(decay: str | None, removed: float) -> None:
    params = weights()
    optimizer = grafted(params, magnitude=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), decay=decay)
    optimizer.param_groups[0]["lr"] *= 0.5
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b * (1 - removed))
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_followers_decay_is_off() -> None:
    optimizer = grafted(weights(), leader="direction")
    assert optimizer.magnitude.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("leader", ["magnitude", "direction"])
def test_schedulers_move_the_leader_and_the_other_follows(leader: str) -> None:
    params, states = weights(), {}
    optimizer = grafted(params, magnitude=weight_decay_off(adamw), leader=leader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        gradients(params, step)
        expected = [m.norm() / (1 + step) for m in steps_apart(adamw, params, states)]
        before = [p.detach().clone() for p in params]
        optimizer.step()
        scheduler.step()
        for p, b, norm in zip(params, before, expected, strict=True):
            assert float((p - b).detach().norm()) == pytest.approx(float(norm), rel=1e-6)
        rates = [o.param_groups[0]["lr"] for o in (optimizer.direction, optimizer.magnitude)]
        followed = rates[0] if leader == "magnitude" else rates[1]
        assert followed == pytest.approx((0.1 if leader == "magnitude" else 1e-3) / (1 + step))


def test_learning_rate_zero_moves_nothing() -> None:
    params = weights()
    optimizer = grafted(params)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    gradients(params, 0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_resume_is_bit_identical() -> None:
    makes: list[Make] = [DIRECTIONS["soap"], DIRECTIONS["muon"], sgd]
    for make in makes:
        whole, half = weights(dtype=torch.float32), weights(dtype=torch.float32)
        first, second = grafted(whole, make), grafted(half, make)
        run(first, whole, range(6))
        run(second, half, range(3))
        file = io.BytesIO()
        torch.save(second.state_dict(), file)
        file.seek(0)
        resumed = grafted(half, make)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        run(resumed, half, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def run(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    params = weights()
    optimizer = grafted(params)
    run(optimizer, params, range(2))
    other = copied(optimizer)
    theirs = other.param_groups[0]["params"]
    assert {id(p) for p in other.direction.param_groups[0]["params"]} == {id(p) for p in theirs}
    run(optimizer, params, range(2, 4))
    run(other, theirs, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))


def test_closure_is_evaluated_once_with_gradients() -> None:
    params, calls = weights(), []
    optimizer = grafted(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        calls.append(loss.item())
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert loss.item() == calls[0]


def test_groups_may_be_added() -> None:
    params = weights()
    optimizer = grafted(params[:2])
    optimizer.add_param_group({"params": params[2], "lr": 5e-4})
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-4]
    before = params[2].detach().clone()
    run(optimizer, params, range(1))
    assert not torch.equal(params[2], before)
    assert {key.split("/")[0] for key in optimizer.state[params[2]]} == {"direction", "magnitude"}


def test_what_one_part_lacks_is_moved_by_the_other() -> None:
    params, alone = weights((4, 4), (4,)), weights((4, 4), (4,))
    optimizer = Grafted(direction=torch.optim.Muon(params[:1], lr=0.1), magnitude=plain(adamw, params))
    other = plain(adamw, alone)
    run(optimizer, params, range(3))
    run(other, alone, range(3))
    torch.testing.assert_close(params[1], alone[1])
    assert not torch.equal(params[0], alone[0])


def test_parameters_without_a_gradient_stay() -> None:
    params = weights()
    before = params[1].detach().clone()
    optimizer = grafted(params)
    gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)


def test_small_steps_lose_no_digits_beside_large_weights() -> None:
    """Taken as a difference of weights, a step of 1e-6 would be nothing beside weights of 100."""
    params = [nn.Parameter(torch.full((2, 2), 100.0))]
    optimizer = torch.optim.SGD(params, lr=1e-3)
    gradients(params, 0)
    places = {p: Place(p.detach().clone(), Blocks(p, {}, None)) for p in params}
    with torch.no_grad():
        moved = move(optimizer, params, places)
    torch.testing.assert_close(moved[0].detach(), -1e-3 * params[0].grad)


def test_failed_step_leaves_the_weights() -> None:
    params = weights()
    optimizer = grafted(params, magnitude=lambda p: mup.Adam(p, lr=0.1))
    before = [p.detach().clone() for p in params]
    gradients(params, 0)
    params[0].grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_rule_is_that_of_the_length() -> None:
    assert method_of(grafted(weights())).name == "adamw"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per": "rows"}, r"per must be one of \('matrix', 'block', 'group'\), got 'rows'"),
        ({"leader": "magnitud"}, r"leader must be .*, got 'magnitud'; did you mean 'magnitude'"),
        ({"decay": "l2"}, r"decay must be one of \(None, 'coupled', 'independent'\), got 'l2'"),
        ({"per": "block"}, r"block_size >= 1 goes with per='block', got None with per='block'; give both"),
        ({"block_size": 2}, r"got 2 with per='matrix'"),
        ({"graft_eps": -1.0}, r"graft_eps must be >= 0, got -1.0; 1e-8 is usual"),
        ({"magnitude": lambda p: torch.optim.AdamW(p, lr=0.0)}, r"AdamW starts at lr=0.0.*give the peak rate"),
        (
            {"magnitude": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1)},
            r"Adam has weight_decay=0.1 and adds it to the gradient.*use an optimizer that decays beside it",
        ),
        (
            {"magnitude": lambda p: sgd(weights())},
            r"SGD must hold some of the 3 .*, got 0 of them and 3 others; build both over",
        ),
    ],
)
def test_errors_say_what_to_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grafted(weights(), **settings)


def test_foreign_state_is_refused() -> None:
    params = weights()
    with pytest.raises(ValueError, match=r"holds \['param_groups', 'state'\], but Grafted needs .*load it into"):
        grafted(params).load_state_dict(sgd(params).state_dict())


def test_one_group_under_two_schedules_is_refused() -> None:
    params = weights()
    leading = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    optimizer = Grafted(direction=leading, magnitude=adamw(params), leader="direction")
    optimizer.param_groups[0]["lr"] = 0.025
    gradients(params, 0)
    with pytest.raises(ValueError, match=r"AdamW holds in one group what is in several groups of SGD.*\[0.25, 1.0\]"):
        optimizer.step()


def test_follower_may_not_hold_more_than_the_leader() -> None:
    params = weights()
    with pytest.raises(ValueError, match=r"SGD must hold some of the 2 .*got 2 of them and 1 others.*other one lead"):
        Grafted(direction=sgd(params), magnitude=adamw(params[:2]))


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_part_that_sits_a_step_out_keeps_the_other_from_it(nonfinite: Literal["skip", "raise"]) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    direction = mup.SGD([weight], lr=0.1, nonfinite=nonfinite)
    magnitude = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1)
    grafted = Grafted(direction=direction, magnitude=magnitude)
    weight.grad = torch.full((2, 2), float("inf"))
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="nothing was changed"):
            grafted.step()
    else:
        grafted.step()
    assert torch.equal(weight, torch.ones(2, 2))
    assert not magnitude.state
