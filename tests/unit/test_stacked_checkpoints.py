"""Checkpoints of a StackedOptimizer: they go on bit for bit, know nothing of stacks, and misfits are refused."""

# ruff: noqa: ANN401 - checkpoints hold whatever torch puts there

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer, lr_scheduler

from lightning_mup import SGD, SOAP, Adam, AdamW, Muon, Shampoo, StackedOptimizer
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

# One process is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def beside(model: Mixed) -> Mixed:
    """A freshly built model with the weights of another."""
    fresh = Mixed(model.first.dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


# -- torch.save -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_goes_on_bit_for_bit_through_a_file(case: str, dtype: torch.dtype) -> None:
    model = Mixed(dtype)
    whole = make(case, model.groups())
    train(whole, range(1, 4))
    resumed = make(case, beside(model).groups())
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert_same(resumed, whole)
    train(whole, range(4, 7))
    train(resumed, range(4, 7))
    assert_same(resumed, whole)


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_above_can_fail(case: str) -> None:
    model = Mixed()
    whole = make(case, model.groups())
    train(whole, range(1, 4))
    forgetful = make(case, beside(model).groups())
    train(whole, [4])
    train(forgetful, [4])
    assert not torch.equal(model.first, params_of(forgetful)[0])


def test_what_was_loaded_is_a_copy() -> None:
    saved = make("soap", Mixed().groups())
    train(saved, [1])
    state_dict = saved.state_dict()
    kept = copy.deepcopy(state_dict["state"])
    loaded = make("soap", Mixed().groups())
    loaded.load_state_dict(state_dict)
    train(loaded, [2, 3])
    for key, state in kept.items():
        assert_equal(state_dict["state"][key].values(), state.values())
    saved.load_state_dict(state_dict)  # its own, too
    train(saved, [2])
    assert all(float(state["step"]) == 2 for state in state_of(saved))


def test_settings_and_schedules_come_along() -> None:
    """Groups come with the checkpoint, as in torch; independent decay goes on from the rate given at first."""
    params = matrices(2)

    def built(ps: list[nn.Parameter], **settings: Any) -> tuple[StackedOptimizer, lr_scheduler.LRScheduler]:
        optimizer = Muon(ps, LR, weight_decay=5e-3, **settings)
        return optimizer, lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def go_on(optimizer: StackedOptimizer, scheduler: lr_scheduler.LRScheduler, steps: range) -> None:
        for step in steps:
            train(optimizer, [step])
            scheduler.step()

    whole = built(params, momentum=0.8, adam={"betas": (0.5, 0.6)}, ns_dtype=torch.bfloat16)
    go_on(*whole, range(1, 4))
    resumed = built(twins(params))
    for own, other in zip(resumed, whole, strict=True):
        own.load_state_dict(through_a_file(other.state_dict()))
    assert resumed[0].state_dict()["param_groups"] == whole[0].state_dict()["param_groups"]
    go_on(*whole, range(4, 7))
    go_on(*resumed, range(4, 7))
    assert_same(resumed[0], whole[0])


def test_an_optimizer_of_several_methods_goes_on() -> None:
    def groups(model: Mixed) -> list[Group]:
        methods = ["muon", "adam", "soap", "shampoo2"]
        return [{**group, "method": name} for name, group in zip(methods, model.groups(), strict=True)]

    model = Mixed()
    whole = SGD(groups(model), LR)
    train(whole, [1, 2])
    resumed = SGD(groups(beside(model)), LR)
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    train(whole, [3, 4])
    train(resumed, [3, 4])
    assert_same(resumed, whole)


# -- other stacks -----------------------------------------------------------------------------------------------------


def regrouped(state_dict: dict[str, Any], groups: list[list[int]]) -> dict[str, Any]:
    """A checkpoint of one group, as if its parameters had been in several."""
    (group,) = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**group, "params": keys} for keys in groups]}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_knows_nothing_of_stacks(case: str) -> None:
    """Three of one shape, saved as one stack, go on in two, one of which has a member that starts anew."""
    params, new = matrices(3), matrices(1, seed=1)
    saved = make(case, params)
    train(saved, range(1, 4))
    copies = twins(params)
    loaded = make(case, [{"params": [copies[2], *new]}, {"params": [copies[1], copies[0]]}])
    loaded.load_state_dict(regrouped(through_a_file(saved.state_dict()), [[2, 3], [1, 0]]))
    fresh = make(case, twins(new))
    for step in range(4, 7):
        train(saved, [step])
        for p, twin in zip(params, copies, strict=True):
            twin.grad = p.grad
        give_gradients(new, -step)
        give_gradients(params_of(fresh), -step)
        loaded.step()
        fresh.step()
    pairs = [*zip(params, copies, strict=True), (params_of(fresh)[0], new[0])]
    states = {**saved.state, **fresh.state}
    for one, other in pairs:
        assert_equal([other, *loaded.state[other].values()], [one, *states[one].values()])


