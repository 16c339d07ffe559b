"""Splitting of parameter groups, and the check that nobody undid it, without a Trainer."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mup.core.base import Base
from lightning_mup.core.groups import GroupSplitter, check_groups
from lightning_mup.core.scaling import Choices, Scaling

Make = Callable[[nn.Module], Optimizer]


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4))


def split(make: Make, model: nn.Module | None = None, **choices: Any) -> Optimizer:
    model = model or net(64)
    names = {id(p): name for name, p in model.named_parameters()}
    with GroupSplitter(Scaling.read(model, Base.of(net(16)), "mup", Choices(**choices)), names) as splitter:
        optimizer = make(model)
    splitter.finish()
    assert splitter.optimizers == [optimizer]
    return optimizer


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


def test_no_parameter_is_lost_and_none_is_doubled() -> None:
    model = net(64)
    optimizer = split(adam, model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_groups_are_only_as_many_as_there_are_settings() -> None:
    assert [group["name"] for group in split(adam).param_groups] == [
        "input",
        "vector",
        "hidden x0.25",
        "output x0.25",
        "vector (2)",
    ]
    same_size = split(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), net(16))
    assert [group["role"] for group in same_size.param_groups] == ["hidden", "vector"]


def test_a_group_added_inside_is_split_too() -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)
        optimizer.add_param_group({"params": model[1:].parameters(), "lr": 0.2})
        return optimizer

    groups = split(make).param_groups
    assert [group["given_group"] for group in groups] == [0, 0, 1, 1, 1, 1]
    assert {group["lr"] / group["lr_mult"] for group in groups[2:]} == {0.2}


def test_a_single_tensor_is_a_group() -> None:
    (group,) = split(lambda model: torch.optim.Adam([{"params": model[1].weight}], lr=0.1)).param_groups
    assert (group["role"], group["lr"]) == ("hidden", 0.025)


def test_the_watch_ends_even_after_an_error() -> None:
    original = Optimizer.add_param_group
    with pytest.raises(ValueError, match="no scaling rule is declared"):
        split(lambda model: torch.optim.ASGD(model.parameters()))
    assert Optimizer.add_param_group is original
    assert "name" not in torch.optim.Adam(net(64).parameters()).param_groups[0]


def test_steps_are_multiples_of_the_bases() -> None:
    """An Adam step with negligible epsilon moves every entry by its group's rate."""
    model = net(64)
    optimizer = split(lambda m: torch.optim.Adam(m.parameters(), lr=0.1, eps=1e-30), model)
    before = [p.detach().clone() for p in model.parameters()]
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    moved = {n: float((old - p.detach()).mean()) for (n, p), old in zip(model.named_parameters(), before, strict=True)}
    assert moved["0.weight"] == pytest.approx(0.1, rel=1e-4)
    assert moved["1.weight"] == pytest.approx(0.025, rel=1e-4)


@pytest.fixture
def optimizer() -> Iterator[Optimizer]:
    made = split(lambda m: torch.optim.Adam([{"params": m[:2].parameters()}, {"params": m[2].parameters()}], lr=0.1))
    check_groups(made)
    return made


@pytest.mark.filterwarnings("ignore:the learning rates of .* were set outside")
def test_any_factor_by_hand_is_taken_over(optimizer: Optimizer) -> None:
    for factor in (0.5, 1e-9, 7.0):
        for group in optimizer.param_groups:
            group["lr"] *= factor
        check_groups(optimizer)
    assert {round(group["lr_at_base"] / (0.1 * 3.5e-9), 9) for group in optimizer.param_groups} == {1.0}


