"""The numbers of the paper's authors once more, from callbacks around torch's own optimizers in a real Trainer.

What is replayed are matrices whose method torch has: Adam as ``torch.optim.Adam``, and the debiased average of SGD as
``torch.optim.SGD(momentum=b)``, whose buffer is ``(1 - b^t) / (1 - b)`` times that average, which the learning rate
takes back. (``dampening=b`` is no such average: torch does not dampen the first gradient.) A normalized step has one
size whatever the buffer's, so its rate is left alone.
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

from lightning_mup import SpectralNormalization, WeightDecay
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


def expressible(case: Record, p: Record) -> bool:
    """Whether torch has the method, and the decay may follow the rate: that of SGD carries the debiasing, too."""
    # Not Muon: torch's iterates in bfloat16. Nor AdaMuon, Shampoo and SOAP, which torch does not have.
    return method(case, p) == "adam" or (method(case, p) == "sgd" and not case.get("weight_decay"))


def torchs(case: Record) -> Record:
    """Return a case with those matrices alone; matrices are independent but for clipping, so there it is all or none.

    ``SpectralNormalization`` has hidden matrices by spectral norm alone: by rms, they are declared as readouts.
    """
    kept = [p for p in case["parameters"] if expressible(case, p)]
    return {**case, "parameters": [] if case.get("gradient_clip_norm") and kept != case["parameters"] else kept}


CASES = [
    case for whole in MANIFEST["cases"] if whole["kind"] in (CHAIN, UPDATE) and (case := torchs(whole))["parameters"]
]

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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        parts = [(self.weight(r) * stored(r.gradients[batch_idx], r.p)).sum() for r in self.recorded]
        return torch.stack(parts).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.now())

    def train_dataloader(self) -> list[Tensor]:
        return [torch.zeros(1)] * int(self.case["steps"])

    def configure_optimizers(self) -> Any:
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

    def __init__(self, spectral: SpectralNormalization) -> None:
        self.spectral = spectral

    def on_train_start(self, ran: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Matrices)
        vectors = {name_of(r.p): r._out.get("initial_vector_array") for r in module.recorded}
        start = {name: {"step": torch.tensor(0), "v": v.view(1, -1)} for name, v in vectors.items() if v is not None}
        self.spectral.load_state_dict(start)


def callbacks_of(case: Record) -> list[Callback]:
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
            roles=roles,
        )
        found += [spectral, Start(spectral)]
    return found


def replay(case: Record, callbacks: list[Callback], clip: float | None) -> dict[str, float]:
    """Return the worst relative error of each matrix: of the way from the start, or of the single steps."""
    module = Matrices(case)
    trainer(
        *callbacks, steps=case["steps"], gradient_clip_val=clip or None, precision=PRECISIONS[case["dtype"]]
    ).fit(module)
    errors: dict[str, float] = {}
    for r, way in zip(module.recorded, zip(*module.seen, strict=True), strict=True):
        at = torch.stack(way)
        got = at[1:] - at[0] if case["kind"] == CHAIN else at[:-1] - at[1:]
        wanted = r.wanted - r.initial if case["kind"] == CHAIN else r.wanted
        errors[r.p["name"]] = relative_error(got, wanted)
    return errors


# -- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['dtype']}")
def test_case(case: Record) -> None:
    errors = replay(case, callbacks_of(case), case.get("gradient_clip_norm"))
    print({k: f"{v:.1e}" for k, v in errors.items()})
    tolerance = case["accuracy"]["suggested_relative_tolerance"]
    assert errors.keys() == {p["name"] for p in case["parameters"]}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}
