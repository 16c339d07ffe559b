"""The methods as the paper and its authors' code write them: float64 NumPy, one matrix at a time, nothing shared.

A path is an array [T, I, O]: gradients, or updates before the learning rate, of T steps. As in the paper, and unlike in
torch, rows are inputs and columns outputs: the left side is the input side. Arguments are called as the package's
settings, but for those that tell how a result is computed rather than what it is.

Reference:
    arXiv:2512.05620, equations 13 to 31, App. B and F; its authors' code where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, qr

Array = NDArray[np.float64]
Formula = Callable[[Array], Array]  # a path of gradients to a path of updates
Sides = tuple[bool, bool]  # whether the input side and the output side are preconditioned

QUINTIC = (3.4445, -4.7750, 2.0315)
ALIGNED_RMS = 0.2
NORM_EPS = 1e-10  # of what is brought to a norm
WARMUP_UPDATES, WARMUP_ITERATIONS = 50, 5  # of the power iteration
QR_STEPS = 10  # in a warm-up step that takes no eigendecomposition


# -- averages and norms --------------------------------------------------------------------------------------------


def ema(x: Array, beta: float, start: Array | float = 0.0) -> Array:
    """Return the exponential average after each step."""
    path = []
    for now in x:
        start = beta * start + (1 - beta) * now
        path.append(start)
    return np.stack(path)


def debiased(average: Array, beta: float) -> Array:
    """Return averages over the sum of their weights, as if each had started at its first value."""
    steps = np.arange(1, len(average) + 1).reshape(-1, 1, 1)
    return average / (1 - beta**steps)


def frobenius(x: Array) -> Array:
    """Return the norm of each matrix, [T, 1, 1]."""
    return np.sqrt((x**2).sum(axis=(1, 2), keepdims=True))


def transposed(x: Array) -> Array:
    """Return the transpose of each matrix."""
    return x.swapaxes(1, 2)


# -- methods that see entries, or whole matrices -------------------------------------------------------------------


def sgd(g: Array, *, momentum: float, debias: bool) -> Array:
    """Return m_hat, or m."""
    m = ema(g, momentum)
    return debiased(m, momentum) if debias else m


def adam(g: Array, *, betas: tuple[float, float], eps: float) -> Array:
    """Return m_hat / (sqrt(v_hat) + eps)."""
    m, v = _moments(g, betas)
    return m / (np.sqrt(v) + eps)


def adam_atan2(g: Array, *, betas: tuple[float, float]) -> Array:
    """Return atan2(m_hat, sqrt(v_hat))."""
    m, v = _moments(g, betas)
    return np.arctan2(m, np.sqrt(v))


def _moments(g: Array, betas: tuple[float, float]) -> tuple[Array, Array]:
    return debiased(ema(g, betas[0]), betas[0]), debiased(ema(g**2, betas[1]), betas[1])


def muon(g: Array, *, momentum: float, nesterov: bool, eps: float, ns_steps: int) -> Array:
    """Return the orthogonalized average, which is not bias-corrected."""
    m = ema(g, momentum)
    mixed = momentum * m + (1 - momentum) * g if nesterov else m
    x = mixed / (frobenius(mixed) + eps)
    tall = x.shape[1] > x.shape[2]
    x = _newton_schulz(transposed(x) if tall else x, ns_steps)
    return transposed(x) if tall else x


def _newton_schulz(x: Array, steps: int) -> Array:
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ transposed(x)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def adamuon(
    g: Array,
    *,
    momentum: float,
    beta2: float,
    nesterov: bool,
    eps: float,
    entry_eps: float,
    rms_align: bool,
    ns_steps: int,
) -> Array:
    """Return Muon's update over the root of its entries' average squares, each matrix at RMS 0.2 if aligned."""
    o = muon(g, momentum=momentum, nesterov=nesterov, eps=eps, ns_steps=ns_steps)
    u = o / (np.sqrt(debiased(ema(o**2, beta2), beta2)) + entry_eps)
    return ALIGNED_RMS * np.sqrt(g[0].size) * u / (frobenius(u) + NORM_EPS) if rms_align else u


# -- methods with preconditioners ----------------------------------------------------------------------------------


def by_blocks(
    method: Callable[[Array, Sides], Array], g: Array, block_size: int | None, max_dim: float | None
) -> Array:
    """Return the updates of a method that treats each block as a matrix of its own; a long side is not cut.

    The authors' code fills the last blocks up with zeros, which is to leave those rows and columns out.
    """
    active = tuple(size <= (max_dim or np.inf) for size in g.shape[1:])
    cuts = [
        range(block_size or size, size, block_size or size) if on else []
        for size, on in zip(g.shape[1:], active, strict=True)
    ]
    return np.block(
        [
            [method(block, active) for block in np.split(row, list(cuts[1]), axis=2)]
            for row in np.split(g, list(cuts[0]), axis=1)
        ]
    )


def shampoo(
    g: Array,
    *,
    betas: tuple[float, float],
    exponent: float | tuple[float, float],
    matrix_eps: float,
    relative_matrix_eps: bool,
    initial_factor: float | None,
    precondition_every: int,
    block_size: int | None,
    max_preconditioned_dim: int | None,
) -> Array:
    """Return (L + ridge)^-k m_hat (R + ridge)^-k, block by block; exponents of a pair are (outputs, inputs)."""
    k_out, k_in = exponent if isinstance(exponent, tuple) else (exponent, exponent)
    start = initial_factor if initial_factor is not None else 0.0 if relative_matrix_eps else matrix_eps

    def roots(moments: Array, k: float) -> Array:
        factors = debiased(ema(moments, betas[1], start * np.eye(moments.shape[1])), betas[1])
        renewed = np.arange(len(g)) // precondition_every * precondition_every
        return np.stack([_inverse_root(f, k, matrix_eps, relative_matrix_eps) for f in factors])[renewed]

    def of_block(block: Array, active: Sides) -> Array:
        m = debiased(ema(block, betas[0]), betas[0])
        # A side that is not preconditioned has the power 0: the identity.
        return (
            roots(block @ transposed(block), k_in * active[0]) @ m @ roots(transposed(block) @ block, k_out * active[1])
        )

    return by_blocks(of_block, g, block_size, max_preconditioned_dim)


def _inverse_root(s: Array, k: float, ridge: float, relative: bool) -> Array:
    w, v = eigh(s)
    damped = np.maximum(w, 0) + ridge * (max(w[-1], 1e-16) if relative else 1.0)
    return (v * damped**-k) @ v.T


def soap(
    g: Array,
    *,
    betas: tuple[float, float],
    eps: float,
    relative_eps: bool,
    matrix_eps: float,
    precondition_every: int,
    warmup_steps: int,
    warmup: Literal["eigh", "qr"],
    block_size: int | None,
    max_preconditioned_dim: int | None,
) -> Array:
    """Return Adam's update in the eigenbases of L and R, turned back, block by block."""
    steps = np.arange(1, len(g) + 1)
    renewals = np.select(
        [steps <= warmup_steps, (steps == 1) | (steps % precondition_every == 0)],
        [-1 if warmup == "eigh" else QR_STEPS, 1],
    )
    own_bases = partial(_bases, beta=betas[1], ridge=matrix_eps, renewals=renewals)

    def of_block(block: Array, active: Sides) -> Array:
        left, left_order = own_bases(block @ transposed(block), active=active[0])
        right, right_order = own_bases(transposed(block) @ block, active=active[1])
        v = _reordered_ema((transposed(left) @ block @ right) ** 2, betas[1], left_order, right_order)
        unit = np.maximum(np.sqrt(v[:, :1, :1]), 1e-10) if relative_eps else 1.0
        turned = (transposed(left) @ ema(block, betas[0]) @ right) / (np.sqrt(v) + eps * unit)
        t = steps.reshape(-1, 1, 1)
        return left @ turned @ transposed(right) * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)

    return by_blocks(of_block, g, block_size, max_preconditioned_dim)


