"""Measure where the best learning rate lies at each width, with the multipliers that a plan gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mup.core.base import Base
from lightning_mup.core.groups import GroupSplitter
from lightning_mup.core.initialize import initialize
from lightning_mup.core.scaling import Choices, Scaling
from tests.models import generator

INPUTS, CLASSES, BATCH, STEPS, LAST = 32, 10, 128, 40, 10


def mlp(width: int) -> nn.Module:
    """Three layers; the readout starts at zero, as in the paper, which takes the widths closer to their limit."""
    readout = nn.Linear(width, CLASSES)
    nn.init.zeros_(readout.weight)
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), readout)


def task() -> list[tuple[Tensor, Tensor]]:
    """Batches labelled by a fixed random network of one hidden layer."""
    first, second = (
        torch.randn(n, m, generator=generator(i)) for i, (n, m) in enumerate(((INPUTS, 64), (64, CLASSES)))
    )
    x = torch.randn(STEPS, BATCH, INPUTS, generator=generator(2))
    y = (torch.relu(x @ first) @ second).argmax(-1)
    return list(zip(x, y, strict=True))


def final_loss(
    width: int, base_width: int, lr: float, rules: str, seed: int, batches: list[tuple[Tensor, Tensor]]
) -> float:
    torch.manual_seed(seed)
    base, model = Base.of(mlp(base_width)), mlp(width)
    scaling = Scaling.read(model, base, rules, Choices())
    params = {spec.name: scaling.initial(spec) for spec in scaling.specs}
    initialize(dict(model.named_parameters()), params, base.measured)
    with GroupSplitter(scaling, {id(p): n for n, p in model.named_parameters()}) as splitter:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    splitter.finish()
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    mean = sum(losses[-LAST:]) / LAST
    return mean if math.isfinite(mean) else math.inf


def best_log2_lr(losses: dict[float, float]) -> float:
    """Vertex of the parabola through the lowest point of (log2 lr, log loss) and its two neighbours."""
    grid = sorted(losses)
    i = min(range(len(grid)), key=lambda k: losses[grid[k]])
    if i in (0, len(grid) - 1):
        raise ValueError(
            f"the best learning rate 2^{grid[i]} is at the edge of the grid {grid[0]}..{grid[-1]}; widen it"
        )
    left, low, right = (math.log(losses[grid[k]]) for k in (i - 1, i, i + 1))
    return grid[i] + 0.5 * (grid[1] - grid[0]) * (left - right) / (left - 2 * low + right)


def drift(rules: str, widths: Sequence[int], grid: Sequence[float], seeds: Sequence[int]) -> tuple[float, list[float]]:
    """Return the slope of log best learning rate against log width, and the optima (log2)."""
    batches, best = task(), []
    for width in widths:
        losses = {
            k: sum(final_loss(width, widths[0], 2.0**k, rules, seed, batches) for seed in seeds) / len(seeds)
            for k in grid
        }
        best.append(best_log2_lr(losses))
    x = [math.log2(width) for width in widths]
    mean_x, mean_y = sum(x) / len(x), sum(best) / len(best)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, best, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, best
