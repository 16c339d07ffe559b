"""What a StackedOptimizer refuses, and what its errors say."""

# ruff: noqa: ANN401 - settings are whatever an optimizer takes

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from lightning_mup import SGD, SOAP, Adam, AdamAtan2, AdaMuon, AdamW, Muon, Shampoo, StackedOptimizer
from tests.unit.stacked import LR, Group, assert_equal, assert_same, make, matrices, params_of, state_of, train, twins

Refused = tuple[type[StackedOptimizer], dict[str, Any], str]

# -- settings ---------------------------------------------------------------------------------------------------------

UNKNOWN: dict[str, tuple[Group, str]] = {
    "near a setting": ({"momentun": 0.9}, r"unknown setting 'momentun' of method 'muon'; .*did you mean 'momentum'"),
    "near a key": ({"axis": ((1,), (0,))}, r"unknown setting 'axis' .*did you mean 'axes'"),
    "another method's": ({"betas": (0.9, 0.95)}, r"unknown setting 'betas' of method 'muon'; available: adam, decay"),
    "not of the method named": ({"method": "adam", "nesterof": True}, r"unknown setting 'nesterof' of method 'adam'"),
    "method": ({"method": "mun"}, r"unknown method 'mun'; .*did you mean 'muon'"),
    "method of torch alone": ({"method": "adagrad"}, r"'adagrad' is declared for another optimizer class"),
    "graft": ({"graft": "adamm"}, r"unknown method 'adamm'; .*did you mean 'adam'"),
    "decay": ({"decay": "copled"}, r"decay must be one of .*'coupled'.*got 'copled'; did you mean 'coupled'"),
    "nonfinite": ({"nonfinite": "skp"}, r"nonfinite must be one of .*got 'skp'; did you mean 'skip'"),
    "role": ({"role": "hiden"}, r"'hiden'.*did you mean 'hidden'"),
    "role of a route": ({"role": "hidden", "routes": {"inputs": "adam"}}, r"'inputs'.*did you mean 'input'"),
    "method of a route": ({"role": "hidden", "routes": {"hidden": "adamm"}}, r"'adamm'; .*did you mean 'adam'"),
    "setting of Adam": ({"adam": {"beta": (0.9, 0.95)}}, r"unknown setting 'beta'.*did you mean 'betas'"),
    "rate of Adam": ({"adam": {"lr": 0.1}}, r"'lr'"),  # a group has one rate
}


@pytest.mark.parametrize(("said", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_unknown_is_named_with_what_is_near(said: Group, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [*matrices(1), *matrices(1, (32,))], **said}], LR)


BETAS = r"betas must be in \[0, 1\)"
RANGES: dict[str, Refused] = {
    "lr": (SGD, {"lr": -0.1}, r"lr and weight_decay must be >= 0, got -0\.1"),
    "lr, not a number": (SGD, {"lr": float("nan")}, r"lr and weight_decay must be >= 0, got nan"),
    "weight_decay": (AdamW, {"weight_decay": -0.1}, r"lr and weight_decay must be >= 0, got .* -0\.1"),
    "decay of no rate": (AdamW, {"lr": 0.0, "weight_decay": 1e-3}, r"follows lr / .* which is 0.* got weight_decay"),
    "sgd momentum": (SGD, {"momentum": 1.0}, r"must be in \[0, 1\), got 1\.0"),
    "adam betas": (Adam, {"betas": (0.9, 1.0)}, BETAS),
    "adam eps": (Adam, {"eps": -1.0}, r"eps >= 0, got .*eps=-1\.0"),
    "adamw betas": (AdamW, {"betas": (-0.1, 0.9)}, BETAS),
    "adam_atan2 betas": (AdamAtan2, {"betas": (1.5, 0.9)}, BETAS),
    "muon momentum": (Muon, {"momentum": -0.1}, r"must be in \[0, 1\), got -0\.1"),
    "muon eps": (Muon, {"eps": -1.0}, r"eps.* >= 0.*-1\.0"),
    "muon ns_steps": (Muon, {"ns_steps": -1}, r"steps.* >= 0.*-1"),
    "adam of muon": (Muon, {"adam": {"betas": (2.0, 0.9)}}, BETAS),
    "adamuon beta2": (AdaMuon, {"beta2": 1.5}, r"\[0, 1\).*1\.5"),
    "adamuon entry_eps": (AdaMuon, {"entry_eps": -1.0}, r"eps.* >= 0.*-1\.0"),
    "shampoo betas": (Shampoo, {"betas": (0.9, 1.0)}, BETAS),
    "shampoo exponent": (Shampoo, {"exponent": (0.25, 0.0)}, r"exponent > 0.*got .*\(0\.25, 0\.0\)"),
    "shampoo matrix_eps": (Shampoo, {"matrix_eps": -1.0}, r"matrix_eps >= 0, got .*-1\.0"),
    "shampoo root": (Shampoo, {"root": "newtn"}, r"'newtn'.*did you mean 'newton'"),
    "shampoo newton": (Shampoo, {"root": "newton", "exponent": 0.3}, r"'newton' needs an exponent 1/integer, got 0\.3"),
    "soap betas": (SOAP, {"betas": (1.5, 0.9)}, BETAS),
    "soap eps": (SOAP, {"eps": -1.0}, r"eps >= 0, got .*-1\.0"),
    "soap every": (SOAP, {"precondition_every": 0}, r"every must be >= 1.*got 0"),
    "soap warmup": (SOAP, {"warmup": "eig"}, r"'eig'.*did you mean 'eigh'"),
    "block_size": (SOAP, {"block_size": 0}, r"block_size must be 1 or more, got 0; None cuts nothing"),
    "max_preconditioned_dim": (Shampoo, {"max_preconditioned_dim": 0}, r"max_dim must be 1 or more, got 0; None is no"),
    "graft_eps": (Muon, {"graft": "adam", "graft_eps": -1.0}, r"eps.* >= 0.*-1\.0"),
}


