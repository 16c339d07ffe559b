"""What each rank holds and sends per step, by size, method, strategy and number of ranks: shapes and settings alone.

Nothing is trained, and nothing is typed: parameters and their methods come from the configurations and their plans,
work and state from the optimizers, and who owns what from the same division that the strategies make. Weights,
gradients and state are in float32; activations, and what is whole for a moment (a block's weights under FSDP2), come on
top.

Usage, from the repository's root: ``python -m recipes.cluster.expect``, which writes ``expect.txt``. See the README.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from lightning_mup.core.method import find_method
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.ownership import Load, assign, is_shared
from lightning_mup.core.plan import aligned
from lightning_mup.train import model_of, plan_of

SIZES = ("190m", "380m", "640m", "1.4b")
METHODS = ("adam", "muon", "shampoo", "soap")
RANKS = (1, 8, 64)
REPLICAS = 2  # of HSDP
HERE = Path(__file__).parent


class Rank(NamedTuple):
    """The busiest rank, in bytes and as a share of the work.

    Args:
        weights: that it keeps; gradients take as much.
        state: of the optimizer.
        work: of all operations of a step of the optimizer.
        sent: per step, by gradients' and weights' means and gathers.
        divided: per step, because of the optimizer's division alone.
    """

    weights: float
    state: float
    work: float
    sent: float
    divided: float


def loads_of(size: str, method: str) -> list[Load]:
    """Return what every parameter of a run costs."""
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", [f"experiment=llama_{size}", f"method={method}"])
    return optimizer_of(config).loads()


def optimizer_of(config: DictConfig) -> StackedOptimizer:
    """Build a configuration's optimizer over shapes."""
    found, plan = find_method(config.method.optimizer), plan_of(config)
    options: dict[str, Any] = {**found.preset, **OmegaConf.to_container(config.method.options, resolve=True)}
    if found.routes:
        routes = {role.value: name for role, name in found.routes.items()}
        options["routes"] = routes | (options.get("routes") or {})
    with torch.device("meta"):
        params = dict(model_of(config).named_parameters())
    specs = [row.spec for row in plan.params]
    groups = [{"params": [params[s.name]], "role": s.role.value, "lookup": s.lookup} for s in specs]
    assert found.build is not None
    built = found.build(groups, lr=config.method.lr, **options)
    assert isinstance(built, StackedOptimizer)
    return built


def replicated(loads: Sequence[Load], ranks: int) -> Rank:
    """Return what a rank has under ``ddp``."""
    whole, state = _bytes(loads), sum(load.state_bytes for load in loads)
    return Rank(whole, state, 1.0, 2 * whole * (ranks - 1) / ranks, 0.0)


def divided(loads: Sequence[Load], ranks: int) -> Rank:
    """Return what the busiest rank has under ``mup_ddp``."""
    shared = [load for load in loads if is_shared(load, "divide")]
    owned = [load for load in loads if not is_shared(load, "divide")]
    each = _divide(owned, ranks)
    state = max(size for _, size in each) + sum(load.state_bytes for load in shared)
    plain, travels = replicated(loads, ranks), _bytes(owned) * (ranks - 1) / ranks
    return Rank(plain.weights, state, _share(each, shared), plain.sent, travels)


def sharded(loads: Sequence[Load], ranks: int, replicas: int = 1) -> Rank:
    """Return what the busiest rank has under ``mup_fsdp``, with copies of the weights (HSDP) or without."""
    shards = ranks // replicas
    parts = [load for load in loads if load.elementwise]
    owned = [load for load in loads if not load.elementwise]
    each, whole, matrices = _divide(owned, ranks), _bytes(loads), _bytes(owned)
    state = max(size for _, size in each) + sum(load.state_bytes for load in parts) / shards
    sent = 3 * whole * (shards - 1) / shards + 2 * whole / shards * (replicas - 1) / replicas
    moved = matrices / ranks * (shards - 1) / shards + matrices / shards * (ranks - 1) / ranks
    work = (max(work for work, _ in each) + sum(load.work for load in parts) / shards) / sum(
        load.work for load in loads
    )
    return Rank(whole / shards, state, work, sent, moved)


def rows(size: str, method: str) -> Iterator[list[str]]:
    """Return the lines of one method at one size."""
    loads = loads_of(size, method)
    for ranks in RANKS:
        ways = {"one process": replicated(loads, 1)}
        if ranks > 1:
            hybrid = sharded(loads, ranks, REPLICAS)
            ways = {"ddp": replicated(loads, ranks), "mup_ddp": divided(loads, ranks)}
            ways |= {"mup_fsdp": sharded(loads, ranks), "mup_hsdp": hybrid}
        for way, rank in ways.items():
            kept = [f"{value / 2**30:.3g}" for value in (rank.weights, rank.weights, rank.state)]
            moved = [f"{value / 2**30:.3g}" for value in (rank.sent, rank.divided)]
            yield [size, method, str(ranks), way, *kept, f"{rank.work:.1%}", *moved]


def text() -> str:
    """Return the table."""
    header = ["size", "method", "ranks", "strategy", "weights", "gradients", "state", "work", "sent", "by division"]
    lines = [row for size in SIZES for method in METHODS for row in rows(size, method)]
    said = "GiB of the busiest rank, float32; work: its share of the optimizer's; sent, and as much received: per step"
    return "\n".join([said, "", *aligned([header, *lines])]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "expect.txt", help="where to write (default: beside this)")
    out = parser.parse_args(arguments).out
    found = text()
    out.write_text(found)
    print(found, end="")


def _bytes(loads: Sequence[Load]) -> float:
    return float(sum(load.param.numel() * 4 for load in loads))


def _divide(owned: Sequence[Load], ranks: int) -> list[tuple[float, int]]:
    each = [(0.0, 0)] * ranks
    assign(owned, each)
    return each


def _share(each: Sequence[tuple[float, int]], shared: Sequence[Load]) -> float:
    common = sum(load.work for load in shared)
    return (max(work for work, _ in each) + common) / (sum(work for work, _ in each) + common)


if __name__ == "__main__":
    main()
