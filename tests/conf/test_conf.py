"""Every YAML of conf/ composes through Hydra and instantiates what it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import lightning_mup

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
KINDS = {
    "callbacks/grafting": lightning_mup.Grafting,
    "callbacks/parametrize": lightning_mup.Parametrize,
    "callbacks/spectral_normalization": lightning_mup.SpectralNormalization,
    "callbacks/watch_updates": lightning_mup.WatchUpdates,
    "callbacks/weight_decay": lightning_mup.WeightDecay,
}


def test_every_file_has_a_kind() -> None:
    assert sorted(KINDS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_composes_and_instantiates(name: str) -> None:
    group, _, choice = name.rpartition("/")
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        found = instantiate(compose(overrides=[f"+{group}={choice}"]))
    assert isinstance(found[group][choice], KINDS[name])


def test_callbacks_stand_side_by_side() -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        found = instantiate(compose(overrides=["+callbacks=[parametrize,weight_decay,watch_updates]"]))
    assert found.callbacks.parametrize.base == {"width": 128}
    assert found.callbacks.weight_decay.amount.value == 1e-4
    assert found.callbacks.watch_updates.every_n_steps == 100


def test_an_override_reaches_the_callback() -> None:
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose(overrides=["+callbacks=parametrize", "callbacks.parametrize.rules=[mup,complete_p]"])
    assert instantiate(config).callbacks.parametrize.rules == ["mup", "complete_p"]
