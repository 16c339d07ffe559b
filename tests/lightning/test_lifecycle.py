"""The callback among the other things that Lightning does to a module in its life."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import copy
import csv
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateMonitor, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mup import Parametrize
from lightning_mup.callbacks.patch import patch_method, unpatch_method
from lightning_mup.core.multipliers import ForwardMultiplier
from tests.lightning.helpers import BASE, Evaluated, Net, Tied, same, trainer, values

PATCHED = {"setup", "configure_model", "configure_optimizers"}


def hooks_in(module: nn.Module) -> list[tuple[str, float]]:
    return [
        (name, hook.factor)
        for name, part in module.named_modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if isinstance(hook, ForwardMultiplier)
    ]


def tied() -> Parametrize:
    return Parametrize(lambda: Tied(16))


def test_module_gets_its_own_hooks_back() -> None:
    module = Net()
    trainer(Parametrize(BASE)).fit(module)
    assert PATCHED.isdisjoint(vars(module))


def test_methods_of_the_instance_come_back() -> None:
    module = Net()
    module.configure_optimizers = own = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    parametrize = Parametrize(BASE)
    trainer(parametrize).fit(module)
    assert parametrize.plan["net.2.weight"].method == "sgd"
    assert vars(module)["configure_optimizers"] is own


def test_hooks_are_installed_once() -> None:
    module, parametrize = Tied(), tied()
    ran = trainer(parametrize)
    ran.fit(module)
    ran.fit(module)
    ran.validate(module, verbose=False)
    trainer(tied()).fit(module)
    trainer(tied()).test(module, verbose=False)
    assert hooks_in(module) == [("net.readout", 0.25)]
    assert hooks_in(copy.deepcopy(module)) == [("net.readout", 0.25)]
    clone = copy.deepcopy(module)
    trainer(tied()).fit(clone)
    assert hooks_in(clone) == [("net.readout", 0.25)]


def test_a_test_run_alone_installs_the_hooks() -> None:
    torch.manual_seed(1)
    fresh, module = Tied(), Tied()
    module.load_state_dict(fresh.state_dict())
    got = trainer(tied()).test(module, verbose=False)
    assert hooks_in(module) == [("net.readout", 0.25)]
    fresh.net["readout"].weight = nn.Parameter(fresh.net["readout"].weight * 0.25)
    want = trainer().test(fresh, verbose=False)
    assert got[0] == pytest.approx(want[0])


def test_evaluation_under_other_multipliers_is_refused(tmp_path: Path) -> None:
    ran = trainer(tied())
    ran.fit(Tied())
    ran.save_checkpoint(tmp_path / "tied.ckpt")
    trainer(tied()).test(Tied(), ckpt_path=tmp_path / "tied.ckpt", verbose=False)
    other = Parametrize(lambda: Tied(32))
    with pytest.raises(
        ValueError, match=r"'net.embedding.weight' was trained with .*\[1.0, 0.25\], here .*\[1.0, 0.5\]"
    ):
        trainer(other).test(Tied(), ckpt_path=tmp_path / "tied.ckpt", verbose=False)


def test_validation_and_test_around_fit() -> None:
    module, parametrize = Evaluated(), Parametrize(BASE)
    trainer(parametrize).validate(module, verbose=False)
    ran = trainer(parametrize, steps=2)
    ran.fit(module)
    after, plan = values(module), parametrize.plan
    ran.validate(module, verbose=False)
    ran.test(module, verbose=False)
    assert all(torch.equal(p, after[name]) for name, p in module.named_parameters())
    assert parametrize.plan is plan


class InTheMiddle(Callback):
    """Copies and pickles the module while it trains."""

    def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.copied = copy.deepcopy(module)
        module.trainer = None
        module.make = None  # a lambda, which no pickle takes
        self.pickled = pickle.loads(pickle.dumps(module))  # noqa: S301 - our own
        module.trainer = ran


def test_copies_and_pickles_in_the_middle() -> None:
    module, watching = Tied(), InTheMiddle()
    trainer(tied(), watching, steps=1).fit(module)
    x = torch.arange(4)
    for other in (watching.copied, watching.pickled):
        assert same(module, other)
        assert other.setup.__self__ is other
        assert torch.equal(other.loss([x, x]), module.loss([x, x]))
    watching.pickled.setup("fit")
    assert watching.pickled.configure_optimizers.__func__ is Net.configure_optimizers


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging(first: bool) -> None:
    averaging = WeightAveraging()
    callbacks = [averaging, Parametrize(BASE)] if first else [Parametrize(BASE), averaging]
    path: list[Tensor] = []

    class Path(Callback):
        def on_train_batch_end(self, ran: L.Trainer, module: L.LightningModule, *args: Any) -> None:
            path.append(module.net[2].weight.detach().clone())

    module = Net()
    trainer(*callbacks, Path(), steps=4).fit(module)
    assert torch.allclose(module.net[2].weight, torch.stack(path).mean(0), atol=1e-6)


def test_callbacks_can_be_pickled_whatever_the_base() -> None:
    for base in (lambda: Net(16), BASE, "self"):
        parametrize = pickle.loads(pickle.dumps(Parametrize(base)))  # noqa: S301 - our own
        trainer(parametrize).fit(Net())
        assert parametrize.plan["net.2.weight"].lr == (1 if base == "self" else 0.25)
    trainer(pickle.loads(pickle.dumps(parametrize))).fit(Net())  # noqa: S301 - after a run


def test_fast_dev_run() -> None:
    parametrize = Parametrize(BASE)
    trainer(parametrize, fast_dev_run=True, logger=CSVLogger("logs")).fit(Evaluated())
    assert parametrize.plan is not None
    assert list(Path().iterdir()) == []


def test_several_trainers_in_one_process() -> None:
    plans = []
    for width in (32, 64, 128):
        parametrize = Parametrize(BASE)
        trainer(parametrize).fit(Net(width))
        plans.append(parametrize.plan["net.2.weight"].lr)
    assert plans == [0.5, 0.25, 0.125]
    assert torch.optim.Optimizer.add_param_group.__module__ == "torch.optim.optimizer"
    assert torch.optim.lr_scheduler.LambdaLR.__init__.__module__ == "torch.optim.lr_scheduler"


def test_one_callback_for_modules_one_after_the_other() -> None:
    parametrize = Parametrize(BASE)
    for width, lr in ((32, 0.5), (64, 0.25)):
        trainer(parametrize).fit(Net(width))
        assert parametrize.plan["net.2.weight"].lr == lr


def test_trainers_in_turn_train_as_trainers_alone() -> None:
    def trained(between: bool) -> Net:
        torch.manual_seed(1)
        module, ran = Net(), trainer(Parametrize(BASE), steps=2)
        ran.fit(module)
        if between:
            trainer(Parametrize(BASE)).fit(Net(32))
        ran.fit_loop.epoch_loop.max_steps = 4
        ran.fit(module)
        return module

    assert same(trained(False), trained(True))


def test_accumulation_and_clipping() -> None:
    def trained(accumulate: int, width: int, callbacks: list[Callback]) -> Net:
        torch.manual_seed(1)
        module = Net(width, make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        module.train_dataloader = lambda: DataLoader(Net.train_dataloader(module).dataset, batch_size=16 // accumulate)
        trainer(*callbacks, steps=3, accumulate_grad_batches=accumulate, gradient_clip_val=0.1).fit(module)
        return module

    for parametrized in (False, True):
        whole, parts = (trained(n, 64, [Parametrize(BASE)] if parametrized else []) for n in (1, 2))
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_clipping_is_told_where_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for rules, told in (("mup", False), ("ntk", True)):
        caplog.clear()
        trainer(Parametrize(BASE, rules=rules), gradient_clip_val=0.1).fit(Net())
        assert "clips by one norm over all gradients" in caplog.text
        assert ("tell folded multipliers from hooked" in caplog.text) is told
    caplog.clear()
    trainer(Parametrize(BASE), gradient_clip_val=0.1, gradient_clip_algorithm="value").fit(Net())
    assert "clips by" not in caplog.text


def test_plan_is_announced_and_printed_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer(Parametrize(BASE)).fit(Evaluated())
    assert caplog.text.count("Parametrize acts after Evaluated.setup") == 1
    assert caplog.text.count("factors on the values at the base") == 1
    assert "hidden  1  64/16    64/16   adam    0.5   0.25" in caplog.text


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by torch.compile itself
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_train_alike(backend: str) -> None:
    class Bare(Tied):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss(batch)  # torch.compile cannot trace Lightning's log

    def trained(compiled: bool) -> Tied:
        torch.manual_seed(1)
        module = Bare()
        trainer(Parametrize(lambda: Bare(16)), steps=2).fit(
            torch.compile(module, backend=backend) if compiled else module
        )
        return module

    plain, compiled = trained(False), trained(True)
    assert hooks_in(compiled) == [("net.readout", 0.25)]
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by torch.compile itself
def test_a_compiled_part_keeps_its_multiplier() -> None:
    def trained(compiled: bool) -> Net:
        torch.manual_seed(1)
        module = Net()
        if compiled:
            module.net[4] = torch.compile(module.net[4], backend="eager")
        parametrize = Parametrize(lambda: Net(16), rules="mean_field", multipliers="hook")
        trainer(parametrize, steps=2).fit(module)
        return module

    assert same(trained(False), trained(True))


def test_learning_rate_monitor(tmp_path: Path) -> None:
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    logger = CSVLogger(tmp_path)
    trainer(Parametrize(BASE), monitor, logger=logger).fit(Net())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        first = next(row for row in csv.DictReader(file) if row["lr-Adam/input"])
    assert float(first["lr-Adam/hidden x0.25"]) == 0.25 * float(first["lr-Adam/input"])
    assert sum(name.endswith("-weight_decay") for name in first) == 5


def test_csv_logger_gets_the_plan(tmp_path: Path) -> None:
    logger, parametrize = CSVLogger(tmp_path), Parametrize(BASE)
    trainer(parametrize, logger=logger).fit(Net())
    written = json.loads((Path(logger.log_dir) / "plan.json").read_text())
    assert written == {"rules": "mup", "params": parametrize.plan.rows()}
    assert parametrize.plan.digest() in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_without_a_logger_nothing_is_written() -> None:
    trainer(Parametrize(BASE)).fit(Net())
    assert list(Path().iterdir()) == []


def test_wandb_gets_the_table(tmp_path: Path) -> None:
    logger, parametrize = WandbLogger(save_dir=tmp_path, offline=True), Parametrize(BASE)
    trainer(parametrize, logger=logger).fit(Net())
    logger.experiment.finish()
    (file,) = tmp_path.rglob("files/media/table/*.table.json")
    table = json.loads(file.read_text())
    header, lines = parametrize.plan.summary()
    assert (table["columns"], table["data"]) == (header, lines)


class Sized(Net):
    def __init__(self, width: int = 64) -> None:
        super().__init__(width)
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)


def test_batch_size_finder(tmp_path: Path) -> None:
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    module, parametrize = Sized(), Parametrize(lambda: Sized(16))
    torch.manual_seed(1)
    ran = trainer(finder, parametrize, steps=1, default_root_dir=tmp_path, enable_checkpointing=True)
    ran.fit(module)
    assert finder.optimal_batch_size == module.batch_size > 2
    assert [g["lr"] / g["lr_mult"] for g in ran.optimizers[0].param_groups] == [0.01] * 5


def test_a_hook_whose_module_waits_is_no_error() -> None:
    class Waiting(Tied):
        """Its second part is called from the second step on."""

        def build(self, width: int) -> nn.Module:
            return nn.ModuleDict({"one": super().build(width), "two": super().build(width)})

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            part, y = self.net["one" if batch_idx == 0 else "two"], batch[1]
            return nn.functional.cross_entropy(part["readout"](part["embedding"](y)), y.roll(1))

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            pass

    trainer(Parametrize(lambda: Waiting(16)), steps=3).fit(Waiting())


def test_a_patch_replaces_the_one_before() -> None:
    """A run that died without a teardown leaves its patch behind."""
    module, seen = Net(), []
    patch_method(module, "setup", after=lambda m: seen.append("old"))
    patch_method(module, "setup", after=lambda m: seen.append("new"))
    module.setup("fit")
    assert seen == ["new"]
    unpatch_method(module, "setup")
    assert "setup" not in vars(module)


def test_a_run_that_fails_shows_no_plan_of_the_run_before() -> None:
    parametrize = Parametrize(BASE)
    trainer(parametrize).fit(Net(32))
    assert parametrize.plan is not None
    with pytest.raises(ValueError, match="no scaling rule is declared"):
        trainer(parametrize).fit(Net(make=lambda m: torch.optim.ASGD(m.parameters())))
    assert parametrize.plan is None
