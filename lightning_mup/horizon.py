"""Rules for batch size and length of training, for whoever asks: none of them is applied by itself.

Most are factors on the peak learning rate, given where that is given (``lr=0.01 * sqrt_batch(1024, 256)``). The paper
(arXiv:2512.05620) has no rule for the rate in batch size or horizon; it moves epsilons with the batch
(``Parametrize(batch=...)``) and weight decay with the width. An independent weight decay does not move with the peak.

Left out, as their formulas could not be read: the SDE rule of Complete(d)P (arXiv:2512.22382), and the regimes of
arXiv:2410.05838, which depend on an unknown critical batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_mup.core.duration import Duration, as_steps

# -- factors on the learning rate ---------------------------------------------------------------------------------


def sqrt_batch(batch: float, base_batch: float) -> float:
    """Return ``sqrt(batch / base_batch)``, the factor on the rate of Adam and other normalized updates.

    Valid where gradient noise dominates, hence below the critical batch size; beyond it the optimum stays, or falls
    again. For Adam the source scales ``1 - beta`` by ``batch / base_batch`` and epsilon by ``sqrt(base_batch / batch)``
    along with it (as remembered, not read again).

    Args:
        batch: batch size, in samples or tokens (> 0).
        base_batch: the one at which the rate was tuned, in the same unit (> 0).

    Raises:
        ValueError: a batch size is not positive.

    Examples:
        >>> sqrt_batch(1024, 256)
        2.0

    Reference:
        Malladi et al. 2022 (arXiv:2205.10287) for Adam; arXiv:2603.28743 uses it for normalized Muon.
    """
    return math.sqrt(_positive("batch", batch) / _positive("base_batch", base_batch))


def linear_batch(batch: float, base_batch: float) -> float:
    """Return ``batch / base_batch``, the factor on the rate of SGD at a fixed number of epochs.

    Valid below the critical batch size, for updates that are linear in the gradient and after a warm-up; not for Adam,
    Muon or anything else that normalizes.

    Args:
        batch: batch size, in samples or tokens (> 0).
        base_batch: the one at which the rate was tuned, in the same unit (> 0).

    Raises:
        ValueError: a batch size is not positive.

    Examples:
        >>> linear_batch(1024, 256)
        4.0

    Reference:
        Goyal et al. 2017 (arXiv:1706.02677), as cited by arXiv:2205.10287.
    """
    return _positive("batch", batch) / _positive("base_batch", base_batch)


def horizon(tokens: float, base_tokens: float, exponent: float = 0.0) -> float:
    """Return ``(tokens / base_tokens)^-exponent``, the factor on the rate of a longer run.

    The exponent is measured, not derived, and holds near the sizes and batch sizes it was fitted at: 0 (the paper,
    which sees the optimum drift slowly downwards at 20 tokens per parameter), 0.3 (commonly reported), 0.32 (normalized
    Muon, and AdamW).

    Args:
        tokens: length of the run, in tokens or steps (> 0).
        base_tokens: the length at which the rate was tuned, in the same unit (> 0).
        exponent: in [0, 1); 0 for no rule.

    Raises:
        ValueError: a length is not positive, or the exponent out of range.

    Examples:
        >>> horizon(16e9, 1e9), horizon(16e9, 1e9, exponent=0.25)
        (1.0, 0.5)

    Reference:
        arXiv:2603.28743 and arXiv:2409.19913 (0.32).
    """
    if not 0 <= exponent < 1:
        raise ValueError(f"exponent must be in [0, 1), got {exponent!r}; it is the alpha of (T/T0)^-alpha, say 0.32")
    return float((_positive("tokens", tokens) / _positive("base_tokens", base_tokens)) ** -exponent)


# -- rates and batch sizes from sizes -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Optimum:
    """A pair of settings that a fitted law gives for one run.

    Args:
        lr: peak learning rate.
        batch_tokens: batch size in tokens, not rounded.

    Examples:
        >>> Optimum(lr=0.001, batch_tokens=1e6).lr
        0.001
    """

    lr: float
    batch_tokens: float


def step_law(parameters: float, tokens: float) -> Optimum:
    """Return the step law's rate ``1.79 N^-0.713 D^0.307`` and batch size ``0.58 D^0.571`` tokens.

    Fitted over 3700 models (as remembered, under AdamW in standard parametrization). The rate already depends on the
    model's size: under a parametrization use it at the base alone. Outside of the fitted sizes it is an extrapolation;
    the source's own bounds of N and D were not found.

    Args:
        parameters: N, without embeddings (> 0).
        tokens: D, over the whole run (> 0).

    Raises:
        ValueError: a number is not positive.

    Examples:
        >>> best = step_law(1e9, 1e11)
        >>> f"{best.lr:.3e}", f"{best.batch_tokens:.3e}"  # 10^(.2529 - 6.417 + 3.377), 10^(-.2366 + 6.281)
        ('1.632e-03', '1.108e+06')

    Reference:
        Predictable Scale, part I (arXiv:2503.04715).
    """
    n, d = _positive("parameters", parameters), _positive("tokens", tokens)
    return Optimum(lr=1.79 * n**-0.713 * d**0.307, batch_tokens=0.58 * d**0.571)


def power_plateau(lr: float, batch: float, scale: float = 4.6, exponent: float = -0.51) -> float:
    """Return ``(lr / (batch scale))^(1 / exponent)``: the tokens after which ``min(lr, batch scale n^exponent)`` falls.

    For muP, and for :func:`lightning_mup.schedules.power` as ``plateau=Tokens(round(...))``. The two constants are
    the source's by memory and were not read again, nor was their unit of ``batch`` (sequences give sensible numbers):
    fit both to runs of your own.

    Args:
        lr: peak learning rate at the base (> 0).
        batch: batch size, in the unit of ``scale`` (> 0).
        scale: a (> 0).
        exponent: b (< 0).

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> round(power_plateau(lr=0.01, batch=100, scale=4.0, exponent=-0.5))  # 400 / sqrt(n) = 0.01
        1600000000

    Reference:
        Power scheduler (arXiv:2408.13359).
    """
    law = _positive("batch", batch) * _positive("scale", scale)
    return float((_positive("lr", lr) / law) ** (1 / _falling(exponent)))


def power_lr(batch: float, tokens: float, scale: float = 4.6, exponent: float = -0.51) -> float:
    """Return ``batch scale tokens^exponent``: the peak rate of a run of so many tokens, by the power scheduler's law.

    Fitted to warm-up, plateau and decay under muP, where it holds for all widths: it is the rate at the base. The power
    scheduler itself follows it during the run; see :func:`power_plateau` for that, and for the two constants.

    Args:
        batch: batch size, in the unit of ``scale`` (> 0).
        tokens: length of the run (> 0).
        scale: a (> 0).
        exponent: b (< 0).

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> round(power_lr(batch=100, tokens=1.6e9, scale=4.0, exponent=-0.5), 12)
        0.01

    Reference:
        Power scheduler (arXiv:2408.13359).
    """
    law = _positive("batch", batch) * _positive("scale", scale)
    return float(law * _positive("tokens", tokens) ** _falling(exponent))


# -- the time scale of weight decay -------------------------------------------------------------------------------


def timescale_steps(weight_decay: float) -> float:
    """Return ``1 / weight_decay``, the steps over which the weights average past updates.

    ``W <- (1 - lambda) W - lr U`` is an exponential moving average of updates with time scale ``1 / lambda`` steps.
    Multiply by the tokens of one step for tokens. Valid at the peak of the schedule, and for lambda well below 1.

    Args:
        weight_decay: lambda, removed per step independently of the rate, in (0, 1); for torch's AdamW that is the
            group's rate x its weight decay.

    Raises:
        ValueError: ``weight_decay`` is out of range.

    Examples:
        >>> timescale_steps(0.0005)
        2000.0

    Reference:
        Wang & Aitchison 2024 (arXiv:2405.13698).
    """
    if not 0 < weight_decay < 1:
        raise ValueError(
            f"weight_decay must be in (0, 1), got {weight_decay!r}; it is removed per step, so for AdamW lr x its own"
        )
    return 1 / weight_decay


def timescale_weight_decay(
    timescale: Duration, *, total: Duration | None = None, tokens_per_step: int | None = None
) -> float:
    """Return the weight decay ``1 / timescale`` (in steps), independent of the learning rate.

    A ``Fraction`` of ``total`` keeps the time scale in epochs when a run gets longer (lambda ~ 1/steps), ``Tokens``
    when the batch does (lambda ~ batch). The paper's rule, lambda ~ 1/width at 20 tokens per parameter, is neither.

    Args:
        timescale: tau, above one step.
        total: the whole run, of which a fraction is one.
        tokens_per_step: tokens of one optimizer step, where something is given in tokens (>= 1).

    Raises:
        ValueError: an argument is missing, or the time scale not above one step.
        TypeError: a duration is of another type.

    Examples:
        >>> from lightning_mup.schedules import Fraction, Tokens
        >>> timescale_weight_decay(Tokens(8 * 10**6), tokens_per_step=4000)
        0.0005
        >>> timescale_weight_decay(Fraction(0.25), total=8000)
        0.0005

    Reference:
        Wang & Aitchison 2024 (arXiv:2405.13698).
    """
    whole = None if total is None else as_steps(total, name="total", tokens_per_step=tokens_per_step)
    steps = as_steps(timescale, name="timescale", tokens_per_step=tokens_per_step, whole=whole)
    if not steps > 1:
        raise ValueError(f"timescale must be above 1 step, got {steps} ({timescale}); a weight decay is below 1")
    return 1 / steps


def power_lines_weight_decay(tokens_per_parameter: float, steps: float) -> float:
    """Return ``1 / (tau steps)`` with ``tau = 1.08 tokens_per_parameter^-0.527``, independent of the learning rate.

    Fitted to AdamW. Exponent and, above all, 1.08 are the source's by memory and were not read again; its range
    was not found. At fixed model and tokens the number of steps is ~ 1/batch, so this is ~ batch.

    Args:
        tokens_per_parameter: tokens of the run over parameters of the model (> 0); 20 is compute-optimal.
        steps: optimizer steps of the run (> 0).

    Raises:
        ValueError: an argument is not positive, or the time scale is not above one step.

    Examples:
        >>> round(power_lines_weight_decay(20, 1000), 6)  # tau = 1.08 e^(-0.527 x 2.9957) = 0.2227
        0.00449

    Reference:
        Power Lines (arXiv:2505.13738).
    """
    tau = 1.08 * _positive("tokens_per_parameter", tokens_per_parameter) ** -0.527
    timescale = tau * _positive("steps", steps)
    if not timescale > 1:
        raise ValueError(
            f"steps={steps} at {tokens_per_parameter} tokens per parameter give a time scale of {timescale:.3g} steps, "
            f"which must be above 1; train for more steps"
        )
    return float(1 / timescale)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}; give it as a plain number")
    return value


def _falling(exponent: float) -> float:
    if not -math.inf < exponent < 0:
        raise ValueError(f"exponent must be < 0, got {exponent!r}; the rate falls with tokens, say -0.51")
    return exponent
