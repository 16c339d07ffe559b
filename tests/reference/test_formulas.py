"""The public optimizers step as the formulas say, in float64 and setting by setting; the formulas share no code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mup import SGD, SOAP, Adam, AdamAtan2, AdaMuon, AdamW, Muon, Shampoo, StackedOptimizer
from tests.reference import formulas
from tests.reference.formulas import Array, Formula

Settings = dict[str, Any]
Shape = tuple[int, ...]
Shapes = st.SearchStrategy[Shape]

TOLERANCE = 1e-9  # relative Frobenius error of an update, at each step
VECTOR = "spectral_normalize/v"
EXAMPLES = settings(max_examples=8)


def sizes(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


def squares(low: int, high: int) -> Shapes:
    return sizes(low, high).map(lambda size: (size, size))


# Shapes are torch's, (outputs, inputs), like those of the parameters.
ANY = st.tuples(sizes(1, 8), sizes(1, 8))
SQUARE = squares(2, 7)
# Blocks of 4 whose remainders have 2 rows or more. One row's factor has rank 1 after one step, and where QR steps begin
# before a factor has full rank, they go on from an arbitrary basis of its null space: no two programs agree.
RAGGED = st.tuples(sizes(6, 7), sizes(6, 7))
FULL_RANK = st.tuples(sizes(2, 6), sizes(2, 6))  # by the third step
WIDE, TALL = st.tuples(sizes(2, 4), sizes(5, 8)), st.tuples(sizes(5, 8), sizes(2, 4))


@dataclass(frozen=True)
class Case:
    """A class under some settings, and the formula of its updates."""

    make: type[StackedOptimizer]
    settings: Settings
    formula: Formula
    shapes: Shapes = ANY
    steps: int = 6
    tolerance: float = TOLERANCE


def case(make: type[StackedOptimizer], formula: Callable[..., Array], shared: Settings) -> Case:
    """Return a case whose class and formula take the same settings."""
    return Case(make, shared, partial(formula, **shared))


MUON: Settings = {"momentum": 0.9, "nesterov": True, "eps": 1e-7, "ns_steps": 5}
ADAMUON: Settings = MUON | {"beta2": 0.8, "entry_eps": 1e-4, "rms_align": False}
SHAMPOO: Settings = {
    "betas": (0.9, 0.8),
    "exponent": 0.25,
    "matrix_eps": 1e-2,
    "relative_matrix_eps": False,
    "initial_factor": None,
    "precondition_every": 1,
    "block_size": None,
    "max_preconditioned_dim": None,
}
SOAP_EIGH: Settings = {
    "betas": (0.9, 0.8),
    "eps": 1e-2,  # a smaller one is what rounding in directions without a gradient would be divided by
    "relative_eps": False,
    "matrix_eps": 1e-4,
    "precondition_every": 2,
    "warmup_steps": 12,
    "warmup": "eigh",
    "block_size": None,
    "max_preconditioned_dim": None,
}
SOAP_SHORT = SOAP_EIGH | {"warmup_steps": 3}  # QR steps afterwards
SOAP_QR = SOAP_EIGH | {"warmup": "qr"}


def muon(**changed: object) -> Case:
    return case(Muon, formulas.muon, MUON | changed)


def adamuon(**changed: object) -> Case:
    return case(AdaMuon, formulas.adamuon, ADAMUON | changed)


def shampoo(**changed: object) -> Case:
    return replace(case(Shampoo, formulas.shampoo, SHAMPOO | changed), steps=8)


def soap(kind: Settings, shapes: Shapes, **changed: object) -> Case:
    return replace(case(SOAP, formulas.soap, kind | changed), shapes=shapes, steps=12)


def adding(further: Settings, to: Case) -> Case:
    """Return a case with further settings of the class, which change how it computes or what goes around it."""
    return replace(to, settings=to.settings | further)


def by_newton(exact: Case) -> Case:
    """Return a case whose class iterates to a residual of 1e-6 on either side, while the formula's roots are exact."""
    return replace(adding({"root": "newton"}, exact), tolerance=5e-6)


