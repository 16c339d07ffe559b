"""Write the first round of a sweep as W&B sweeps, one for each grid."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lightning_mup.compose_errors import composed, explain
from lightning_mup.sweep import Sweep, from_words
from lightning_mup.sweep_axes import Combination, folder_name

EXAMPLE = (
    "example: lightning-mup sweep-file sweep=width_lr method=adamw,muon --out sweeps; then: wandb sweep sweeps/..."
)

_COMMAND = ("${env}", "${interpreter}", "-m", "lightning_mup.train")
_ELSEWHERE = {"sweep", "launcher"}
"""Groups that the agent takes the place of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of ``lightning-mup sweep-file``.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="as of lightning-mup train; sweep=width_lr if none"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write one file for each sweep, instead of printing")


def run(args: argparse.Namespace) -> int:
    """Write the files, or print them; return 0.

    Args:
        args: parsed words.

    Raises:
        ValueError: the words do not make a sweep with a grid.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> run(parser.parse_args(["model.net.width=64,128", "hydra.sweeper.grid.radius=1", "method.lr=0.01"]))
        # width_lr
        command:
        - ${env}
        - ${interpreter}
        - -m
        - lightning_mup.train
        - name=width_lr
        - hydra.mode=RUN
        - logger=wandb
        - ${args_no_hyphens}
        method: grid
        metric:
          name: val/loss
          goal: minimize
        parameters:
          model.net.width:
            values:
            - 64
            - 128
          method.lr:
            values:
            - 0.00390625
            - 0.0078125
            - 0.015625
        <BLANKLINE>
        0
    """
    texts = {name: f"# {name}\n{OmegaConf.to_yaml(OmegaConf.create(dict(file)))}" for name, file in files(args.words)}
    if args.out is None:
        print("---\n".join(texts.values()))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = args.out / f"{name}.yaml"
        path.write_text(text)
        print(f"wandb sweep {path}")
    return 0


def files(words: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield name and content of W&B sweeps that have the points of a sweep's first round, each point once.

    W&B knows products alone, so combinations with different grids, such as those of several methods, go apart.

    Args:
        words: overrides of ``conf/train.yaml``.

    Raises:
        ValueError: the words do not make a sweep with a grid.
    """
    config, sweep = _planned(list(words))
    end = [f"name={config.name}", "hydra.mode=RUN"]
    if not any(word.startswith("logger=") for word in words):
        end.append("logger=wandb")
    groups = _products(sweep.combinations)
    for group in groups:
        told = _values(group)
        apart = {key: values[0] for key, values in told.items() if len(values) == 1} if len(groups) > 1 else {}
        fixed = [str(c) for c in group[0].choices if not c.axis and c.key not in {*_ELSEWHERE, "name"}]
        points = [sweep.grid.value(k) for k in group[0].first]
        axes = {key: [_plain(value) for value in values] for key, values in told.items()} | {sweep.grid.key: points}
        yield (
            ",".join(filter(None, [str(config.name), folder_name(apart)])),
            {
                "command": [*_COMMAND, *fixed, *end, "${args_no_hyphens}"],
                "method": "grid",
                "metric": {"name": "val/loss", "goal": "minimize"},
                "parameters": {key: {"values": values} for key, values in axes.items()},
            },
        )


def _planned(words: list[str]) -> tuple[DictConfig, Sweep]:
    """Return configuration and sweep of the words, which may name an experiment that has one."""
    try:
        own = from_words(words)[1] is not None
    except HydraException:  # settings of a grid, perhaps, which compose beside one alone
        own = False
    words = words if own else ["sweep=width_lr", *words]
    try:
        config, sweep = from_words(words)
    except HydraException as error:
        raise ValueError(explain(error, config=composed(words))) from error
    if sweep is None:
        raise ValueError(f"{' '.join(words)} has no grid; give sweep=width_lr, or another with one")
    return config, sweep


def _products(combinations: Sequence[Combination]) -> list[list[Combination]]:
    """Return the combinations in groups of one grid each that are products of their axes."""
    grids: dict[tuple[int, ...], list[Combination]] = {}
    for made in combinations:
        grids.setdefault(made.first, []).append(made)
    return [
        part for group in grids.values() for part in ([group] if _is_product(group) else [[made] for made in group])
    ]


def _is_product(group: Sequence[Combination]) -> bool:
    return len(list(itertools.product(*_values(group).values()))) == len(group)


def _values(group: Sequence[Combination]) -> dict[str, list[str]]:
    """Return the values of each axis within a group, in their order."""
    found: dict[str, dict[str, None]] = {}
    for made in group:
        for choice in made.choices:
            if choice.axis:
                found.setdefault(choice.key, {})[choice.value] = None
    return {key: list(values) for key, values in found.items()}


def _plain(value: str) -> object:
    """Return a number as a number; a list stays one word, since the agent would write it with spaces."""
    parsed = OverridesParser.create().parse_override(f"key={value}").value()
    return parsed if isinstance(parsed, (int, float)) else value
