"""A plain PyTorch loop under a plan: initial values, parameter groups, and the best learning rate at three widths.

It trains the paper's Llama with Muon, and Adam for embedding and readout, on the text that is always there, under mup
and under sp. No Trainer is involved: what a plan says is done by two functions of a few lines.

Usage, from the repository's root: ``python -m recipes.plain_pytorch.train``. See the README in this folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_mup as mup
from lightning_mup import schedules
from lightning_mup.data.module import TokenDataModule
from lightning_mup.data.standard_library import StandardLibrary
from lightning_mup.models.llama import Llama

BASE_WIDTH, DEPTH, CONTEXT, BATCH = 64, 2, 64, 8
LR, WEIGHT_DECAY = 0.05, 1e-4  # at the base: the rate of a matrix' spectral norm, and the fraction removed per step
ROLES = {"embedding.weight": "input", "layers.*": "hidden", "readout.weight": "output"}
"""Left out, they are read off the dimensions that grow; in the base run, none does."""
RESULTS = Path(__file__).parent / "results"


def build(width: int) -> Llama:
    """Return the network, which knows nothing of parametrizations; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Llama(256, width=width, depth=DEPTH, context=CONTEXT, head_dim=32)


@torch.no_grad()
def initialize(net: nn.Module, plan: mup.Plan, base: mup.Base) -> None:
    """Scale each parameter to the plan's ratio of the size that it has in the base; zeros stay zero."""
    for name, parameter in net.named_parameters():
        row = plan[name]
        actual = parameter.double().square().mean().sqrt()
        if actual > 0:
            parameter.mul_(row.init * base.measured[row.spec.base_name].rms / actual)


def parameter_groups(net: nn.Module, plan: mup.Plan, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups for :class:`lightning_mup.Muon`: parameters that are treated alike share one, and its products.

    Args:
        net: the network.
        plan: its plan.
        lr: learning rate at the base.
        weight_decay: fraction removed per step, at the base.
    """
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        row = plan[name]
        defaults = mup.all_methods()[row.method].defaults
        settings = {
            "method": row.method,
            "lr": lr * row.lr,
            "weight_decay": weight_decay * row.weight_decay,  # of independent decay, which is the default of ours
            **{key: defaults[key] * factor for key, factor in row.eps.items()},
            "axes": row.spec.axes,  # (out, in): torch keeps an embedding the other way round than a linear layer
            "lookup": row.spec.lookup,
            "split": row.spec.split,
        }
        groups.setdefault(tuple(settings.items()), {**settings, "params": []})["params"].append(parameter)
    return list(groups.values())


def optimizer_of(net: nn.Module, base: nn.Module, *, rules: str, lr: float) -> torch.optim.Optimizer:
    """Give a network its initial values, and return the optimizer that its plan asks for."""
    is_base = mup.Base.of(net).shapes == mup.Base.of(base).shapes
    choices = mup.Choices(roles=ROLES)
    plan = mup.plan(net, "self" if is_base else base, rules=rules, method="muon_adam", choices=choices)
    initialize(net, plan, mup.Base.of(base))
    return mup.Muon(parameter_groups(net, plan, lr=lr, weight_decay=WEIGHT_DECAY), lr=lr)


def loss_of(net: nn.Module, text: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next byte, in nats, of windows [batch, context + 1]."""
    return F.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], steps: int) -> None:
    """Take steps with a linear warm-up over a tenth of them and a linear decay to 0; any torch scheduler would do."""
    scheduler = schedules.linear(optimizer, total=steps, warmup=schedules.Fraction(0.1))
    for text, _ in zip(batches, range(steps), strict=False):
        optimizer.zero_grad()
        loss_of(net, text).backward()
        optimizer.step()
        scheduler.step()


def run(width: int, *, rules: str, lr: float, steps: int) -> float:
    """Train one network and return its loss on the validation text, in nats per byte."""
    data = TokenDataModule(StandardLibrary(), context=CONTEXT, batch_size=BATCH, val_batches=40)
    data.prepare_data()
    data.setup("fit")  # its loaders are torch's; they need no Trainer
    net = build(width)
    train(net, optimizer_of(net, build(BASE_WIDTH), rules=rules, lr=lr), data.train_dataloader(), steps)
    with torch.no_grad():
        return sum(loss_of(net, text).item() for text in data.val_dataloader()) / len(data.val_dataloader())


def table(losses: dict[tuple[str, float], list[float]], widths: Sequence[int]) -> str:
    """Return one line per parametrization and learning rate, with the best of each width marked."""
    lines = [f"{'rules':<6}{'lr':>8}" + "".join(f"{width:>10}" for width in widths)]
    for (rules, lr), found in losses.items():
        best = [min(all_[i] for (other, _), all_ in losses.items() if other == rules) for i in range(len(widths))]
        cells = (f"{loss:>9.4f}{'*' if loss == least else ' '}" for loss, least in zip(found, best, strict=True))
        lines.append(f"{rules:<6}{lr:>8.4f}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train at every width, rate and parametrization, and leave the table of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="multiples of 32")
    parser.add_argument("--rules", nargs="+", default=["mup", "sp"], help="parametrizations")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4], help=f"on the rate {LR}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="other numbers may round otherwise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of losses.txt")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    losses: dict[tuple[str, float], list[float]] = {}
    for rules in given.rules:
        for factor in given.factors:
            key = (rules, LR * factor)
            losses[key] = [run(width, rules=rules, lr=key[1], steps=given.steps) for width in given.widths]
            print(f"{rules}, lr {key[1]:.4f}: {losses[key]}", flush=True)
    title = f"validation loss in nats per byte after {given.steps} steps, by width; * best of the column\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "losses.txt").write_text(title + table(losses, given.widths) + "\n")
    print(title + table(losses, given.widths))


if __name__ == "__main__":
    main()
