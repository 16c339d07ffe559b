"""Run an optimizer on one matrix with gradients as they are early in training, and measure its last step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mup.core.method import Settings

Factory = Callable[[list[nn.Parameter]], Optimizer]
OwnFactor = Callable[[Settings, int, int], float]

SAMPLES = 4  # rank of the gradients: small against every width
_GRADIENT_TIMES_FAN_OUT = 2.0**10  # large enough that usual epsilons (1e-6 and below) are negligible


@dataclass(frozen=True, slots=True)
class Trial:
    """One size at which an optimizer was run.

    Args:
        fan_in: columns of the matrix.
        fan_out: rows of the matrix.
        depth: the gradient's entries are of size ``1/(depth fan_out)``.
        weight: RMS of the matrix' initial entries.
        eps: factor on the optimizer's setting ``eps``.
        norm: spectral norm of the last step's change, over the learning rate.
    """

    fan_in: int
    fan_out: int
    depth: int = 1
    weight: float = 1.0
    eps: float = 1.0
    norm: float = math.nan


def run(factory: Factory, trial: Trial, steps: int, own_factor: OwnFactor | None) -> Trial:
    """Return the trial with the spectral norm of the last of some steps, over learning rate and own factor.

    Args:
        factory: makes the optimizer from a list of parameters.
        trial: the sizes.
        steps: number of steps.
        own_factor: factor on the learning rate to divide out, from (settings, fan_out, fan_in).

    Raises:
        ValueError: the step fails, changes nothing, or is not finite.
        TypeError: the factory returns no optimizer.
    """
    torch.manual_seed(0)  # for an optimizer that draws; the caller's state comes back afterwards
    draw = torch.Generator("cpu").manual_seed(0)
    # In float64, since optimizers that normalize each direction blow rounding errors up to full size.
    values = torch.randn(trial.fan_out, trial.fan_in, generator=draw, dtype=torch.float64)
    weight = nn.Parameter(values * (trial.weight / values.square().mean().sqrt()))
    optimizer = checked(factory([weight]))
    group = optimizer.param_groups[0]
    if trial.eps != 1:
        group["eps"] *= trial.eps
    for gradient in _gradients(trial, steps, draw):
        before = weight.detach().clone()
        _step(optimizer, weight, gradient)
    rate = float(group["lr"]) * (own_factor(group, trial.fan_out, trial.fan_in) if own_factor else 1.0)
    change = (weight.detach() - before).double()
    norm = float(torch.linalg.matrix_norm(change, ord=2)) / rate if change.isfinite().all() else math.nan
    if not norm > 0:
        raise ValueError(
            f"{type(optimizer).__name__} made a step of norm {norm} at lr={group['lr']}; it must move the weight by a "
            f"finite amount at step {steps}"
        )
    return replace(trial, norm=norm)


def _gradients(trial: Trial, steps: int, draw: torch.Generator) -> Iterator[Tensor]:
    inputs, errors = (_orthogonal(size, draw) for size in (trial.fan_in, trial.fan_out))
    errors *= _GRADIENT_TIMES_FAN_OUT / (trial.depth * trial.fan_out)
    # The same coefficients at every size: they are noise that the fit need not see.
    draw_alike = torch.Generator("cpu").manual_seed(1)
    for _ in range(steps):
        yield (errors * (0.5 + torch.rand(SAMPLES, generator=draw_alike, dtype=torch.float64))) @ inputs.T


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return one column per sample, entries of RMS 1; orthogonal, so that their overlaps do not depend on the size."""
    columns, _ = torch.linalg.qr(torch.randn(size, SAMPLES, generator=generator, dtype=torch.float64))
    return torch.mul(columns, math.sqrt(size))


def _step(optimizer: Optimizer, weight: nn.Parameter, gradient: Tensor) -> None:
    weight.grad = gradient
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be measured: step() on one matrix with a dense gradient, without a "
            f"closure, failed with {type(error).__name__}: {error}. Declare a Method by hand"
        ) from error


def checked(optimizer: object) -> Optimizer:
    """Return an optimizer whose update can be measured: it has a learning rate, and no weight decay.

    Raises:
        ValueError: it has no learning rate, or decays weights.
        TypeError: it is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"the factory must return a torch optimizer, got {optimizer!r}; pass "
            f"lambda params: MyOptimizer(params, lr=0.1)"
        )
    group, kind = optimizer.param_groups[0], type(optimizer).__name__
    if not float(group.get("lr", 0.0)) > 0:
        raise ValueError(f"{kind} must hold a learning rate > 0 in its groups, got lr={group.get('lr')!r}; give lr=0.1")
    if group.get("weight_decay"):
        raise ValueError(
            f"{kind} has weight_decay={group['weight_decay']}, which would be measured with the update; build it with "
            f"weight_decay=0"
        )
    return optimizer
