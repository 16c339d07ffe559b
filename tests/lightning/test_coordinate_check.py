"""The coordinate check, on real trainings: it tells right parametrizations from wrong ones and leaves no trace."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mup.analysis.coordinate import CoordinateReport, load_coordinates
from lightning_mup.analysis.updates import Yardstick
from lightning_mup.callbacks.coordinate_check import CoordinateCheck, Sweep, coordinate_check
from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.callbacks.probe import captured, undisturbed
from lightning_mup.callbacks.watch import Watch, main_parameter, whole
from lightning_mup.core.power import Power
from lightning_mup.core.rules import Rules, find_rules
from lightning_mup.core.scaling import Choices
from lightning_mup.core.spec import ParamSpec, Role
from tests.models import MLP, ResidualMLP, TransformerLM, markov_text

WIDTHS = (64, 128, 256, 512)
DEPTHS = (4, 8, 16, 32)
COMPLETE_P = ("mup", "complete_p")
LR = {"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3}


def sweep(seeds: int, *, updates: bool = True, data: object = None) -> Sweep:
    return Sweep(seeds=range(seeds), data=data, updates=updates, accelerator="cpu", progress=False)


class Text(TransformerLM):
    """As a language model whose width is large against what it reads: 16 words, and small logits at the start.

    With as many words as dimensions, and logits of order 1 at the smallest width, slopes of 0.15 come from the widths
    being finite rather than from the rules.
    """

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__(width, depth)
        with torch.no_grad():
            self.readout.weight.mul_(0.1)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(markov_text(160, 17) % 16), batch_size=16)


def mlp(width: int) -> MLP:
    return MLP(width, depth=3)


BRANCH_ENDS = ("down.weight", "down.bias", "out_proj.weight", "linear2.weight", "linear2.bias")


def quiet(factory: Callable[..., LightningModule]) -> Callable[..., LightningModule]:
    """Start the residual branches at zero, as in the paper.

    Else L random branches of size 1/L add 1/sqrt(L) to the stream at the start, which SGD, whose steps follow the
    gradient's size, shows as slopes of 0.2 from 4 blocks on.
    """

    def build(depth: int) -> LightningModule:
        module = factory(depth=depth)
        for name, parameter in module.named_parameters():
            if name.endswith(BRANCH_ENDS):
                nn.init.zeros_(parameter)
        return module

    return build


# -- acceptance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LR)
@pytest.mark.parametrize("factory", [mlp, Text])
def test_mup_is_flat_in_width(factory: Callable[..., LightningModule], method: str) -> None:
    seeds = 5 if method == "sgd" else 3  # its update follows the gradient's size, which varies most from seed to seed
    how = replace(sweep(seeds), weight_decay=1e-4 if method == "adamw" else 0.0)
    report = coordinate_check(factory, widths=WIDTHS, method=method, lr=LR[method], sweep=how)
    assert report.steps == tuple(range(1, 11))
    assert {s.note for s in report.slopes} == {""}
    assert report.passed, report.table()


@pytest.mark.parametrize("method", LR)
@pytest.mark.parametrize("factory", [mlp, Text])
def test_sp_fails_the_same_check(factory: Callable[..., LightningModule], method: str) -> None:
    report = coordinate_check(factory, widths=WIDTHS, rules="sp", method=method, lr=LR[method], sweep=sweep(1))
    assert not report.passed
    assert max(abs(s.slope) for s in report.failed if s.kind == "output") > 0.3
    assert max(abs(s.slope) for s in report.failed if s.kind == "update") > 0.3


@pytest.mark.parametrize("factory", [ResidualMLP, Text])
def test_complete_p_is_flat_in_depth(factory: Callable[..., LightningModule]) -> None:
    report = coordinate_check(factory, depths=DEPTHS, rules=COMPLETE_P, lr=LR["adam"], sweep=sweep(2))
    assert report.size == "depth"
    assert report.tolerance == 0.15
    assert report.passed, report.table()


@pytest.mark.parametrize("method", ["sgd", "adam"])
@pytest.mark.parametrize("factory", [ResidualMLP, Text])
def test_complete_p_is_flat_in_depth_from_quiet_branches(factory: Callable[..., LightningModule], method: str) -> None:
    how = sweep(3)
    report = coordinate_check(quiet(factory), depths=DEPTHS, rules=COMPLETE_P, method=method, lr=LR[method], sweep=how)
    assert report.passed, report.table()


@pytest.mark.parametrize("method", ["sgd", "adam"])
@pytest.mark.parametrize("factory", [ResidualMLP, Text])
def test_mup_alone_fails_in_depth_from_quiet_branches(factory: Callable[..., LightningModule], method: str) -> None:
    with pytest.warns(UserWarning, match="say nothing about depth"):
        report = coordinate_check(
            quiet(factory), depths=DEPTHS, method=method, lr=LR[method], sweep=sweep(1, updates=False)
        )
    assert max(s.slope for s in report.failed) > 0.3


@pytest.mark.parametrize("factory", [ResidualMLP, Text])
def test_mup_alone_fails_in_depth(factory: Callable[..., LightningModule]) -> None:
    with pytest.warns(UserWarning, match="say nothing about depth"):
        report = coordinate_check(factory, depths=DEPTHS, lr=LR["adam"], sweep=sweep(1, updates=False))
    assert max(s.slope for s in report.failed) > 0.3


def wrong(role: Role, **entries: Power) -> Rules:
    right = find_rules("mup")
    return Rules("wrong", {**right.rows, role: replace(right.rows[role], **entries)}, reference="none")


@pytest.mark.parametrize(
    ("rules", "culprits"),
    [
        (wrong(Role.HIDDEN, update_norm=Power()), set()),  # equal to the right one where fan_in = fan_out
        (wrong(Role.HIDDEN, update_norm=Power(fan_in=1 / 2)), {"net.2.weight", "net.4.weight"}),
        (wrong(Role.OUTPUT, update_norm=Power()), {"net.6.weight"}),
        (wrong(Role.VECTOR, update_norm=Power()), {"net.0.bias", "net.2.bias", "net.4.bias"}),
    ],
    ids=lambda value: "" if isinstance(value, Rules) else ",".join(sorted(value)) or "none",
)
def test_a_wrong_row_is_named(rules: Rules, culprits: set[str]) -> None:
    # Steps so small that a wrong layer does not yet carry the others away.
    report = coordinate_check(mlp, widths=WIDTHS, rules=rules, lr=1e-4, sweep=sweep(2))
    assert {s.layer for s in report.failed if s.kind == "update"} == culprits
    assert report.passed == (not culprits)


def test_a_wrong_initialization_shows_in_the_outputs() -> None:
    rules = wrong(Role.HIDDEN, init_std=Power())
    report = coordinate_check(mlp, widths=WIDTHS, rules=rules, lr=LR["adam"], sweep=sweep(1, updates=False))
    assert "net.4" in {s.layer for s in report.failed}


# -- the callback leaves no trace --------------------------------------------------------------------------------------


class Nosy(LightningModule):
    """A module on which everything that a probe could disturb leaves a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 8))
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval().requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.accuracy = torchmetrics.MeanMetric()
        self.count = 0
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x += 0.01 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        assert isinstance(self.calls, Tensor)
        self.calls += 1
        self.count += 1
        loss = F.cross_entropy(self.frozen(self.net(self.norm(x))), y)
        self.losses.append(float(loss.detach()))
        self.accuracy(loss.detach())
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(96, 16), torch.randint(8, (96,))), batch_size=16, shuffle=True)


