"""What every transform promises, over all of them: stacks, own state, determinism, odd shapes, extreme values."""

from __future__ import annotations

import pkgutil

import pytest
import torch

import lightning_mup.transforms as home
from lightning_mup.core.chains import build_chain
from lightning_mup.core.graft import Graft
from lightning_mup.core.method import all_methods
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.transform import Chain, Context, State, Transform
from lightning_mup.transforms.adam import Adam
from lightning_mup.transforms.momentum import Momentum
from lightning_mup.transforms.normalize_entries import NormalizeEntries
from lightning_mup.transforms.shampoo import Shampoo
from lightning_mup.transforms.soap import Soap

VARIANTS: dict[str, Transform] = {  # settings that no method has by default
    "momentum": Momentum(0.9, debias=True, nesterov=True),
    "normalize_entries": NormalizeEntries(eps=1e-3, rms=0.2),
    "rms_normalize": RmsNormalize(over_inputs=True),
    "spectral_normalize": SpectralNormalize(),
    "shampoo_renewed": Shampoo(every=2, matrix_eps=1e-3),
    "shampoo_blocked": Shampoo(every=2, matrix_eps=1e-3, relative_matrix_eps=True, block_size=3, max_dim=6),
    "soap_renewed": Soap(eps=1e-3, every=2, warmup_steps=2),
    "soap_blocked": Soap(eps=1e-3, every=2, warmup_steps=1, warmup="qr", block_size=3, max_dim=6),
    "graft": Graft(magnitude=Adam(eps=1e-3), direction=Shampoo(every=2, exponent=0.5, matrix_eps=1e-3)),
}
# Sizes are multiples of 16, two of the widest registers, or odd: in between, the last entries are no vector's, and the
# CPU's atan2 rounds those in another way.
SHAPES = [(1, 1), (1, 7), (7, 1), (4, 4), (8, 4), (4, 8)]
STEPS = 4


def chains() -> dict[str, Transform]:
    """Every method's chain at its defaults, those of entry points included; one of each, where methods share it."""
    found: dict[str, Transform] = {}
    for name, method in sorted(all_methods().items()):
        if method.chain and (made := build_chain(method, method.defaults)) not in found.values():
            found[name] = made
    return found


def leaves(transform: Transform) -> list[Transform]:
    """The transforms that a chain or a graft is made of."""
    inner: tuple[Transform, ...] = ()
    if isinstance(transform, Chain):
        inner = transform.transforms
    if isinstance(transform, Graft):
        inner = (transform.magnitude, transform.direction)
    return [leaf for part in inner for leaf in leaves(part)] or [transform]


TRANSFORMS = {**VARIANTS, **chains()}


def gradients(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    """Gradients [steps, N, O, I]."""
    return torch.randn(STEPS, count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(transform: Transform, g_TNOI: torch.Tensor) -> tuple[list[torch.Tensor], State]:
    state = transform.init(torch.zeros_like(g_TNOI[0]))
    return [transform.update(g, state, Context(step)).clone() for step, g in enumerate(g_TNOI, 1)], state


def test_every_file_is_in_the_contract() -> None:
    files = {f"{home.__name__}.{info.name}" for info in pkgutil.iter_modules(home.__path__)}
    assert files <= {type(leaf).__module__ for transform in TRANSFORMS.values() for leaf in leaves(transform)}


# A vector's factor has rank one; SOAP's basis of the rest is arbitrary, so there the last bit decides.
TURNED = {name for name, transform in TRANSFORMS.items() if any(isinstance(leaf, Soap) for leaf in leaves(transform))}
COMPARABLE = [(n, s) for n in TRANSFORMS for s in SHAPES if n not in TURNED or s == (1, 1) or 1 not in s]


@pytest.mark.parametrize(("name", "shape"), COMPARABLE, ids=str)
def test_a_stack_of_three_is_three_stacks_of_one(name: str, shape: tuple[int, int]) -> None:
    g = gradients(shape)
    together, state = run(TRANSFORMS[name], g)
    assert all(len(value) == 3 for value in state.values())
    # The CPU's products round by the alignment of what they read: in odd sizes, a stack's second matrix lies otherwise.
    rtol = 0.0 if shape[0] * shape[1] % 16 == 0 else 1e-12
    for i in range(3):
        alone, own = run(TRANSFORMS[name], g[:, i : i + 1])
        pairs = [(ours[i], theirs[0]) for ours, theirs in zip(together, alone, strict=True)]
        for ours, theirs in pairs + [(state[key][i], own[key][0]) for key in state]:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_writes_into_its_own_state_alone(name: str) -> None:
    g = gradients((5, 4))
    before = g.clone()
    param = torch.randn(3, 5, 4, dtype=torch.float64)
    kept = param.clone()
    state = TRANSFORMS[name].init(param)
    places = {key: value.data_ptr() for key, value in state.items()}
    for step, u in enumerate(g, 1):
        out = TRANSFORMS[name].update(u, state, Context(step))
        snapshot = {key: value.clone() for key, value in state.items()}
        out.add_(1.0)  # the caller owns what it got
        assert all(torch.equal(value, snapshot[key]) for key, value in state.items())
    assert torch.equal(g, before)
    assert torch.equal(param, kept)
    assert places == {key: value.data_ptr() for key, value in state.items()}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_twice(name: str) -> None:
    torch.manual_seed(1)
    first, _ = run(TRANSFORMS[name], gradients((6, 5)))
    torch.manual_seed(2)
    second, _ = run(TRANSFORMS[name], gradients((6, 5)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_numbers_stay_finite(name: str, shape: tuple[int, int], scale: float) -> None:
    outputs, state = run(TRANSFORMS[name], gradients(shape) * scale)
    assert all(bool(out.isfinite().all()) for out in outputs)
    assert all(bool(value.isfinite().all()) for value in state.values())
    if scale == 0:
        assert all(not out.any() for out in outputs)
