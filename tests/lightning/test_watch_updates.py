"""WatchUpdates on real trainings: its numbers are those of plain algebra, it leaves no trace, and loggers get them."""

# ruff: noqa: ANN401 - tests hand on whatever Lightning and torch take

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mup import SGD, AdamW, Muon, Parametrize
from lightning_mup.callbacks import quantities
from lightning_mup.callbacks.matrices import Watched, choose, rates_of
from lightning_mup.callbacks.probe_pass import multiplied
from lightning_mup.callbacks.quantities import CHEAP, QUANTITIES
from lightning_mup.callbacks.spectral_normalization import SpectralNormalization
from lightning_mup.callbacks.watch_updates import Per, WatchUpdates
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.spec import ParamSpec, Role
from tests.lightning.helpers import Net, Tied, trainer, values
from tests.models import TransformerLM, generator

LAYERS = ("net.0", "net.2", "net.4")
ROLES = {"net.0": "input", "net.2": "hidden", "net.4": "output"}
Values = dict[str, Tensor]


def sgd(module: L.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Noting(L.Callback):
    """Notes what a step is computed from: weights, gradients, rates, batches."""

    def __init__(self) -> None:
        self.old: list[Values] = []
        self.new: list[Values] = []
        self.gradients: list[Values] = []
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.old.append(values(module))
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.new.append(values(module))


def fit(module: L.LightningModule, *callbacks: L.Callback, steps: int = 1, **options: Any) -> dict[str, float]:
    torch.manual_seed(1)
    run = trainer(*callbacks, steps=steps, **options)
    run.fit(module)
    return {key: float(value) for key, value in run.callback_metrics.items() if "/" in key}


def rms(array: Any) -> float:
    return math.sqrt(float(np.mean(np.square(np.asarray(array, dtype=np.float64)))))


def singular(tensor: Tensor) -> Any:
    return np.linalg.svd(tensor.double().numpy(), compute_uv=False)


def forward(weights: Values, x: Tensor) -> dict[str, tuple[Any, Any]]:
    """Each layer's input and output, by numpy."""
    h, found = x.double().numpy(), {}
    for layer in LAYERS:
        weight, bias = (weights[f"{layer}.{key}"].double().numpy() for key in ("weight", "bias"))
        out = h @ weight.T + bias
        found[layer] = (h, out)
        h = np.maximum(out, 0.0)
    return found


def exponent(inputs: Any, change: Any) -> float:
    rows = inputs[np.abs(inputs).max(1) > 0]
    ratios = [rms(change @ x) / (rms(change) * rms(x)) for x in rows]
    return float(np.mean(np.log(ratios)) / math.log(change.shape[1]))


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_every_number_of_a_step_of_sgd_is_as_by_hand() -> None:
    noted = Noting()
    found = fit(Net(16, make=sgd).double(), WatchUpdates(1, quantities=QUANTITIES, per="matrix"), noted)
    old, (before, after) = noted.old[0], (forward(w, noted.batches[0]) for w in (noted.old[0], noted.new[0]))
    wanted: dict[str, float] = {}
    for name, gradient in noted.gradients[0].items():
        update = -0.1 * gradient
        weight = old[name] + update
        for what, matrix in (("weight", weight), ("update", update)):
            s = singular(matrix.reshape(len(matrix), -1))
            wanted[f"{what}/rms/{name}"] = rms(matrix)
            wanted[f"{what}/spectral_norm/{name}"] = s[0]
            wanted[f"{what}/stable_rank/{name}"] = (s**2).sum() / s[0] ** 2
        wanted[f"update/relative/{name}"] = rms(update) / rms(old[name])
        wanted[f"optimizer/effective_learning_rate/{name}"] = 0.0
        wanted[f"optimizer/decay_timescale/{name}"] = math.inf
    for layer in LAYERS:
        change = -0.1 * noted.gradients[0][f"{layer}.weight"].double().numpy()
        wanted[f"update/alignment/{layer}.weight"] = exponent(before[layer][0], change)
        wanted[f"feature/rms/{layer}"] = rms(after[layer][1])
        wanted[f"feature/change/{layer}"] = rms(after[layer][1] - before[layer][1])
    wanted["logits/rms"] = rms(after["net.4"][1])
    wanted["logits/change"] = rms(after["net.4"][1] - before["net.4"][1])
    passes = {key for key in wanted if key.startswith(("feature", "logits"))}  # outputs are captured in float32
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=2e-4 if key in passes else 1e-6), key


