"""The wheel holds conf/ and the sweeper: a program in another package takes our groups by its search path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "lightning_mup", "conf", "hydra_plugins")

CONFIG = """
defaults:
  - model: llama
  - data: synthetic
  - method: muon
  - callbacks: [watch_updates, spectral_normalization]
  - sweep: grid
  - _self_

name: theirs
model: {net: {width: 32}}
method: {lr: 0.05}

hydra:
  searchpath: [pkg://lightning_mup.conf]
  sweeper: {grid: {radius: 1}}
"""

PROGRAM = """
from pathlib import Path

import hydra
import lightning_mup
from hydra.utils import instantiate


@hydra.main(config_path="conf", config_name="main", version_base="1.3")
def main(config):
    net = instantiate(config.model.net)
    callbacks = instantiate(config.callbacks)
    print("package", Path(lightning_mup.__file__).parent)
    print("built", type(net).__name__, net.embedding.weight.shape[1], *(type(c).__name__ for c in callbacks.values()))
    return abs(config.method.lr - 2**-4)


main()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of a copy of this repository is unpacked."""
    copy, wheels, target = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "installed"))
    for name in SOURCES:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, copy], check=True)
    subprocess.run([*pip, "install", *offline, "--target", target, *wheels.glob("*.whl")], check=True)
    return target


def test_every_configuration_is_in_the_wheel(installed: Path) -> None:
    ours = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    theirs = {
        path.relative_to(installed / "lightning_mup/conf") for path in (installed / "lightning_mup").rglob("*.yaml")
    }
    assert theirs == ours
    assert (installed / "hydra_plugins/lightning_mup_sweeper/__init__.py").exists()
    assert not (installed / "hydra_plugins/__init__.py").exists()  # or other plugins would be hidden


def test_a_program_in_another_package_uses_our_groups_and_sweeper(installed: Path, tmp_path: Path) -> None:
    package = tmp_path / "theirs"
    (package / "conf").mkdir(parents=True)
    (package / "conf/main.yaml").write_text(CONFIG)
    for name, text in (("__init__.py", ""), ("conf/__init__.py", ""), ("program.py", PROGRAM)):
        (package / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "theirs.program", "data.context=16"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line for line in lines if line.startswith("package")} == {f"package {installed / 'lightning_mup'}"}
    assert [line for line in lines if line.startswith("built")] == [
        "built Llama 32 WatchUpdates SpectralNormalization"
    ] * 3
    assert sorted(path.name for path in (tmp_path / "runs/theirs").iterdir()) == [
        *(f"context=16,lr=2^{k}" for k in (-3, -4, -5)),
        "multirun.yaml",
    ]
