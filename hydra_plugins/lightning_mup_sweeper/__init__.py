"""Hydra takes plugins from the namespace ``hydra_plugins`` alone; what this one does is in :mod:`lightning_mup.sweep`.

Every Hydra program on the machine loads this file at its start, hence it loads nothing but Hydra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_mup.sweep import Sweep
    from lightning_mup.sweep_grid import Grid


class GridSweeper(Sweeper):
    """Outer axes times a grid of powers of two, which grows until the best value lies inside it.

    Args:
        axes: override key to the values of an outer axis; the command line may add axes or replace one.
        grid: the hyperparameter whose best value is looked for, and its grid.
    """

    def __init__(self, axes: Mapping[str, Sequence[object]], grid: Grid) -> None:
        self.axes, self.grid = axes, grid

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over before the sweep."""
        self.loader, self.config = hydra_context.config_loader, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sweep:
        """Run all rounds.

        Args:
            arguments: overrides of the command line.

        Raises:
            lightning_mup.sweep.SweepError: jobs failed; the others have been run.
        """
        from lightning_mup.sweep import planned, run_rounds  # they load torch, which other programs need not wait for

        assert self.config is not None
        assert self.launcher is not None
        sweep = planned(self.config, arguments, axes=self.axes, grid=self.grid, loader=self.loader)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, sweep.folder / "multirun.yaml")
        run_rounds(sweep, launcher=self.launcher)
        return sweep