def fit(module: LightningModule, *callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:  # noqa: ANN401
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module)
    return trainer


def trace(module: Nosy, trainer: Trainer) -> dict[str, Any]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    flags = [part.training for part in module.modules()]
    return {"losses": module.losses, "count": module.count, "flags": flags, **metrics}


EVAL_AT_START = pytest.mark.filterwarnings("ignore:Found 3 module")  # Nosy wants it so


@EVAL_AT_START
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_bit_identical_with_and_without(accumulate: int) -> None:
    plain, watched = Nosy(), Nosy()
    watched.load_state_dict(plain.state_dict())
    check = CoordinateCheck(steps=3)
    trainers = [
        fit(plain, accumulate_grad_batches=accumulate),
        fit(watched, check, accumulate_grad_batches=accumulate),
    ]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert trace(plain, trainers[0]) == trace(watched, trainers[1])
    assert plain.calls == 4 * accumulate
    assert {r.step for r in check.records} == {1, 2, 3}


@EVAL_AT_START
def test_the_probe_sees_no_randomness() -> None:
    module = Nosy()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net.parameters(), lr=0.0)  # type: ignore[method-assign]
    check = CoordinateCheck(steps=2)
    fit(module, check, steps=2)
    outputs = {(r.layer, r.value) for r in check.records if r.kind == "output"}
    # running statistics of the batch norm are the only thing that moves
    assert {layer for layer, value in outputs if value == 0} == set()
    assert {r.value for r in check.records if r.kind == "update"} == {0.0}