def test_a_role_is_the_mean_of_its_matrices() -> None:
    found = {}
    pers: tuple[Per, ...] = ("role", "matrix")
    for per in pers:
        torch.manual_seed(3)
        parametrize = Parametrize({"width": 16}, method="muon", lr=0.02, weight_decay=1e-3)
        found[per] = fit(Net(32), parametrize, WatchUpdates(1, quantities=QUANTITIES, per=per))
    role, matrix = found["role"], found["matrix"]
    assert {key.rpartition("/")[2] for key in role} == {*ROLES.values(), "vector", "rms", "change"}
    for layer, name in ROLES.items():
        for key in ("weight/rms", "update/spectral_norm", "update/alignment", "optimizer/decay_timescale"):
            assert role[f"{key}/{name}"] == pytest.approx(matrix[f"{key}/{layer}.weight"], rel=1e-6)
        assert role[f"feature/rms/{name}"] == pytest.approx(matrix[f"feature/rms/{layer}"])
    biases = [matrix[f"update/rms/{layer}.bias"] for layer in LAYERS]
    assert role["update/rms/vector"] == pytest.approx(sum(biases) / 3)


def test_alignment_of_a_role_is_the_mean_over_tokens() -> None:
    sums: dict[quantities.Key, quantities.Sum] = {
        ("update/alignment", "hidden", "a"): (3.0, 6.0),
        ("update/alignment", "hidden", "b"): (2.0, 2.0),
        ("update/alignment", "hidden", "zeros"): (0.0, 0.0),
    }
    assert quantities.means(sums, "role") == {"update/alignment/hidden": 0.625}
    assert quantities.means(sums, "matrix") == {"update/alignment/a": 0.5, "update/alignment/b": 1.0}


def test_updates_of_muon_have_the_norm_that_the_plan_wants() -> None:
    torch.manual_seed(0)
    found = fit(
        Net(64),
        Parametrize({"width": 64}, method="muon", lr=0.02, options={"ns_steps": 30}),
        WatchUpdates(1, quantities=["update/spectral_norm", "update/stable_rank"]),
    )
    assert found["update/spectral_norm/hidden"] == pytest.approx(0.02, rel=0.3)  # Newton-Schulz ends near 1


OPTIMIZERS: dict[str, Callable[[L.LightningModule], Any]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, weight_decay=1e-3),
    "adamw": lambda m: AdamW(m.named_parameters(), lr=0.01, weight_decay=1e-3),
    "muon": lambda m: Muon(m.parameters(), lr=0.02, weight_decay=1e-3),
    "torch adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "two groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 0.003},
        ],
        lr=0.01,
    ),
}
FRACTIONS = {"sgd": 1e-3, "adamw": 1e-3, "muon": 1e-3, "torch adamw": 1e-3, "two groups": 1e-3}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_and_rates_of_any_optimizer(name: str, accumulate: int) -> None:
    noted, watch = Noting(), WatchUpdates(2, quantities=[*CHEAP, "optimizer/decay_timescale"], per="matrix")
    found = fit(Net(16, make=OPTIMIZERS[name]), watch, noted, steps=2, accumulate_grad_batches=accumulate)
    old, new = noted.old[-1], noted.new[-1]
    assert len(noted.old) == 2
    for parameter, weight in new.items():
        assert found[f"update/rms/{parameter}"] == pytest.approx(rms(weight.double() - old[parameter]), rel=1e-4)
        assert found[f"weight/rms/{parameter}"] == pytest.approx(rms(weight))
    lr = {"sgd": 0.1, "muon": 0.02}.get(name, 0.01)
    assert found["optimizer/decay_timescale/net.2.weight"] == pytest.approx(1 / FRACTIONS[name])
    wanted = math.sqrt(lr * FRACTIONS[name])
    assert found["optimizer/effective_learning_rate/net.2.weight"] == pytest.approx(wanted)
    if name == "two groups":
        assert found["optimizer/decay_timescale/net.2.bias"] == math.inf


