"""What loss is reached at what cost: runs gathered by cost, and the frontier between them.

Logs are natural. Shapes: B costs of the frontier's runs, M losses to look up, D draws.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LINE = 2
"""Points that make a line."""
ENDLESS = 1e3
"""Log of a ratio of costs that stands for an endless one."""
_PARABOLA = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: what it cost, and the loss it ended at.

    Args:
        cost: FLOPs, or seconds, or anything else that is compared (> 0).
        loss: final loss in nats (> 0); inf or nan where the run diverged.
        seed: tells repeats from duplicates.
        label: name in notes; ``""`` for the cost.

    Raises:
        ValueError: the cost or the loss is out of range.

    Examples:
        >>> Trial(-1e18, 3.2)
        Traceback (most recent call last):
        ...
        ValueError: cost must be positive and finite, got -1e+18; give the FLOPs or seconds of the whole run
    """

    cost: float
    loss: float
    seed: int = 0
    label: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.cost < math.inf:
            what = "give the FLOPs or seconds of the whole run"
            raise ValueError(f"cost must be positive and finite, got {self.cost!r}; {what}")
        if self.loss <= 0:
            what = "inf or nan says that the run diverged"
            raise ValueError(f"loss must be positive, got {self.loss!r}; {what}")

    @property
    def name(self) -> str:
        """The label, or else the cost."""
        return self.label or f"cost {self.cost:.4g}"


@dataclass(frozen=True, eq=False)
class Points:
    """Trials by cost, cheapest first, without the costs at which one diverged.

    Args:
        cost: ``[B]``, in the trials' unit.
        x: ``[B]``, its log.
        y: ``[B]``, mean log loss of the repeats.
        count: ``[B]``, number of repeats.
        names: of the first trial at each cost.
        diverged: cost and number of trials where one diverged.
        within: sum of squares of log losses within repeats.
        freedom: its degrees of freedom.
        repeated: number of trials that are the same as another one, and counted once.
    """

    cost: tuple[float, ...]
    x: Array
    y: Array
    count: Array
    names: tuple[str, ...]
    diverged: tuple[tuple[float, int], ...]
    within: float
    freedom: int
    repeated: int


def gather(trials: Sequence[Trial], what: str) -> Points:
    """Gather trials of equal cost as repeats.

    Args:
        trials: at least one.
        what: the argument's name, for the error.

    Raises:
        ValueError: there is no trial.

    Examples:
        >>> points = gather([Trial(4, 3.0), Trial(1, 3.2), Trial(4, 3.1, seed=1), Trial(16, math.nan)], "runs")
        >>> points.cost, points.count.tolist(), points.freedom, points.diverged
        ((1, 4), [1.0, 2.0], 1, ((16, 1),))
    """
    if not trials:
        raise ValueError(f"{what} must hold one trial or more, got {trials!r}; give a Trial for each run")
    groups: dict[float, list[Trial]] = defaultdict(list)
    unique = {(t.cost, repr(t.loss), t.seed, t.label): t for t in trials}  # repr, since nan is not equal to itself
    for trial in unique.values():
        groups[trial.cost].append(trial)
    fine = {c: group for c, group in sorted(groups.items()) if all(math.isfinite(t.loss) for t in group)}
    logs = [np.log([t.loss for t in group]) for group in fine.values()]
    return Points(
        cost=tuple(fine),
        x=np.log(np.array(list(fine), dtype=np.float64)),
        y=np.array([float(log.mean()) for log in logs]),
        count=np.array([float(len(log)) for log in logs]),
        names=tuple(group[0].name for group in fine.values()),
        diverged=tuple((cost, len(group)) for cost, group in sorted(groups.items()) if cost not in fine),
        within=sum(float(np.square(log - log.mean()).sum()) for log in logs),
        freedom=sum(len(log) - 1 for log in logs),
        repeated=len(trials) - len(unique),
    )


