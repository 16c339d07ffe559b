"""The plain PyTorch loop does what the callback does, and the recipe runs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_mup as mup
from lightning_mup.language import LanguageModel
from recipes.plain_pytorch import train as recipe

README = Path(recipe.__file__).parent / "README.md"
LR, STEPS = 0.05, 3


def batches() -> list[Tensor]:
    return list(torch.randint(256, (STEPS, 2, 9), generator=torch.Generator().manual_seed(1)))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize(("width", "rules"), [(64, "mup"), (128, "mup"), (128, "sp")])
def test_the_loop_ends_where_the_trainer_does(width: int, rules: str) -> None:
    plain = recipe.build(width)
    optimizer = recipe.optimizer_of(plain, recipe.build(64), rules=rules, lr=LR)
    for text in batches():
        optimizer.zero_grad()
        recipe.loss_of(plain, text).backward()
        optimizer.step()
    module = LanguageModel(recipe.build(width))
    parametrize = mup.Parametrize(
        "self" if width == 64 else (lambda: LanguageModel(recipe.build(64))),
        rules=rules,
        method="muon_adam",
        lr=LR,
        weight_decay=recipe.WEIGHT_DECAY,
        roles={f"net.{pattern}": role for pattern, role in recipe.ROLES.items()},
    )
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[parametrize],
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    ours, theirs = dict(plain.named_parameters()), dict(module.net.named_parameters())
    start = dict(recipe.build(width).named_parameters())
    assert all(bool((ours[name] != start[name]).any()) for name in ours)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)


def test_groups_hold_every_parameter_once() -> None:
    net = recipe.build(128)
    groups = recipe.parameter_groups(net, mup.plan(net, recipe.build(64), method="muon_adam"), lr=1.0, weight_decay=1.0)
    held = [id(p) for p in itertools.chain.from_iterable(group["params"] for group in groups)]
    assert sorted(held) == sorted(map(id, net.parameters()))
    assert len(groups) == 3  # embedding, hidden, readout
    assert [group["weight_decay"] for group in groups] == [0.5] * 3
    assert sorted(group["lr"] for group in groups) == [0.5, 1.0, 1.0]


def test_the_recipe_leaves_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    recipe.main(["--widths", "64", "--rules", "mup", "--factors", "1", "4", "--steps", "2", "--out", str(tmp_path)])
    lines = (tmp_path / "losses.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["rules", "lr"], ["mup", "0.0500"], ["mup", "0.2000"]]
    assert sum(line.endswith("*") for line in lines[2:]) == 1
    assert all(2 < float(line.split()[2].rstrip("*")) < 8 for line in lines[2:])


def test_the_readme_runs() -> None:
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL):
        exec(compile(block, str(README), "exec"), {})  # noqa: S102 - it is our own README


def test_the_readme_shows_the_recorded_result() -> None:
    shown = re.findall(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert shown == [(README.parent / "results" / "losses.txt").read_text()]
