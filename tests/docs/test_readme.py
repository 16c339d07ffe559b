"""Every block of the README is run as written, and what it prints is compared with what the README shows."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def of(language: str) -> list[str]:
    return [code for kind, code in BLOCKS if kind == language]


@pytest.fixture
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_first_block_begins_by_line_fifteen_and_the_whole_is_short() -> None:
    lines = TEXT.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if "callbacks=[" in line) <= 15
    assert len(lines) <= 200


@pytest.mark.usefixtures("_at_root")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_python_blocks_run_in_order_and_print_what_is_shown() -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in of("python"):
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - it is our own README
    shown = [line.rstrip() for block in of("text") for line in block.splitlines()]
    lines = {line.rstrip() for line in printed.getvalue().splitlines()}
    assert [line for line in shown if line not in lines] == []


@pytest.mark.parametrize("line", [line for block in of("bash") for line in block.splitlines() if line])
def test_commands_run(line: str, tmp_path: Path) -> None:
    command = line.partition("#")[0].split()
    if command[0] == "bash":  # the two set-up commands: one of them runs this very test
        assert (ROOT / command[1]).is_file()
        return
    assert command[0] == "lightning-mup"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    call = [sys.executable, "-m", "lightning_mup.cli", *command[1:]]
    run = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
