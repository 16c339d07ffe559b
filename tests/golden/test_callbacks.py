"""The numbers of the paper's authors once more, from callbacks around torch's own optimizers in a real Trainer.

What is replayed are matrices whose method torch has: Adam as ``torch.optim.Adam``, and the debiased average of SGD as
``torch.optim.SGD(momentum=b)``, whose buffer is ``(1 - b^t) / (1 - b)`` times that average, which the learning rate
takes back. (``dampening=b`` is no such average: torch does not dampen the first gradient.) A normalized step has one
size whatever the buffer's, but for the 1e-10 that is added to norms; so its rate is left alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_mup import SpectralNormalization, WeightDecay
from lightning_mup.core.linalg import power_iteration
from lightning_mup.schedules import Fraction, Steps, constant, linear
from tests.golden.dialect import Record, known, settings_of
from tests.golden.replay import Recorded, normalization_of, relative_error, stored
from tests.golden.test_replay import HERE, MANIFEST
from tests.lightning.helpers import trainer, values

CHAIN, UPDATE = "parameter_trajectory", "normalized_update"
ROLES = {"hidden": "hidden", "readout": "output"}  # of what is no embedding
PRECISIONS = {"float64": "64-true", "float32": "32-true"}

# -- which matrices of which cases ---------------------------------------------------------------------------------


def method(case: Record, p: Record) -> str:
    return str(p.get("optimizer", case["optimizer"]))


def has_method(case: Record, p: Record) -> bool:
    """Whether torch has the method, and the decay may follow the rate: that of SGD carries the debiasing, too."""
    # Not Muon: torch's iterates in bfloat16. Nor AdaMuon, Shampoo and SOAP, which torch does not have.
    return method(case, p) == "adam" or (method(case, p) == "sgd" and not case.get("weight_decay"))


def hides_direction(case: Record, p: Record) -> bool:
    """Whether the recorded power iteration sees an update at a rate of 0, where the callback sees no step."""
    factors = case.get("schedule", {}).get("factor_per_step_as_used", [])
    moves = Recorded(case, p, HERE).gradients.any(-1).any(-1)
    at_zero = [move for factor, move in zip(factors, moves, strict=False) if factor == 0 and move]
    return normalization_of(case, p) == "spectral" and bool(at_zero)


def selected(case: Record, wanted: Callable[[Record, Record], bool]) -> Record:
    """Return a case with some matrices alone; they are independent but for clipping, so there it is all or none."""
    kept = [p for p in case["parameters"] if wanted(case, p)]
    return {**case, "parameters": [] if case.get("gradient_clip_norm") and kept != case["parameters"] else kept}


def cases_of(wanted: Callable[[Record, Record], bool]) -> list[Record]:
    found = [selected(case, wanted) for case in MANIFEST["cases"] if case["kind"] in (CHAIN, UPDATE)]
    return [case for case in found if case["parameters"]]


CASES = cases_of(lambda case, p: has_method(case, p) and not hides_direction(case, p))
HIDDEN = cases_of(lambda case, p: has_method(case, p) and hides_direction(case, p))
BY_ID = {case["id"]: case for case in CASES if case["dtype"] == "float64"}

# -- a run ---------------------------------------------------------------------------------------------------------


class Matrices(L.LightningModule):
    """The matrices of a case under a loss that is linear in them, so that its gradients are those recorded."""

    def __init__(self, case: Record) -> None:
        super().__init__()
        self.case, self.recorded = case, [Recorded(case, p, HERE) for p in case["parameters"]]
        self.weights = nn.ModuleDict({key(r.p): self.layer(r) for r in self.recorded})
        self.seen = [self.now()]

    def layer(self, r: Recorded) -> nn.Module:
        rows, columns = r.p["shape"]
        dtype = r.wanted.dtype
        made: nn.Module = (
            nn.Embedding(rows, columns, dtype=dtype)
            if r.p["role"] == "embedding"
            else nn.Linear(rows, columns, bias=False, dtype=dtype)
        )
        start = stored(r.initial, r.p) if self.case["kind"] == CHAIN else torch.zeros_like(made.weight)
        made.weight = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        return made

    def weight(self, r: Recorded) -> nn.Parameter:
        found = self.weights[key(r.p)].weight
        assert isinstance(found, nn.Parameter)
        return found

    def now(self) -> list[Tensor]:
        found = values(self)
        return [stored(found[name_of(r.p)], r.p) for r in self.recorded]

    def training_step(self, step: int) -> Tensor:
        parts = [(self.weight(r) * stored(r.gradients[step], r.p)).sum() for r in self.recorded]
        return torch.stack(parts).sum()

    def on_train_batch_end(self, *args: object) -> None:
        self.seen.append(self.now())

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(self.case["steps"]), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - one of the many forms that Lightning takes
        (name,) = {method(self.case, r.p) for r in self.recorded}
        groups = [self.group(r) for r in self.recorded]
        if name == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(groups)
        else:
            optimizer = torch.optim.SGD(groups)
        if self.case["kind"] == UPDATE:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def group(self, r: Recorded) -> dict[str, Any]:
        taken = {"betas", "eps", "momentum"}
        own = {name: value for name, value in settings_of(self.case, r.p).items() if name in taken}
        return {"params": [self.weight(r)], "lr": r.p.get("learning_rate", 1.0), **own}

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        recorded = self.case["schedule"]
        if isinstance(optimizer, torch.optim.SGD):
            assert "normalization" not in self.case
            return LambdaLR(optimizer, [debiased(recorded, g["momentum"]) for g in optimizer.param_groups])
        total, warmup = Steps(recorded["total_steps"]), Steps(recorded["warmup_steps"])
        if recorded["kind"] == "const":
            return constant(optimizer, total=total, warmup=warmup)
        assert recorded["kind"] == "linear"
        return linear(optimizer, total=total, warmup=warmup, decay=Fraction(recorded["decay_fraction"]))


def debiased(recorded: Record, beta: float) -> Callable[[int], float]:
    """Return the factor by which torch's sum of gradients becomes the scheduled, debiased average."""
    factors = [*recorded["factor_per_step_as_used"], 0.0]  # a scheduler looks one step ahead
    return lambda step: factors[step] * (1 - beta) / (1 - beta ** (step + 1))


