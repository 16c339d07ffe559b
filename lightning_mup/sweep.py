"""Sweeps by Hydra: outer axes (width, method, seed, ...) times a grid that grows until the best value lies inside it.

``lightning-mup train sweep=width_lr method=adamw,muon launcher=joblib``. All combinations go round by round, so that a
launcher always has as many jobs as there can be. The same command again repeats nothing and goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_mup.core.plan import aligned
from lightning_mup.ledger import Status, book, ledger_of
from lightning_mup.sweep_axes import Combination, combinations, folder_name, quoted
from lightning_mup.sweep_grid import Grid, Line

log = logging.getLogger(__name__)


class SweepError(CompactHydraException):
    """Some jobs of a sweep failed; the message lists them with their folders."""


@dataclass
class Sweep:
    """All combinations of a sweep, with what is known along the grid of each.

    Args:
        grid: the grid within each combination.
        combinations: of the outer axes.
        folder: holds one folder per job.
        failures: why a job failed, by its folder.
        ledger: file to which the cost of every job is added; ``ledger.jsonl`` beside the folder if None.

    Examples:
        >>> from lightning_mup.sweep_axes import Choice
        >>> widths = [Combination((Choice("model.net.width", n),), first=(-5, -4, -3)) for n in ("64", "128")]
        >>> sweep = Sweep(Grid("method.lr"), widths, Path("runs/width_lr"))
        >>> [str(sweep.job_folder(job)) for job in sweep.next_jobs()][0]
        'runs/width_lr/width=64,lr=2^-5'
        >>> sweep.lines[0].losses |= {-5: 3.1, -4: 3.0, -3: 3.2}
        >>> sweep.lines[1].losses |= {-5: 2.9, -4: 3.1, -3: float("inf")}
        >>> print(sweep.table())
        width  best  loss    state     grid
        64     2^-4  3.0000  interior  2^-5 3.1000  2^-4 3.0000  2^-3 3.2000
        128    2^-5  2.9000  open      2^-5 2.9000  2^-4 3.1000  2^-3 diverged
    """

    grid: Grid
    combinations: Sequence[Combination]
    folder: Path
    failures: dict[Path, Exception] = field(default_factory=dict)
    ledger: Path | None = None

    def __post_init__(self) -> None:
        keys = [self.grid.key, *(choice.key for made in self.combinations for choice in made.choices if choice.named)]
        self.names = [made.names(all_keys=keys) for made in self.combinations]
        self.lines = [Line(made.first, self.grid.max_extend, self.grid.margin) for made in self.combinations]
        self.grids = [self.grid for _ in self.combinations]
        self.short_key = self.grid.key.rpartition(".")[2]
        if self.short_key in {name for names in self.names for name in names}:
            self.short_key = self.grid.key
        folders = [folder_name(names) for names in self.names]
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        if twice is not None:
            raise ValueError(f"two combinations of the axes are both called {twice}; leave one of them out")

    def next_jobs(self) -> list[tuple[int, int]]:
        """Return the jobs of the next round, each as the index of its combination and its point of the grid."""
        return [(i, k) for i, line in enumerate(self.lines) for k in line.missing()]

    def job_folder(self, job: tuple[int, int]) -> Path:
        """Return a job's folder, which its overrides name."""
        i, k = job
        return self.folder / folder_name({**self.names[i], self.short_key: self.grids[i].label(k)})

    def overrides(self, job: tuple[int, int]) -> tuple[str, ...]:
        """Return a job's overrides, without that of its folder."""
        i, k = job
        return (*map(str, self.combinations[i].choices), f"{self.grid.key}={self.grids[i].value(k)!r}")

    def record(self, job: tuple[int, int], returned: JobReturn) -> None:
        """Take what a job returned, or the exception that ended it.

        Args:
            job: its combination and point.
            returned: what Hydra made of it.
        """
        i, k = job
        try:
            self.lines[i].losses[k] = _loss(returned.return_value)
        except Exception as error:  # the other jobs go on; it is raised at the end
            log.error("job failed: %s", self.job_folder(job), exc_info=error)
            self.lines[i].failed.add(k)
            self.failures[self.job_folder(job)] = error

    def table(self) -> str:
        """Return one row per combination: what tells it apart, the best of the grid, and all losses along the grid."""
        known = dict.fromkeys(name for names in self.names for name in names)
        axes = [name for name in known if len({names.get(name) for names in self.names}) > 1]
        rows = [[*axes, "best", "loss", "state", "grid"]]
        for names, grid, line in zip(self.names, self.grids, self.lines, strict=True):
            best = line.best
            shown = ["-", "-"] if best is None else [grid.label(best), _shown(line.losses[best])]
            rows.append([*(names.get(axis, "") for axis in axes), *shown, line.state, _along(grid, line)])
        return "\n".join(aligned(rows))

    def conclude(self) -> None:
        """Say after the last round what is still open.

        Raises:
            SweepError: jobs failed.
        """
        edges = [folder_name(n) for n, line in zip(self.names, self.lines, strict=True) if line.state == "edge"]
        if edges:
            log.warning("the best value is too near the edge of the grid for %s; %s", "; ".join(edges), self._remedy())
        if self.failures:
            rows = [f"  {folder}: {type(error).__name__}: {error}" for folder, error in self.failures.items()]
            done = sum(len(line.losses) for line in self.lines)
            again = "The same command runs these again."
            raise SweepError("\n".join([f"{len(rows)} of {len(rows) + done} jobs failed:", *rows, again]))

    def book(self, jobs: Sequence[tuple[int, int]]) -> None:
        """Add what jobs cost to the ledger; those that are booked already add nothing.

        Args:
            jobs: jobs that were recorded.
        """
        ended = {self.job_folder(job): self._status(job) for job in jobs}
        book(self.ledger or ledger_of(self.folder), self.folder, ended)

    def _remedy(self) -> str:
        return f"give hydra.sweeper.grid.max_extend={2 * self.grid.max_extend + 2} or another centre"

    def _status(self, job: tuple[int, int]) -> Status:
        i, k = job
        if k in self.lines[i].failed:
            return "failed"
        return "diverged" if math.isinf(self.lines[i].losses[k]) else "finished"


