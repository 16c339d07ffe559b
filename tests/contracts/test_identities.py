"""Exact identities between the optimizers, by their public classes: each is another one in some limit."""

# ruff: noqa: ANN401 - settings are of many types

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_mup as mup
from lightning_mup.core.linalg import QUINTIC, polar

Optimizer = type[mup.StackedOptimizer]
Settings = dict[str, Any]

sides = st.integers(1, 8)
shapes = st.tuples(sides, sides)
seeds = st.integers(0, 2**31 - 1)
scales = st.integers(-20, 20).map(lambda power: 10.0**power)
SHAPES = [(1, 1), (1, 6), (6, 1), (7, 4), (4, 7), (5, 5)]


def gradients(shape: tuple[int, ...], steps: int = 6, seed: int = 0, count: int = 1) -> Tensor:
    """Gradients [steps, count, O, I]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(steps, count, *shape, generator=draw, dtype=torch.float64)


def step(optimizer: mup.StackedOptimizer, g_NOI: Tensor) -> Tensor:
    """Take a step from zero at learning rate 1, and return what it subtracted."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, g_NOI, strict=True):
        p.data.zero_()
        p.grad = g.clone()
    optimizer.step()
    return torch.stack([-p.detach() for p in params])


def make(cls: Optimizer, like_NOI: Tensor, **settings: Any) -> mup.StackedOptimizer:
    return cls([nn.Parameter(torch.zeros_like(like)) for like in like_NOI], lr=1.0, **settings)


def updates(cls: Optimizer, g_TNOI: Tensor, **settings: Any) -> Tensor:
    optimizer = make(cls, g_TNOI[0], **settings)
    return torch.stack([step(optimizer, g_NOI) for g_NOI in g_TNOI])


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def spectral_norms(u_TNOI: Tensor) -> Tensor:
    return torch.linalg.svdvals(u_TNOI)[..., 0]


# Without averages

ADAM_NOW: Settings = {"betas": (0.0, 0.0), "eps": 0.0}
SHAMPOO_NOW: Settings = {"betas": (0.0, 0.0), "precondition_every": 1, "matrix_eps": 1e-14}