def _bases(
    moments: Array, *, beta: float, ridge: float, renewals: Sequence[int], active: bool
) -> tuple[Array, NDArray[np.intp]]:
    """Return the basis at each step, and in which order it takes the columns of the one before.

    A renewal is a number of QR steps, or -1 for an eigendecomposition, which keeps second moments where they are.
    """
    eye = basis = np.eye(moments.shape[1])
    bases, orders = [], []
    for factor, renewal in zip(ema(moments, beta), renewals, strict=True):
        order = np.arange(len(eye))
        if active and renewal < 0:
            basis = eigh(factor + ridge * eye)[1][:, ::-1]
        for _ in range(renewal if active else 0):
            basis, own = _qr_step(factor + ridge * eye, basis)
            order = order[own]
        bases.append(basis)
        orders.append(order)
    return np.stack(bases), np.stack(orders)


def _qr_step(p: Array, basis: Array) -> tuple[Array, NDArray[np.intp]]:
    order = np.argsort(-np.diag(basis.T @ p @ basis), kind="stable")
    return qr(p @ basis[:, order])[0], order


def _reordered_ema(x: Array, beta: float, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Array:
    average, path = np.zeros_like(x[0]), []
    for now, row, column in zip(x, rows, columns, strict=True):
        average = beta * average[row][:, column] + (1 - beta) * now
        path.append(average)
    return np.stack(path)


# -- what goes around a method -------------------------------------------------------------------------------------


def grafted(g: Array, *, length: Formula, direction: Formula, eps: float) -> Array:
    """Return the direction's updates at the lengths of the other's, over whole matrices."""
    u = direction(g)
    return frobenius(length(g)) / (frobenius(u) + eps) * u


def spectral_normalized(u: Array, v: Array, iterations: int = 1) -> Array:
    """Return updates of spectral norm sqrt(d_out/d_in), by a power iteration that goes on from step to step."""
    wanted, path = np.sqrt(u.shape[2] / u.shape[1]), []
    for step, a in enumerate(u):
        for _ in range(WARMUP_ITERATIONS if step < WARMUP_UPDATES else iterations):
            y = a @ v
            z = a.T @ y
            new = z / (np.linalg.norm(z) + NORM_EPS)
            v = new if np.linalg.norm(new) > 0.5 else v
        path.append(wanted * a / (np.linalg.norm(y) + NORM_EPS))
    return np.stack(path)


def rms_normalized(u: Array) -> Array:
    """Return updates of root mean square 1."""
    return u / (np.sqrt((u**2).mean(axis=(1, 2), keepdims=True)) + NORM_EPS)


def trajectory(
    w: Array,
    g: Array,
    method: Formula,
    *,
    lr: float,
    schedule: Sequence[float],
    weight_decay: float,
    decay: Literal["independent", "coupled", "l2"],
) -> Array:
    """Return the weights after each step, W <- W - s (lr U + removed W); an L2 term is part of the gradient instead."""
    removed = {"independent": weight_decay, "coupled": lr * weight_decay, "l2": 0.0}[decay]
    l2 = weight_decay if decay == "l2" else 0.0
    seen: list[Array] = []
    path = []
    for s, now in zip(schedule, g, strict=True):
        seen.append(now + l2 * w)
        w = w - s * (lr * method(np.stack(seen))[-1] + removed * w)
        path.append(w)
    return np.stack(path)