def key(p: Record) -> str:
    return str(p["name"]).replace(".", "-")


def name_of(p: Record) -> str:
    return f"weights.{key(p)}.weight"


class Start(Callback):
    """Lets a spectral normalization begin at the recorded vectors, when a checkpoint would."""

    def __init__(self, spectral: SpectralNormalization, turned: Callable[[Recorded, Tensor], Tensor]) -> None:
        self.spectral, self.turned = spectral, turned

    def on_train_start(self, ran: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Matrices)
        vectors = {name_of(r.p): self.turned(r, r.out["initial_vector_array"].view(1, -1)) for r in module.recorded}
        self.spectral.load_state_dict({name: {"step": torch.tensor(0), "v": v} for name, v in vectors.items()})


def as_recorded(r: Recorded, v_NO: Tensor) -> Tensor:
    return v_NO


def turned_by_first_update(r: Recorded, v_NO: Tensor) -> Tensor:
    """Return the vector after Adam's first update, ``g / (|g| + eps)``, and the five iterations of the warm-up."""
    g = r.gradients[0].mT[None]
    return power_iteration(g / (g.abs() + settings_of(r.case, r.p)["eps"]), v_NO, iterations=5)[1]


def callbacks_of(case: Record, turned: Callable[[Recorded, Tensor], Tensor] = as_recorded) -> list[Callback]:
    """Return what decays and normalizes; hidden matrices that are so by rms are declared as readouts."""
    own = [p for p in case["parameters"] if p["role"] != "embedding"]
    found: list[Callback] = []
    if case["kind"] == CHAIN:
        roles = {name_of(p): known(ROLES, p["role"], "role") for p in own}
        found.append(WeightDecay(case["weight_decay"], policy="constant", base="self", schedule="lr", roles=roles))
    if "normalization" in case:
        how = {p["role"]: normalization_of(case, p) for p in own}
        roles = {name_of(p): "output" if how[p["role"]] == "rms" else ROLES[p["role"]] for p in own}
        spectral = SpectralNormalization(
            readout=how.get("readout", "spectral"),
            iterations=math.ceil(case["normalization"]["power_iterations"]),
            warmup_steps=case["normalization"]["warmup_steps"],
            vectors=1,
            roles=roles,
        )
        found += [spectral, Start(spectral, turned)]
    return found