def planned(
    master: DictConfig,
    arguments: Sequence[str],
    *,
    axes: Mapping[str, Sequence[object]],
    grid: Grid,
    loader: ConfigLoader,
    ledger: str | None = None,
) -> Sweep:
    """Return a sweep before its first round.

    Args:
        master: the composed configuration with its ``hydra`` node.
        arguments: overrides of the command line.
        axes: override key to the values of an outer axis.
        grid: the grid within each combination.
        loader: composes configurations.
        ledger: file to which costs are added; ``ledger.jsonl`` beside the sweep's folder if None.

    Raises:
        ValueError: the axes or the grid do not fit the configuration.
    """
    made = combinations(master, arguments, axes=axes, grid=grid, loader=loader)
    return Sweep(grid, made, Path(str(master.hydra.sweep.dir)), ledger=Path(ledger) if ledger else None)


def from_words(words: Sequence[str]) -> tuple[DictConfig, Sweep | None]:
    """Return the configuration, with its ``hydra`` node, of a command line, and its sweep if it has a grid.

    Args:
        words: overrides of ``conf/train.yaml``.

    Raises:
        ValueError: the axes or the grid do not fit the configuration.
        hydra.errors.HydraException: the configuration does not compose.

    Examples:
        >>> config, sweep = from_words(["sweep=width_lr", "model.net.width=64,128"])
        >>> config.name, len(sweep.next_jobs())
        ('width_lr', 10)
    """
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", list(words), RunMode.MULTIRUN)
        settings = master.hydra.sweeper
        if "grid" not in settings:
            return master, None
        arguments = cast(list[str], OmegaConf.to_container(master.hydra.overrides.task, resolve=False))
        return master, instantiate(settings).planned(master, arguments, loader=loader)


def run_rounds(sweep: Sweep, *, launcher: Launcher) -> None:
    """Run jobs, round by round, until no combination needs more.

    Args:
        sweep: from :func:`planned`.
        launcher: runs the jobs of a round.

    Raises:
        SweepError: jobs failed; those of the other combinations have been run.
    """
    count, number = 0, 0
    while jobs := sweep.next_jobs():
        number += 1
        log.info("round %d: %d jobs for %d combinations", number, len(jobs), len({i for i, _ in jobs}))
        for job, returned in zip(jobs, _launch(launcher, sweep, jobs, count), strict=True):
            sweep.record(job, returned)
        sweep.book(jobs)
        count += len(jobs)
        log.info("after round %d, in %s:\n%s", number, sweep.folder, sweep.table())
    sweep.conclude()


def _launch(launcher: Launcher, sweep: Sweep, jobs: Sequence[tuple[int, int]], count: int) -> Sequence[JobReturn]:
    subdirs = [f"hydra.sweep.subdir={quoted(sweep.job_folder(job).name)}" for job in jobs]
    batch = [[*sweep.overrides(job), subdir] for job, subdir in zip(jobs, subdirs, strict=True)]
    return launcher.launch(batch, initial_job_idx=count)


def _loss(value: object) -> float:
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"a job must return its loss, or inf where it diverged; it returned {value!r}")
    return float(value)


def _along(grid: Grid, line: Line) -> str:
    points = {k: _shown(loss) for k, loss in line.losses.items()} | dict.fromkeys(line.failed, "failed")
    return "  ".join(f"{grid.label(k)} {points[k]}" for k in sorted(points))


def _shown(loss: float) -> str:
    return "diverged" if math.isinf(loss) else f"{loss:.4f}"
