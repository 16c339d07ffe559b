"""Replay recorded numbers through the public optimizers: ``python -m tests.golden.replay FOLDER``.

The folder holds ``manifest.json`` (cases: gradients in, updates or parameters out), the arrays that it names, and
``learning_rate_multipliers.json``. Matrices are recorded as [d_in, d_out]; torch keeps [out, in]. Whatever is unknown
here, be it a kind, a setting, a peculiarity or a column, fails the case by name: nothing is left out in silence.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mup import SGD, SOAP, Adam, AdaMuon, Method, Muon, Shampoo, StackedOptimizer, all_methods
from lightning_mup.core.normalize import SpectralNormalize
from lightning_mup.core.transform import chain
from tests.golden.dialect import Record, UnknownError, known, learning_rate, settings_of
from tests.golden.rows import FAILED, replay_rows, show_rows

Compared = tuple[str, Tensor, Tensor]  # name, got, wanted; both [steps, d_in, d_out]

ZERO = 1e-12  # what counts as zero where zero was recorded, by the manifest's convention
VECTOR = "spectral_normalize/v"
CLASS_ITERATIONS = (1, 50)  # power iterations and warm-up steps of the classes' spectral_norm=True

CLASSES = {"sgd": SGD, "adam": Adam, "muon": Muon, "adamuon": AdaMuon, "shampoo": Shampoo, "soap": SOAP}

# -- one matrix: its optimizer -------------------------------------------------------------------------------------


def stored(x: Tensor, p: Record) -> Tensor:
    """Return a matrix in the layout of its parameter, and back: nn.Embedding's is the recorded one."""
    return x if p.get("role") == "embedding" else x.mT


def normalizing(name: str, iterations: int, warmup_steps: int) -> Method:
    """Return a method that ends in a spectral normalization of other iterations than the classes'."""
    own = all_methods()[name]
    make = own.chain
    assert make is not None
    return replace(own, chain=lambda settings: chain(make(settings), SpectralNormalize(iterations, warmup_steps)))


def normalization_of(case: Record, p: Record) -> str:
    """Return how a matrix' update is normalized: "none", "rms" (embeddings always), or "spectral"."""
    if "normalization" not in case:
        return "none"
    how: str = case["normalization"].get(p["role"], "rms" if p["role"] == "embedding" else "none")
    if how not in ("rms", "spectral"):
        raise UnknownError(f"unknown normalization {how!r} of {p['role']}")
    return how


def over_inputs(case: Record, p: Record) -> float:
    """Return a factor on the rate for matrices normalized as if looked up: unlike a looked-up row's, inputs add up."""
    added_up = normalization_of(case, p) == "rms" and p["role"] != "embedding"
    return float(p["shape"][0] ** -0.5) if added_up else 1.0


def build(weight: nn.Parameter, case: Record, p: Record, lr: float, weight_decay: float = 0.0) -> StackedOptimizer:
    """Return the optimizer of one matrix, through the public class of its name."""
    name, how = p.get("optimizer", case["optimizer"]), normalization_of(case, p)
    settings = settings_of(case, p) | {"lr": lr, "weight_decay": weight_decay, "decay": "independent"}
    axes = {"axes": ((1,), (0,))} if p.get("role") == "embedding" else {}
    group = {"params": [weight], "lookup": how == "rms", **axes}
    if how == "spectral":
        iterations = (math.ceil(case["normalization"]["power_iterations"]), case["normalization"]["warmup_steps"])
        if iterations != CLASS_ITERATIONS:
            method = normalizing(name, *iterations)
            return StackedOptimizer([group], method, {**method.defaults, **settings, "spectral_norm": False})
    return known(CLASSES, name, "optimizer")([group], **settings)


def start_iteration(optimizer: StackedOptimizer, vector: Tensor) -> None:
    """Let a spectral normalization, where there is one, begin at the recorded vector."""
    state = optimizer.state_dict()
    if VECTOR in state["state"][0]:
        state["state"][0][VECTOR] = vector
        optimizer.load_state_dict(state)


# -- cases by kind -------------------------------------------------------------------------------------------------


@cache
def arrays(path: Path) -> dict[str, Tensor]:
    """Return all arrays of a file."""
    with np.load(path) as file:
        return {key: torch.from_numpy(value) for key, value in file.items()}


@dataclass(frozen=True)
class Recorded:
    """What is recorded about one matrix of a case, in the case's precision."""

    case: Record
    p: Record
    folder: Path

    @property
    def wanted(self) -> Tensor:
        """What comes out, per step."""
        return self.out["expected_array"]

    @property
    def gradients(self) -> Tensor:
        """What goes in, per step."""
        found = arrays(self.folder / "gradients_float64.npz")[self.p["gradient_array"]]
        return found[: self.case["steps"]].to(self.wanted.dtype)

    @property
    def initial(self) -> Tensor:
        """Where a trajectory starts."""
        found = arrays(self.folder / "initial_parameters_float64.npz")
        return found[self.p["initial_parameter_array"]].to(self.wanted.dtype)

    @property
    def out(self) -> dict[str, Tensor]:
        """The case's own arrays of this matrix, by what they are."""
        found = arrays(self.folder / self.case["file"])
        return {key: found[name] for key, name in self.p.items() if key in ("expected_array", "initial_vector_array")}

    def start(self, initial: Tensor, lr: float, weight_decay: float = 0.0) -> tuple[nn.Parameter, StackedOptimizer]:
        """Return a parameter and the optimizer that is about to take its first step."""
        weight = nn.Parameter(stored(initial, self.p).clone(memory_format=torch.contiguous_format))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="weight_decay=")  # recorded large on purpose: few steps
            optimizer = build(weight, self.case, self.p, lr, weight_decay)
        if "initial_vector_array" in self.p:
            start_iteration(optimizer, self.out["initial_vector_array"])
        return weight, optimizer