def failed(case: Record, callbacks: list[Callback], clip: float | None = None) -> dict[str, float]:
    """Return the matrices whose worst error, of the way from the start or of the single steps, is too large."""
    module = Matrices(case)
    ran = trainer(*callbacks, steps=case["steps"], gradient_clip_val=clip or None, precision=PRECISIONS[case["dtype"]])
    ran.fit(module)
    errors: dict[str, float] = {}
    for r, way in zip(module.recorded, zip(*module.seen, strict=True), strict=True):
        at = torch.stack(way)
        got = at[1:] - at[0] if case["kind"] == CHAIN else at[:-1] - at[1:]
        wanted = r.wanted - r.initial if case["kind"] == CHAIN else r.wanted
        errors[r.p["name"]] = relative_error(got, wanted)
    tolerance = case["accuracy"]["suggested_relative_tolerance"]
    return {name: error for name, error in errors.items() if not error <= tolerance}


# -- tests ---------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")  # recorded large on purpose: few steps


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['dtype']}")
def test_case(case: Record) -> None:
    assert not failed(case, callbacks_of(case), case.get("gradient_clip_norm"))


def test_what_is_covered() -> None:
    assert Counter(case["kind"] for case in CASES) == {CHAIN: 13, UPDATE: 7}
    assert Counter(method(case, p) for case in CASES for p in case["parameters"]) == {"adam": 49, "sgd": 29}
    assert sum("normalization" in case and case["kind"] == CHAIN for case in CASES) == 2
    assert [(case["id"], [p["name"] for p in case["parameters"]]) for case in HIDDEN] == [
        ("chain.spectral_shampoo_half_with_adam", ["readout"])
    ]
    everything = [case for case in MANIFEST["cases"] if case["kind"] in (CHAIN, UPDATE)]
    left_out = [case for case in everything if not selected(case, has_method)["parameters"]]
    assert len(left_out) == len(everything) - len(CASES) == 20
    assert {method(case, p) for case in left_out for p in case["parameters"]} == {"muon", "adamuon", "shampoo", "soap"}


@pytest.mark.parametrize("case", HIDDEN, ids=lambda c: c["id"])
def test_a_rate_of_zero_hides_the_direction_and_nothing_else(case: Record) -> None:
    assert failed(case, callbacks_of(case)).keys() == {"readout"}
    assert not failed(case, callbacks_of(case, turned_by_first_update))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("chain.adam", WeightDecay),
        ("chain.spectral_muon_with_adam", WeightDecay),
        ("chain.spectral_muon_with_adam", SpectralNormalization),
        ("normalized_sgd.short_warmup", SpectralNormalization),
        ("chain.adam_clipped", WeightDecay),
    ],
)
def test_every_callback_is_needed(name: str, without: type[Callback]) -> None:
    case = BY_ID[name]
    kept = [c for c in callbacks_of(case) if not isinstance(c, without)]
    assert failed(case, kept, case.get("gradient_clip_norm")).keys() == {p["name"] for p in case["parameters"]}


def test_clipping_is_needed() -> None:
    case = BY_ID["chain.adam_clipped"]
    assert failed(case, callbacks_of(case)).keys() == {p["name"] for p in case["parameters"]}
