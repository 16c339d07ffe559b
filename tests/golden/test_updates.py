"""Updates before the learning rate, against the numbers of the paper's authors: every such case, step by step."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mup.core.graft import Graft
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.transform import Context, Transform, chain
from lightning_mup.transforms.adam import Adam
from lightning_mup.transforms.momentum import Momentum
from lightning_mup.transforms.normalize_entries import NormalizeEntries
from lightning_mup.transforms.orthogonalize import Orthogonalize
from lightning_mup.transforms.shampoo import Shampoo
from lightning_mup.transforms.soap import Soap

HERE = Path(__file__).parent
CASES = [c for c in json.loads((HERE / "manifest.json").read_text())["cases"] if c["kind"] != "parameter_trajectory"]
Case = dict[str, Any]


@cache
def arrays(file: str) -> Any:  # noqa: ANN401
    return np.load(HERE / file)


def ratios(case: Case, p: Case) -> tuple[float, float, float, float, float, float]:
    """Fan-in, fan-out, depth and batch ratios, and block-count ratios, 1 where the case does not scale epsilons."""
    if not case["hyperparameters"].get("scale_eps"):
        return (1.0,) * 6
    (r_in, r_out), blocks = (
        [size / base for size, base in zip(p["shape"], p["base_shape"], strict=True)],
        (p.get("normalized_blocks_in", 1.0), p.get("normalized_blocks_out", 1.0)),
    )
    return r_in, r_out, p["depth_ratio"], case["batch_ratio"], *blocks


def sgd(case: Case, p: Case) -> Transform:
    return Momentum(case["hyperparameters"]["beta1"], debias=True)


def adam(case: Case, p: Case, eps: str = "eps") -> Transform:
    h, (_, r_out, depth, batch, *_) = case["hyperparameters"], ratios(case, p)
    return Adam((h["beta1"], h["beta2"]), h[eps] / batch**0.5 / r_out / depth)


def muon(case: Case, p: Case) -> Transform:
    h, (r_in, r_out, depth, *_) = case["hyperparameters"], ratios(case, p)
    momentum = Momentum(h.get("beta", h.get("beta1")), nesterov=h["nesterov"])
    return chain(momentum, Orthogonalize(h["newton_schulz_steps"], h["eps"] * (r_in / r_out) ** 0.5 / depth))


def adamuon(case: Case, p: Case) -> Transform:
    h, (r_in, r_out, *_) = case["hyperparameters"], ratios(case, p)
    eps = h["adam_eps"] * (r_in * r_out) ** -0.5
    return chain(muon(case, p), NormalizeEntries(h["beta2"], eps, rms=0.2 if h["rms_align"] else None))


def shampoo(case: Case, p: Case) -> Transform:
    h, (r_in, r_out, depth, batch, nb_in, nb_out) = case["hyperparameters"], ratios(case, p)
    scale = r_in / r_out / depth**2 / (nb_in * nb_out)
    start = h["matrix_eps"] * scale / (1 if h["rel_eps"] else batch)
    direction = Shampoo(
        (h["beta1"], h["beta2"]),
        exponent=h["exponent"],
        matrix_eps=h["matrix_eps"] if h["rel_eps"] else start,
        relative_matrix_eps=h["rel_eps"],
        start=start,
        every=h["precondition_frequency"],
        root="eigh" if h["eigh"] else "newton",
        block_size=h["block_size"] or None,
        max_dim=h["max_precond_dim"],
    )
    if not h["grafting"]:
        return direction
    limit, k = h["max_precond_dim"], h["exponent"]
    total = k * sum(limit is None or size <= limit for size in p["shape"])
    rate = depth ** (1 - 2 * total) * (r_out / r_in) ** (1 - total) * (nb_in * nb_out) ** -total
    eps = h["adam_eps"] * batch ** (2 * k - 1) * (r_out / r_in) ** 0.5 / rate
    return Graft(magnitude=adam(case, p, "adam_eps"), direction=direction, eps=eps)


def soap(case: Case, p: Case) -> Transform:
    h, (r_in, r_out, depth, _, nb_in, nb_out) = case["hyperparameters"], ratios(case, p)
    limit = h["max_precond_dim"]
    active = tuple(limit is None or size <= limit for size in p["shape"])
    eps = {
        (True, True): (r_in / r_out / (nb_in * nb_out)) ** 0.5 / depth,
        (True, False): (r_in / nb_in) ** 0.5 / r_out,
        (False, True): (r_out * nb_out) ** -0.5,
    }[active]
    return Soap(
        (h["beta1"], h["beta2"]),
        eps=h["adam_eps"] * (1 if h["rel_eps"] else eps),
        relative_eps=h["rel_eps"],
        matrix_eps=h["matrix_eps"] * r_in / r_out / depth**2 / (nb_in * nb_out),
        every=h["precondition_frequency"],
        warmup_steps=h["eigh_warmup_steps"],
        warmup="eigh" if h["eigh"] else "qr",
        block_size=h["block_size"] or None,
        max_dim=limit,
    )


BUILD = {"sgd": sgd, "adam": adam, "muon": muon, "adamuon": adamuon, "shampoo": shampoo, "soap": soap}


def replay(case: Case, p: Case) -> float:
    """Worst relative error over the steps; matrices are stored [d_in, d_out], ours are [fan_out, fan_in]."""
    want = torch.from_numpy(arrays(case["file"])[p["expected_array"]])
    gradients = torch.from_numpy(arrays("gradients_float64.npz")[p["gradient_array"]]).to(want.dtype)
    transform = BUILD[case["optimizer"]](case, p)
    if case["kind"] == "normalized_update":
        transform = normalized(transform, p, case)
    state = transform.init(torch.zeros_like(gradients[:1].mT))
    if "spectral_normalize/v" in state:
        state["spectral_normalize/v"].copy_(torch.from_numpy(arrays(case["file"])[p["initial_vector_array"]]))
    worst = 0.0
    for step in range(case["steps"]):
        got = transform.update(gradients[step : step + 1].mT, state, Context(step + 1))[0].mT
        scale = want[step].norm()
        worst = max(worst, float((got - want[step]).norm() / (scale if scale else 1.0)))
    return worst


def normalized(transform: Transform, p: Case, case: Case) -> Transform:
    how = case["normalization"]
    if p["role"] == "embedding":
        return chain(transform, RmsNormalize())
    if how[p["role"]] == "rms":
        return chain(transform, RmsNormalize(over_inputs=True))
    return chain(transform, SpectralNormalize(math.ceil(how["power_iterations"]), how["warmup_steps"]))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['dtype']}")
def test_update(case: Case) -> None:
    for p in case["parameters"]:
        assert replay(case, p) <= case["accuracy"]["suggested_relative_tolerance"], p["name"]