def replay_updates(case: Record, folder: Path) -> Iterator[Compared]:
    """Replay updates before the learning rate: what one step at rate 1 takes from zero."""
    for p in case["parameters"]:
        recorded = Recorded(case, p, folder)
        zero = torch.zeros(p["shape"], dtype=recorded.wanted.dtype)
        weight, optimizer = recorded.start(zero, over_inputs(case, p))
        got = []
        for gradient in recorded.gradients:
            weight.data.zero_()
            weight.grad = stored(gradient, p)
            optimizer.step()
            got.append(-stored(weight.detach().clone(), p))
        yield p["name"], torch.stack(got), recorded.wanted


def replay_trajectory(case: Record, folder: Path) -> Iterator[Compared]:
    """Replay whole training steps, clipping over all matrices; what is compared is the way from the start."""
    recorded = [Recorded(case, p, folder) for p in case["parameters"]]
    rates = [learning_rate(case, r.p) * over_inputs(case, r.p) for r in recorded]
    started = [r.start(r.initial, lr, case["weight_decay"]) for r, lr in zip(recorded, rates, strict=True)]
    gone: list[list[Tensor]] = [[] for _ in recorded]
    for step, factor in enumerate(case["schedule"]["factor_per_step_as_used"][: case["steps"]]):
        for r, (weight, _) in zip(recorded, started, strict=True):
            weight.grad = stored(r.gradients[step], r.p).clone()
        if case["gradient_clip_norm"]:
            nn.utils.clip_grad_norm_([weight for weight, _ in started], case["gradient_clip_norm"])
        for r, lr, (weight, optimizer), way in zip(recorded, rates, started, gone, strict=True):
            optimizer.param_groups[0]["lr"] = factor * lr
            optimizer.step()
            way.append(stored(weight.detach(), r.p) - r.initial)
    for r, way in zip(recorded, gone, strict=True):
        yield r.p["name"], torch.stack(way), r.wanted - r.initial


KINDS: dict[str, Callable[[Record, Path], Iterator[Compared]]] = {
    "preconditioned_update": replay_updates,
    "normalized_update": replay_updates,
    "parameter_trajectory": replay_trajectory,
}


class Outcome(NamedTuple):
    """How one matrix of a case compares: worst relative Frobenius error over the steps."""

    case: str
    parameter: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether the error is too large, or not a number."""
        return not self.error <= self.tolerance


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the worst relative Frobenius error over the steps; where zero was recorded, only zero will do."""
    if got.shape != wanted.shape:
        return math.inf
    off, size = (torch.linalg.matrix_norm(x.double()) for x in (got.double() - wanted.double(), wanted))
    at_zero = torch.where(off <= ZERO, 0.0, math.inf).double()
    return float(torch.where(size == 0, at_zero, off / size).max())


def replay_case(case: Record, folder: Path) -> list[Outcome]:
    """Return one outcome for each matrix of a case, or one that says why there is none."""
    label, tolerance = f"{case['id']} {case['dtype']}", case["accuracy"]["suggested_relative_tolerance"]
    try:
        replayed = list(known(KINDS, case["kind"], "kind of case")(case, folder))
        if not replayed:
            raise UnknownError("the case has no parameters")
    except (ValueError, LookupError, TypeError, RuntimeError, OSError) as problem:
        return [Outcome(label, "-", math.nan, tolerance, f"not replayed: {problem}")]
    return [Outcome(label, name, relative_error(got, wanted), tolerance) for name, got, wanted in replayed]


# -- report --------------------------------------------------------------------------------------------------------


def show_cases(outcomes: list[Outcome]) -> None:
    """Print one line for each matrix."""
    print(f"{'case':<52}{'parameter':<26}{'worst error':>12}{'tolerance':>11}")
    for o in outcomes:
        said = f"  FAILED {o.note}" if o.failed else ""
        print(f"{o.case:<52}{o.parameter:<26}{o.error:>12.1e}{o.tolerance:>11.1e}{said}")


def main(arguments: list[str] | None = None) -> int:
    """Replay a folder and return the exit status: 0 where every case and row was replayed and none failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.replay", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds manifest.json, what it names, and the multipliers")
    folder = parser.parse_args(arguments).folder
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    outcomes = [replay_case(case, folder) for case in cases]
    rows = replay_rows(folder)
    show_cases([o for own in outcomes for o in own])
    show_rows(rows)
    failed = sum(any(o.failed for o in own) for own in outcomes)
    bad_rows = sum(o.verdict == FAILED for o in rows)
    print(f"\ncases: {len(cases)}, matrices: {sum(map(len, outcomes))}, failed cases: {failed}")
    print(f"rows: {len(rows)}, failed rows: {bad_rows}")
    return int(bool(failed or bad_rows or not cases or not rows))


if __name__ == "__main__":
    sys.exit(main())