def test_accumulated_batches_are_one_step() -> None:
    checks = [CoordinateCheck(steps=2), CoordinateCheck(steps=2)]
    data = mlp(32).train_dataloader()
    for check, count in zip(checks, (1, 2), strict=True):
        check.probe = next(iter(data))
        loader = DataLoader(data.dataset, batch_size=64 // count)
        torch.manual_seed(0)
        module = mlp(32)
        module.train_dataloader = lambda loader=loader: loader  # type: ignore[method-assign, misc]
        fit(module, check, steps=2, accumulate_grad_batches=count)
    assert len(checks[0].records) == 24
    for one, other in zip(checks[0].records, checks[1].records, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-3)


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_records_of_a_transformer_cover_what_is_called_and_what_moves() -> None:
    check = CoordinateCheck(steps=1, size=64, seed=7)
    fit(Text(64, 2), check, steps=1)
    outputs = [r.layer for r in check.records if r.kind == "output"]
    blocks = [f"encoder.layers.{i}" for i in range(2)]
    inner = ("norm1", "self_attn", "norm2", "linear1", "linear2")
    expected = {"tokens", "positions", "encoder.norm", "readout", *blocks, *(f"{b}.{n}" for b in blocks for n in inner)}
    assert set(outputs) == expected  # the model's own output is the readout's
    assert len(outputs) == len(expected)
    assert {r.layer for r in check.records if r.kind == "update"} == {n for n, _ in Text(64, 2).named_parameters()}
    assert {(r.size, r.seed, r.step) for r in check.records} == {(64, 7, 1)}


def test_groups_follow_the_plan() -> None:
    check = CoordinateCheck(steps=1)
    fit(Text(128), Parametrize(lambda: Text(64)), check, steps=1)
    groups = {r.layer: r.group for r in check.records if r.kind == "output"}
    assert groups["tokens"] == "input"
    assert groups["encoder.layers.0"] == "stream"
    assert groups["encoder.layers.0.self_attn"] == "hidden"
    assert groups["encoder.layers.0.norm1"] == "vector"
    assert groups["readout"] == "output"


def test_first_update_of_sgd_is_the_gradients() -> None:
    module = mlp(32)
    gradients: dict[str, Tensor] = {}
    module.on_before_optimizer_step = lambda optimizer: gradients.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    )
    check = CoordinateCheck(steps=1)
    fit(module, check, steps=1)
    found = {r.layer: r.value for r in check.records if r.kind == "update"}
    wanted = 0.01 * float(torch.linalg.matrix_norm(gradients["net.0.weight"], ord=2)) / (32 / 16) ** 0.5
    assert found["net.0.weight"] == pytest.approx(wanted, rel=1e-3)


def test_folded_and_hooked_multipliers_measure_alike() -> None:
    values = {}
    ways: tuple[Literal["fold", "hook"], ...] = ("fold", "hook")
    for how in ways:
        torch.manual_seed(0)
        check = CoordinateCheck(steps=2)
        parametrize = Parametrize(
            lambda: ResidualMLP(32, 2),
            rules=COMPLETE_P,
            method="adam",
            lr=1e-3,
            options={"eps": 1e-12},
            multipliers=how,
        )
        fit(ResidualMLP(32, 4), parametrize, check, steps=2)
        values[how] = {(r.kind, r.layer, r.step): r.value for r in check.records}
    assert values["fold"] == pytest.approx(values["hook"], rel=1e-2)


def test_a_file_is_written_when_the_steps_are_over(tmp_path: Path) -> None:
    check = CoordinateCheck(steps=2)
    fit(mlp(32), check, steps=3, default_root_dir=tmp_path)
    assert load_coordinates(tmp_path / "coordinate_check.csv") == check.records
    assert {r.step for r in check.records} == {1, 2}


def test_a_file_is_written_when_training_ends_early(tmp_path: Path) -> None:
    check = CoordinateCheck(steps=5)
    fit(mlp(32), check, steps=2, default_root_dir=tmp_path)
    assert {r.step for r in load_coordinates(tmp_path / "coordinate_check.csv")} == {1, 2}


class Manual(MLP):
    def __init__(self) -> None:
        super().__init__(32)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.optimizers().step()  # type: ignore[union-attr]
        return loss


def test_manual_optimization_needs_a_forward() -> None:
    with pytest.raises(ValueError, match=r"training_step of Manual steps its optimizers itself"):
        fit(Manual(), CoordinateCheck(steps=1), steps=1)
    check = CoordinateCheck(steps=1, forward=lambda module, batch: module.net(batch[0]))
    fit(Manual(), check, steps=1)
    assert {"net.0", "net.2", "net.4"} == {r.layer for r in check.records if r.kind == "output"}