def frontier_of(points: Points) -> list[int]:
    """Return the places of the points whose loss is below that of every cheaper one.

    Raises:
        ValueError: there are fewer than two.

    Examples:
        >>> frontier_of(gather([Trial(1, 3.2), Trial(4, 3.0), Trial(16, 3.1), Trial(64, 2.9)], "baseline"))
        [0, 1, 3]
    """
    on = [i for i in range(len(points.x)) if i == 0 or points.y[i] < points.y[:i].min()]
    if len(on) >= LINE:
        return on
    got = ", ".join(f"{math.exp(y):.4g} at {cost:.4g}" for cost, y in zip(points.cost, points.y, strict=True))
    bad = "".join(f", diverged at {cost:.4g}" for cost, _ in points.diverged)
    rule = "the baseline's loss must fall over two costs or more"
    raise ValueError(f"{rule}, got {(got + bad).removeprefix(', ')}; run it at another size")


def log_cost(x_B: Array, y_DB: Array, loss_DM: Array) -> Array:
    """Return the log cost at which each draw's frontier reaches each log loss, ``[D, M]``.

    The frontier is linear in log-log between the points whose loss is below that of every cheaper one; its two last
    and its two first points go on. Where a draw has one such point alone, the first, a lower loss is ``ENDLESS`` beyond
    it, and one that is not lower as far before it.

    Args:
        x_B: log costs, ascending, two or more.
        y_DB: log losses there.
        loss_DM: log losses to reach.

    Examples:
        >>> log_cost(np.array([0.0, 1.0, 2.0]), np.array([[3.0, 2.0, 2.5]]), np.array([[2.5, 1.0, 3.5]]))
        array([[ 0.5,  2. , -0.5]])
    """
    count, places = len(x_B), np.arange(len(x_B))
    best_DB = np.minimum.accumulate(y_DB, axis=1)
    on_DB = np.concatenate([np.ones_like(y_DB[:, :1], dtype=bool), y_DB[:, 1:] < best_DB[:, :-1]], axis=1)
    last_DB = np.maximum.accumulate(np.where(on_DB, places, 0), axis=1)  # last point of the frontier up to here
    second_D1 = np.where(on_DB[:, 1:], places[1:], count).min(axis=1, keepdims=True)
    single_D1 = second_D1 == count
    before_last_D1 = np.take_along_axis(last_DB, np.maximum(last_DB[:, -1:] - 1, 0), axis=1)
    reached_DM = (best_DB[:, :, None] > loss_DM[:, None, :]).sum(axis=1)  # first point of so low a loss; B for none
    before, beyond = reached_DM == 0, reached_DM == count
    inside_DM = np.take_along_axis(last_DB, np.clip(reached_DM - 1, 0, count - 1), axis=1)
    left_DM = np.where(beyond, before_last_D1, inside_DM)
    right_DM = np.where(beyond, last_DB[:, -1:], np.where(before, np.minimum(second_D1, count - 1), reached_DM))
    y_left, y_right = np.take_along_axis(y_DB, left_DM, axis=1), np.take_along_axis(y_DB, right_DM, axis=1)
    rise_DM = np.where(single_D1, 1.0, y_right - y_left)
    line_DM = x_B[left_DM] + (x_B[right_DM] - x_B[left_DM]) * (loss_DM - y_left) / rise_DM
    return np.where(single_D1, x_B[0] + np.where(before, -ENDLESS, ENDLESS), line_DM)


def parabola_log_cost(x_B: Array, y_B: Array, loss: float) -> float:
    """Return the log cost at a log loss on the parabola ``x(y)`` through the three nearest points.

    Args:
        x_B: log costs of a frontier.
        y_B: its log losses, descending.
        loss: log loss to reach.

    Examples:
        >>> parabola_log_cost(np.array([0.0, 1.0, 4.0]), np.array([2.0, 1.0, 0.0]), 0.5)
        2.25
        >>> parabola_log_cost(np.array([0.0, 1.0]), np.array([2.0, 1.0]), 0.5)
        nan
    """
    if len(x_B) < _PARABOLA:
        return math.nan
    near = np.sort(np.argsort(np.abs(y_B - loss), kind="stable")[:_PARABOLA])
    (a, b, c), (p, q, r) = y_B[near], x_B[near]
    first, second = (q - p) / (b - a), (r - q) / (c - b)  # Newton's divided differences
    return float(p + first * (loss - a) + (second - first) / (c - a) * (loss - a) * (loss - b))