def grafting(to: Case, donor: str, length: Formula) -> Case:
    """Return a case with another method's lengths; an epsilon as large as this one is seen."""
    formula = partial(formulas.grafted, length=length, direction=to.formula, eps=0.1)
    return replace(adding({"graft": donor, "graft_eps": 0.1}, to), formula=formula)


ADAM_LENGTH = partial(formulas.adam, betas=(0.9, 0.8), eps=1e-2)

ENTRIES = {
    "sgd": case(SGD, formulas.sgd, {"momentum": 0.0, "debias": True}),
    "sgd_momentum": case(SGD, formulas.sgd, {"momentum": 0.9, "debias": True}),
    "sgd_biased": case(SGD, formulas.sgd, {"momentum": 0.9, "debias": False}),
    "adam": case(Adam, formulas.adam, {"betas": (0.9, 0.99), "eps": 1e-8}),
    "adam_eps": case(Adam, formulas.adam, {"betas": (0.5, 0.8), "eps": 0.3}),
    "adam_memoryless": case(Adam, formulas.adam, {"betas": (0.0, 0.9), "eps": 1e-3}),
    "adamw": case(AdamW, formulas.adam, {"betas": (0.8, 0.95), "eps": 1e-3}),
    "adam_atan2": case(AdamAtan2, formulas.adam_atan2, {"betas": (0.9, 0.8)}),
}
MATRICES = {
    "muon": muon(),
    "muon_plain": muon(nesterov=False),
    "muon_eps": muon(eps=0.5),
    "muon_steps": muon(ns_steps=2, momentum=0.5),
    "adamuon": adamuon(),
    "adamuon_plain": adamuon(nesterov=False, eps=0.5, entry_eps=0.1),
    "adamuon_aligned": adamuon(rms_align=True),
    "adamuon_aligned_steps": adamuon(rms_align=True, ns_steps=3, beta2=0.95),
}
PRECONDITIONED = {
    "shampoo": shampoo(),
    "shampoo2": shampoo(exponent=0.5),
    "shampoo_pair": shampoo(exponent=(0.5, 0.25)),
    "shampoo_any_exponent": shampoo(exponent=(0.3, 0.7)),
    "shampoo_relative": shampoo(relative_matrix_eps=True, matrix_eps=1e-3),
    "shampoo_relative_start": shampoo(relative_matrix_eps=True, matrix_eps=1e-3, initial_factor=0.3),
    "shampoo_start": shampoo(initial_factor=0.3),
    "shampoo_from_zero": shampoo(initial_factor=0.0),
    "shampoo_seldom": shampoo(precondition_every=3),
    "shampoo_seldom_relative": shampoo(precondition_every=3, relative_matrix_eps=True, exponent=0.5),
    "shampoo_blocks": shampoo(block_size=3),
    "shampoo_blocks_seldom": shampoo(block_size=3, precondition_every=3, exponent=(0.25, 0.5), initial_factor=0.1),
    "shampoo_one_side": shampoo(max_preconditioned_dim=4, exponent=(0.5, 0.25)),
    "shampoo_one_side_blocks": shampoo(max_preconditioned_dim=5, block_size=2, relative_matrix_eps=True),
    "shampoo_newton": by_newton(shampoo()),
    "shampoo2_newton": by_newton(shampoo(exponent=(0.5, 0.25))),
    "shampoo_newton_relative": by_newton(shampoo(relative_matrix_eps=True, matrix_eps=1e-3, block_size=4)),
    "soap": soap(SOAP_EIGH, ANY),
    "soap_relative": soap(SOAP_EIGH, FULL_RANK, relative_eps=True),
    "soap_ridge": soap(SOAP_SHORT, FULL_RANK, matrix_eps=0.3),
    "soap_blocks": soap(SOAP_EIGH, ANY, block_size=3),
    "soap_one_side": soap(SOAP_EIGH, ANY, max_preconditioned_dim=4),
    "soap_short": soap(SOAP_SHORT, FULL_RANK),
    "soap_short_seldom": soap(SOAP_SHORT, FULL_RANK, precondition_every=4, eps=1e-3),
    "soap_short_relative": soap(SOAP_SHORT, FULL_RANK, relative_eps=True),
    "soap_short_blocks": soap(SOAP_SHORT, RAGGED, block_size=4),
    "soap_short_blocks_relative": soap(SOAP_SHORT, RAGGED, block_size=4, relative_eps=True),
    "soap_short_out": soap(SOAP_SHORT, WIDE, max_preconditioned_dim=4),
    "soap_short_in": soap(SOAP_SHORT, TALL, max_preconditioned_dim=4),
    "soap_short_in_blocks": soap(
        SOAP_SHORT, st.tuples(sizes(8, 9), sizes(5, 7)), block_size=3, max_preconditioned_dim=7
    ),
    # Without eigendecompositions the factors have full rank at once, or rounding chooses the basis.
    "soap_qr": soap(SOAP_QR, SQUARE),
    "soap_qr_short": soap(SOAP_QR, SQUARE, warmup_steps=4, precondition_every=3),
    "soap_qr_relative": soap(SOAP_QR, SQUARE, relative_eps=True, matrix_eps=1e-2),
    "soap_qr_out": soap(SOAP_QR, WIDE, max_preconditioned_dim=4, warmup_steps=5),
    "soap_qr_in": soap(SOAP_QR, TALL, max_preconditioned_dim=4, warmup_steps=5),
    "soap_qr_blocks": soap(SOAP_QR, st.tuples(*[st.sampled_from((2, 4, 6))] * 2), block_size=2, warmup_steps=5),
    "soap_no_warmup": soap(SOAP_EIGH, SQUARE, warmup_steps=0),
}
GRAFTED = {
    "muon_length_of_sgd": grafting(muon(), "sgd", partial(formulas.sgd, momentum=0.9, debias=True)),
    # Settings of the same names are shared, but for an epsilon of the direction's own.
    "muon_length_of_adam": grafting(
        adding({"adam": {"betas": (0.9, 0.8), "eps": 1e-2}}, muon(eps=0.05)), "adam", ADAM_LENGTH
    ),
    "shampoo_length_of_adam": grafting(adding({"eps": 1e-2}, shampoo(block_size=3)), "adam", ADAM_LENGTH),
    "soap_length_of_adam": grafting(adding({"adam": {"eps": 1e-2}}, soap(SOAP_SHORT, FULL_RANK)), "adam", ADAM_LENGTH),
}
SPECTRAL = {
    name: adding({"spectral_norm": True}, plain)
    for name, plain in {
        "spectral_sgd": replace(ENTRIES["sgd_momentum"], steps=54),  # beyond the warm-up of the iteration
        "spectral_adam": ENTRIES["adam"],
        "spectral_muon": MATRICES["muon"],
        "spectral_shampoo": PRECONDITIONED["shampoo_blocks"],
        "spectral_soap": PRECONDITIONED["soap_short"],
        "spectral_graft": GRAFTED["muon_length_of_sgd"],
    }.items()
}
CASES = ENTRIES | MATRICES | PRECONDITIONED | GRAFTED | SPECTRAL


