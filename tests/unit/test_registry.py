"""One file adds a parametrization or a method: a new module of the folder, or an entry point of another package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lightning_mup.core import registry
from lightning_mup.core.rules import Rules, all_rules, find_rules

RULES = """
from lightning_mup import Row, Rules, Role, SPECTRAL
MINE = Rules("{name}", dict.fromkeys(Role, Row(update_norm=SPECTRAL)), reference="a test")
"""


@pytest.fixture
def _fresh() -> Iterator[None]:
    all_rules.cache_clear()
    yield
    all_rules.cache_clear()


def write_package(folder: Path, name: str, files: dict[str, str]) -> str:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    for file, text in files.items():
        (package / f"{file}.py").write_text(text)
    importlib.invalidate_caches()
    return name


def test_a_file_in_the_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = write_package(tmp_path, "one_more", {"mine": RULES.format(name="mine")})
    assert list(registry.collect(package, Rules)) == ["mine"]


@pytest.mark.usefixtures("_fresh")
def test_an_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = write_package(tmp_path, "third_party", {"rules": RULES.format(name="theirs")})
    point = EntryPoint("theirs", f"{package}.rules:MINE", "lightning_mup.rules")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    assert find_rules("theirs").name == "theirs"
    assert "mup" in all_rules()


def test_a_name_taken_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = write_package(tmp_path, "twice", {"a": RULES.format(name="same"), "b": RULES.format(name="same")})
    with pytest.raises(ValueError, match=r"the name 'same' is taken twice, the second time by twice\.b; rename"):
        registry.collect(package, Rules)


def test_an_entry_point_of_another_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("wrong", "sys:path", "lightning_mup.rules")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(ValueError, match=r"entry point 'sys:path' of 'lightning_mup.rules' must be a Rules, got \["):
        registry.collect("lightning_mup.rules", Rules)
    assert sys.path
