"""A new optimizer is one file: where it is installed, it is planned, trained, resumed and held to the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILE = '''
import torch
import lightning_mup as mup
from lightning_mup.core.linalg import polar


class Whitened(mup.StackedOptimizer):
    """Muon with the exact orthogonal factor."""

    def __init__(self, params, lr=0.02, *, weight_decay=0.0, decay="independent", nonfinite="raise"):
        settings = {"lr": lr, "weight_decay": weight_decay, "decay": decay, "nonfinite": nonfinite}
        super().__init__(params, METHOD, settings)


class Whiten:
    name = "whiten"

    def init(self, param_NOI):
        return {"ema": torch.zeros_like(param_NOI)}

    def update(self, u_NOI, state, ctx):
        return polar(state["ema"].lerp_(u_NOI, 0.1))


METHOD = mup.Method(
    name="NAME",
    update_norm=mup.Power(),
    optimizers=(Whitened,),
    chain=lambda settings: Whiten(),
    build=Whitened,
    reference="a test",
)
'''
INSTALLED = {  # what an installer leaves beside the file
    "METADATA": "Metadata-Version: 2.1\nName: NAME\nVersion: 0.1\n",
    "entry_points.txt": "[lightning_mup.methods]\nNAME = NAME:METHOD\n",
}
GOOD = "whitened"
BROKEN: dict[str, tuple[str, str, str]] = {  # what stands there, what stands there instead, which test notices
    "whitened_misdeclared": (
        "update_norm=mup.Power()",
        "update_norm=mup.Power(fan_in=1 / 2)",
        "test_update_is_as_large_as_declared",
    ),
    "whitened_careless": (
        'state["ema"].lerp_(u_NOI, 0.1)',
        'u_NOI.mul_(0.1).add_(state["ema"], alpha=0.9)',
        "test_it_writes_into_its_own_state_alone",
    ),
}
FILES = ["test_transforms.py", "test_methods.py", "installed.py"]
Outcomes = dict[tuple[str, str], set[str]]


def install(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source.replace("NAME", name))
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    for file, text in INSTALLED.items():
        (info / file).write_text(text.replace("NAME", name))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The names of tests by method and outcome, in another process where a good method and bad ones are installed."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, GOOD, FILE)
    for name, (right, wrong, _) in BROKEN.items():
        assert FILE.count(right) == 1
        install(folder, name, FILE.replace(right, wrong))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    options = ["-k", GOOD, "-q", "-rA", "--tb=no", "--show-capture=no", "-p", "no:cacheprovider"]
    options.append(f"--basetemp={folder / 'temporary'}")
    call = [sys.executable, "-m", "pytest", *options, *(f"tests/contracts/{file}" for file in FILES)]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    found: Outcomes = defaultdict(set)
    for outcome, test, case in re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(\w+)(.*)$", done.stdout, flags=re.MULTILINE):
        method = re.search(rf"{GOOD}\w*", case)
        found[method.group() if method else GOOD, outcome].add(test)
    return found


def test_a_method_in_one_file_is_planned_trained_resumed_and_held_to_the_contract(outcomes: Outcomes) -> None:
    assert outcomes[GOOD, "FAILED"] | outcomes[GOOD, "ERROR"] == set()
    assert outcomes[GOOD, "PASSED"] >= {
        "test_whitened_is_planned",
        "test_whitened_is_trained_and_resumed_bit_for_bit",
        "test_a_stack_of_three_is_three_stacks_of_one",
        "test_it_writes_into_its_own_state_alone",
        "test_the_same_twice",
        "test_numbers_stay_finite",
        "test_update_is_as_large_as_declared",
        "test_wrong_declaration_is_found",
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_fails_the_contract(name: str, outcomes: Outcomes) -> None:
    noticing = {bad: test for bad, (_, _, test) in BROKEN.items()}
    assert noticing.pop(name) in outcomes[name, "FAILED"]
    assert set(noticing.values()) <= outcomes[name, "PASSED"]  # which know of other flaws