# -- parameters of other layouts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a parameter is matrices: what its group says, and its values as the formulas have them, [T, I, O] each."""

    group: Settings
    shapes: Shapes
    kernels: Callable[[Array], list[Array]]


def of_linear(path: Array) -> list[Array]:
    return [path.swapaxes(1, 2)]


LINEAR = Layout({}, ANY, of_linear)
LAYOUTS = {
    "embedding": Layout({"axes": ((1,), (0,))}, ANY, lambda path: [path]),
    "looked_up": Layout({"axes": ((1,), (0,)), "lookup": True}, ANY, lambda path: [path]),
    "fused": Layout(
        {"split": 3},
        st.tuples(sizes(1, 4).map(lambda size: 3 * size), sizes(1, 6)),
        lambda path: [kernel for part in np.split(path, 3, axis=1) for kernel in of_linear(part)],
    ),
    "convolution": Layout(
        {},
        st.tuples(sizes(1, 5), sizes(1, 3), sizes(1, 2), sizes(1, 3)),
        lambda path: of_linear(path.reshape(*path.shape[:2], -1)),
    ),
    "transposed_convolution": Layout(
        {"axes": ((1, 2, 3), (0,))},
        st.tuples(sizes(1, 5), sizes(1, 3), sizes(1, 2), sizes(1, 3)),
        lambda path: [path.reshape(*path.shape[:2], -1)],
    ),
    "experts": Layout(  # [experts, in, out]
        {"axes": ((2,), (1,))},
        st.tuples(sizes(1, 3), sizes(1, 5), sizes(1, 5)),
        lambda path: list(path.swapaxes(0, 1)),
    ),
    "experts_of_linear": Layout(  # [experts, out, in]
        {"axes": ((1,), (2,))},
        st.tuples(sizes(1, 3), sizes(1, 5), sizes(1, 5)),
        lambda path: [kernel for expert in path.swapaxes(0, 1) for kernel in of_linear(expert)],
    ),
}
IN_LAYOUTS = {
    "adam": ENTRIES["adam"],
    "muon": MATRICES["muon"],
    "adamuon": MATRICES["adamuon_aligned"],
    "shampoo": shampoo(exponent=(0.5, 0.25), block_size=3, max_preconditioned_dim=7),
    "soap": soap(SOAP_EIGH, ANY, block_size=3, max_preconditioned_dim=7),
    "graft": GRAFTED["muon_length_of_sgd"],
    "spectral": SPECTRAL["spectral_muon"],
}


