"""Every error says what was wrong, what came instead, what is allowed and what to do; here the messages are read."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_mup import Base, Parametrize, WeightDecay
from lightning_mup.callbacks.companions import refuse_meta
from tests.lightning.helpers import BASE, Net, Tied, adam, trainer, values

Words = list[str]


def message_of(run: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


def assert_says(message: str, *parts: str) -> None:
    missing = [part for part in parts if not re.search(part, message)]
    assert not missing, f"{missing} not in: {message}"


def fit(module: Net | None = None, *callbacks: Any, **kwargs: Any) -> Callable[[], None]:
    return lambda: trainer(*callbacks, Parametrize(BASE, **kwargs)).fit(module or Net())


CONSTRUCTOR: dict[str, tuple[dict[str, Any], Words]] = {
    "lr without method": ({"lr": 0.1}, ["lr=0.1", "belong to method", "configure_optimizers"]),
    "decay without method": ({"weight_decay": 0.1}, ["weight_decay=0.1", "belong to method"]),
    "method without lr": ({"method": "adam"}, ["method='adam'", "lr > 0", "got None"]),
    "negative lr": ({"method": "adam", "lr": -1.0}, ["lr > 0", "got -1.0"]),
    "negative decay": ({"method": "adamw", "lr": 0.1, "weight_decay": -0.1}, [">= 0", "got -0.1"]),
    "decay of adam": ({"method": "adam", "lr": 0.1, "weight_decay": 0.1}, ["0.1", "adam", "method='adamw'"]),
    "unknown method": ({"method": "adamm", "lr": 0.1}, ["'adamm'", "available", "did you mean 'adam'"]),
    "not to be supplied": ({"method": "adagrad", "lr": 0.1}, ["'adagrad'", "available: adam, adam_atan2", "leave"]),
    "initialize": ({"initialize": "scaled"}, ["'scale', 'draw' or 'keep'", "'scaled'"]),
    "multipliers": ({"multipliers": "folded"}, ["'fold' or 'hook'", "'folded'"]),
    "batch": ({"batch": (0, 8)}, ["batch size", r"\(0, 8\)"]),
    "lr multipliers": ({"lr_multipliers": {"hidden": 0.0}}, ["positive", "'hidden': 0.0", "requires_grad"]),
    "options with lr": ({"method": "adam", "lr": 0.1, "options": {"lr": 1.0}}, ["'lr'", "argument of its own"]),
}


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_constructor(case: str) -> None:
    arguments, words = CONSTRUCTOR[case]
    assert_says(message_of(lambda: Parametrize(BASE, **arguments)), *words)


FITTING: dict[str, tuple[object, dict[str, Any], Words]] = {
    "no such override": ({"widht": 16}, {}, ["'widht'", "no hyperparameter of Net", "did you mean 'width'"]),
    "no such file": ("base.json", {}, ["'base.json'", "Base.of"]),
    "base of another model": (lambda: nn.Linear(2, 2), {}, ["'net.0.weight'", "no counterpart", "same model"]),
    "unknown rules": (BASE, {"rules": "mupp"}, ["'mupp'", "available", "did you mean 'mup'"]),
    "pattern of nothing": (BASE, {"lr_multipliers": {"net.9.weight": 2.0}}, ["'net.9.weight'", "matches no parameter"]),
    "roles that are not there": (
        lambda: nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))}),
        {},
        ["'net.4.weight'", "no counterpart"],
    ),
    "base without values": (Base.of(torch.nn.Module.to(Net(16), "meta")), {}, ["'net.0.weight'", "initialize='keep'"]),
}


@pytest.mark.parametrize("case", FITTING)
def test_reading(case: str) -> None:
    base, arguments, words = FITTING[case]
    assert_says(message_of(lambda: trainer(Parametrize(base, **arguments)).fit(Net())), *words)


def test_base_of_no_known_form() -> None:
    assert_says(message_of(lambda: trainer(Parametrize(3)).fit(Net()), TypeError), "factory", "got 3")


def test_module_without_parameters() -> None:
    class Empty(Net):
        def build(self, width: int) -> nn.Module:
            return nn.ReLU()

    assert_says(message_of(fit(Empty())), "Empty has no parameters", "configure_model")


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (
            LearningRateFinder(),
            ["LearningRateFinder", "one learning rate for all groups", "undoes the plan", "base model"],
        ),
        (StochasticWeightAveraging(0.1), ["StochasticWeightAveraging", "use .*WeightAveraging"]),
        (type("Mine", (Parametrize,), {})(BASE), ["2 Parametrize callbacks", "keep one"]),
    ],
)
def test_companions(callback: Any, words: Words) -> None:
    assert_says(message_of(fit(None, callback)), *words)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (LearningRateFinder(), ["schedule that decay follows", "without WeightDecay"]),
        (StochasticWeightAveraging(0.1), ["schedule that decay follows", "use .*WeightAveraging"]),
        (type("Mine", (WeightDecay,), {})(1e-3), ["2 WeightDecay callbacks", "decay once a step", "keep one"]),
    ],
)
def test_companions_of_a_decay_hear_of_no_plan(callback: Any, words: Words) -> None:
    message = message_of(lambda: trainer(callback, WeightDecay(1e-3, base="self")).fit(Net()))
    assert_says(message, *words)
    assert "plan" not in message


def test_tuner_cannot_find_a_rate() -> None:
    tuner = Tuner(trainer(Parametrize(BASE)))
    assert_says(message_of(lambda: tuner.lr_find(Net())), "LearningRateFinder", "one learning rate for all groups")


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_lose_the_shapes(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    parametrize = Parametrize(BASE)
    built = trainer(parametrize)
    monkeypatch.setattr(type(built), "strategy", object.__new__(kind))  # the real ones need an accelerator
    message = message_of(lambda: parametrize.setup(built, Net(), "fit"))
    assert_says(message, kind.__name__, "shapes", "mup_fsdp", "mup_ddp")


def test_meta_device_without_a_strategy_that_materializes() -> None:
    class OnMeta(Net):
        def build(self, width: int) -> nn.Module:
            with torch.device("meta"):
                return super().build(width)

    message = message_of(lambda: trainer(Parametrize(lambda: Net(16))).fit(OnMeta()))
    assert_says(message, "'net.0.weight'", "SingleDeviceStrategy", "does not materialize", "mup_fsdp")


class Undeclared(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


class Duck:
    """Lightning takes anything that looks like an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[Any] = []
        self.defaults: dict[str, Any] = {}
        self.state: dict[str, Any] = {}


