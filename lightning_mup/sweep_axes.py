"""The outer axes of a sweep: what the command line and the configuration list, each combination with its name."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_mup.sweep_grid import Grid

_LONGEST, _DIGITS = 192, 12
_SAFE = "^+-.~"
"""Beside letters, digits and _, what a folder's name may hold as it is."""
_UNNAMED = {"sweep", "launcher"}
"""Groups that say which jobs there are and where they run, not what one is."""


@dataclass(frozen=True)
class Choice:
    """One override of a combination.

    Args:
        key: as on the command line, such as ``model.net.width`` or ``method``.
        value: as on the command line.
        axis: whether it is one of several, or fixed for the whole sweep.
        named: whether it is part of the folder's name.

    Examples:
        >>> str(Choice("model.net.width", "64"))
        'model.net.width=64'
    """

    key: str
    value: str
    axis: bool = True
    named: bool = True

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


@dataclass(frozen=True)
class Combination:
    """One value of every outer axis, and the points of the grid to begin with.

    Args:
        choices: all overrides of its jobs but the grid's.
        first: points of the first round.
    """

    choices: tuple[Choice, ...]
    first: tuple[int, ...]

    def names(self, *, all_keys: Iterable[str]) -> dict[str, str]:
        """Return short key to value for whatever tells it from others, sorted by key.

        Args:
            all_keys: every key of the sweep, among which short ones must be unique.

        Examples:
            >>> made = Combination((Choice("model.net.width", "64"), Choice("method", "muon")), first=(0,))
            >>> made.names(all_keys=["model.net.width", "method", "method.lr"])
            {'method': 'muon', 'width': '64'}
        """
        short = shortened(all_keys)
        return dict(sorted((short[c.key], c.value) for c in self.choices if c.named))


def combinations(
    master: DictConfig,
    arguments: Sequence[str],
    *,
    axes: Mapping[str, Sequence[object]],
    grid: Grid,
    loader: ConfigLoader,
) -> list[Combination]:
    """Return the product of all axes, each combination with its own first points of the grid.

    Args:
        master: the composed configuration with its ``hydra`` node.
        arguments: overrides of the command line; a list is an axis, or replaces the one of that key.
        axes: override key to values.
        grid: the grid within each combination; an override of its key gives the centre.
        loader: composes a combination's configuration, of which the centre is taken.

    Raises:
        ValueError: an axis cannot be listed, is the grid's own, or the grid's centre is not positive.
    """
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    unnamed = _UNNAMED | set(master.hydra.job.config.override_dirname.exclude_keys)
    listed = {str(key): [Choice(str(key), _written(value)) for value in _values(key, axes[key])] for key in axes}
    centre = []
    for override in overrides:
        key = override.get_key_element()
        if override.key_or_group == grid.key:
            centre = [_centre(override, grid)]
        else:
            axis = override.is_sweep_override() or key in listed
            named = axis or override.key_or_group not in unnamed
            listed[key] = [Choice(key, value, axis, named) for value in _listed(override)]
    if grid.key in listed:
        raise ValueError(f"axes lists {grid.key}, which the grid varies; leave it out of axes")
    return [
        Combination(choices, _first(grid, master, [*map(str, choices), *centre], loader))
        for choices in itertools.product(*listed.values())
    ]


def _first(grid: Grid, master: DictConfig, overrides: list[str], loader: ConfigLoader) -> tuple[int, ...]:
    composed = loader.load_sweep_config(master_config=master, sweep_overrides=overrides)
    return grid.first(centre=OmegaConf.select(composed, grid.key))


def _centre(override: Override, grid: Grid) -> str:
    if override.is_sweep_override():
        raise ValueError(
            f"{override.input_line} lists values of {grid.key}, which the grid varies by itself; give its centre "
            f"{grid.key}=NUMBER, or take sweep=none for exactly these values"
        )
    return str(override.input_line)


def _values(key: object, values: object) -> list[object]:
    if not isinstance(values, (list, tuple, ListConfig)) or not values:
        raise ValueError(f"axis {key} must be a list of values, got {values!r}; write {key}: [{values}]")
    return [OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for value in values]


def _written(value: object) -> str:
    """Return a value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _listed(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ValueError(f"{override.input_line} is no list of values; write {override.key_or_group}=VALUE,VALUE")
    return list(override.sweep_string_iterator())


# -- names ------------------------------------------------------------------------------------------------------------


def shortened(keys: Iterable[str]) -> dict[str, str]:
    """Return the last word of each key where it is the only one that ends so, and the whole key elsewhere.

    Examples:
        >>> shortened(["model.net.width", "base.width", "method.lr", "seed"])
        {'model.net.width': 'model.net.width', 'base.width': 'base.width', 'method.lr': 'lr', 'seed': 'seed'}
    """
    keys = list(dict.fromkeys(keys))
    last = {key: key.lstrip("+~").rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: last[key] if count[last[key]] == 1 else key for key in keys}


def folder_name(names: Mapping[str, str]) -> str:
    """Return ``key=value,key=value`` in characters that every file system takes.

    Examples:
        >>> folder_name({"rules.names": "[mup,complete_p]", "width": "64", "lr": "2^-4", "data": "'a b/c'"})
        'rules.names=mup+complete_p,width=64,lr=2^-4,data=a%20b%2Fc'
    """
    return _cut(",".join(f"{quote(key, safe=_SAFE)}={_plain(value)}" for key, value in names.items()))


def shortened_name(text: str) -> str:
    """Return a text as a folder's name, which file systems want at most 255 bytes long and without a slash.

    Examples:
        >>> shortened_name("method=muon"), shortened_name("")
        ('method=muon', 'default')
        >>> len(shortened_name("x" * 1000))
        193
    """
    return _cut(quote(text or "default", safe=f"{_SAFE}=,"))


def _cut(name: str) -> str:
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - _DIGITS]}~{hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]}"


def _plain(value: str) -> str:
    if value.startswith("[") and value.endswith("]"):
        value = "+".join(part.strip().strip("\"'") for part in value[1:-1].split(","))
    return quote(re.sub(r"^(['\"])(.*)\1$", r"\2", value), safe=_SAFE)


def quoted(text: str) -> str:
    """Return a text as an override's value that Hydra takes literally.

    Examples:
        >>> quoted("runs/width=64,lr=2^-4")
        "'runs/width=64,lr=2^-4'"
    """
    return "'" + re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"