# -- gradients, steps and errors -----------------------------------------------------------------------------------


def gradients(draw: Callable[[st.SearchStrategy[Any]], Any], shape: Shape, steps: int) -> Array:
    """Return gradients [T, *shape]: matrices of distinct singular values, which change places on the way, and noise."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = min(shape[-2:])
    left, right = (np.linalg.qr(rng.normal(size=(*shape[:-2], size, rank)))[0] for size in shape[-2:])
    values = np.geomspace(4.0, 1.0, rank)
    noise = 0.2 * rng.normal(size=(steps, *shape))
    moving = np.linspace(values, np.roll(values, 1), steps).reshape(steps, *[1] * (len(shape) - 1), rank)
    return draw(st.floats(0.25, 4.0)) * (left * moving @ right.swapaxes(-1, -2) + noise)


def updates(optimizer: StackedOptimizer, g: Array) -> Array:
    """Return what each step takes from zero."""
    (weight,) = optimizer.param_groups[0]["params"]
    path = []
    for now in g:
        weight.data.zero_()
        weight.grad = torch.from_numpy(now.copy())
        optimizer.step()
        path.append(-weight.detach().numpy().copy())
    return np.stack(path)


def zeros(shape: Shape) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def ends_of(own: Case, optimizer: StackedOptimizer, count: int) -> list[Formula]:
    """Return what is done in the end to the updates of each matrix; iterations start where the class' do."""
    (state,) = optimizer.state.values()
    if VECTOR in state:
        return [partial(formulas.spectral_normalized, v=v.copy()) for v in np.atleast_2d(state[VECTOR].numpy())]
    return [formulas.rms_normalized if own.settings.get("spectral_norm") else np.asarray] * count


def assert_close(got: Array, wanted: Array, tolerance: float) -> None:
    assert got.shape == wanted.shape
    off, size = (np.linalg.norm(x, axis=(1, 2)) for x in (got - wanted, wanted))
    assert np.all(off <= tolerance * size), f"relative errors by step: {off / size}"