class Raw(MLP):
    def __init__(self) -> None:
        super().__init__(32)
        self.scale = nn.Parameter(torch.ones(4, 4))


def test_unreadable_parameters_cost_the_updates_only() -> None:
    check = CoordinateCheck(steps=1)
    with pytest.warns(UserWarning, match=r"(?s)records outputs alone.*scale"):
        fit(Raw(), check, steps=1)
    assert {r.kind for r in check.records} == {"output"}


def test_refused_settings() -> None:
    with pytest.raises(ValueError, match="1 or more, got steps=0"):
        CoordinateCheck(steps=0)
    with pytest.raises(ValueError, match="either widths or depths, got widths=None and depths=None"):
        coordinate_check(mlp)
    with pytest.raises(ValueError, match=r"widths must hold two positive sizes or more, got \(64,\)"):
        coordinate_check(mlp, widths=(64,))


# -- the sweep ---------------------------------------------------------------------------------------------------------


def small(how: Sweep) -> CoordinateReport:
    return coordinate_check(mlp, widths=(32, 64), steps=1, sweep=how)


def test_a_sweep_leaves_no_trace(tmp_path: Path) -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = (torch.get_rng_state(), random.getstate(), logger.level)
    small(sweep(1))
    after = (torch.get_rng_state(), random.getstate(), logger.level)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_repeats_itself() -> None:
    assert small(sweep(2)).records == small(sweep(2)).records


def test_all_trainings_see_the_given_batches() -> None:
    seen: list[float] = []

    class Seeing(MLP):
        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
            seen.append(float(batch[0].sum()))

    x, y = torch.randn(64, 16), torch.randint(8, (64,))
    data = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    coordinate_check(Seeing, widths=(32, 64), steps=3, sweep=sweep(2, data=data))
    assert len(seen) == 12
    assert seen == 4 * seen[:3]
    assert len(set(seen)) == 3


