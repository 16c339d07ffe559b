"""The settings of every run of section 4 of arXiv:2512.05620, as the configurations compose and the plan moves them.

Nothing is typed here: rates, decay and warm-up are those of ``conf/paper/``, at width 512, and the other sizes' follow.
It writes ``settings.csv`` (one line per size and method) and ``settings.txt`` (tables to read).

Usage, from the repository's root: ``python recipes/llama_190m_to_1.4b/settings.py``. See the README in this folder.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from lightning_mup.budget import budget_steps, count, training_flops
from lightning_mup.core.decay import find_decay
from lightning_mup.core.duration import Tokens, as_steps
from lightning_mup.core.plan import aligned
from lightning_mup.train import flattened, model_of, plan_of

SIZES = ("190m", "380m", "640m", "1.4b")
METHODS = ("adam", "muon", "shampoo", "soap")
HIDDEN, EMBEDDING, READOUT = "net.layers.0.attention.q_proj.weight", "net.embedding.weight", "net.readout.weight"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One run, in the units in which the Trainer is told.

    Args:
        size: name of the model.
        method: name of the method.
        width: size of the residual stream.
        params: number of parameters.
        non_embedding_params: the same without embedding and readout.
        batch: sequences per step.
        context: tokens per sequence.
        tokens: that the budget pays for.
        steps: whole steps of them.
        warmup_tokens: until the rate is at its peak.
        warmup_steps: the same in steps.
        clip: norm to which gradients are clipped.
        lr_hidden: peak learning rate of the blocks' matrices.
        lr_embedding: that of the embedding.
        lr_readout: that of the readout.
        weight_decay: fraction of every weight removed per step at the peak.
        flops: floating-point operations of the training, optimizer not counted.
    """

    size: str
    method: str
    width: int
    params: int
    non_embedding_params: int
    batch: int
    context: int
    tokens: int
    steps: int
    warmup_tokens: int
    warmup_steps: float
    clip: float
    lr_hidden: float
    lr_embedding: float
    lr_readout: float
    weight_decay: float
    flops: float

    @classmethod
    def of(cls, size: str, method: str) -> Run:
        """Read a run off its configuration and its plan."""
        config = configuration(size, method)
        with torch.device("meta"):
            model = model_of(config).net
        params, batch = count(model), config.data.batch_size * config.data.context
        tokens = int(config.budget.tokens_per_parameter * params)
        plan, decay = plan_of(config), find_decay(config.weight_decay.policy)
        (fraction,) = {config.weight_decay.weight_decay * decay.factor(row.spec) for row in plan.params}
        warmup = Tokens(config.schedule.warmup.n)
        return cls(
            size=size,
            method=method,
            width=config.model.width,
            params=params,
            non_embedding_params=count(model, embeddings=False),
            batch=config.data.batch_size,
            context=config.data.context,
            tokens=tokens,
            steps=budget_steps(config.budget, params=params, tokens_per_step=batch),
            warmup_tokens=warmup.n,
            warmup_steps=as_steps(warmup, tokens_per_step=batch),
            clip=config.trainer.gradient_clip_val,
            lr_hidden=config.method.lr * plan[HIDDEN].lr,
            lr_embedding=config.method.lr * plan[EMBEDDING].lr,
            lr_readout=config.method.lr * plan[READOUT].lr,
            weight_decay=fraction,
            flops=training_flops(model, config.data.context) * tokens,
        )


def configuration(size: str, method: str) -> DictConfig:
    """Compose what ``lightning-mup train experiment=llama_SIZE method=METHOD`` runs."""
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        return compose("train", [f"experiment=llama_{size}", f"method={method}"])


def all_runs() -> list[Run]:
    """Return every run, the methods of a size side by side."""
    return [Run.of(size, method) for size in SIZES for method in METHODS]


def write_csv(runs: Iterable[Run], path: Path) -> None:
    """Write one line per run, numbers to six digits."""
    names = [field.name for field in fields(Run)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_exact(getattr(run, name)) for name in names] for run in runs)


def text(runs: Sequence[Run]) -> str:
    """Return the tables: sizes, runs, and the methods' own settings."""
    sections = [
        ("sizes (20 tokens per parameter; FLOPs of forward and backward passes, optimizer not counted)", sizes(runs)),
        ("runs (peak rates; decay: fraction of every weight removed per step at the peak)", settings(runs)),
        ("settings at width 512", [f"{method}: {own_settings(method)}" for method in METHODS]),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections) + "\n"


def sizes(runs: Sequence[Run]) -> list[str]:
    """Return the lines of one table: a size's parameters and what it costs."""
    rows = [["size", "width", "params", "non-embedding", "batch", "tokens", "steps", "FLOPs"]]
    for run in (run for run in runs if run.method == METHODS[0]):
        counts = [f"{run.params:,}", f"{run.non_embedding_params:,}", f"{run.batch} x {run.context}"]
        rows.append([run.size, str(run.width), *counts, f"{run.tokens:,}", f"{run.steps:,}", f"{run.flops:.3e}"])
    return aligned(rows)


def settings(runs: Sequence[Run]) -> list[str]:
    """Return the lines of one table: what the plan makes of each method's numbers at each size."""
    header = ["method", "size", "lr hidden", "lr embedding", "lr readout", "decay", "decay x width", "warm-up tokens"]
    rows = [[*header, "warm-up steps", "of all", "clip"]]
    for run in (run for method in METHODS for run in runs if run.method == method):
        factors = (run.lr_hidden, run.lr_embedding, run.lr_readout, run.weight_decay, run.weight_decay * run.width)
        warmup = [f"{run.warmup_tokens:,}", f"{run.warmup_steps:,.1f}", f"{run.warmup_steps / run.steps:.3%}"]
        rows.append([run.method, run.size, *(f"{value:.4g}" for value in factors), *warmup, f"{run.clip:g}"])
    return aligned(rows)


def own_settings(method: str) -> str:
    """Return a method's settings beside rate, decay and warm-up, as configured."""
    config = configuration(SIZES[0], method)
    options = ", ".join(f"{key}={value}" for key, value in flattened(config.method.options).items())
    return f"optimizer={config.method.optimizer}, {options}"


def _exact(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both files and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of settings.txt and settings.csv")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    runs = all_runs()
    write_csv(runs, out / "settings.csv")
    shown = text(runs)
    (out / "settings.txt").write_text(shown)
    print(shown, end="")


if __name__ == "__main__":
    main()