@given(shapes, seeds, scales)
def test_adam_of_one_gradient_is_its_sign(shape: tuple[int, int], seed: int, scale: float) -> None:
    g_TNOI = gradients(shape, 2, seed) * scale
    for cls in (mup.Adam, mup.AdamW):
        assert torch.equal(updates(cls, g_TNOI, **ADAM_NOW), g_TNOI.sign())
    close(updates(mup.AdamAtan2, g_TNOI, betas=(0.0, 0.0)), g_TNOI.sign() * (math.pi / 4), 1e-15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shampoo_of_one_gradient_is_its_orthogonal_factor(shape: tuple[int, int]) -> None:
    g_TNOI = gradients(shape, 2)
    want_TNOI = torch.stack([polar(g_NOI) for g_NOI in g_TNOI])
    close(updates(mup.Shampoo, g_TNOI, **SHAMPOO_NOW), want_TNOI, 1e-9)
    muon_TNOI = updates(mup.Muon, g_TNOI, momentum=0.0)
    close(torch.stack([polar(u_NOI) for u_NOI in muon_TNOI]), want_TNOI, 1e-10)


@given(shapes, seeds)
def test_muon_of_one_gradient_moves_its_singular_values_alone(shape: tuple[int, int], seed: int) -> None:
    g_TNOI, eps, (a, b, c) = gradients(shape, 1, seed), 1e-7, QUINTIC
    u, s, v = torch.linalg.svd(g_TNOI, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + eps)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    close(updates(mup.Muon, g_TNOI, momentum=0.0, eps=eps), u @ torch.diag_embed(s) @ v, 1e-10)


# Blocks

RENEWED: dict[Optimizer, Settings] = {
    mup.Shampoo: {"precondition_every": 2},
    mup.SOAP: {"precondition_every": 2, "warmup_steps": 2},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cls", RENEWED)
def test_one_block_is_none(cls: Optimizer, shape: tuple[int, int]) -> None:
    g_TNOI, settings = gradients(shape, count=2), RENEWED[cls]
    whole = updates(cls, g_TNOI, **settings)
    for size in (max(shape), max(shape) + 1, 1000):
        assert torch.equal(updates(cls, g_TNOI, block_size=size, **settings), whole)
    # One less cuts, which shows.
    assert max(shape) == 1 or not torch.equal(updates(cls, g_TNOI, block_size=max(shape) - 1, **settings), whole)


@given(shapes, seeds, st.sampled_from([0.25, (0.125, 0.375), (0.5 - 2**-10, 2**-10)]))
def test_shampoo_of_single_entries_is_adam(shape: tuple[int, int], seed: int, exponent: Any) -> None:
    """Epsilons meet where both vanish: the ridge stands under the root; a relative one is a factor on it."""
    g_TNOI, betas = gradients(shape, 4, seed), (0.9, 0.95)
    entries: Settings = {"betas": betas, "block_size": 1, "exponent": exponent, "precondition_every": 1}
    adam = updates(mup.Adam, g_TNOI, betas=betas, eps=0.0)
    absolute: Settings = {"matrix_eps": 1e-30, "relative_matrix_eps": False, "initial_factor": 0.0}
    close(updates(mup.Shampoo, g_TNOI, **entries, **absolute), adam, 1e-12)
    close(updates(mup.Shampoo, g_TNOI, **entries, matrix_eps=0.01) * math.sqrt(1.01), adam, 1e-12)


@given(shapes, seeds)
def test_soap_of_single_entries_is_adam(shape: tuple[int, int], seed: int) -> None:
    g_TNOI, betas = gradients(shape, 4, seed), (0.9, 0.95)
    soap = updates(mup.SOAP, g_TNOI, betas=betas, block_size=1, eps=0.0, precondition_every=2, warmup_steps=1)
    close(soap, updates(mup.Adam, g_TNOI, betas=betas, eps=0.0), 1e-12)


# Grafts

DONORS: dict[str, Optimizer] = {"adam": mup.Adam, "sgd": mup.SGD}
GRAFTS: dict[str, tuple[Optimizer, str, Settings, Settings]] = {  # direction, donor, settings of either
    "shampoo": (mup.Shampoo, "adam", {"eps": 1e-3}, {"betas": (0.9, 0.95), "eps": 1e-3}),
    "shampoo, blocks": (mup.Shampoo, "adam", {"block_size": 2}, {"betas": (0.9, 0.95)}),
    "soap": (mup.SOAP, "adam", {}, {"betas": (0.9, 0.95)}),
    "soap, blocks": (mup.SOAP, "adam", {"block_size": 2}, {"betas": (0.9, 0.95)}),
    "muon": (mup.Muon, "adam", {"eps": 1e-5, "adam": {"eps": 1e-3}}, {"eps": 1e-3}),
    "muon, sgd": (mup.Muon, "sgd", {"momentum": 0.8}, {"momentum": 0.8}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 4), (3, 8), (6, 6)], ids=str)
@pytest.mark.parametrize("name", GRAFTS)
def test_a_graft_has_one_length_and_another_direction(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    cls, donor, settings, shared = GRAFTS[name]
    g_TNOI = gradients(shape, 5, count=3).to(dtype)
    grafted, direction, length = (
        u.double().flatten(2)
        for u in (
            updates(cls, g_TNOI, graft=donor, **settings),
            updates(cls, g_TNOI, **settings),
            updates(DONORS[donor], g_TNOI, **shared),
        )
    )
    close(grafted.norm(dim=2), length.norm(dim=2), 1e-6)
    assert (torch.cosine_similarity(grafted, direction, dim=2) > 0.999999).all()
    assert ((direction.norm(dim=2) / length.norm(dim=2) - 1).abs() > 1e-3).all()  # which the graft undoes
    assert (torch.cosine_similarity(grafted, length, dim=2) < 0.99).any()


# Spectral normalization

WARM = 50  # steps of five iterations each
# With SOAP's own epsilon, its bases' directions of almost no gradient are entries like any other, and arbitrary: each
# renewal turns the whole update, and one iteration does not follow at once.
NORMALIZED: dict[Optimizer, Settings] = {
    mup.Muon: {},
    mup.Shampoo: {"exponent": 0.125},  # with 1/4, the update of a square matrix has norm 1 anyway
    mup.SOAP: {"eps": 1.0},
    mup.AdamW: {},
    mup.AdaMuon: {},
}


def drifting(shape: tuple[int, int], steps: int) -> Tensor:
    """Gradients [steps, 1, O, I] of falling singular values, which turn slowly."""
    start, drift = gradients(shape, 2)
    u, s, v = torch.linalg.svd(start, full_matrices=False)
    spectrum = 4 * 0.8 ** torch.arange(s.shape[-1], dtype=torch.float64)
    return torch.stack([(u * spectrum) @ v + 3e-4 * t * drift for t in range(steps)])


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("cls", NORMALIZED)
def test_spectral_norm_is_as_wanted(cls: Optimizer, shape: tuple[int, int]) -> None:
    g_TNOI, wanted, settings = drifting(shape, WARM + 15), math.sqrt(shape[0] / shape[1]), NORMALIZED[cls]
    after = spectral_norms(updates(cls, g_TNOI, spectral_norm=True, **settings)[WARM:])
    assert (after / wanted - 1).abs().max() < 0.02
    before = spectral_norms(updates(cls, g_TNOI[:2], **settings))
    assert (before / wanted - 1).abs().max() > 0.05


CONSTANT: dict[Optimizer, Settings] = {  # updates that are the same at each step
    mup.SGD: {},
    mup.Muon: {"momentum": 0.0},
    mup.Shampoo: {**SHAMPOO_NOW, "exponent": 0.125},  # with 1/4, all singular values are the largest
    mup.AdamW: {"betas": (0.0, 0.0)},
}
V = "spectral_normalize/v"


def warmed(cls: Optimizer, g_NOI: Tensor, steps: int = WARM) -> mup.StackedOptimizer:
    optimizer = make(cls, g_NOI, spectral_norm=True, **CONSTANT[cls])
    for _ in range(steps):
        step(optimizer, g_NOI)
    return optimizer


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("cls", CONSTANT)
def test_the_error_never_grows_while_the_update_stays(cls: Optimizer, shape: tuple[int, int]) -> None:
    g_NOI = gradients(shape, 1)[0]
    optimizer = warmed(cls, g_NOI, steps=0)
    norms = torch.cat([spectral_norms(step(optimizer, g_NOI)) for _ in range(WARM + 15)])
    error = norms / math.sqrt(shape[0] / shape[1]) - 1
    assert (error > -1e-7).all()  # a vector's image is no longer than the norm
    assert (error.diff() < 1e-12).all()
    assert error[0] > max(1e-5, 10 * error[-1])


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)], ids=str)
def test_after_the_warmup_one_iteration_goes_on_from_the_stored_vector(shape: tuple[int, int]) -> None:
    a_NOI = gradients(shape, 1, count=2)[0]
    optimizer = warmed(mup.SGD, a_NOI)
    params = optimizer.param_groups[0]["params"]
    for p, v in zip(params, gradients(shape, 1, seed=1, count=2)[0, :, :, 0], strict=True):
        optimizer.state[p][V].copy_(v / v.norm())  # far from where it was
    before = [optimizer.state[p][V].clone() for p in params]
    got = step(optimizer, a_NOI)
    for u, a, v, p in zip(got, a_NOI, before, params, strict=True):
        close(u, a * math.sqrt(shape[0] / shape[1]) / (a.T @ v).norm(), 1e-9)
        moved = a @ (a.T @ v)
        close(optimizer.state[p][V], moved / moved.norm(), 1e-9)


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("cls", CONSTANT)
def test_a_lost_vector_shows(cls: Optimizer, start: float) -> None:
    g_NOI = gradients((16, 16), 1)[0]
    kept, lost = warmed(cls, g_NOI), warmed(cls, g_NOI)
    for state in lost.state.values():
        state[V].fill_(0.0)[0] = start
    right, wrong = (spectral_norms(step(optimizer, g_NOI)) for optimizer in (kept, lost))
    assert ((wrong / right - 1).abs() > 0.02).all()  # from zero, nothing moves


