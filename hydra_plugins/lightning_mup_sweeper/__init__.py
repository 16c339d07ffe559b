"""Hydra takes plugins from the namespace ``hydra_plugins`` alone; what these do is in :mod:`lightning_mup.sweep`.

Every Hydra program on the machine loads this file at its start, hence it loads nothing but Hydra.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_mup.sweep import Sweep
    from lightning_mup.sweep_grid import Grid
    from lightning_mup.sweep_telescope import Settings, TelescopingSweep

log = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """Outer axes times a grid of powers of two, which grows until the best value lies inside it.

    Args:
        axes: override key to the values of an outer axis; the command line may add axes or replace one.
        grid: the hyperparameter whose best value is looked for, and its grid.
        ledger: file to which the cost of every job is added; ``ledger.jsonl`` beside the sweep's folder if None.
    """

    def __init__(self, axes: Mapping[str, Sequence[object]], grid: Grid, ledger: str | None = None) -> None:
        self.axes, self.grid, self.ledger = axes, grid, ledger

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over before the sweep."""
        self.loader, self.config = hydra_context.config_loader, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def planned(self, master: DictConfig, arguments: Sequence[str], *, loader: ConfigLoader) -> Sweep:
        """Return the sweep before its first round.

        Args:
            master: the composed configuration with its ``hydra`` node.
            arguments: overrides of the command line.
            loader: composes configurations.

        Raises:
            ValueError: the settings do not fit the configuration.
        """
        from lightning_mup.sweep import planned  # loads torch, which other programs need not wait for

        return planned(master, arguments, axes=self.axes, grid=self.grid, loader=loader, ledger=self.ledger)

    def sweep(self, arguments: list[str]) -> Sweep:
        """Run all rounds.

        Args:
            arguments: overrides of the command line.

        Raises:
            lightning_mup.sweep.SweepError: jobs failed; the others have been run.
        """
        assert self.config is not None
        sweep = self.planned(self.config, arguments, loader=self.loader)
        self.run(sweep)
        return sweep

    def run(self, sweep: Sweep) -> None:
        """Run all rounds of a sweep, in its folder."""
        from lightning_mup.sweep import run_rounds

        assert self.launcher is not None
        sweep.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, sweep.folder / "multirun.yaml")
        run_rounds(sweep, launcher=self.launcher)


class TelescopeSweeper(GridSweeper):
    """Outer axes times a telescoping sweep: widths double, grids narrow around the optimum of the level before.

    Args:
        axes: override key to the values of an outer axis; the command line may add axes or replace one.
        grid: the hyperparameter whose best value is looked for, and the grid at the base's width.
        telescope: widths, and what may be spent.
        cost: floating-point operations of the run that a configuration names.
        dry_run: say what would be run, and run nothing.
        ledger: file to which the cost of every job is added; ``ledger.jsonl`` beside the sweep's folder if None.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[object]],
        grid: Grid,
        telescope: Settings,
        cost: Callable[[DictConfig], float],
        dry_run: bool = False,
        ledger: str | None = None,
    ) -> None:
        super().__init__(axes, grid, ledger)
        self.telescope, self.cost, self.dry_run = telescope, cost, dry_run

    def planned(self, master: DictConfig, arguments: Sequence[str], *, loader: ConfigLoader) -> TelescopingSweep:
        """Return the sweep before its first round.

        Args:
            master: the composed configuration with its ``hydra`` node.
            arguments: overrides of the command line.
            loader: composes configurations.

        Raises:
            ValueError: the settings do not fit the configuration, or the base's grid costs more than the share.
        """
        from lightning_mup.sweep_telescope import planned

        return planned(
            master,
            arguments,
            axes=self.axes,
            grid=self.grid,
            settings=self.telescope,
            cost=self.cost,
            loader=loader,
            ledger=self.ledger,
        )

    def sweep(self, arguments: list[str]) -> TelescopingSweep:
        """Say what the levels of every combination cost, then run all rounds, unless this is a dry run.

        Args:
            arguments: overrides of the command line.

        Raises:
            lightning_mup.sweep.SweepError: jobs failed; the others have been run.
        """
        assert self.config is not None
        sweep = self.planned(self.config, arguments, loader=self.loader)
        log.info("telescoping sweep in %s:\n%s", sweep.folder, sweep.plan())
        if self.dry_run:
            log.info("this is a dry run: nothing was started; leave hydra.sweeper.dry_run out to start it")
        else:
            self.run(sweep)
        return sweep