def test_rates_are_the_steps_own() -> None:
    """The schedule has moved on by the time the step is measured."""

    def make(module: L.LightningModule) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]

    found = fit(Net(16, make=make), WatchUpdates(3, quantities=["optimizer/decay_timescale"]), steps=3)
    assert found["optimizer/decay_timescale/hidden"] == pytest.approx(1 / (0.01 * 0.5**2 * 0.1))


def test_decay_by_a_callback_is_part_of_the_update_and_of_the_rates() -> None:
    def make(module: L.LightningModule) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]

    for order in (1, -1):
        noted = Noting()
        watch = WatchUpdates(2, quantities=["update/rms", "optimizer/decay_timescale"], per="matrix")
        callbacks: list[L.Callback] = [watch, WeightDecay(0.008, base="self")][::order]
        found = fit(Net(16, make=make), *callbacks, noted, steps=2)
        name = "net.2.weight"
        wanted = -0.005 * noted.gradients[1][name].double() - 0.004 * noted.old[1][name].double()
        assert found[f"update/rms/{name}"] == pytest.approx(rms(wanted), rel=1e-4)
        assert found[f"optimizer/decay_timescale/{name}"] == pytest.approx(250.0)


def test_rate_of_a_normalized_step_is_that_at_the_base() -> None:
    """Of matrices; vectors move at their group's."""

    def make(module: L.LightningModule) -> Any:
        return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)

    def rates(*others: L.Callback) -> dict[str, float]:
        names = {"net.2.weight": "hidden", "net.4.weight": "output"}
        quantities: list[Any] = ["optimizer/effective_learning_rate", "optimizer/decay_timescale"]
        watch = WatchUpdates(1, quantities=quantities, per="matrix")
        plan = Parametrize(lambda: Net(16, make=make), lr_multipliers={"output": 0.5})
        found = fit(Net(64, make=make), plan, WeightDecay(4e-4), watch, *others)
        assert found["optimizer/decay_timescale/net.2.weight"] == pytest.approx(4 / 4e-4)
        return {
            name: found[f"optimizer/effective_learning_rate/{name}"] for name in (*names, "net.2.bias", "net.4.bias")
        }

    plain, normalized = rates(), rates(SpectralNormalization())
    # A hidden matrix four times as wide has a quarter of the rate under Adam, and all of it once it is normalized.
    assert plain["net.2.weight"] == pytest.approx((0.02 / 4 * 1e-4) ** 0.5)
    assert normalized["net.2.weight"] == pytest.approx((0.02 * 1e-4) ** 0.5)
    assert normalized["net.4.weight"] == pytest.approx((0.5 * 0.02 * 1e-4) ** 0.5)
    assert {name: normalized[name] for name in ("net.2.bias", "net.4.bias")} == {
        name: plain[name] for name in ("net.2.bias", "net.4.bias")
    }


def test_decay_inside_a_normalized_gradient_removes_no_known_fraction() -> None:
    weight = nn.Parameter(torch.ones(1))
    inside = torch.optim.Adam([weight], lr=0.1, weight_decay=0.5)
    beside = torch.optim.Adam([weight], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)
    assert [rates_of(optimizer)[id(weight)] for optimizer in (inside, beside)] == [(0.1, 0.0), (0.1, 0.05)]


# -- which matrices ----------------------------------------------------------------------------------------------------