def early(module: Net) -> torch.optim.Optimizer:
    return module.early


def foreign(module: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD([*module.parameters(), nn.Parameter(torch.ones(7, 3))], lr=0.1)


def test_undeclared_optimizer() -> None:
    message = message_of(fit(Net(make=lambda m: Undeclared(m.parameters()))))
    assert_says(message, "Undeclared", "declared: adafactor", "lightning_mup.measure", "declare=")


def test_optimizer_built_too_early() -> None:
    module = Net(make=early)
    object.__setattr__(module, "early", torch.optim.SGD(module.parameters(), lr=0.1))
    assert_says(message_of(fit(module)), "SGD was built before configure_optimizers", "build it inside")


def test_foreign_parameters() -> None:
    assert_says(message_of(fit(Net(make=foreign))), "SGD", r"shape \(7, 3\)", "not in the LightningModule", "attribute")


def test_optimizer_that_is_none_of_torchs() -> None:
    assert_says(message_of(fit(Net(make=lambda m: Duck())), TypeError), "Duck", "torch.optim.Optimizer", "subclass")


def test_another_plan_for_a_trained_module() -> None:
    module = Net()
    trainer(Parametrize(BASE)).fit(module)
    message = message_of(lambda: trainer(Parametrize({"width": 32})).fit(module))
    assert_says(message, "Net was parametrized before", "'net.2.weight'", "x 0.5, now x 0.707", "train a new instance")


def test_hook_that_never_runs() -> None:
    class Bypassed(Tied):
        def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
            y = batch[1]
            logits = self.net["embedding"](y) @ self.net["readout"].weight.T
            return nn.functional.cross_entropy(logits, y.roll(1))

    message = message_of(lambda: trainer(Parametrize(lambda: Bypassed(16))).fit(Bypassed()))
    assert_says(message, "'net.readout'", "never applied", "multipliers='fold'")


def test_hook_that_would_be_wrong() -> None:
    class Attention(Net):
        def build(self, width: int) -> nn.Module:
            return nn.ModuleList([nn.MultiheadAttention(width, width // 4, bias=False), nn.Linear(width, 4)])

    make = Parametrize(lambda: Attention(16), rules="ntk", multipliers="hook", roles={"*in_proj_weight": "hidden"})
    message = message_of(lambda: trainer(make).fit(Attention()))
    assert_says(message, "'net.0'", "MultiheadAttention", "multipliers='fold'")


class Handmade(Net):
    """Sets the rates in a hook of its own."""

    def __init__(self, rates: Callable[[list[dict[str, Any]]], None], lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__(make=lambda m: torch.optim.Adam(m.parameters(), lr=lr), **kwargs)
        self.rates = rates

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates(self.trainer.optimizers[0].param_groups)


def flat(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        group["lr"] = 0.05


def proportional(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        group["lr"] = 0.05 * group["lr_mult"]


def halved(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        group["lr"] /= 2


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_rates_flattened_by_hand(lr: float) -> None:
    message = message_of(lambda: trainer(Parametrize(lambda: Net(16))).fit(Handmade(flat, lr)))
    assert_says(message, "Adam", "'hidden x0.25': 0.05", r"rate \* group\['lr_mult'\]")


@pytest.mark.filterwarnings("ignore:the learning rates of .* were set outside")
@pytest.mark.parametrize(("rates", "want"), [(proportional, 0.05), (halved, 0.1 / 4)])
def test_rates_moved_in_proportion_by_hand(rates: Any, want: float) -> None:
    ran = trainer(Parametrize(lambda: Net(16)))
    ran.fit(Handmade(rates))
    groups = ran.optimizers[0].param_groups
    assert [group["lr_at_base"] for group in groups] == pytest.approx([want] * len(groups))


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Net) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Net, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_finetuning_that_adds_groups_is_refused_at_once() -> None:
    message = message_of(lambda: trainer(Thawing(), Parametrize(lambda: Net(16))).fit(Net()))
    assert_says(message, "cannot run beside Thawing", "adds groups", "requires_grad before trainer.fit")


def test_parameters_added_later() -> None:
    class Growing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    message = message_of(lambda: trainer(Parametrize(BASE)).fit(Growing()))
    assert_says(message, "group of Adam", "added after configure_optimizers", "pass all parameters")


def test_parameters_freed_later() -> None:
    class Freed(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(True)

    module = Freed()
    module.net[0].requires_grad_(False)
    message = message_of(lambda: trainer(Parametrize(BASE)).fit(module))
    assert_says(message, "'frozen'", "now trains", "before trainer.fit")


def test_groups_named_frozen_by_the_user_may_train() -> None:
    make = lambda m: torch.optim.Adam([{"params": m.parameters(), "name": "frozen once"}], lr=0.1)  # noqa: E731
    trainer(Parametrize(BASE)).fit(Net(make=make))


def test_after_an_error_the_module_is_as_before() -> None:
    module = Net(make=lambda m: Undeclared(m.parameters()))
    message_of(fit(module))
    assert {"setup", "configure_model", "configure_optimizers"}.isdisjoint(vars(module))
    module.make = adam
    parametrize = Parametrize(BASE)
    trainer(parametrize).fit(module)
    assert parametrize.plan["net.2.weight"].method == "adam"


def test_a_failed_initialization_is_tried_again() -> None:
    module = Net()
    before = values(module)
    message_of(lambda: trainer(Parametrize(Base.of(Net(16).to("meta")))).fit(module))
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    trainer(Parametrize(BASE), steps=0).fit(module)
    assert not torch.equal(module.net[2].weight, before["net.2.weight"])


def resume(path: Path, **kwargs: Any) -> Callable[[], None]:
    return lambda: trainer(Parametrize(**{"base": BASE, **kwargs}), steps=16).fit(Net(), ckpt_path=path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    ran = trainer(Parametrize(BASE), steps=8)
    ran.fit(Net())
    ran.save_checkpoint(tmp_path / "8.ckpt")
    return tmp_path / "8.ckpt"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rules": "sp_per_layer"}, ["rules sp_per_layer .other: mup", "net.0.weight: eps .*0.5.*0.25"]),
        ({"base": {"width": 32}}, ["net.0.weight: fan_out 64/32 .other: 64/16", "more"]),
        ({"lr_multipliers": {"embedding": 0.1}}, ["net.0.weight: lr 0.1 .other: 1.0"]),
        ({"method": "adamw", "lr": 0.01}, ["net.0.weight: method adamw .other: adam"]),
    ],
)
def test_resume_under_another_plan(checkpoint: Path, change: dict[str, Any], words: Words) -> None:
    message = message_of(resume(checkpoint, **change))
    assert_says(message, "written under another plan", *words, "resume with the base", "initialize='keep'")


def test_resume_under_the_same_plan(checkpoint: Path) -> None:
    resume(checkpoint)()
    resume(checkpoint, base=lambda: Net(16))()


def test_resume_of_a_run_without_a_plan(tmp_path: Path) -> None:
    ran = trainer(steps=8)
    ran.fit(Net())
    ran.save_checkpoint(tmp_path / "plain.ckpt")
    message = message_of(resume(tmp_path / "plain.ckpt"))
    assert_says(message, "step 8", "without Parametrize", "initialize='keep'")


@pytest.mark.parametrize(
    "returned",
    [
        lambda o: [o],
        lambda o: ([o], []),
        lambda o: {"optimizer": o},
        lambda o: {"optimizer": o, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(o, [lambda step: 1.0])},
        lambda o: [{"optimizer": o}],
    ],
)
def test_optimizer_built_too_early_in_whatever_is_returned(returned: Callable[[Any], Any]) -> None:
    module = Net(make=lambda m: returned(m.early))
    object.__setattr__(module, "early", torch.optim.SGD(module.parameters(), lr=0.1))
    assert_says(message_of(fit(module)), "SGD was built before configure_optimizers", "build it inside")


def test_meta_device_under_a_strategy_that_materializes(monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer()
    monkeypatch.setattr(type(built), "strategy", object.__new__(ModelParallelStrategy))
    refuse_meta(built, Net().to("meta"))


def test_differences_that_are_not_shown_are_counted(checkpoint: Path) -> None:
    message = message_of(resume(checkpoint, base={"width": 32}))
    shown = [line for line in message.splitlines() if "(other: " in line][1:]  # the first line holds the digests
    assert len(shown) == 8
    (more,) = re.findall(r"and (\d+) more", message)
    old, new = Parametrize(BASE), Parametrize({"width": 32})
    for parametrize in (old, new):
        trainer(parametrize, steps=0).fit(Net())
    assert len(shown) + int(more) == len(new.plan.diff(old.plan.rows()))
