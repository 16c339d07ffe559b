"""Learning-rate schedules in steps, tokens or fractions of a run, as ordinary torch schedulers.

Each constructor returns a ``LambdaLR`` to be stepped once per optimizer step (``"interval": "step"`` in Lightning):

>>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
>>> scheduler = linear(optimizer, total=Tokens(10**9), warmup=Tokens(10**7), tokens_per_step=10**5)
>>> [scheduler.lr_lambdas[0](step) for step in (0, 50, 100, 5050, 10000)]
[0.0, 0.5, 1.0, 0.5, 0.0]

``functools.partial(linear, total=1000)`` is what ``Parametrize(schedule=...)`` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_mup.core.duration import Duration, Fraction, Steps, Tokens, as_steps
from lightning_mup.core.registry import near

__all__ = [
    "Duration",
    "Fraction",
    "Schedule",
    "Shape",
    "Steps",
    "Tokens",
    "as_steps",
    "constant",
    "cosine",
    "linear",
    "power",
    "schedule",
    "wsd",
]

Shape = Literal["constant", "linear", "cosine", "1-sqrt"]
"""How the rate goes down at the end of a run."""


class _Undivulged:
    """Gives a class with slots an empty ``__dict__``, which is what LambdaLR saves and, on resuming, puts back.

    So a checkpoint holds the step alone. A resumed run follows the schedule that its code asks for, rather than,
    silently, that of the run before: the end of a WSD run may branch off anywhere.
    """


@dataclass(frozen=True, slots=True)
class Schedule(_Undivulged):
    """The factor on the learning rate at a step, counted from 0; :func:`schedule` makes one from durations.

    ``t / warmup`` before ``warmup``, so 0 at the first step; then ``min(1, (t / plateau)^exponent)`` times
    ``left + floor (1 - left)`` with ``left`` a shape of ``x = (total - t) / decay`` clipped to [0, 1]: ``x``
    (``"linear"``), ``(1 - cos(pi x)) / 2`` (``"cosine"``), ``1 - sqrt(1 - x)`` (``"1-sqrt"``) or 1 (``"constant"``,
    or ``decay = 0``).

    Args:
        shape: shape of the decay.
        warmup: steps of linear warm-up (>= 0).
        total: steps of the run (> warmup); None if nothing depends on it.
        decay: steps that the decay takes, up to ``total``, in [0, total - warmup].
        floor: factor at and after the end, in [0, 1].
        plateau: steps after which the rate falls as a power (>= warmup); None for never.
        exponent: that power (<= 0).

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> Schedule("linear", warmup=2, total=10, decay=4)(8)
        0.5

    Reference:
        arXiv:2512.05620, its published code: warm-up, constant, then linear.
    """

    shape: Shape
    warmup: float = 0.0
    total: float | None = None
    decay: float = 0.0
    floor: float = 0.0
    plateau: float | None = None
    exponent: float = 0.0

    def __post_init__(self) -> None:
        shapes, end = get_args(Shape), math.inf if self.total is None else self.total
        if self.shape not in shapes:
            raise ValueError(f"shape must be one of {shapes}, got {self.shape!r}{near(str(self.shape), shapes)}")
        if not 0 <= self.warmup < end:
            raise ValueError(f"warmup must be in [0, total={self.total}), got {self.warmup} steps; shorten it")
        if not 0 <= self.decay <= end - self.warmup:
            raise ValueError(
                f"decay must be in [0, total - warmup={end - self.warmup}], got {self.decay} steps; shorten it, or "
                f"give Fraction(1.0) for all that follows the warm-up"
            )
        if self.decay and self.total is None:
            raise ValueError(f"decay={self.decay} steps end at total, got total=None; give total")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor!r}; it is a fraction of the peak rate")
        if not -math.inf < self.exponent <= 0:
            raise ValueError(f"exponent must be <= 0, got {self.exponent!r}; 0 keeps the rate")
        if self.plateau is not None and not self.plateau >= max(self.warmup, math.ulp(0)):
            raise ValueError(
                f"plateau must be > 0 and >= warmup={self.warmup}, got {self.plateau} steps; shorten the warm-up or "
                f"lower the peak rate"
            )

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        if step < self.warmup:
            return step / self.warmup
        law = 1.0 if self.plateau is None or step <= self.plateau else (step / self.plateau) ** self.exponent
        left = self._left(step)
        return law * (left + self.floor * (1 - left))

    def _left(self, step: int) -> float:
        if self.total is None or not self.decay:
            return 1.0
        return _LEFT[self.shape](min(max((self.total - step) / self.decay, 0.0), 1.0))


_LEFT: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(1 - x),
}


def schedule(
    shape: Shape,
    *,
    total: Duration | None = None,
    warmup: Duration = 0,
    decay: Duration | None = None,
    floor: float = 0.0,
    plateau: Duration | None = None,
    exponent: float = 0.0,
    tokens_per_step: int | None = None,
) -> Schedule:
    """Return the :class:`Schedule` of some durations, a pure function of the step.

    Args:
        shape: shape of the decay: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        total: the whole run, in steps or tokens; may be left out where nothing depends on it.
        warmup: linear warm-up from 0; a fraction is one of ``total``.
        decay: the last part of the run; a fraction is one of what follows the warm-up. None for all of that.
        floor: factor at and after the end, in [0, 1].
        plateau: after which the rate falls as a power; a fraction is one of ``total``. None for never.
        exponent: that power (<= 0).
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is unknown, missing, out of range, or has no effect.
        TypeError: a duration is of another type.

    Examples:
        >>> factor = schedule("linear", total=100, warmup=Fraction(0.2), decay=Fraction(0.5))
        >>> factor.warmup, factor.decay
        (20.0, 40.0)
        >>> [factor(step) for step in (0, 10, 60, 80, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]

    Reference:
        arXiv:2512.05620, its published code (``"linear"``, fractions of decay); arXiv:2405.18392 (``"1-sqrt"``).
    """

    def steps(name: str, duration: Duration, whole: float | None) -> float:
        return as_steps(duration, name=name, tokens_per_step=tokens_per_step, whole=whole)

    if shape == "constant" and (decay is not None or floor):
        raise ValueError(f"a constant schedule has no decay, got decay={decay!r}, floor={floor!r}; leave both out")
    if total is None and shape in get_args(Shape) and shape != "constant" and decay != 0:
        raise ValueError(f"shape {shape!r} needs total, got {total!r}; give the run's length in steps or tokens")
    if isinstance(total, Fraction):
        raise ValueError(f"total is what fractions are of, got {total!r}; give it as Steps(n) or Tokens(n)")
    end = None if total is None else steps("total", total, None)
    start = steps("warmup", warmup, end)
    rest = None if end is None else end - start
    given = 0 if shape == "constant" else Fraction(1.0) if decay is None else decay
    return Schedule(
        shape,
        warmup=start,
        total=end,
        decay=steps("decay", given, rest),
        floor=floor,
        plateau=None if plateau is None else steps("plateau", plateau, end),
        exponent=exponent,
    )


# -- torch schedulers ---------------------------------------------------------------------------------------------


def constant(
    optimizer: torch.optim.Optimizer,
    *,
    warmup: Duration = 0,
    total: Duration | None = None,
    tokens_per_step: int | None = None,
) -> LambdaLR:
    """Return warm-up and then a constant rate, ``min(1, t / warmup)``.

    Args:
        optimizer: an optimizer that was given the peak rate.
        warmup: linear warm-up from 0.
        total: the whole run, for a warm-up that is a fraction of it.
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is missing or out of range.
        TypeError: a duration is of another type.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> constant(optimizer, warmup=4).lr_lambdas[0](1)
        0.25

    Reference:
        arXiv:2512.05620, its published code.
    """
    factor = schedule("constant", total=total, warmup=warmup, tokens_per_step=tokens_per_step)
    return LambdaLR(optimizer, factor)


def linear(
    optimizer: torch.optim.Optimizer,
    *,
    total: Duration,
    warmup: Duration = 0,
    decay: Duration | None = None,
    floor: float = 0.0,
    tokens_per_step: int | None = None,
) -> LambdaLR:
    """Return the paper's schedule: warm-up, constant, and a linear ``(total - t) / decay`` down to the end.

    Args:
        optimizer: an optimizer that was given the peak rate.
        total: the whole run.
        warmup: linear warm-up from 0; a fraction is one of ``total``.
        decay: the last part of the run; a fraction is one of what follows the warm-up. None for all of that.
        floor: factor at and after the end, in [0, 1].
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is missing or out of range.
        TypeError: a duration is of another type.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scheduler = linear(optimizer, total=Steps(24), warmup=Tokens(16000), tokens_per_step=4000)
        >>> [scheduler.lr_lambdas[0](step) for step in (0, 1, 4, 14, 24)]
        [0.0, 0.25, 1.0, 0.5, 0.0]

    Reference:
        arXiv:2512.05620, its published code.
    """
    factor = schedule("linear", total=total, warmup=warmup, decay=decay, floor=floor, tokens_per_step=tokens_per_step)
    return LambdaLR(optimizer, factor)


def cosine(
    optimizer: torch.optim.Optimizer,
    *,
    total: Duration,
    warmup: Duration = 0,
    floor: float = 0.0,
    tokens_per_step: int | None = None,
) -> LambdaLR:
    """Return warm-up and then half a cosine, ``(1 + cos(pi (t - warmup) / (total - warmup))) / 2``.

    Args:
        optimizer: an optimizer that was given the peak rate.
        total: the whole run.
        warmup: linear warm-up from 0; a fraction is one of ``total``.
        floor: factor at and after the end, in [0, 1]; there are no restarts.
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is missing or out of range.
        TypeError: a duration is of another type.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> round(cosine(optimizer, total=100, floor=0.1).lr_lambdas[0](50), 12)
        0.55

    Reference:
        arXiv:1608.03983, equation 5, without restarts.
    """
    factor = schedule("cosine", total=total, warmup=warmup, floor=floor, tokens_per_step=tokens_per_step)
    return LambdaLR(optimizer, factor)


def wsd(
    optimizer: torch.optim.Optimizer,
    *,
    total: Duration,
    decay: Duration,
    warmup: Duration = 0,
    shape: Shape = "1-sqrt",
    floor: float = 0.0,
    tokens_per_step: int | None = None,
) -> LambdaLR:
    """Return warm-up, stable rate and decay (WSD); with ``y = 1 - (total - t) / decay``, ``1 - sqrt(y)`` by default.

    A run that is resumed under another ``total`` branches off: the checkpoint brings the step, the code the schedule.

    Args:
        optimizer: an optimizer that was given the peak rate.
        total: the whole run.
        decay: the last part of the run; a fraction is one of what follows the warm-up.
        warmup: linear warm-up from 0; a fraction is one of ``total``.
        shape: ``"1-sqrt"``, ``"linear"`` (``1 - y``) or ``"cosine"`` (``(1 + cos(pi y)) / 2``).
        floor: factor at and after the end, in [0, 1].
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is unknown, missing or out of range.
        TypeError: a duration is of another type.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scheduler = wsd(optimizer, total=1000, decay=Steps(400))
        >>> [scheduler.lr_lambdas[0](step) for step in (0, 600, 700, 1000)]
        [1.0, 1.0, 0.5, 0.0]

    Reference:
        arXiv:2404.06395 (WSD); arXiv:2405.18392 (its ``1 - sqrt``).
    """
    factor = schedule(shape, total=total, warmup=warmup, decay=decay, floor=floor, tokens_per_step=tokens_per_step)
    return LambdaLR(optimizer, factor)


def power(
    optimizer: torch.optim.Optimizer,
    *,
    plateau: Duration,
    exponent: float = -0.51,
    warmup: Duration = 0,
    total: Duration | None = None,
    decay: Duration = 0,
    tokens_per_step: int | None = None,
) -> LambdaLR:
    """Return the Power scheduler, ``min(1, (t / plateau)^exponent)``, after a warm-up and, if asked, before a decay.

    Its rate ``min(peak, B a n^b)`` after n tokens has ``plateau = (peak / (B a))^(1/b)`` tokens, which is
    :func:`lightning_mup.horizon.power_plateau`.

    Args:
        optimizer: an optimizer that was given the peak rate.
        plateau: when the power takes over from the peak (>= warmup); a fraction is one of ``total``.
        exponent: b (<= 0). Its default is the source's by memory and was not read again.
        warmup: linear warm-up from 0; a fraction is one of ``total``.
        total: the whole run, where something is a fraction of it or decays.
        decay: a last, linear part down to 0 (the source's own shape of it was not found).
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is missing or out of range.
        TypeError: a duration is of another type.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scheduler = power(optimizer, plateau=100, exponent=-0.5)
        >>> [scheduler.lr_lambdas[0](step) for step in (0, 100, 400)]
        [1.0, 1.0, 0.5]

    Reference:
        arXiv:2408.13359.
    """
    factor = schedule(
        "linear",
        total=total,
        warmup=warmup,
        decay=decay,
        plateau=plateau,
        exponent=exponent,
        tokens_per_step=tokens_per_step,
    )
    return LambdaLR(optimizer, factor)