class Mixed(L.LightningModule):
    """Fused attention, a convolution, experts, an embedding, a recurrent layer and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(2, 16, 16) / 4)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.readout = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens)
        h = h + self.attention(query=h, value=h.flip(1), key=2 * h, need_weights=False)[0]
        h = h + self.conv(h.mT).mT
        h = h + torch.einsum("eoi,bti->bto", self.experts, h)
        return self.readout(self.frozen(h))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randint(10, (16, 9), generator=generator(0))), batch_size=8)


def test_matrices_are_those_of_the_optimizers() -> None:
    noted, module = Noting(), Mixed()
    watch = WatchUpdates(1, quantities=QUANTITIES, per="matrix", roles={"experts": "hidden", "readout.*": "output"})
    found = fit(module, watch, noted)
    change = {n: noted.new[0][n].double() - noted.old[0][n].double() for n in noted.new[0]}
    norm = {key.removeprefix("update/spectral_norm/"): found[key] for key in found if "update/spectral_norm/" in key}
    assert {name for name in norm if "bias" not in name} == {
        "tokens.weight",
        *(f"attention.in_proj_weight[{i}]" for i in range(3)),
        "attention.out_proj.weight",
        "conv.weight",
        *(f"experts[{i}]" for i in range(2)),
        "readout.weight",
    }
    for i, block in enumerate(change["attention.in_proj_weight"].chunk(3)):
        assert norm[f"attention.in_proj_weight[{i}]"] == pytest.approx(singular(block)[0], rel=1e-4)
    assert norm["conv.weight"] == pytest.approx(singular(change["conv.weight"].flatten(1))[0], rel=1e-4)
    for i, block in enumerate(change["experts"]):
        assert norm[f"experts[{i}]"] == pytest.approx(singular(block)[0], rel=1e-4)
    assert {key.removeprefix("update/alignment/") for key in found if "alignment" in key} == {
        *(f"attention.in_proj_weight[{i}]" for i in range(3)),
        "readout.weight",
    }
    assert {key.removeprefix("feature/rms/") for key in found if "feature/rms" in key} == {
        "tokens",
        "attention",
        "conv",
        "readout",
    }  # the experts' module is the whole model; the frozen layer is not watched


def test_attention_is_aligned_with_query_key_and_value() -> None:
    noted, module = Noting(), Mixed()
    watch = WatchUpdates(1, quantities=["update/alignment"], per="matrix", roles={"experts": "hidden"})
    tokens = next(iter(module.train_dataloader()))[0][:, :-1]
    found = fit(module, watch, noted)
    h = noted.old[0]["tokens.weight"][tokens].flatten(0, 1).double().numpy()
    name = "attention.in_proj_weight"
    blocks = (noted.new[0][name].double() - noted.old[0][name].double()).chunk(3)
    flipped = noted.old[0]["tokens.weight"][tokens].flip(1).flatten(0, 1).double().numpy()
    for i, inputs in enumerate((h, 2 * h, flipped)):
        assert found[f"update/alignment/{name}[{i}]"] == pytest.approx(exponent(inputs, blocks[i].numpy()), abs=1e-4)


def test_attention_with_other_keys_has_a_matrix_for_each() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    for i, key in enumerate("qkv"):
        name = f"{key}_proj_weight"
        spec = ParamSpec(name, Role.HIDDEN, tuple(getattr(attention, name).shape))
        assert multiplied(Watched.of(spec), attention) == (i,)


def test_at_most_so_many_of_each_role() -> None:
    specs = [ParamSpec(f"{i}.w", Role.HIDDEN, (6, 2), split=3) for i in range(4)]
    specs += [ParamSpec("b", Role.VECTOR, (6,))]
    chosen = choose(specs, 2)
    assert [label for watched in chosen for label in watched.labels] == ["0.w[0]", "3.w[2]", "b"]
    assert [len(choose(specs, most)) for most in (1, 5, 12, None)] == [2, 5, 5, 5]
    found = fit(TransformerLM(32, 3), WatchUpdates(1, per="matrix", max_matrices=2))
    assert sum(key.startswith("update/rms/") for key in found) == 2 + 2 + 2  # input, hidden, vector


def test_logits_are_those_of_a_tied_readout_and_of_layers_that_are_not_watched() -> None:
    noted = Noting()
    found = fit(Tied(16, make=sgd), WatchUpdates(1, quantities=["logits/rms"], forward=of_tokens), noted)
    new = noted.new[0]
    h = new["net.embedding.weight"].double()
    wanted = rms(h @ h.T + new["net.readout.bias"].double())
    assert found["logits/rms"] == pytest.approx(wanted, rel=1e-5)
    noted = Noting()
    found = fit(Net(16, make=sgd), WatchUpdates(1, quantities=["logits/rms"], max_matrices=1), noted)
    assert found["logits/rms"] == pytest.approx(rms(forward(noted.new[0], noted.batches[0])["net.4"][1]), rel=1e-5)


def of_tokens(module: Any, batch: Any) -> None:
    module.net["readout"](module.net["embedding"](torch.arange(4)))


def test_roles_without_a_plan_are_those_of_module_types() -> None:
    found = fit(Net(16, make=sgd), WatchUpdates(1, quantities=["update/rms"]))
    assert set(found) == {"update/rms/hidden", "update/rms/vector"}
    given = fit(Net(16, make=sgd), WatchUpdates(1, quantities=["update/rms"], roles={"net.4.weight": "output"}))
    assert set(given) == {"update/rms/hidden", "update/rms/output", "update/rms/vector"}


def test_copies_are_copies() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    taken = Watched.of(ParamSpec("w", Role.HIDDEN, (2, 2))).take(parameter)
    parameter.data.zero_()
    assert taken.tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


# -- when, and what it costs -------------------------------------------------------------------------------------------


def test_nothing_is_done_on_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(Watched, "take")
    counted(quantities, "norms_and_ranks")
    counted(nn.Sequential, "forward")
    every = fit(Net(16, make=sgd), WatchUpdates(4, quantities=QUANTITIES), steps=3)
    assert set(done) == {"forward"}
    assert len(done) == 3
    assert every == {}
    done.clear()
    fit(Net(16, make=sgd), WatchUpdates(4, quantities=QUANTITIES), steps=7, accumulate_grad_batches=2)
    assert done.count("take") == 6
    assert done.count("norms_and_ranks") == 2 * 6  # one for each weight and each update
    assert done.count("forward") == 14 + 2
    done.clear()
    fit(Net(16, make=sgd), WatchUpdates(2), steps=7)
    assert (done.count("take"), done.count("norms_and_ranks"), done.count("forward")) == (3 * 6, 0, 7)


def test_training_is_the_same_with_and_without() -> None:
    runs = []
    for callbacks in ([], [WatchUpdates(2, quantities=QUANTITIES)]):
        torch.manual_seed(0)
        module = TransformerLM(32, 1)
        torch.manual_seed(1)
        trainer(*callbacks, steps=5).fit(module)
        runs.append(values(module))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_the_batch_stays_the_same() -> None:
    seen: list[float] = []

    def run(module: Any, batch: Any) -> None:
        seen.append(float(batch[0].sum()))
        module.net(batch[0])

    fit(Net(16, make=sgd), WatchUpdates(2, quantities=["feature/change"], forward=run), steps=6)
    assert len(seen) == 6  # before and after each of three
    assert len(set(seen)) == 1
    seen.clear()
    own = [torch.ones(3, 8), torch.zeros(3, dtype=torch.long)]
    fit(Net(16, make=sgd), WatchUpdates(2, quantities=["feature/rms"], probe=own, forward=run), steps=4)
    assert seen == [24.0, 24.0]


class Manual(Net):
    """Two optimizers, which step in every batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