def check(own: Case, layout: Layout, data: st.DataObject, shapes: Shapes) -> None:
    shape = data.draw(shapes)
    g = gradients(data.draw, shape, own.steps)
    optimizer = own.make([{"params": [zeros(shape)], **layout.group}], lr=1.0, **own.settings)
    seen_by_each = layout.kernels(g)
    ends = ends_of(own, optimizer, len(seen_by_each))
    got = layout.kernels(updates(optimizer, g))
    for kernel, seen, end in zip(got, seen_by_each, ends, strict=True):
        assert_close(kernel, end(own.formula(seen)), own.tolerance)


@pytest.mark.parametrize("name", CASES)
@EXAMPLES
@given(data=st.data())
def test_updates_are_the_formulas(name: str, data: st.DataObject) -> None:
    check(CASES[name], LINEAR, data, CASES[name].shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_LAYOUTS)
@EXAMPLES
@given(data=st.data())
def test_each_matrix_of_a_parameter_follows_the_formula(name: str, layout: str, data: st.DataObject) -> None:
    check(IN_LAYOUTS[name], LAYOUTS[layout], data, LAYOUTS[layout].shapes)


@pytest.mark.parametrize("make", [Muon, AdaMuon, Shampoo, SOAP])
@EXAMPLES
@given(size=sizes(1, 8), seed=sizes(0, 1000))
def test_vectors_follow_the_formula_of_adam(make: type[StackedOptimizer], size: int, seed: int) -> None:
    g = np.random.default_rng(seed).normal(size=(6, size))
    got = updates(make([zeros((size,))], lr=1.0, adam={"betas": (0.7, 0.8), "eps": 0.1}), g)
    assert_close(got[..., None], formulas.adam(g[..., None], betas=(0.7, 0.8), eps=0.1), TOLERANCE)


# -- trajectories --------------------------------------------------------------------------------------------------

LR, DECAY = 0.3, 9e-3
SCHEDULE = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]  # warm-up from 0, linear decay; the learning rate given is the peak
TRAJECTORIES = {
    f"{name}_{decay}": (own, decay)
    for name, own in {
        "sgd": ENTRIES["sgd_momentum"],
        "adam": ENTRIES["adam_eps"],
        "adamw": ENTRIES["adamw"],
        "adam_atan2": ENTRIES["adam_atan2"],
        "muon": MATRICES["muon"],
        "adamuon": MATRICES["adamuon_aligned"],
        "shampoo": PRECONDITIONED["shampoo"],
        "soap": PRECONDITIONED["soap"],
    }.items()
    for decay in ("independent", "coupled", "l2")
}


def train(optimizer: StackedOptimizer, g: Array) -> Array:
    """Return the weights after each step, under a scheduler that multiplies the learning rate."""
    (weight,) = optimizer.param_groups[0]["params"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [*SCHEDULE, 0.0].__getitem__)
    path = []
    for now in g:
        weight.grad = torch.from_numpy(now.copy())
        optimizer.step()
        scheduler.step()
        path.append(weight.detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize("name", TRAJECTORIES)
@EXAMPLES
@given(data=st.data())
def test_weights_follow_the_schedule_and_decay(name: str, data: st.DataObject) -> None:
    own, decay = TRAJECTORIES[name]
    shape = data.draw(own.shapes)
    g = gradients(data.draw, shape, len(SCHEDULE))
    start = np.random.default_rng(len(name)).normal(size=shape)
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = own.make([weight], lr=LR, weight_decay=DECAY, decay=decay, **own.settings)
    ((seen,), (initial,)) = (LINEAR.kernels(x) for x in (g, start[None]))
    wanted = formulas.trajectory(
        initial[0], seen, own.formula, lr=LR, schedule=SCHEDULE, weight_decay=DECAY, decay=decay
    )
    assert_close(of_linear(train(optimizer, g))[0], wanted, TOLERANCE)