def test_parameters_may_have_another_dtype_where_the_checkpoint_is_loaded() -> None:
    params = matrices(2)
    saved = make("adamw", params)
    train(saved, [1, 2])
    wider = nn.Parameter(params[1].detach().double())
    loaded = make("adamw", [*twins(params[:1]), wider])
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert loaded.state[wider]["adam/m"].dtype == torch.float64
    assert_equal([loaded.state[wider]["adam/m"].float()], [saved.state[params[1]]["adam/m"]])


# -- misfits ----------------------------------------------------------------------------------------------------------


def saved_by(cls: type[Optimizer], shape: tuple[int, ...] = (32, 16), **settings: Any) -> dict[str, Any]:
    optimizer = cls(matrices(2, shape), lr=LR, **settings)
    train(optimizer, [1])
    return optimizer.state_dict()


def state_only(state_dict: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """State under the settings of the optimizer that it is loaded into."""
    return {**optimizer.state_dict(), "state": state_dict["state"]}


def test_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'momentum/ema' has shape \(16, 32\), but \(32, 16\) is needed"):
        Muon(matrices(2), LR).load_state_dict(saved_by(Muon, (16, 32)))


@pytest.mark.parametrize(
    ("into", "settings", "saved", "message"),
    [
        (SOAP, {}, lambda: saved_by(Muon), r"holds \['momentum/ema', 'step'\], but method 'soap'.*'soap/basis_in'"),
        (Shampoo, {}, lambda: saved_by(Shampoo, block_size=8), r"'shampoo/root_in' has shape .*, but \(1, 16, 16\)"),
        (Muon, {"graft": "adam"}, lambda: saved_by(Muon), r"but method 'muon' under its settings has .*'graft/dir"),
        (AdamW, {"spectral_norm": True}, lambda: saved_by(AdamW), r"but method 'adamw'.*'spectral_normalize/v'"),
        (Adam, {}, lambda: saved_by(torch.optim.Adam), r"\['exp_avg', 'exp_avg_sq', 'step'\], but method 'adam'"),
    ],
    ids=["method", "blocks", "graft", "spectral", "torch"],
)
def test_state_under_other_settings_is_refused(
    into: type[StackedOptimizer], settings: dict[str, Any], saved: Callable[[], dict[str, Any]], message: str
) -> None:
    optimizer = into(matrices(2), LR, **settings)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_only(saved(), optimizer))


def test_a_checkpoint_of_another_class_is_refused() -> None:
    """Its groups would silently turn SOAP into Muon."""
    optimizer = SOAP(matrices(2), LR)
    with pytest.raises(ValueError, match="muon"):
        optimizer.load_state_dict(saved_by(Muon))


def test_a_checkpoint_of_torchs_class_is_refused() -> None:
    optimizer = Adam(matrices(2), LR)
    with pytest.raises(ValueError, match="method"):
        optimizer.load_state_dict(saved_by(torch.optim.Adam))


