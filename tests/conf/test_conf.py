"""Every YAML of conf/ composes through Hydra and instantiates what it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import lightning_mup

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))


def test_there_are_files() -> None:
    assert "callbacks/parametrize" in FILES


@pytest.mark.parametrize("name", FILES)
def test_composes_and_instantiates(name: str) -> None:
    group, _, choice = name.rpartition("/")
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        found = instantiate(compose(overrides=[f"+{group}={choice}"]))
    assert isinstance(found[group]["parametrize"], lightning_mup.Parametrize)
    assert found[group]["parametrize"].base == {"width": 128}


def test_an_override_reaches_the_callback() -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose(overrides=["+callbacks=parametrize", "callbacks.parametrize.rules=[mup,complete_p]"])
    assert instantiate(config).callbacks.parametrize.rules == ["mup", "complete_p"]
