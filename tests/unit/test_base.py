"""The base in all its forms: what it reads, what it refuses, and that it leaves everything else as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_mup.core.base import (
    Base,
    Measured,
    bare_model,
    canonical,
    doubled,
    head_dims,
    is_base_of,
    resolve_base,
)


class Lit(L.LightningModule):
    def __init__(self, width: int = 8, depth: int = 2, name: str = "x", bias: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(*[nn.Linear(width, width, bias=bias) for _ in range(depth)])


class Late(L.LightningModule):
    """Layers in configure_model, a parameter in __init__."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.scale = nn.Parameter(torch.ones(1))
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Linear(self.hparams["width"], 2)


class InSetup(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.net = nn.Linear(self.hparams["width"], 2)


# -- forms -------------------------------------------------------------------------------------------------------------


def test_every_form_of_base(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    Base.of(Lit(4)).save(file)
    forms: list[object] = [Base.of(Lit(4)), Lit(4), lambda: Lit(4), {"width": 4}, file, str(file)]
    found = [resolve_base(form, Lit(16)) for form in forms]
    assert all(base.shapes == found[0].shapes for base in found)
    assert found[0].shapes["net.1.weight"] == (4, 4)


def test_self_is_the_target() -> None:
    assert resolve_base("self", Lit(16)).shapes["net.0.weight"] == (16, 16)


def test_overrides_keep_what_is_not_named() -> None:
    base = resolve_base({"width": 4}, Lit(16, depth=3, bias=False))
    assert sorted(base.shapes) == [f"net.{i}.weight" for i in range(3)]


@pytest.mark.parametrize("kind", [Late, InSetup])
@pytest.mark.parametrize("materialize", [True, False])
def test_layers_built_in_hooks(kind: type[L.LightningModule], materialize: bool) -> None:
    for base in ({"width": 4}, lambda: kind(width=4)):
        found = resolve_base(base, kind(), materialize=materialize)
        assert found.shapes["net.weight"] == (2, 4)
        assert ("net.weight" in found.measured) is materialize


def test_meta_gives_shapes_and_materialize_initial_values() -> None:
    assert resolve_base({"width": 4}, Lit()).measured == {}
    measured = resolve_base({"width": 4}, Lit(), materialize=True).measured
    assert measured["net.0.weight"].rms == pytest.approx((1 / 3) ** 0.5 / 2, rel=0.5)


def test_constructor_that_reads_values_is_built_for_real() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rates = [x.item() for x in torch.linspace(0, 1, 3)]
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in rates)

    assert len(resolve_base(Reads, nn.Linear(1, 1)).shapes) == 6


def test_sharded_wrappers_and_compilation_leave_names_alone() -> None:
    net = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(Base.of(net).shapes) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(Base.of(nn.DataParallel(net)).shapes) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert bare_model(net) is net


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("_orig_mod.weight", "weight"),
        ("a._orig_mod._checkpoint_wrapped_module.b", "a.b"),
        ("a_orig_mod.b", "a_orig_mod.b"),  # somebody's own name
        ("module.weight", "module.weight"),
    ],
)
def test_canonical_names(name: str, bare: str) -> None:
    assert canonical(name) == bare


def test_both_names_of_a_tied_parameter() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    assert list(Base.of(net).shapes) == ["a.weight", "b.weight"]


# -- randomness --------------------------------------------------------------------------------------------------------


def test_building_a_base_draws_nothing_from_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draw on every rank; generators of the host and of accelerators stay where they were."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the accelerators were seeded"))
    target = Lit()
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = resolve_base({"width": 4}, target, materialize=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, numpy)
    torch.default_generator.manual_seed(8)
    assert resolve_base({"width": 4}, target, materialize=True) == first


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_base_comes_back_whole(tmp_path: Path) -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)})
    Base.of(net).save(tmp_path / "base.json")
    assert Base.load(tmp_path / "base.json") == Base.of(net)
    assert Base.load(tmp_path / "base.json").head_dims == {"attention": 4}


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "No such file"),
        ("not json", "Expecting value"),
        ("[1, 2]", "indices must be"),
        ('{"shapes": {}}', "'format'"),
        ('{"format": 1, "shapes": {"w": [1]}}', "'measured'"),
        ('{"format": 1, "shapes": [], "measured": {}, "head_dims": {}}', "items"),
    ],
)
def test_broken_file(content: str | None, got: str, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="cannot read a base from") as error:
        Base.load(file)
    assert str(file) in str(error.value)
    assert got in str(error.value)
    assert "write one with Base.of(module).save(path)" in str(error.value)


