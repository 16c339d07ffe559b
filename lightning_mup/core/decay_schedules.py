"""Schedules of weight decay that do not follow the learning rate: functions of (step, total steps)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, cast

from lightning_mup.core.registry import near

DecaySchedule = Callable[[int, int], float]
"""From the number of steps taken before and that of the whole run to a factor >= 0."""
DecayScheduleLike = Literal["lr", "constant", "linear", "cosine", "step"] | DecaySchedule

_DROPS, _DROP = (0.5, 0.75), 0.1  # He et al. 2016 (arXiv:1512.03385), section 4.2: at 32k and 48k of 64k steps

SCHEDULES: Mapping[str, DecaySchedule] = {
    "constant": lambda step, total: 1.0,
    "linear": lambda step, total: max(0.0, 1 - step / total),
    "cosine": lambda step, total: (1 + math.cos(math.pi * min(1.0, step / total))) / 2,
    "step": lambda step, total: _DROP ** sum(step >= drop * total for drop in _DROPS),
}
"""Each starts at 1. ``step`` falls to a tenth at a half and at three quarters of the run."""


def find_schedule(choice: DecayScheduleLike) -> DecaySchedule | None:
    """Return the schedule of a name or the function given; None for ``"lr"``, which the optimizer itself tells.

    Raises:
        ValueError: the name is unknown.
        TypeError: the choice is neither a name nor callable.

    Examples:
        >>> [find_schedule("cosine")(step, 4) for step in (0, 2, 4)], find_schedule("step")(3, 4)
        ([1.0, 0.5, 0.0], 0.010000000000000002)
        >>> find_schedule("cosin")
        Traceback (most recent call last):
        ValueError: unknown schedule 'cosin'; available: lr, constant, ..., or a function of (step, ...); did you ...
    """
    if callable(choice):
        return choice
    known = ["lr", *SCHEDULES]
    allowed = f"available: {', '.join(known)}, or a function of (step, total steps)"
    if not isinstance(choice, str):
        raise TypeError(f"schedule must be a name or a function, got {choice!r}; {allowed}")
    if choice not in known:
        raise ValueError(f"unknown schedule {choice!r}; {allowed}{near(cast(str, choice), known)}")
    return SCHEDULES.get(choice)
