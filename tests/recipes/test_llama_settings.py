"""The recorded settings of the paper's section 4 are what the configurations say now, and what the paper says."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_mup.data.hub import HubText
from lightning_mup.sweep import from_words

RECIPE = Path(__file__).parents[2] / "recipes" / "llama_190m_to_1.4b"

# arXiv:2512.05620, section 4: width -> parameters, steps, FLOPs
SIZES = {
    "190m": (512, 185_680_896, 28_332, 4.320e18),
    "380m": (768, 379_184_640, 57_858, 1.781e19),
    "640m": (1024, 639_797_248, 97_625, 5.038e19),
    "1.4b": (1536, 1_362_349_056, 207_877, 2.268e20),
}
# Table 4, at width 512: rate, multiplier of embedding and readout, warm-up tokens, decay x width
METHODS = {
    "adam": (4e-3, 1.0, 742_723_584, 0.1024),
    "muon": (8e-3, 1.6, 11_140_854, 0.16384),
    "shampoo": (2e-3, 32.0, 185_680_896, 0.1024),
    "soap": (3.2e-2, 1.0, 23_210_112, 0.1024),
}
# Powers of the width in the rates of hidden matrices, embedding and readout
POWERS = {"adam": (-1, 0, -1), "muon": (0, 0, -1), "shampoo": (-1, 0, -1), "soap": (0, 0, 0)}


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("llama_settings", RECIPE / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def made(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("settings")
    recipe.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str], dict[str, Any]]:
    with (RECIPE / "settings.csv").open() as file:
        return {(row["size"], row["method"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", ["settings.csv", "settings.txt"])
def test_what_is_recorded_is_what_is_made_now(made: Path, name: str) -> None:
    assert (made / name).read_text() == (RECIPE / name).read_text()


def test_the_readme_shows_what_is_recorded() -> None:
    shown = re.findall(r"```text\n(.*?)```", (RECIPE / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for block in shown for line in block.splitlines()]
    assert len(lines) > len(SIZES) * len(METHODS)
    assert set(lines) <= set((RECIPE / "settings.txt").read_text().splitlines())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_settings_of_the_paper(recorded: dict[tuple[str, str], dict[str, Any]], size: str, method: str) -> None:
    row = recorded[size, method]
    width, params, steps, flops = SIZES[size]
    rate, multiplier, warmup, decay_times_width = METHODS[method]
    hidden, embedding, readout = (rate * (width / 512) ** power for power in POWERS[method])
    assert (int(row["width"]), int(row["params"]), int(row["steps"])) == (width, params, steps)
    assert (int(row["batch"]), int(row["context"]), float(row["clip"])) == (128, 1024, 1)
    assert int(row["tokens"]) == 20 * params
    assert steps == int(row["tokens"]) // (128 * 1024)
    assert float(row["flops"]) == pytest.approx(flops, rel=5e-4)  # rounded there
    found = [float(row[key]) for key in ("lr_hidden", "lr_embedding", "lr_readout", "weight_decay")]
    assert found == pytest.approx(
        [hidden, multiplier * embedding, multiplier * readout, decay_times_width / width], rel=1e-5
    )
    assert int(row["warmup_tokens"]) == warmup
    assert float(row["warmup_steps"]) == pytest.approx(warmup / (128 * 1024), rel=1e-5)


def test_commands_of_the_script_compose() -> None:
    shown = subprocess.run(["/usr/bin/env", "bash", RECIPE / "run.sh"], capture_output=True, text=True, check=True)
    commands = [shlex.split(line) for line in shown.stdout.splitlines()]
    prepare = next(command for command in commands if command[1] == "data")
    prepared = HubText(**{key: word for key, _, word in (pair.partition("=") for pair in prepare[5:-1])})
    tuned, trained = [], []
    for command in commands:
        if command[1] != "train":
            continue
        config, sweep = from_words([word for word in command[2:] if word != "--multirun"])
        source = config.data.source
        assert HubText(source.name, subset=source.subset, encoder=source.encoder).folder() == prepared.folder()
        assert prepare[-1] == f"tokens={source.tokens}"
        assert config.hydra.sweep.dir == f"runs/{config.name}"
        assert config.hydra.launcher.gpus_per_node == 8
        (tuned if sweep else trained).append((config.name, len(sweep.next_jobs()) if sweep else 0))
    assert tuned == [("llama_190m_lr", 20), ("llama_190m_decay", 20)]
    assert trained == [(f"llama_{size}", 0) for size in SIZES]


def test_the_script_refuses_what_it_does_not_know() -> None:
    call = ["/usr/bin/env", "bash", str(RECIPE / "run.sh"), "tuna"]
    run = subprocess.run(call, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown step 'tuna'; give data, tune, train" in run.stderr