def two(module: Any) -> Any:
    first, rest = [*module.net[0].parameters()], [*module.net[2:].parameters()]
    return [torch.optim.SGD(first, lr=0.1), torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)]


def test_manual_optimization() -> None:
    with pytest.raises(ValueError, match=r"cannot be run for update/alignment; give WatchUpdates\(forward="):
        fit(Manual(make=two, automatic=False), WatchUpdates(1, quantities=["update/alignment"]))
    noted = Noting()
    watch = WatchUpdates(2, quantities=QUANTITIES, per="matrix", forward=lambda module, batch: module.net(batch[0]))
    found = fit(Manual(make=two, automatic=False), watch, noted, steps=8)  # Lightning counts each optimizer's
    assert len(noted.new) == 4
    before = noted.old[-2]  # the first optimizer's step is the batch's first
    for name, weight in noted.new[-1].items():
        assert found[f"update/rms/{name}"] == pytest.approx(rms(weight.double() - before[name]), rel=1e-4)
    assert found["optimizer/decay_timescale/net.0.weight"] == math.inf
    assert found["optimizer/decay_timescale/net.2.weight"] == pytest.approx(1000.0)


class Saving(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_steps_are_counted_over_resumed_runs(tmp_path: Path) -> None:
    steps: list[int] = []

    class Counting(WatchUpdates):
        def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
            steps.append(trainer.global_step)

    fit(Net(16, make=sgd), Counting(3), Saving(tmp_path), steps=4)
    assert steps == [3]
    trainer(Counting(3), steps=10).fit(Net(16, make=sgd), ckpt_path=tmp_path / "4.ckpt")
    assert steps == [3, 6, 9]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision: str) -> None:
    noted = Noting()
    found = fit(Net(16, make=sgd), WatchUpdates(1, quantities=QUANTITIES, per="matrix"), noted, precision=precision)
    for name, weight in noted.new[0].items():
        change = weight.float() - noted.old[0][name].float()
        assert found[f"update/spectral_norm/{name}"] == pytest.approx(singular(change.reshape(len(change), -1))[0])
    assert 0 < found["update/alignment/net.2.weight"] < 1
    assert found["logits/rms"] > 0


