"""The telescoping sweep by Hydra: for each combination of the outer axes, levels one after another, each with its grid.

``lightning-mup train experiment=... sweep=telescope model.net.width=1024``: from the base's width towards the target's,
which is what the configuration's model has. :mod:`lightning_mup.telescope` plans it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lightning_mup.analysis.optimum import Optimum
from lightning_mup.core.plan import aligned
from lightning_mup.sweep import Sweep
from lightning_mup.sweep_axes import Combination, combinations, folder_name
from lightning_mup.sweep_grid import Grid, Line
from lightning_mup.telescope import Telescope, located, telescope

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Widths of a telescoping sweep, and what it may spend.

    Args:
        base: smallest width.
        target: width that the tuning is for.
        key: override key of the width.
        share: share of the target's run that each combination may spend (> 0).
        drift: octaves by which the optimum may move between the base and infinite width; half the grid's reach if None.

    Examples:
        >>> Settings(64, 1024).share
        0.2
    """

    base: int
    target: int
    key: str = "model.net.width"
    share: float = 0.2
    drift: float | None = None


@dataclass
class TelescopingSweep(Sweep):
    """A sweep whose combinations come back at the next width, with a grid around the optimum of the one before.

    Args:
        telescopes: the levels of each combination that it starts with.
        key: override key of the width.
    """

    telescopes: Sequence[Telescope] = ()
    key: str = "model.net.width"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.combinations = list(self.combinations)
        self.keys = [self.grid.key, *(c.key for made in self.combinations for c in made.choices if c.named)]
        self.labels = [
            folder_name({k: value for k, value in made.names(all_keys=self.keys).items() if k != self._width})
            or "the run"
            for made in self.combinations
        ]
        self.levels = [[i] for i in range(len(self.combinations))]  # lines of each combination, in their order
        self.optima: dict[int, Optimum] = {}
        for i, (line, made) in enumerate(zip(self.lines, self.telescopes, strict=True)):
            self.lines[i] = replace(line, max_extend=min(self.grid.max_extend, made.spare(0, 0.0)))

    @property
    def _width(self) -> str:
        return next(name for name in (self.key.rpartition(".")[2], self.key) if name in self.names[0])

    def next_jobs(self) -> list[tuple[int, int]]:
        """Return the jobs of the next round; a combination whose level is through gets its next level first."""
        for index, lines in enumerate(self.levels):
            best = self._optimum(lines[-1])
            if best is not None and math.isfinite(best.log2_value) and len(lines) < len(self.telescopes[index].levels):
                self._open_next(index, best)
        return super().next_jobs()

    def plan(self) -> str:
        """Return the levels of every combination that differ, what all cost, and their share of the target's run."""
        groups: dict[Telescope, list[str]] = {}
        for label, made in zip(self.labels, self.telescopes, strict=True):
            groups.setdefault(made, []).append(label)
        parts = [f"{'; '.join(labels)}\n{made.table()}" for made, labels in groups.items()]
        runs = sum(made.runs for made in self.telescopes)
        cost = sum(made.cost for made in self.telescopes)
        target = max(made.target_flops for made in self.telescopes)
        total = f"{runs} runs for {len(self.telescopes)} combinations: {cost:.3g} FLOPs, {cost / target:.2%} of one run"
        return "\n".join(
            [*parts, f"{total} at the target; grids whose best value is at the edge grow within the share"]
        )

    def found(self) -> str:
        """Return one row per combination: the optimum of each level, and what they say for the target."""
        deepest = max(map(len, self.levels))
        rows = [["", *(f"level {n}" for n in range(1, deepest + 1)), "target", f"{self.grid.key} at the target"]]
        for label, lines, made in zip(self.labels, self.levels, self.telescopes, strict=True):
            optima = [self.optima[i] for i in lines if i in self.optima and math.isfinite(self.optima[i].log2_value)]
            best = made.at_target(optima) if optima else None
            shown = [str(self.optima[i]) if i in self.optima else "-" for i in lines]
            end = ["-", "-"] if best is None else [str(best), f"{best.value:.5g}"]
            rows.append([label, *shown, *["-"] * (deepest - len(shown)), *end])
        return "\n".join(aligned(rows))

    def conclude(self) -> None:
        """Say what was found, and what is still open.

        Raises:
            SweepError: jobs failed.
        """
        log.info("optima, as log2 of %s, in %s:\n%s", self.grid.key, self.folder, self.found())
        stuck = [
            label
            for label, lines in zip(self.labels, self.levels, strict=True)
            if lines[-1] in self.optima and math.isnan(self.optima[lines[-1]].log2_value)
        ]
        if stuck:
            log.warning("all runs of a level diverged for %s; give a smaller centre", "; ".join(stuck))
        super().conclude()

    def _remedy(self) -> str:
        return (
            "give hydra.sweeper.telescope.share or .drift more, hydra.sweeper.grid.max_extend more, or another centre"
        )

    def _optimum(self, i: int) -> Optimum | None:
        """Return the optimum along a line that needs no more jobs."""
        line = self.lines[i]
        if i not in self.optima and line.losses and not line.failed and not line.missing():
            try:
                self.optima[i] = located(self.grids[i], line)
            except ValueError as error:  # the other combinations go on; it is raised at the end
                k = line.first[0]
                line.failed.add(k)
                self.failures[self.job_folder((i, k))] = error
        return self.optima.get(i)

    def _open_next(self, index: int, before: Optimum) -> None:
        made, lines = self.telescopes[index], self.levels[index]
        number = len(lines)
        level = made.levels[number]
        own = level.grid(self.grid.key, before.log2_value)
        grid = replace(own, max_extend=self.grid.max_extend, margin=self.grid.margin)
        spent = sum(made.levels[n].flops * len(self.lines[i].losses) for n, i in enumerate(lines))
        first = grid.first(centre=2.0**before.log2_value)
        combination = _at_width(self.combinations[lines[-1]], self.key, level.width, first)
        lines.append(len(self.lines))
        self.combinations = [*self.combinations, combination]
        self.names.append(combination.names(all_keys=self.keys))
        self.grids.append(grid)
        self.lines.append(Line(first, min(grid.max_extend, made.spare(number, spent)), grid.margin))