def test_a_module_keeps_its_own_optimizer() -> None:
    report = coordinate_check(mlp, widths=(32, 64), steps=1, method=None, sweep=sweep(1))
    assert report.slopes
    with pytest.raises(ValueError, match="belong to method"):
        coordinate_check(mlp, widths=(32, 64), method=None, lr=0.1, sweep=sweep(1))


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    small(Sweep(seeds=(0,), accelerator="cpu"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "coordinate check" in captured.err


def test_divergence_is_named() -> None:
    report = coordinate_check(mlp, widths=(32, 64), method="sgd", lr=1e30, steps=3, sweep=sweep(1))
    assert not report.passed
    assert "not finite at 32, 64" in report.table()


class ZeroReadout(MLP):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.zeros_(self.net[-1].weight)


def test_layers_behind_a_zero_readout_do_not_change_at_first() -> None:
    report = coordinate_check(ZeroReadout, widths=WIDTHS, method="sgd", lr=0.1, steps=2, sweep=sweep(2))
    notes = {(s.kind, s.layer, s.step): s.note for s in report.slopes}
    assert notes["output", "net.2", 1] == "no change"
    assert notes["output", "net.2", 2] == notes["output", "net.4", 1] == ""
    assert report.passed, report.table()


def test_rates_by_role_reach_the_smallest_width() -> None:
    how = replace(sweep(1), choices=Choices(lr_multipliers={"readout": 0.25}))
    reports = [coordinate_check(mlp, widths=(32, 64), method="sgd", steps=1, sweep=s) for s in (sweep(1), how)]
    plain, slowed = ([r.value for r in report.records if r.layer == "net.6.weight"] for report in reports)
    assert len(plain) == 2
    assert slowed == pytest.approx([0.25 * value for value in plain], rel=1e-3)  # differences of float32 weights


class Still(Nosy):
    """Nothing in it moves but what a probe fails to hold still: dropout, noise, a batch that is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


@pytest.mark.filterwarnings("ignore:Found 3 module")
def test_a_module_that_does_not_move_measures_zero() -> None:
    check = CoordinateCheck(steps=3)
    fit(Still(), check, steps=3)
    assert {r.step for r in check.records} == {1, 2, 3}
    assert {(r.layer, r.value) for r in check.records if r.value != 0} == set()


def yardsticks_of(*names: str, tied_to: tuple[str, ...] = ()) -> dict[str, Yardstick]:
    return {n: Yardstick(ParamSpec(n, Role.HIDDEN, (8, 8), tied_to=tied_to), 1.0, 1.0) for n in names}


def test_attention_ends_with_its_projection() -> None:
    found = yardsticks_of("attn.in_proj_weight", "attn.out_proj.weight")
    module = nn.MultiheadAttention(8, 2)
    for ends, name in ((False, "attn.in_proj_weight"), (True, "attn.out_proj.weight")):
        main = main_parameter("attn", module, found, ends=ends)
        assert main is not None
        assert main.spec.name == name


def test_a_tied_readout_is_what_it_shares() -> None:
    found = yardsticks_of("embedding.weight", tied_to=("readout.weight",))
    main = main_parameter("readout", nn.Linear(8, 8, bias=False), found)
    assert main is not None
    assert main.spec.name == "embedding.weight"


def test_copies_do_not_follow_the_parameter() -> None:
    parameter = nn.Parameter(torch.ones(2))
    copied = whole(parameter)
    parameter.data.zero_()
    assert copied.tolist() == [1.0, 1.0]


def test_outputs_are_kept_as_they_were() -> None:
    """A model may go on to write into what a layer put out."""
    layer = nn.Linear(2, 2)
    with captured({"fc": layer}) as outputs, torch.no_grad():
        y = layer(torch.ones(1, 2))
        want = y.clone()
        y.zero_()
    assert torch.equal(outputs["fc"], want.flatten())
    assert not layer._forward_hooks


def test_a_probe_gives_back_whatever_it_took() -> None:
    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen, self.metric = nn.Linear(2, 2).eval(), [1], torchmetrics.MeanMetric()
            self.register_buffer("calls", torch.zeros(()))

    module = Own()
    own_log = lambda *args, **kwargs: None  # noqa: E731
    module.__dict__["log"] = own_log
    module.metric(torch.tensor(3.0))
    before, fast = dict(vars(module)), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with undisturbed(module):
            assert not torch.is_grad_enabled()
            module.log("loss", 1.0)
            module.log_dict({"loss": 1.0})
            module.metric(torch.tensor(5.0))
            module.calls += 1
            module.seen.append(2)
            module.new = 3
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert module.__dict__["log"] is own_log
    assert "log_dict" not in module.__dict__
    assert vars(module).keys() == before.keys()
    assert (module.seen, float(module.calls), float(module.metric.compute())) == ([1], 0.0, 3.0)
    assert float(module.metric._forward_cache) == 3.0
    assert (module.training, module.layer.training) == (True, False)


def test_attention_is_not_fused_while_it_is_probed() -> None:
    """torch's fused layer would skip the submodules."""
    assert torch.backends.mha.get_fastpath_enabled()
    with undisturbed(LightningModule()):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own imports
def test_nothing_is_compiled_for_a_probe() -> None:
    compiled: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:  # noqa: ANN401
        compiled.append(graph)
        return graph.forward

    layer = torch.compile(nn.Linear(2, 2), backend=backend)
    with undisturbed(LightningModule()):
        layer(torch.ones(1, 2))
    assert compiled == []


def test_a_branchs_own_multiplier_is_divided_out() -> None:
    watch = object.__new__(Watch)
    watch._outputs, watch._modules = {"fc": torch.zeros(4)}, {"fc": nn.Linear(4, 4)}
    watch._yardsticks = {"fc.weight": Yardstick(ParamSpec("fc.weight", Role.HIDDEN, (4, 4)), 0.5, 1.0)}
    assert watch._distance("fc", torch.ones(4)) == 2.0
    watch._yardsticks = {}
    assert watch._distance("fc", torch.ones(4)) == 1.0


def test_outputs_that_change_their_shape_are_dropped() -> None:
    class Growing(MLP):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = (part[: 8 + self.global_step] for part in batch)
            return F.cross_entropy(self.net(x), y)

    check = CoordinateCheck(steps=1)
    with pytest.warns(UserWarning, match=r"drops 'net\.[0-9]': its output on one batch changes its shape"):
        fit(Growing(32), check, steps=1)
    assert {r.kind for r in check.records} == {"update"}


def test_the_probe_runs_in_the_trainers_precision() -> None:
    seen: list[bool] = []

    def forward(module: LightningModule, batch: Any) -> None:  # noqa: ANN401
        seen.append(torch.is_autocast_enabled("cpu"))
        module.net(batch[0])

    fit(MLP(32), CoordinateCheck(steps=1, forward=forward), steps=1, precision="bf16-mixed")
    assert seen == [True, True]