def test_file_of_another_format(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    Base.of(Lit()).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ValueError, match=r"has format 99, allowed is 1; write one with Base.of"):
        Base.load(file)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_base_without_parameters() -> None:
    with pytest.raises(ValueError, match=r"the base ReLU has no parameters; build them in __init__ or configure_model"):
        Base.of(nn.ReLU())


@pytest.mark.parametrize(
    ("base", "error", "words"),
    [
        ({"widht": 4}, ValueError, ["'widht'", "no hyperparameter of Lit", "'depth', 'name'", "did you mean 'width'?"]),
        (lambda: 4, TypeError, ["must return a torch module, got 4", "pass lambda: Lit(...)"]),
        (lambda: Lit, TypeError, ["must return a torch module, got <class", "pass lambda: Lit(...)"]),
        (128, TypeError, ["base must be a factory, a dict", "got 128", "pass lambda: Lit(...)"]),
        (None, TypeError, ["base must be a factory", "got None"]),
    ],
)
def test_wrong_base(base: object, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        resolve_base(base, Lit())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_module_that_saved_no_hyperparameters() -> None:
    class Silent(L.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.net = nn.Linear(width, width)

    with pytest.raises(ValueError, match=r"'width', which is no hyperparameter of Silent; it saved \[\].*save_hyp"):
        resolve_base({"width": 4}, Silent(8))


def test_class_that_cannot_be_rebuilt() -> None:
    class Partly(L.LightningModule):
        def __init__(self, width: int, net: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["net"])
            self.net = net

    with pytest.raises(ValueError, match=r"cannot rebuild Partly .*missing.*'net'.*pass base=lambda: Partly\(\.\.\.\)"):
        resolve_base({"width": 4}, Partly(8, nn.Linear(8, 8)))


def test_hook_that_wants_a_trainer() -> None:
    class Attached(L.LightningModule):
        def configure_model(self) -> None:
            self.net = nn.Linear(self.trainer.num_devices, 2)

    with pytest.raises(ValueError, match=r"Attached.configure_model cannot build the base without a Trainer \(Runtime"):
        resolve_base(Attached, nn.Linear(1, 1))


def test_lazy_base() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' of Sequential is lazy.*run one batch.*in the factory"):
        resolve_base(lambda: nn.Sequential(nn.LazyLinear(4)), nn.Linear(1, 1))


# -- whether this is the base run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "declared"),
    [
        ("self", True),
        ({"width": 8}, True),
        ({"width": 8, "depth": 2}, True),
        ({"width": 4}, False),
        ({"unknown": 4}, False),
        (lambda: Lit(8), False),
    ],
)
def test_declared_base_run(base: object, declared: bool) -> None:
    assert is_base_of(base, Lit(8, 2)) is declared


def test_module_is_its_own_base() -> None:
    module = Lit()
    assert is_base_of(module, module)
    assert not is_base_of(Lit(), module)


def test_doubled_sizes() -> None:
    found = doubled({"width": 8, "bias": True, "name": "x"}, Lit(8))
    assert found is not None
    assert found.shapes["net.0.weight"] == (16, 16)
    assert "net.0.bias" in found.shapes  # neither flags nor words are doubled


@pytest.mark.parametrize("base", [lambda: Lit(8), "self", {"width": "wide"}])
def test_nothing_to_double(base: object) -> None:
    assert doubled(base, Lit(8)) is None


# -- measurements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "constant"),
    [(torch.ones(3), True), (torch.zeros(3), True), (-torch.ones(3), True), (torch.tensor([1.0, -1.0]), False)],
)
def test_constant_values(tensor: torch.Tensor, constant: bool) -> None:
    assert Measured.of(tensor).constant is constant


@pytest.mark.parametrize("make", [lambda: torch.empty(0, 4), lambda: torch.empty(4, 0)])
def test_empty_parameters_are_not_measured(make: Callable[[], torch.Tensor]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(make())
    assert Base.of(module).measured == {}


def test_head_dims_by_module() -> None:
    net = nn.Sequential(nn.MultiheadAttention(32, 2), nn.Linear(2, 2))
    assert head_dims(net) == {"0": 16}