def planned(
    master: DictConfig,
    arguments: Sequence[str],
    *,
    axes: Mapping[str, Sequence[object]],
    grid: Grid,
    settings: Settings,
    cost: Callable[[DictConfig], float],
    loader: ConfigLoader,
    ledger: str | None = None,
) -> TelescopingSweep:
    """Return a telescoping sweep before its first round.

    Args:
        master: the composed configuration with its ``hydra`` node.
        arguments: overrides of the command line.
        axes: override key to the values of an outer axis, without the width.
        grid: the grid at the base's width; what it is centred at is the configured value, of each combination its own.
        settings: widths, and what may be spent.
        cost: floating-point operations of the run that a configuration names.
        loader: composes configurations.
        ledger: file to which costs are added; ``ledger.jsonl`` beside the sweep's folder if None.

    Raises:
        ValueError: the axes, the grid or the widths do not fit, or the base's grid costs more than the share.
    """
    if settings.key in axes:
        raise ValueError(f"axes lists {settings.key}, which the telescope doubles from base to target; leave it out")
    others = _without(arguments, settings.key, loader)
    made = combinations(master, others, axes={**axes, settings.key: [settings.base]}, grid=grid, loader=loader)
    telescopes = []
    for combination in made:
        overrides = [str(choice) for choice in combination.choices if choice.key != settings.key]
        composed = loader.load_sweep_config(master_config=master, sweep_overrides=overrides)
        telescopes.append(_telescope(composed, combination, grid=grid, settings=settings, cost=cost))
    folder = Path(str(master.hydra.sweep.dir))
    return TelescopingSweep(
        grid,
        made,
        folder,
        ledger=Path(ledger) if ledger else None,
        telescopes=telescopes,
        key=settings.key,
    )


def _telescope(
    config: DictConfig, made: Combination, *, grid: Grid, settings: Settings, cost: Callable[[DictConfig], float]
) -> Telescope:
    def flops(width: int) -> float:
        OmegaConf.update(config, settings.key, width)
        return cost(config)

    return telescope(
        settings.base,
        settings.target,
        flops,
        centre=grid.log2(made.first[grid.radius]),
        radius=grid.radius * grid.step,
        step=grid.step,
        share=settings.share,
        drift=settings.drift,
    )


def _without(arguments: Sequence[str], key: str, loader: ConfigLoader) -> list[str]:
    """Return the overrides but that of the width, which says the target's."""
    kept = []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(arguments)):
        if override.get_key_element() != key:
            kept.append(str(override.input_line))
        elif override.is_sweep_override():
            raise ValueError(
                f"{override.input_line} lists widths, which the telescope doubles by itself; give {key}=NUMBER, the "
                f"target's, or take sweep=width_lr for exactly these"
            )
    return kept


def _at_width(made: Combination, key: str, width: int, first: tuple[int, ...]) -> Combination:
    choices = tuple(replace(c, value=str(width)) if c.key == key else c for c in made.choices)
    return Combination(choices, first)
