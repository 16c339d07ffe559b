"""StackedOptimizer: one run per stack, arrangements, missing gradients, torch's conventions, several methods, decay."""

# ruff: noqa: ANN401 - settings are whatever an optimizer takes

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_mup import SGD, SOAP, Adam, AdaMuon, AdamW, Muon, Shampoo, StackedOptimizer
from lightning_mup.core.stack import _STACK_ENTRIES, Stack
from lightning_mup.core.transform import Chain, Transform
from tests.models import generator
from tests.unit.stacked import (
    CASES,
    LR,
    Group,
    Mixed,
    assert_equal,
    assert_same,
    give_gradients,
    make,
    matrices,
    params_of,
    state_of,
    train,
    twins,
)

METHODS: dict[str, type[StackedOptimizer]] = {
    "sgd": SGD,
    "adamw": AdamW,
    "muon": Muon,
    "shampoo": Shampoo,
    "soap": SOAP,
}

# -- stacks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the stacks that the transforms were run on, or that they moved themselves."""
    seen: list[tuple[int, ...]] = []
    original, original_move = Chain.update, Stack.to_move

    def update(self: Chain, u_NOI: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(u_NOI.shape))
        return original(self, u_NOI, *args)

    def to_move(self: Stack, transform: Transform, members: list[int], *args: Any) -> object:
        found, like = original_move(self, transform, members, *args), self.arrangements[0]
        if found:
            seen.append((sum(self.arrangements[i].count for i in members), like.rows, like.columns))
        return found

    monkeypatch.setattr(Chain, "update", update)
    monkeypatch.setattr(Stack, "to_move", to_move)
    return seen


@pytest.mark.parametrize("case", ["sgd", "muon", "soap blocked"])
def test_a_step_is_one_run_per_stack(case: str, runs: list[tuple[int, ...]]) -> None:
    model = Mixed()
    optimizer = make(case, model.groups())
    train(optimizer, [1])
    stacks = [(2, 32, 16), (2, 32, 1), (1, 1, 1), (1, 16, 16), (1, 32, 16), (3, 16, 16), (2, 16, 32)]
    assert sorted(runs) == sorted(stacks)
    train(optimizer, [2])
    assert len(runs) == 2 * len(stacks)


def test_groups_methods_and_dtypes_are_stacks_of_their_own(runs: list[tuple[int, ...]]) -> None:
    params = [*matrices(4), *matrices(2, dtype=torch.float64)]
    groups: list[Group] = [{"params": [*params[:2], *params[4:]]}, {"params": params[2:4], "method": "adam"}]
    train(Muon(groups, lr=LR), [1])
    assert runs == [(2, 32, 16)] * 3


@pytest.mark.parametrize("case", CASES)
def test_weights_and_state_are_moved_in_place(case: str) -> None:
    optimizer = make(case, Mixed().groups())
    before = [value for p in params_of(optimizer) for value in (p, *optimizer.state[p].values())]
    places, start = [value.data_ptr() for value in before], [value.clone() for value in params_of(optimizer)]
    train(optimizer, range(1, 4))
    after = [value for p in params_of(optimizer) for value in (p, *optimizer.state[p].values())]
    assert [value.data_ptr() for value in after] == places
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert not any(torch.equal(p, was) for p, was in zip(params_of(optimizer), start, strict=True))
    assert all(bool(value.isfinite().all()) for value in after)


@pytest.mark.parametrize("case", CASES)
def test_one_optimizer_of_many_is_many_of_one(case: str) -> None:
    params = [*matrices(3), *matrices(2, (32,)), *matrices(2, (16, 16)), *matrices(1, ())]
    together, alone = make(case, params), [make(case, [p]) for p in twins(params)]
    for step in range(1, 6):
        train(together, [step])
        for p, optimizer in zip(params, alone, strict=True):
            (own,) = params_of(optimizer)
            own.grad = p.grad
            optimizer.step()
    for p, optimizer in zip(params, alone, strict=True):
        (own,) = params_of(optimizer)
        assert_equal([p, *together.state[p].values()], [own, *optimizer.state[own].values()])


