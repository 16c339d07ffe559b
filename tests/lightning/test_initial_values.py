"""Initial values: the proxy's measured sizes times the plan's ratios, given the base in any form."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mup import Base, Parametrize
from lightning_mup.core.base import resolve_base
from tests.lightning.helpers import BASE, Evaluated, Net, Tied, rms, same, trainer, values


def started(parametrize: Parametrize, module: Net, **kwargs: Any) -> dict[str, Tensor]:
    """The values before the first step."""
    trainer(parametrize, steps=0, **kwargs).fit(module)
    return values(module)


def saved_base(tmp_path: Path) -> Path:
    Base.of(proxy()).save(tmp_path / "base.json")
    return tmp_path / "base.json"


def proxy() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(16)


FORMS: dict[str, Callable[[Path], object]] = {
    "factory": lambda path: proxy,
    "lambda": lambda path: lambda: Net(16),
    "overrides": lambda path: BASE,
    "module": lambda path: proxy(),
    "saved": saved_base,
    "text": lambda path: str(saved_base(path)),
    "Base": lambda path: Base.of(proxy()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["scale", "draw"])
def test_sizes_are_the_bases_times_the_ratio(form: str, how: Any, tmp_path: Path) -> None:
    parametrize = Parametrize(FORMS[form](tmp_path), initialize=how)
    got = started(parametrize, Net())
    measured = Base.of(proxy()).measured
    for name, tensor in got.items():
        untouched = how == "scale" and name == "net.4.bias"
        if not untouched:
            assert rms(tensor) == pytest.approx(parametrize.plan[name].init * measured[name].rms, rel=1e-5)
    assert {p.init for p in parametrize.plan.params} == {1.0, 0.5, 0.25}


def test_scale_keeps_the_shape_of_the_draw() -> None:
    class Orthogonal(Net):
        def build(self, width: int) -> nn.Module:
            net = super().build(width)
            nn.init.orthogonal_(net[2].weight)
            nn.init.zeros_(net[4].weight)
            return net

    module = Orthogonal()
    before = values(module)
    after = started(Parametrize(lambda: Orthogonal(16)), module)
    gram = after["net.2.weight"] @ after["net.2.weight"].T
    assert torch.allclose(gram, torch.eye(64) * gram[0, 0], atol=1e-5)
    assert not after["net.4.weight"].any()
    ratio = after["net.0.weight"] / before["net.0.weight"]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))


def test_keep_leaves_all_values_alone() -> None:
    module = Net()
    before = values(module)
    after = started(Parametrize(BASE, initialize="keep"), module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_draw_depends_on_name_and_seed_alone() -> None:
    def drawn(global_seed: int, seed: int = 0, **kwargs: Any) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        return started(Parametrize(BASE, initialize="draw", seed=seed, **kwargs), Net())

    one, two, other = drawn(1), drawn(2), drawn(1, seed=1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", ["scale", "draw", "keep"])
def test_global_random_state_is_left_alone(how: Any) -> None:
    class Watched(Net):
        def on_fit_start(self) -> None:
            self.state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    def noisy_proxy() -> Net:
        random.random(), np.random.rand(), torch.rand(1)
        return Net(16)

    states = []
    for callbacks in ([], [Parametrize(noisy_proxy, initialize=how)]):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        module = Watched()
        trainer(*callbacks, steps=1).fit(module)
        states.append(module.state)
    assert states[0] == states[1]


@pytest.mark.parametrize("how", ["scale", "draw"])
def test_padding_rows_stay_zero(how: Any) -> None:
    class Padded(Tied):
        def build(self, width: int) -> nn.Module:
            return nn.ModuleDict(
                {"embedding": nn.Embedding(4, width, padding_idx=2), "readout": nn.Linear(width, 4, bias=False)}
            )

    parametrize = Parametrize(lambda: Padded(16), initialize=how)
    after = started(parametrize, Padded())
    base = resolve_base(lambda: Padded(16), Padded(), materialize=True)
    assert not after["net.embedding.weight"][2].any()
    assert after["net.embedding.weight"][[0, 1, 3]].all()
    assert rms(after["net.embedding.weight"]) == pytest.approx(base.measured["net.embedding.weight"].rms, rel=1e-5)


@pytest.mark.parametrize("how", ["scale", "draw"])
def test_bf16_true_is_measured_in_float64(how: Any) -> None:
    parametrize = Parametrize(BASE, initialize=how)
    module = Net()
    started(parametrize, module, precision="bf16-true")
    assert module.net[2].weight.dtype == torch.bfloat16
    measured = resolve_base(BASE, module, materialize=True).measured
    for name in ("net.0.weight", "net.2.weight", "net.4.weight"):
        wanted = parametrize.plan[name].init * measured[name].rms
        assert rms(module.get_parameter(name)) == pytest.approx(wanted, rel=2e-3)


class Late(Net):
    """Its parameters appear in the hook that the subclass names."""

    def build(self, width: int) -> nn.Module:
        return nn.ModuleList()

    def appear(self) -> None:
        if len(self.net) == 0:
            self.net = Net.build(self, self.hparams["width"])


class InSetup(Late):
    def setup(self, stage: str) -> None:
        self.appear()


class InConfigureModel(Late):
    def configure_model(self) -> None:
        self.appear()


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_models_built_late(kind: type[Net], precision: Any) -> None:
    module, parametrize = kind(), Parametrize(lambda: Net(16), initialize="draw")
    got = started(parametrize, module, precision=precision)
    want = started(Parametrize(lambda: Net(16), initialize="draw"), Net(), precision=precision)
    if precision == "32-true":
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert module.net[2].weight.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
    assert parametrize.plan["net.2.weight"].lr == 0.25


def test_overrides_rebuild_a_module_of_configure_model() -> None:
    parametrize = Parametrize(BASE)
    trainer(parametrize).fit(InConfigureModel())
    assert parametrize.plan["net.2.weight"].lr == 0.25


def test_fit_again_never_initializes_twice() -> None:
    module, parametrize = Net(), Parametrize(BASE)
    trainer(parametrize, steps=3).fit(module)
    trained = values(module)
    trainer(parametrize, steps=0).fit(module)
    trainer(Parametrize(BASE, initialize="draw"), steps=0).fit(module)
    trainer(Parametrize(BASE, method="sgd", lr=0.1, lr_multipliers={"hidden": 2.0}), steps=0).fit(module)
    assert all(torch.equal(p, trained[name]) for name, p in module.named_parameters())
    same_trainer = trainer(parametrize, steps=0)
    same_trainer.fit(module)
    same_trainer.fit(module)
    assert all(torch.equal(p, trained[name]) for name, p in module.named_parameters())


def test_a_new_part_of_a_trained_module_is_initialized() -> None:
    module = Net()
    trainer(Parametrize(BASE)).fit(module)
    trained = values(module)
    module.net[4] = nn.Linear(64, 4)
    after = started(Parametrize(BASE), module)
    changed = [name for name in after if not torch.equal(after[name], trained[name])]
    assert changed == ["net.4.weight", "net.4.bias"]
    base = resolve_base(BASE, module, materialize=True).measured
    assert rms(after["net.4.weight"]) == pytest.approx(0.25 * base["net.4.weight"].rms, rel=1e-5)


def test_evaluation_never_initializes() -> None:
    module = Evaluated()
    before = values(module)
    for name in ("validate", "test"):
        getattr(trainer(Parametrize(BASE)), name)(module, verbose=False)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    started(Parametrize(BASE), module)
    assert not torch.equal(module.net[2].weight, before["net.2.weight"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by torch.compile itself
def test_compiled_parts_are_initialized_alike() -> None:
    torch.manual_seed(1)
    plain = Net()
    torch.manual_seed(1)
    compiled = Net()
    compiled.net[2] = torch.compile(compiled.net[2], backend="eager")
    for module in (plain, compiled):
        trainer(Parametrize(BASE), steps=2).fit(module)
    assert same(plain, compiled)


class Teacher(Net):
    """Trains beside a frozen copy of itself, as mean teachers and target networks do."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(width)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)


def test_frozen_copies_follow_what_they_copy() -> None:
    module = Teacher()
    seen: dict[str, bool] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pairs = zip(pl_module.net.parameters(), pl_module.teacher.parameters(), strict=True)
            seen["equal"] = all(torch.equal(a, b) for a, b in pairs if a.ndim == 2)

    trainer(Parametrize(lambda: Teacher(16)), Look()).fit(module)
    assert seen == {"equal": True}


def test_a_frozen_copy_without_its_hook_is_refused() -> None:
    run = lambda: trainer(Parametrize(lambda: Teacher(16), rules="ntk", multipliers="hook")).fit(Teacher())  # noqa: E731
    with pytest.raises(
        ValueError, match=r"is a frozen copy of .*, whose forward multiplier .* is a hook that the copy"
    ):
        run()


def test_former_values_are_initialized_again() -> None:
    module = Net(64)
    former = copy.deepcopy(module.state_dict())
    first = started(Parametrize(lambda: Net(16)), module)
    module.load_state_dict(former)
    again = started(Parametrize(lambda: Net(16)), module)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(former["net.2.weight"], first["net.2.weight"])