@pytest.mark.parametrize("cls", NORMALIZED)
def test_a_loaded_optimizer_takes_the_same_step(cls: Optimizer) -> None:
    g_TNOI, settings = gradients((8, 8), WARM + 3, count=2), {**NORMALIZED[cls], "spectral_norm": True}
    saved, fresh = (make(cls, g_TNOI[0], **settings) for _ in range(2))
    for g_NOI in g_TNOI[: WARM + 1]:
        step(saved, g_NOI)
    state = copy.deepcopy(saved.state_dict())
    without = make(cls, g_TNOI[0], **settings)
    without.load_state_dict(state)
    for entry, like in zip(without.state.values(), make(cls, g_TNOI[0], **settings).state.values(), strict=True):
        entry[V].copy_(like[V])
    fresh.load_state_dict(state)
    for g_NOI in g_TNOI[WARM + 1 :]:
        want = step(saved, g_NOI)
        assert torch.equal(step(fresh, g_NOI), want)
        assert not torch.equal(step(without, g_NOI), want)


@pytest.mark.parametrize("cls", NORMALIZED)
def test_looked_up_rows_have_a_root_mean_square_of_one(cls: Optimizer) -> None:
    g_TNOI = gradients((10, 6), 4)
    table = nn.Parameter(torch.zeros(10, 6, dtype=torch.float64))
    group = {"params": [table], "axes": ((1,), (0,)), "lookup": True}
    optimizer = cls([group], lr=1.0, spectral_norm=True)
    u_TNOI = torch.stack([step(optimizer, g_NOI) for g_NOI in g_TNOI])
    close(u_TNOI.square().mean((1, 2, 3)).sqrt(), torch.ones(4, dtype=torch.float64), 1e-8)
    # Nothing but the length is changed: without the normalization, the group's update has the same direction.
    plain = cls([{**group, "params": [nn.Parameter(torch.zeros_like(table))]}], lr=1.0)
    raw_TNOI = torch.stack([step(plain, g_NOI) for g_NOI in g_TNOI])
    close(u_TNOI, raw_TNOI / raw_TNOI.square().mean((1, 2, 3), keepdim=True).sqrt(), 1e-8)


# Presets


def test_muon_adam_gives_embedding_and_readout_to_adam() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(8, width), nn.Linear(width, width), nn.Linear(width, 8))

    method = mup.all_methods()["muon_adam"]
    roles = {role: method.for_role(role).name for role in mup.Role}
    assert roles == {**dict.fromkeys(mup.Role, "adam"), mup.Role.HIDDEN: "muon_adam"}
    rows = mup.plan(build(32), lambda: build(16), method="muon_adam").params
    matrices = {row.spec.name: row.method for row in rows if row.spec.name.endswith("weight")}
    assert matrices == {"0.weight": "adam", "1.weight": "muon_adam", "2.weight": "adam"}


@pytest.mark.parametrize("role", ["input", "hidden", "output"])
def test_muon_adam_takes_adams_steps_where_it_says_so(role: str) -> None:
    g_TNOI = gradients((5, 4), 3)
    group = {"params": [nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))], "method": "muon_adam", "role": role}
    optimizer = mup.Muon([group], lr=1.0)
    got = torch.stack([step(optimizer, g_NOI) for g_NOI in g_TNOI])
    assert torch.equal(got, updates(mup.Muon if role == "hidden" else mup.Adam, g_TNOI))