def test_a_refused_checkpoint_changes_nothing() -> None:
    params = matrices(2)
    optimizer, twin = Muon(params, LR), Muon(twins(params), LR)
    train(optimizer, [1])
    train(twin, [1])
    with pytest.raises(ValueError, match="is needed"):
        optimizer.load_state_dict(saved_by(Muon, (16, 32), momentum=0.5))
    assert optimizer.param_groups[0]["momentum"] == 0.95
    train(optimizer, [2])
    train(twin, [2])
    assert_same(optimizer, twin)


@pytest.mark.parametrize("groups", [[{"count": 1}], [{"count": 1}, {"count": 1}]])
def test_other_groups_are_torchs_error(groups: list[dict[str, int]]) -> None:
    optimizer = Muon([{"params": matrices(group["count"], seed=i)} for i, group in enumerate(groups)], LR)
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(saved_by(Muon))


# -- torch.distributed.checkpoint -------------------------------------------------------------------------------------

Regroup = Callable[[Mixed], list[Group]]


def options(flat: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def save(model: nn.Module, optimizer: Optimizer, folder: Path, flat: bool) -> None:
    state_dict = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options(flat))}
    dcp.save(state_dict, checkpoint_id=folder, no_dist=True)


def load(model: nn.Module, optimizer: Optimizer, folder: Path, flat: bool) -> None:
    state_dict = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options(flat))}
    dcp.load(state_dict, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(model, optimizer, state_dict["optimizer"], options=options(flat))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_distributed_checkpoints_go_on_bit_for_bit(case: str, flat: bool, tmp_path: Path) -> None:
    model = Mixed(torch.bfloat16 if "blocked" in case else torch.float32)
    whole = make(case, model.groups())
    train(whole, range(1, 4))
    save(model, whole, tmp_path, flat)
    fresh = beside(model)
    resumed = make(case, fresh.groups())
    load(fresh, resumed, tmp_path, flat)
    assert_same(resumed, whole)
    assert resumed.state_dict()["param_groups"] == whole.state_dict()["param_groups"]
    train(whole, range(4, 7))
    train(resumed, range(4, 7))
    assert_same(resumed, whole)


def alike(model: Mixed) -> list[Group]:
    return [{"params": [model.first, model.second, model.bias, model.other, model.scale, model.conv]}]


def apart(model: Mixed) -> list[Group]:
    return [{"params": [model.other, model.second]}, {"params": [model.scale, model.first, model.conv, model.bias]}]


@pytest.mark.parametrize(("before", "after"), [(alike, apart), (apart, alike)], ids=["split", "joined"])
@pytest.mark.parametrize("case", CASES)
def test_distributed_checkpoints_may_be_grouped_otherwise(
    case: str, before: Regroup, after: Regroup, tmp_path: Path
) -> None:
    model = Mixed()
    whole = make(case, before(model))
    train(whole, range(1, 4))
    save(model, whole, tmp_path, flat=True)
    fresh = beside(model)
    resumed = make(case, after(fresh))
    load(fresh, resumed, tmp_path, flat=True)
    for step in range(4, 7):
        for one in (model, fresh):
            give_gradients(list(one.parameters()), step)
        whole.step()
        resumed.step()
    for name, p in model.named_parameters():
        own = fresh.get_parameter(name)
        assert_equal([own, *resumed.state[own].values()], [p, *whole.state[p].values()])


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_distributed_checkpoints_leave_the_weights(case: str, flat: bool, tmp_path: Path) -> None:
    """An optimizer without state would take a step in between, which decays the weights."""
    model = Mixed()
    optimizer = make(case, model.groups(), weight_decay=5e-3, decay="independent")
    before: list[Tensor] = [p.detach().clone() for p in model.parameters()]
    save(model, optimizer, tmp_path, flat)
    load(model, optimizer, tmp_path, flat)
    assert_equal(model.parameters(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(float(state["step"]) == 0 for state in state_of(optimizer))