@pytest.mark.filterwarnings("ignore:the learning rates of .* were set outside")
def test_users_groups_may_move_apart(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = (0.3 if group["given_group"] else 0.1) * group["lr_mult"]
    check_groups(optimizer)
    assert [g["lr_at_base"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.1, 0.3, 0.3])


def test_parts_of_one_group_may_not(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(ValueError, match=r"set to \{'input': 0.2, .* rate \* group\['lr_mult'\]"):
        check_groups(optimizer)


def test_flat_rates_over_groups_of_one_part() -> None:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.Adam([{"params": [model[0].weight]}, {"params": [model[1].weight]}], lr=0.1)

    optimizer = split(make)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    with pytest.raises(ValueError, match="undoes the plan"):
        check_groups(optimizer)


@pytest.mark.filterwarnings("ignore:the learning rates of .* were set outside")
def test_zero_is_any_multiple(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    check_groups(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_mult"]
    check_groups(optimizer)


def test_state_dicts_keep_the_multipliers(optimizer: Optimizer) -> None:
    fresh = split(lambda m: torch.optim.Adam([{"params": m[:2].parameters()}, {"params": m[2].parameters()}], lr=0.5))
    fresh.load_state_dict(optimizer.state_dict())
    check_groups(fresh)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


def linear(sizes: dict[str, tuple[int, int]]) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


def split_between(model: nn.Module, base: nn.Module, make: Make) -> dict[str, dict[str, Any]]:
    """The group of each parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    with GroupSplitter(Scaling.read(model, Base.of(base), "mup", Choices()), names) as splitter:
        optimizer = make(model)
    splitter.finish()
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_parameters_that_differ_in_their_decay_alone_are_split() -> None:
    model, base = linear({"a": (64, 64), "b": (32, 32)}), linear({"a": (16, 16), "b": (16, 16)})
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.01)  # noqa: E731
    groups = split_between(model, base, make)
    assert [groups[n]["lr_mult"] for n in ("a.weight", "b.weight")] == [1, 1]
    assert [groups[n]["weight_decay"] for n in ("a.weight", "b.weight")] == pytest.approx([0.01 / 4, 0.01 / 2])


def test_parameters_that_differ_in_their_epsilon_alone_are_split() -> None:
    model, base = linear({"a": (64, 64), "b": (64, 32)}), linear({"a": (16, 16), "b": (16, 16)})
    make = lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, eps=1e-6)  # noqa: E731
    groups = split_between(model, base, make)
    assert [groups[n]["lr_mult"] for n in ("a.weight", "b.weight")] == [1 / 4, 1 / 4]
    assert [groups[n]["eps"] for n in ("a.weight", "b.weight")] == pytest.approx([1e-6 / 4, 1e-6 / 2])


@pytest.mark.filterwarnings("ignore:the learning rates of .* were set outside")
def test_a_rate_by_hand_where_all_groups_stand_at_one_multiple() -> None:
    optimizer = split(lambda model: torch.optim.Adam([model[1].weight], lr=0.1))
    (group,) = optimizer.param_groups
    group["lr"] = 0.05 * group["lr_mult"]
    check_groups(optimizer)
    assert group["lr_at_base"] == pytest.approx(0.05)


@pytest.mark.filterwarnings("ignore:the learning rates of .* were set outside")
def test_rates_by_hand_may_be_rounded(optimizer: Optimizer) -> None:
    for group, rounding in zip(optimizer.param_groups, (1, 1 + 1e-7, 1 - 1e-7, 1 + 1e-7, 1), strict=True):
        group["lr"] = 0.03 * group["lr_mult"] * rounding
    check_groups(optimizer)
    assert [g["lr_at_base"] for g in optimizer.param_groups] == pytest.approx([0.03] * 5, rel=1e-6)


def test_one_freed_parameter_of_a_frozen_group_is_enough() -> None:
    model = net(64)
    model[0].requires_grad_(False)
    optimizer = split(adam, model)
    check_groups(optimizer)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'frozen' of Adam was frozen when the plan was made and now trains"):
        check_groups(optimizer)


def test_rates_by_hand_are_told_once(optimizer: Optimizer) -> None:
    for rate in (0.05, 0.06):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]
        if rate == 0.05:
            with pytest.warns(UserWarning, match=r"of Adam were set outside .* taken for rate \* group\['lr_mult'\]"):
                check_groups(optimizer)
    check_groups(optimizer)


def test_schedules_by_hand_that_forget_the_multiples() -> None:
    def two(model: nn.Module) -> Optimizer:  # one multiple each, so that no group is torn
        return torch.optim.Adam([{"params": [model[0].weight], "lr": 0.1}, {"params": [model[1].weight], "lr": 0.2}])

    for factor in (0.25, 1.0):  # g["lr"] = g["initial_lr"] * factor
        optimizer = split(two)
        for group, given in zip(optimizer.param_groups, (0.1, 0.2), strict=True):
            group["lr"] = given * factor
        with pytest.raises(ValueError, match="which undoes the plan"):
            check_groups(optimizer)


def test_a_warm_up_by_hand_that_ends_at_the_given_rate() -> None:
    optimizer = split(lambda model: torch.optim.Adam([model[1].weight, model[2].weight], lr=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    with pytest.raises(ValueError, match="which undoes the plan"):
        check_groups(optimizer)