@pytest.mark.parametrize(("cls", "settings", "message"), RANGES.values(), ids=RANGES)
def test_what_is_out_of_range_is_refused_at_once(
    cls: type[StackedOptimizer], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls([*matrices(1), *matrices(1, (32,))], **{"lr": LR, **settings})


@pytest.mark.parametrize(
    "said",
    [
        {"axes": ((0,), (2,))},
        {"axes": ((0,), (-1,))},
        {"axes": ((0,), (0, 1))},
        {"axes": ((), (0, 1)), "split": 2},
        {"split": 3},
        {"split": -2},
    ],
    ids=str,
)
def test_axes_and_split_that_do_not_fit(said: Group) -> None:
    with pytest.raises(ValueError, match=r"axes=.*split=.*do not fit a parameter of shape \(32, 16\)"):
        Muon([{"params": matrices(1), **said}], LR)


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_parameters_are_of_a_floating_point_dtype(dtype: torch.dtype) -> None:
    counts = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"floating-point dtype, got {dtype}; leave such ones out"):
        Muon([counts], LR)


def test_a_parameter_twice_is_torchs_error() -> None:
    params = matrices(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        Muon([{"params": params}, {"params": params[:1], "method": "adam"}], LR)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        Muon([params[0], params[0]], LR)


@pytest.mark.parametrize(
    "params", [[], [{"params": {nn.Parameter(torch.ones(2))}}], [torch.ones(2, requires_grad=True) * 2]]
)
def test_what_torch_refuses(params: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"empty parameter list|ordered collections|non-leaf"):
        Muon(params, LR)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_parameters_without_entries_are_passed_over(shape: tuple[int, ...]) -> None:
    """As torch's optimizers do, which takes a layer of no outputs along."""
    full = matrices(1)
    optimizer, alone = Muon([*full, nn.Parameter(torch.ones(shape))], LR), Muon(twins(full), LR)
    train(optimizer, [1])
    train(alone, [1])
    assert_equal(full, params_of(alone))


@pytest.mark.parametrize(
    "said", [{"momentum": 1.5}, {"decay": "other"}, {"axes": ((0,), (2,))}, {"method": "adagrad"}], ids=str
)
def test_a_group_that_is_refused_is_not_there(said: Group) -> None:
    params = matrices(2)
    optimizer, twin = make("muon", params), make("muon", twins(params))
    with pytest.raises(ValueError, match=r"must be|do not fit|another optimizer"):
        optimizer.add_param_group({"params": matrices(1, seed=1), **said})
    assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 1
    train(optimizer, [1])
    train(twin, [1])
    assert_same(optimizer, twin)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_sparse_gradients_are_refused(nonfinite: Any) -> None:
    table = nn.Embedding(32, 16, sparse=True)
    optimizer = Muon(table.parameters(), LR, nonfinite=nonfinite)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"needs dense gradients, got a sparse one; use Embedding\(sparse=False\)"):
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_change_nothing(bad: float) -> None:
    layer = nn.Linear(16, 32)
    optimizer = Muon(layer.named_parameters(), LR, weight_decay=1e-3)
    train(optimizer, [1])
    before, kept = [p.detach().clone() for p in layer.parameters()], state_of(optimizer)
    layer.bias.grad[3] = bad
    with pytest.raises(
        ValueError, match=r"gradient of 'bias' is not finite \(and those of 0 others\).*nonfinite='skip'"
    ):
        optimizer.step()
    assert_equal(layer.parameters(), before)
    for state, was in zip(state_of(optimizer), kept, strict=True):
        assert_equal(state.values(), was.values())


def test_unnamed_parameters_are_named_by_place() -> None:
    params = matrices(3)
    optimizer = SGD([{"params": params[:1], "name": "first"}, {"params": params[1:], "name": "second"}], LR)
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    params[0].grad = torch.zeros_like(params[0])
    with pytest.raises(ValueError, match=r"'parameter 0 of group second' is not finite \(and those of 1 others\)"):
        optimizer.step()


def test_partial_values_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        partial = DTensor.from_local(torch.ones(16, 16), init_device_mesh("cpu", (1,)), [Partial()])
        with pytest.raises(ValueError, match=r"parts must be of the values.*reduce the tensor first"):
            Muon([nn.Parameter(partial)], LR)
    finally:
        dist.destroy_process_group()