def test_divergence_does_not_stop_a_run() -> None:
    def make(module: L.LightningModule) -> Any:
        return torch.optim.SGD(module.parameters(), lr=1e30)

    found = fit(Net(16, make=make), WatchUpdates(3, quantities=QUANTITIES), steps=3)
    assert math.isnan(found["weight/spectral_norm/hidden"])


class Bottleneck(Net):
    def build(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 8), nn.Flatten())


def test_what_cannot_be_known_is_said() -> None:
    with pytest.warns(UserWarning, match="nothing to log for update/alignment: no watched matrix"):
        fit(Bottleneck(make=sgd), WatchUpdates(1, quantities=["update/rms", "update/alignment"]), steps=2)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantities": ["update/spectral_nrm"]}, "did you mean 'update/spectral_norm'"),
        ({"quantities": []}, r"must name one or more, got \[\]"),
        ({"per": "layer"}, "'role' or 'matrix', got 'layer'"),
        ({"every_n_steps": 0}, "1 or more, got 0 and 8"),
        ({"max_matrices": 0}, "max_matrices=None takes all"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WatchUpdates(**settings)


def test_roles_beside_a_plan_are_refused() -> None:
    watch = WatchUpdates(1, roles={"net.2.weight": "hidden"})
    with pytest.raises(ValueError, match=r"give them to Parametrize\(roles=...\) alone"):
        fit(Net(32), Parametrize({"width": 16}), watch)


def test_every_quantity_is_documented_and_the_default_is_cheap() -> None:
    assert all(name in str(WatchUpdates.__doc__) for name in QUANTITIES)
    assert not set(CHEAP) & (quantities.OF_PASSES | {q for q in QUANTITIES if "spectral" in q or "rank" in q})
    assert WatchUpdates(quantities=["update/rms", "weight/rms", "update/rms"]).quantities == (
        "weight/rms",
        "update/rms",
    )


# -- loggers -----------------------------------------------------------------------------------------------------------


def test_csv_gets_columns(tmp_path: Path) -> None:
    watch = WatchUpdates(2, quantities=["update/spectral_norm", "logits/rms"])
    fit(Net(16, make=sgd), watch, steps=5, logger=CSVLogger(tmp_path), log_every_n_steps=5)
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    watched = [row for row in rows if row["update/spectral_norm/hidden"]]
    assert [int(row["step"]) for row in watched] == [1, 3]  # counted from 0, as Lightning's loggers do
    assert all(float(row["logits/rms"]) > 0 for row in watched)
    assert [row["step"] for row in rows if row["loss"]] == ["4"]  # independent of log_every_n_steps


class Kept(WatchUpdates):
    """Keeps what it logs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(1, **settings)
        self.logged: list[dict[str, float]] = []

    def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)
        super()._log(trainer, metrics)


def test_wandb_sums_up_by_minimum_and_last(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, prefix="run")
    run = logger.experiment
    defined: list[str] = []
    original = run.define_metric

    def define(name: str, **options: Any) -> Any:
        defined.append(name)
        return original(name, **options)

    run.define_metric = define  # type: ignore[method-assign]
    try:
        watch = Kept(quantities=["update/spectral_norm", "logits/rms"], per="matrix")
        fit(Net(16, make=sgd), watch, steps=4, logger=logger)
        found = {key: dict(run.summary[f"run-{key}"]) for key in watch.logged[-1]}
    finally:
        wandb.finish()
    assert len(watch.logged) == 4
    assert len(defined) == len(watch.logged[0])  # once each
    assert "update/spectral_norm/net.2.weight" in found
    for key, values_of_it in found.items():
        series = [metrics[key] for metrics in watch.logged]
        assert values_of_it == pytest.approx({"min": min(series), "last": series[-1]}), key