@pytest.mark.parametrize("case", CASES)
def test_gradients_stay_as_they_are(case: str) -> None:
    optimizer = make(case, Mixed().groups())
    give_gradients(params_of(optimizer), 1)
    before = [p.grad.clone() for p in params_of(optimizer)]
    optimizer.step()
    assert_equal([p.grad for p in params_of(optimizer)], before)


@pytest.mark.parametrize("case", CASES)
def test_large_stacks_are_cut_into_portions(
    case: str, runs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = matrices(5)
    whole = make(case, params)
    monkeypatch.setitem(_STACK_ENTRIES, "cpu", 2 * 32 * 16)
    cut = make(case, twins(params))
    train(cut, range(1, 4))
    assert [shape for shape in runs if shape[0] > 2] == []
    train(whole, range(1, 4))
    assert_same(cut, whole)
    whole.load_state_dict(cut.state_dict())  # it is cut from now on
    runs.clear()
    train(cut, [4])
    train(whole, [4])
    assert runs[: len(runs) // 2] == runs[len(runs) // 2 :]
    assert_same(cut, whole)


# -- arrangements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arranged:
    """A parameter under a group's settings, and the matrices that it is."""

    shape: tuple[int, ...]
    matrices: Callable[[Tensor], list[Tensor]]
    settings: Group


ARRANGED = {
    "convolution": Arranged((16, 4, 2, 2), lambda p: [p.flatten(1)], {}),
    "transposed convolution": Arranged(
        (4, 16, 2, 2), lambda p: [p.transpose(0, 1).flatten(1)], {"axes": ((1,), (0, 2, 3))}
    ),
    "transposed": Arranged((16, 32), lambda p: [p.mT], {"axes": ((1,), (0,))}),
    "split": Arranged((48, 16), lambda p: list(p.split(16)), {"split": 3}),
    "experts": Arranged((3, 16, 32), list, {"axes": ((1,), (2,))}),
    "experts, in before out": Arranged((3, 16, 32), lambda p: list(p.mT), {"axes": ((2,), (1,))}),
    "heads": Arranged((4, 8, 16), lambda p: [p.flatten(0, 1)], {"axes": ((0, 1), (2,))}),
    "split experts": Arranged(
        (2, 32, 16), lambda p: [half for one in p for half in one.split(16)], {"axes": ((1,), (2,)), "split": 2}
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arranged", ARRANGED.values(), ids=ARRANGED)
def test_a_parameter_moves_as_the_matrices_that_it_is(arranged: Arranged, method: str) -> None:
    (param,) = matrices(1, arranged.shape, dtype=torch.float64)
    plain = twins(arranged.matrices(param))
    ours = METHODS[method]([{"params": [param], **arranged.settings}], lr=LR)
    theirs = METHODS[method](plain, lr=LR)
    for step in range(1, 5):
        give_gradients([param], step)
        ours.step()
        for p, grad in zip(plain, arranged.matrices(param.grad), strict=True):
            p.grad = grad.contiguous()
        theirs.step()
    for one, other in zip(arranged.matrices(param), plain, strict=True):
        # Products read a transposed gradient in another order, and SOAP's basis of directions without a gradient is
        # any: there, epsilon decides.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_does_not_matter(layout: Callable[[Tensor], Tensor], method: str) -> None:
    plain = matrices(2, dtype=torch.float64)
    params = [nn.Parameter(layout(p.detach())) for p in plain]
    ours, theirs = METHODS[method](params, lr=LR, weight_decay=1e-3), METHODS[method](plain, lr=LR, weight_decay=1e-3)
    for step in range(1, 4):
        train(theirs, [step])
        for p, twin in zip(params, plain, strict=True):
            p.grad = layout(twin.grad)
        ours.step()
    assert [p.stride() for p in params] == [layout(p.detach()).stride() for p in plain]
    for one, other in zip(params, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_gradients_that_were_broadcast() -> None:
    params = matrices(2)
    optimizer, before = SGD(params, lr=0.5), [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones(()).expand(p.shape)
    optimizer.step()
    assert_equal(params, [was - 0.5 for was in before])


def test_parameters_that_went_elsewhere_are_stacked_anew() -> None:
    model, twin = Mixed(), Mixed(torch.float64)
    ours, theirs = (make("muon", m.groups()) for m in (model, twin))
    train(ours, [1, 2])
    train(theirs, [1, 2])
    model.to(torch.float64)
    assert {value.dtype for state in state_of(ours) for value in state.values()} == {torch.float32}
    train(ours, [3, 4])
    train(theirs, [3, 4])
    names = {key: value.dtype for state in state_of(ours) for key, value in state.items() if key != "step"}
    assert set(names.values()) == {torch.float64}
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_parameters_may_join_a_group_and_leave_it() -> None:
    """Who freezes layers edits ``group["params"]``, which torch's optimizers read anew at each step."""
    stays, leaves, joins = matrices(3)
    optimizer = SGD([stays, leaves], lr=LR)
    optimizer.param_groups[0]["params"] = [stays, joins]
    give_gradients([stays, leaves, joins], 1)
    before = [p.detach().clone() for p in (stays, leaves, joins)]
    optimizer.step()
    moved = [not torch.equal(p, was) for p, was in zip((stays, leaves, joins), before, strict=True)]
    assert moved == [True, False, True]


# -- missing gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_without_a_gradient_weight_state_and_step_stay(case: str) -> None:
    params = matrices(3)
    optimizer, alone = make(case, params), make(case, twins(params[1:2]))
    (twin,) = params_of(alone)
    for step, given in enumerate([True, False, False, True, True], 1):
        give_gradients(params, step)
        twin.grad = params[1].grad
        kept = {key: value.clone() for key, value in optimizer.state[params[1]].items()} if not given else {}
        was = params[1].detach().clone()
        if given:
            alone.step()
        else:
            params[1].grad = None
        optimizer.step()
        assert torch.equal(params[1], was) != given
        assert_equal([optimizer.state[params[1]][key] for key in kept], kept.values())
    assert [float(optimizer.state[p]["step"]) for p in params] == [5, 3, 5]
    assert_equal([params[1], *optimizer.state[params[1]].values()], [twin, *alone.state[twin].values()])


def test_members_of_a_stack_that_are_at_one_step_are_one_run(runs: list[tuple[int, ...]]) -> None:
    params = matrices(4)
    optimizer = Muon(params, lr=LR)
    train(optimizer, [1])
    give_gradients(params, 2)
    params[0].grad = params[2].grad = None
    optimizer.step()
    assert runs == [(4, 32, 16), (2, 32, 16)]
    train(optimizer, [3])
    assert runs[2:] == [(2, 32, 16), (2, 32, 16)]  # two are a step behind


def test_a_step_without_any_gradient() -> None:
    optimizer = make("adamw", Mixed().groups())
    before = [p.detach().clone() for p in params_of(optimizer)]
    optimizer.step()
    assert_equal(params_of(optimizer), before)
    assert all(float(state["step"]) == 0 for state in state_of(optimizer))


# -- torch's conventions ----------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, LR, 8, base_momentum=0.5, max_momentum=0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=1e-3),
}


def run_scheduled(optimizer: Optimizer, schedule: Callable[[Optimizer], Any]) -> list[Any]:
    scheduler, seen = schedule(optimizer), []
    for step in range(1, 7):
        train(optimizer, [step])
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        scheduler.step()
    return seen


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_torchs_schedules(schedule: Callable[[Optimizer], Any]) -> None:
    """Rates and betas of the schedule are those of the step."""
    params = matrices(2, dtype=torch.float64)
    ours, theirs = AdamW(params, LR), torch.optim.AdamW(twins(params), LR, weight_decay=0.0)
    seen = run_scheduled(ours, schedule)
    assert seen == run_scheduled(theirs, schedule)
    assert len(set(seen)) == 6
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [SGD, Muon, AdaMuon])
def test_one_cycle_turns_the_momentum(cls: type[StackedOptimizer]) -> None:
    params, by_hand = matrices(2), []
    scheduled, other = cls(params, LR, momentum=0.9), cls(twins(params), LR, momentum=0.9)
    scheduler = SCHEDULES["one cycle"](scheduled)
    for step in range(1, 5):
        by_hand.append(scheduled.param_groups[0]["momentum"])
        other.param_groups[0].update(lr=scheduled.param_groups[0]["lr"], momentum=by_hand[-1])
        train(scheduled, [step])
        train(other, [step])
        scheduler.step()
    assert len(set(by_hand)) > 2
    assert_same(scheduled, other)


def test_a_closure_is_called_once_with_gradients_on() -> None:
    (p,), calls = matrices(1), []
    optimizer, before = SGD([p], lr=0.5), p.detach().clone()

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss.detach()

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss) == pytest.approx(float(before.sum()))
    assert_equal([p], [before - 0.5])


@pytest.mark.parametrize("case", CASES)
def test_a_group_that_is_added_later(case: str) -> None:
    first, later = matrices(2), matrices(2, seed=1)
    optimizer, alone = make(case, first), make(case, twins(later))
    train(optimizer, [1, 2])
    optimizer.add_param_group({"params": later, "lr": 2 * LR})
    assert all(float(optimizer.state[p]["step"]) == 0 for p in later)
    assert optimizer.state[later[0]].keys() == optimizer.state[first[0]].keys()
    alone.param_groups[0].update(lr=2 * LR, lr_scheduled_from=2 * LR)
    for step in (3, 4):
        give_gradients(first, step)
        give_gradients(later, -step)
        optimizer.step()
        give_gradients(params_of(alone), -step)
        alone.step()
    assert_equal(later, params_of(alone))


def test_zeroed_gradients_are_gradients_and_absent_ones_are_not() -> None:
    params = matrices(2)
    optimizer = AdamW(params, lr=LR, weight_decay=1e-3)
    train(optimizer, [1])
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert_equal(params, before)
    assert float(optimizer.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("case", CASES)
def test_the_rate_may_be_a_tensor(case: str) -> None:
    params, rate = matrices(2), torch.tensor(0.125)  # a power of two multiplies exactly
    cls, settings = CASES[case]
    ours = cls(params, lr=rate, **settings)
    theirs = cls(twins(params), lr=0.125, **settings)
    train(ours, [1, 2])
    train(theirs, [1, 2])
    rate.fill_(0.5)
    theirs.param_groups[0]["lr"] = 0.5
    train(ours, [3])
    train(theirs, [3])
    assert ours.param_groups[0]["lr"] is rate
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["sgd", "muon", "soap"])
def test_a_gradient_scaler_skips_overflowing_steps(case: str) -> None:
    params = matrices(2)
    ours, theirs = make(case, params), make(case, twins(params))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step, factor in enumerate([1.0, float("inf"), 1.0], 1):
        slopes = [torch.randn(p.shape, generator=generator(step)) for p in params]
        for optimizer, wrap in ((ours, scaler.scale), (theirs, lambda loss: loss)):
            optimizer.zero_grad()
            loss = factor * sum((p * slope).sum() for p, slope in zip(params_of(optimizer), slopes, strict=True))
            wrap(loss).backward()
        scaler.step(ours)
        scaler.update()
        if math.isfinite(factor):
            theirs.step()
    assert scaler.get_scale() == 2.0**9
    assert {float(state["step"]) for state in state_of(ours)} == {2}
    assert_same(ours, theirs)


def test_nonfinite_gradients_skip_the_step_where_asked() -> None:
    params = matrices(2)
    optimizer = Muon(params, lr=LR, nonfinite="skip")
    train(optimizer, [1])
    before, kept = [p.detach().clone() for p in params], state_of(optimizer)
    give_gradients(params, 2)
    params[1].grad[0, 0] = float("nan")
    optimizer.step()
    assert_equal(params, before)
    for state, was in zip(state_of(optimizer), kept, strict=True):
        assert_equal(state.values(), was.values())


def test_names_stay_with_parameters_and_groups() -> None:
    model = Mixed()
    optimizer = make("muon", [{**group, "name": f"group {i}"} for i, group in enumerate(model.groups())])
    groups = optimizer.state_dict()["param_groups"]
    assert [group["name"] for group in groups] == [f"group {i}" for i in range(4)]
    named = [name for group in groups for name in group["param_names"]]
    assert [id(dict(model.named_parameters())[name]) for name in named] == [id(p) for p in params_of(optimizer)]


# -- several methods --------------------------------------------------------------------------------------------------


def test_groups_may_name_methods() -> None:
    params = matrices(4)
    groups: list[Group] = [
        {"params": params[:2]},
        {"params": params[2:3], "method": "adam", "betas": (0.5, 0.6), "lr": 0.01},
        {"params": params[3:], "method": "sgd"},
    ]
    optimizer = Muon(groups, lr=LR, weight_decay=1e-3, eps=1e-5, momentum=0.8)
    common = {"weight_decay": 1e-3, "decay": "independent"}
    pairs = [
        (params[:2], Muon(twins(params[:2]), LR, eps=1e-5, momentum=0.8, **common)),
        (params[2:3], Adam(twins(params[2:3]), 0.01, betas=(0.5, 0.6), **common)),
        (params[3:], SGD(twins(params[3:]), LR, **common)),
    ]
    for step in range(1, 5):
        train(optimizer, [step])
        for own, alone in pairs:
            for p, twin in zip(own, params_of(alone), strict=True):
                twin.grad = p.grad
            alone.step()
    for own, alone in pairs:
        assert_equal(own, params_of(alone))
    _, adam, sgd = optimizer.param_groups
    assert (adam["eps"], sgd["momentum"]) == (1e-8, 0.0)  # each method's own defaults
    assert "momentum" not in adam
    assert "betas" not in sgd


ROUTED: dict[str, tuple[Group, type[StackedOptimizer], dict[str, Any]]] = {
    # a group's role, or none, with the method that its parameters are left to
    "by the optimizer": ({"role": "input"}, Adam, {"betas": (0.5, 0.6)}),
    "by the group": ({"role": "hidden", "routes": {"hidden": "adam"}}, Adam, {"betas": (0.5, 0.6)}),
    "settings of the group": ({"role": "input", "adam": {"eps": 1e-3}}, Adam, {"eps": 1e-3}),
    "by a method": ({"role": "output", "method": "muon_adam"}, Adam, {}),
    "another role": ({"role": "hidden"}, Muon, {}),
    "no role": ({}, Muon, {}),
    "a frozen one": ({"role": "frozen"}, Muon, {}),
}


@pytest.mark.parametrize(("said", "cls", "settings"), ROUTED.values(), ids=ROUTED)
def test_roles_are_routed(said: Group, cls: type[StackedOptimizer], settings: dict[str, Any]) -> None:
    params = matrices(2)
    optimizer = Muon([{"params": params, **said}], lr=LR, routes={"input": "adam"}, adam={"betas": (0.5, 0.6)})
    alone = cls(twins(params), LR, **settings)
    train(optimizer, range(1, 4))
    train(alone, range(1, 4))
    assert_same(optimizer, alone)


@pytest.mark.parametrize("shape", [(32,), ()])
@pytest.mark.parametrize("cls", [Muon, AdaMuon, Shampoo, SOAP])
def test_what_is_no_matrix_is_adams(cls: type[StackedOptimizer], shape: tuple[int, ...]) -> None:
    params = matrices(2, shape)
    optimizer = cls(params, LR, adam={"betas": (0.5, 0.6), "eps": 1e-4}, spectral_norm=True, weight_decay=1e-3)
    alone = Adam(twins(params), LR, betas=(0.5, 0.6), eps=1e-4, decay="independent", weight_decay=1e-3)
    train(optimizer, range(1, 4))
    train(alone, range(1, 4))
    assert_same(optimizer, alone)


def test_vectors_may_be_routed_elsewhere() -> None:
    params = matrices(2, (32,))
    optimizer, alone = Muon(params, LR, routes={"vector": "sgd"}), SGD(twins(params), LR)
    train(optimizer, [1, 2])
    train(alone, [1, 2])
    assert_same(optimizer, alone)


def test_scalars_may_be_routed_elsewhere() -> None:
    params = matrices(1, ())
    optimizer = Muon([{"params": params, "role": "scalar"}], LR, routes={"scalar": "sgd"})
    alone = SGD(twins(params), LR)
    train(optimizer, [1, 2])
    train(alone, [1, 2])
    assert_same(optimizer, alone)


# -- copies -----------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),  # noqa: S301 - written right here
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("case", CASES)
def test_copies_go_on_alike_and_apart(case: str, how: Callable[[Any], Any]) -> None:
    original = make(case, Mixed().groups())
    train(original, [1, 2])
    weights, kept = [p.detach().clone() for p in params_of(original)], state_of(original)
    copied = how(original)
    train(copied, [3, 4])
    assert_equal(params_of(original), weights)
    for state, was in zip(state_of(original), kept, strict=True):
        assert_equal(state.values(), was.values())
    train(original, [3, 4])
    assert_same(original, copied)


def test_a_copy_takes_groups() -> None:
    copied = copy.deepcopy(make("muon", matrices(1)))
    copied.add_param_group({"params": matrices(1, seed=1), "method": "adam"})
    assert "adam/v" in copied.state[params_of(copied)[1]]
    assert copied.param_groups[0].keys() - copied.param_groups[1].keys() >= {"momentum", "ns_steps"}


# -- weight decay -----------------------------------------------------------------------------------------------------


def decayed(optimizer: StackedOptimizer) -> float:
    """What is left of each weight after six steps of a schedule, without gradients."""
    before = [p.detach().clone() for p in params_of(optimizer)]
    scheduler = SCHEDULES["lambda"](optimizer)
    for _ in range(6):
        for p in params_of(optimizer):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
    ratios = torch.cat([(p.detach() / was).flatten() for p, was in zip(params_of(optimizer), before, strict=True)])
    assert float(ratios.max() - ratios.min()) < 1e-12
    return float(ratios.mean())


@pytest.mark.parametrize("lr", [0.1, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_independent_decay_follows_the_schedule_alone(case: str, lr: float) -> None:
    params = [*matrices(2, dtype=torch.float64), *matrices(1, (32,), dtype=torch.float64)]
    optimizer = CASES[case][0](params, lr=lr, **{**CASES[case][1], "weight_decay": 5e-3, "decay": "independent"})
    assert decayed(optimizer) == pytest.approx(math.prod(1 - 5e-3 / (1 + step) for step in range(6)), rel=1e-12)


@pytest.mark.parametrize("lr", [1e-3, 0.2])
def test_independent_decay_under_one_cycle_is_whole_at_its_peak(lr: float) -> None:
    """Which OneCycleLR sets, whatever rate the optimizer was given."""
    params = matrices(1, dtype=torch.float64)
    start = params[0].detach().clone()
    optimizer = AdamW(params, lr, weight_decay=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=10, pct_start=0.4, cycle_momentum=False
    )
    factors = []
    for _ in range(10):
        params[0].grad = torch.zeros_like(params[0])
        factors.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        scheduler.step() if len(factors) < 10 else None
    assert max(factors) == pytest.approx(1.0)
    assert float(params[0].detach()[0, 0] / start[0, 0]) == pytest.approx(
        math.prod(1 - 5e-3 * f for f in factors), rel=1e-12
    )


@pytest.mark.parametrize("lr", [0.1, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_coupled_decay_follows_the_rate(case: str, lr: float) -> None:
    params = matrices(2, dtype=torch.float64)
    optimizer = CASES[case][0](params, lr=lr, **{**CASES[case][1], "weight_decay": 0.1, "decay": "coupled"})
    assert decayed(optimizer) == pytest.approx(math.prod(1 - 0.1 * lr / (1 + step) for step in range(6)), rel=1e-12)


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_decay_adds_to_the_update(cls: type[StackedOptimizer]) -> None:
    start, ends = matrices(1, dtype=torch.float64)[0].detach(), {}
    for lr, decay in ((0.1, 0.0), (0.1, 5e-3), (0.2, 0.0), (0.2, 5e-3)):
        p = nn.Parameter(start.clone())
        train(cls([p], lr, weight_decay=decay, decay="independent"), [1])
        ends[lr, decay] = p.detach()
    for lr in (0.1, 0.2):
        torch.testing.assert_close(ends[lr, 0.0] - ends[lr, 5e-3], 5e-3 * start, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ends[0.2, 0.0] - start, 2 * (ends[0.1, 0.0] - start), rtol=1e-9, atol=1e-12)


Make = Callable[[Any], Optimizer]
REFERENCES: dict[str, tuple[Make, Make]] = {
    "l2": (
        lambda params: Adam(params, LR, weight_decay=0.1),
        lambda params: torch.optim.Adam(params, LR, weight_decay=0.1),
    ),
    "l2 of sgd": (
        lambda params: SGD(params, LR, weight_decay=0.1, decay="l2"),
        lambda params: torch.optim.SGD(params, LR, weight_decay=0.1),
    ),
    "coupled": (
        lambda params: AdamW(params, LR, weight_decay=0.1, decay="coupled"),
        lambda params: torch.optim.AdamW(params, LR, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize(("make_ours", "make_theirs"), REFERENCES.values(), ids=REFERENCES)
def test_decay_as_torch_has_it(make_ours: Make, make_theirs: Make) -> None:
    params = matrices(2, dtype=torch.float64)
    ours, theirs = make_ours(params), make_theirs(twins(params))
    train(ours, range(1, 6))
    train(theirs, range(1, 6))
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["muon", "soap", "shampoo"])
def test_l2_is_a_term_of_the_gradient(case: str) -> None:
    params = matrices(2)
    ours, theirs = make(case, params, weight_decay=0.1, decay="l2"), make(case, twins(params), weight_decay=0.0)
    for step in range(1, 4):
        give_gradients(params, step)
        for p, twin in zip(params, params_of(theirs), strict=True):
            twin.grad = p.grad.add(twin.detach(), alpha=0.1)
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_a_decay_that_looks_like_torchs_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 removes 10% .*decay='coupled', or weight_decay=0\.005"):
        Muon(matrices(1), lr=LR, weight_decay=0.1)


# -- state ------------------------------------------------------------------------------------------------------------

ADAM = {"adam/m", "adam/v"}
FACTORS = {f"{kind}_{side}": size for side, size in (("in", 16), ("out", 32)) for kind in ("root", "factor", "basis")}


def squares(name: str, kinds: tuple[str, str], blocks: int = 1, size: int | None = None) -> dict[str, tuple[int, ...]]:
    keys = [key for key in FACTORS if key.startswith(kinds)]
    return {f"{name}/{key}": (blocks, size or FACTORS[key], size or FACTORS[key]) for key in keys}


SPECTRAL = {"spectral_normalize/v": (32,)}
WHOLE = (32, 16)
STATE: dict[str, dict[str, tuple[int, ...]]] = {
    "sgd": {"momentum/ema": WHOLE},
    "sgd spectral": {"momentum/ema": WHOLE, **SPECTRAL},
    "adam": dict.fromkeys(ADAM, WHOLE),
    "adam grafted": dict.fromkeys({"graft/direction/m", "graft/direction/v"}, WHOLE),
    "muon": {"momentum/ema": WHOLE},
    "muon grafted": dict.fromkeys({"graft/magnitude/m", "graft/magnitude/v", "graft/direction/momentum/ema"}, WHOLE),
    "adamuon": dict.fromkeys({"momentum/ema", "normalize_entries/v"}, WHOLE),
    "shampoo": {"shampoo/ema": WHOLE, **squares("shampoo", ("root", "factor"))},
    "shampoo blocked": {"shampoo/ema": WHOLE, **squares("shampoo", ("root", "factor"), 8, 8)},
    "soap": {"soap/m_turned": (1, *WHOLE), "soap/v": (1, *WHOLE), **squares("soap", ("basis", "factor"))},
    "soap blocked": {"soap/m_turned": (8, 8, 8), "soap/v": (8, 8, 8), **squares("soap", ("basis", "factor"), 8, 8)},
}


@pytest.mark.parametrize("case", STATE)
def test_state_is_there_at_once_under_names_by_meaning(case: str) -> None:
    optimizer = make(case, matrices(2))
    for p in params_of(optimizer):
        assert {key: tuple(value.shape) for key, value in optimizer.state[p].items()} == {"step": (), **STATE[case]}
        assert float(optimizer.state[p]["step"]) == 0
    train(optimizer, [1])
    assert all(float(state["step"]) == 1 for state in state_of(optimizer))
    assert all(set(state) == {"step", *STATE[case]} for state in state_of(optimizer))


def test_state_of_arranged_parameters() -> None:
    model = Mixed()
    optimizer = make("soap", model.groups(), precondition_every=1)
    shapes = {n: {k: tuple(v.shape) for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    assert all(shapes[n]["soap/m"] == tuple(p.shape) for n, p in model.named_parameters() if p.ndim > 1)
    assert [shapes[n]["adam/m"] for n in ("bias", "scale")] == [(32,), ()]
    # as many as there are matrices, each of one block
    assert [shapes[n]["soap/factor_out"] for n in ("qkv", "experts")] == [(3, 1, 16, 16), (2, 1, 16, 16)]
    assert [shapes[n]["soap/factor_in"] for n in ("conv", "embedding")] == [(1, 16, 16)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_state_is_float32_at_least(case: str, dtype: torch.dtype) -> None:
    model = Mixed(dtype)
    optimizer, before = make(case, model.groups()), Mixed(dtype)
    train(optimizer, [1, 2])
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters())
    # A scalar may move by less than bfloat16 tells.
    assert not any(
        torch.equal(p, was) for p, was in zip(model.parameters(), before.parameters(), strict=True) if p.ndim
    )
    held = {value.dtype for state in state_of(optimizer) for key, value in state.items() if key != "step"}
    assert held == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("case", ["sgd", "adamw", "muon"])
def test_bfloat16_weights_move_by_the_update_in_float32(case: str) -> None:
    low = matrices(2, dtype=torch.bfloat16)
    ours, theirs = make(case, low), make(case, [nn.Parameter(p.detach().float()) for p in low])
    give_gradients(low, 1)
    for p, twin in zip(low, params_of(theirs), strict=True):
        twin.grad = p.grad.float()
    ours.step()
    theirs.step()
    assert_equal(
        [value for state in state_of(ours) for value in state.values()],
        [value for state in state_of(theirs) for value in state.values()],
    )
    assert_equal(low, [p.detach().bfloat16() for p in params_of(theirs)])


def test_a_list_is_as_good_as_a_pair() -> None:
    """YAML has no tuples, and full checkpoints turn them into lists."""
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizers = [AdamW([weight], betas=betas) for weight, betas in zip(weights, ((0.8, 0.9), [0.8, 0.9]), strict=True)]  # type: ignore[arg-type]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    assert torch.equal(*weights)
