"""How much weight decay at the base, in any of the units that people use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lightning_mup.core.decay import DecayPolicy, all_decays

_HIGH = 0.01  # removed per step, it halves a weight every 69 steps: nobody means that


class Run(NamedTuple):
    """What the size of a decay may depend on, looked up where it is needed.

    Args:
        steps: number of optimizer steps of the whole run (>= 1).
        width: width of the base (>= 1).
    """

    steps: Callable[[], int]
    width: Callable[[], int]


class _Given(NamedTuple):
    value: float
    tokens_per_step: float
    run: Run


def _halving(steps: float) -> float:
    return -math.expm1(-math.log(2) / steps)  # 1 - 2^(-1/steps), without cancellation


_FRACTIONS: Mapping[str, Callable[[_Given], float]] = {
    "weight_decay": lambda given: given.value,
    "half_life_steps": lambda given: _halving(given.value),
    "half_life_tokens": lambda given: _halving(given.value / given.tokens_per_step),
    "decay_times_width": lambda given: given.value / given.run.width(),
    "timescale": lambda given: 1 / (given.value * given.run.steps()),
    "timescale_tokens": lambda given: given.tokens_per_step / given.value,
}
_IN_TOKENS = {"half_life_tokens", "timescale_tokens"}


@dataclass(frozen=True, slots=True)
class DecayAmount:
    """The fraction of a weight removed per step at the base, as it was given.

    Args:
        kind: name of the argument: ``weight_decay`` is the fraction itself, in [0, 1); a half-life ``h`` in steps or
            tokens (> 0) stands for ``1 - 2^(-1/h)``; ``decay_times_width`` (> 0) for itself over the base's width; a
            time scale ``tau``, as a share of the run's steps or in tokens (> 0), for ``1/tau`` in steps.
        value: what was given.
        tokens_per_step: tokens in one optimizer step (> 0), for what is given in tokens.

    Raises:
        ValueError: a value is out of range, or tokens per step are missing, or given and not needed.

    Warns:
        UserWarning: the fraction is so large that it looks like torch's, which is multiplied by the learning rate.

    Examples:
        >>> run = Run(steps=lambda: 1000, width=lambda: 128)
        >>> DecayAmount("decay_times_width", 0.0128).fraction(run), DecayAmount("timescale", 0.5).fraction(run)
        (0.0001, 0.002)
        >>> round((1 - DecayAmount("half_life_steps", 10.0).fraction(run)) ** 10, 12)
        0.5

    Reference:
        arXiv:2512.05620, section 4 (decay times width); arXiv:2505.13738 (tau as a share of the run).
    """

    kind: str
    value: float
    tokens_per_step: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0 or (self.kind != "weight_decay" and self.value == 0):
            raise ValueError(f"{self.kind} must be positive and finite, got {self.value!r}")
        if self.kind == "weight_decay":
            _check_fraction(self.value)
        tokens = self.tokens_per_step
        if self.kind in _IN_TOKENS and (tokens is None or not 0 < tokens < math.inf):
            raise ValueError(
                f"{self.kind}={self.value} needs tokens_per_step > 0 (batch size x sequence length x accumulated "
                f"batches x ranks), got {tokens!r}"
            )
        if self.kind not in _IN_TOKENS and tokens is not None:
            raise ValueError(f"tokens_per_step={tokens!r} has no use beside {self.kind}={self.value}; leave it out")

    def fraction(self, run: Run) -> float:
        """Return the fraction removed per step, at the base and at the schedule's peak.

        Raises:
            ValueError: it is 1 or more.
        """
        found = _FRACTIONS[self.kind](_Given(self.value, self.tokens_per_step or 1.0, run))
        if not found < 1:
            raise ValueError(f"{self.kind}={self.value} would remove {found:.4g} of a weight per step, allowed is < 1")
        return found


def find_amount(
    given: Mapping[str, float | None], policy: DecayPolicy, tokens_per_step: float | None = None
) -> DecayAmount:
    """Return the one amount among the arguments that is not None.

    Raises:
        ValueError: there is none, there are several, or it is one that the policy does not take.

    Examples:
        >>> from lightning_mup.core.decay import find_decay
        >>> find_amount({"weight_decay": 1e-4, "timescale": None}, find_decay("width")).kind
        'weight_decay'
        >>> find_amount({"timescale": 0.5}, find_decay("width"))
        Traceback (most recent call last):
        ValueError: policy 'width' takes one of weight_decay, ..., got timescale=0.5; give policy='timescale' with it
    """
    found = {key: float(value) for key, value in given.items() if value is not None}
    wrong = [key for key in found if key not in policy.takes]
    if len(found) == 1 and not wrong:
        ((kind, value),) = found.items()
        return DecayAmount(kind, value, tokens_per_step)
    got = ", ".join(f"{key}={value:g}" for key, value in found.items()) or "none of them"
    others = [name for name, other in all_decays().items() if len(found) == 1 and set(wrong) & set(other.takes)]
    hint = f"; give policy={others[0]!r} with it" if others else ""
    raise ValueError(f"policy {policy.name!r} takes one of {', '.join(policy.takes)}, got {got}{hint}")


def _check_fraction(weight_decay: float) -> None:
    if weight_decay >= 1:
        raise ValueError(f"weight_decay is the fraction removed per step, in [0, 1), got {weight_decay!r}")
    if weight_decay >= _HIGH:
        warnings.warn(
            f"weight_decay={weight_decay} removes {weight_decay:.0%} of every weight at each step, since it is "
            f"independent of the learning rate; torch's AdamW multiplies it by lr, so give weight_decay x lr",
            stacklevel=6,
        )
