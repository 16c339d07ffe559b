"""Independent weight decay around any torch optimizer: weights are multiplied after backward, before the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mup.core.finite import all_finite, norms_below
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.parts import holds_on_all, local
from lightning_mup.core.schedules import LR_AT_BASE, Group
from lightning_mup.core.transform import SMALL

_PEAKS = ("max_lr", "initial_lr", LR_AT_BASE, "lr")  # where a group may hold its peak; the first that is there counts


class Share(NamedTuple):
    """Parameters of one group that lose the same fraction per step."""

    group: int
    rate: float
    params: list[Tensor]


class DecayStep:
    """Before each update of an optimizer, ``W <- (1 - rate x schedule) W``.

    Where ``step`` is given a closure, the weights are multiplied after it, so that the gradient is that at the weights
    as they were. What torch's optimizers leave alone is left alone: parameters without a gradient, and all parameters
    on a step that a gradient scaler or ``nonfinite`` skips.

    Args:
        optimizer: the optimizer; its own decay must be off.
        rates: fraction removed per step by ``id`` of the parameter; parameters without one do not decay.
        schedule: from the index of a group to its factor on the rate, >= 0.
        active: tells whether a step is one of training; distributed checkpoints take others to create state.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> step = DecayStep(optimizer, {id(weight): 0.25}, schedule=lambda group: 1.0)
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7500, 0.7500])
        >>> step.remove()

    Reference:
        arXiv:2512.05620, App. F: W <- W - s(t) (lr U + lambda W).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rates: Mapping[int, float],
        schedule: Callable[[int], float],
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self._optimizer, self._schedule, self._active = optimizer, schedule, active
        self._shares = _shares(optimizer, rates)
        self._groups = len(optimizer.param_groups)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def fractions(self, optimizer: Optimizer) -> dict[int, float]:
        """Return what the next step will remove, by ``id`` of the parameter; nothing for another optimizer."""
        if optimizer is not self._optimizer:
            return {}
        return {id(p): 1.0 - self._factor(share) for share in self._shares for p in share.params}

    def remove(self) -> None:
        """Take the hook off again."""
        self._handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._active():
            return None
        self._check()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._decay()
            return None
        wrapped = self._after(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        pending = True

        def decaying() -> Any:  # noqa: ANN401 - the closure's own result
            nonlocal pending
            result = closure()
            if pending:  # LBFGS evaluates several times within one step
                pending = False
                self._decay()
            return result

        return decaying

    def _check(self) -> None:
        kind, groups = type(self._optimizer).__name__, self._optimizer.param_groups
        if len(groups) != self._groups:
            raise ValueError(
                f"{kind} had {self._groups} parameter groups when training started and has {len(groups)} now, so that "
                f"nobody says how those added decay; pass all parameters in configure_optimizers"
            )
        if own := own_decay(self._optimizer):
            raise ValueError(
                f"weight_decay of {kind} was set to {own} while WeightDecay decays the same weights; change it there"
            )

    @torch.no_grad()
    def _decay(self) -> None:
        if not will_update(self._optimizer):
            return
        alike: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
        for share in self._shares:
            factor = self._factor(share)
            for p in share.params if factor != 1 else ():
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype, factor), []).append(local(p))
        for (_, _, factor), params in alike.items():
            torch._foreach_mul_(params, factor)

    def _factor(self, share: Share) -> float:
        scheduled = float(self._schedule(share.group))
        factor = 1.0 - share.rate * scheduled
        if not (scheduled >= 0 and factor >= 0):
            raise ValueError(
                f"the schedule of weight decay gave {scheduled!r}, with which a step would remove "
                f"{share.rate * scheduled:.4g} of a weight; allowed is a factor >= 0 that removes at most all of it"
            )
        return factor


def own_decay(optimizer: Optimizer) -> list[float]:
    """Return the weight decays, not 0, that an optimizer's own groups hold, each once.

    Examples:
        >>> own_decay(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
        [0.01]
    """
    return sorted({float(group["weight_decay"]) for group in optimizer.param_groups if group.get("weight_decay")})


def peak_rate(group: Group) -> float:
    """Return the learning rate of a group that its schedule starts from or rises to; at the base, under a plan.

    Examples:
        >>> peak_rate({"lr": 0.0, "initial_lr": 0.1}), peak_rate({"lr": 0.1})
        (0.1, 0.1)
    """
    return float(next(group[key] for key in _PEAKS if key in group))


def rate_now(group: Group) -> float:
    """Return the learning rate of a group; at the base, under a plan.

    Examples:
        >>> rate_now({"lr": 0.05, "lr_at_base": 0.1}), rate_now({"lr": 0.05})
        (0.1, 0.05)
    """
    return float(group[LR_AT_BASE] if LR_AT_BASE in group else group["lr"])


def _shares(optimizer: Optimizer, rates: Mapping[int, float]) -> list[Share]:
    found: list[Share] = []
    for index, group in enumerate(optimizer.param_groups):
        parts: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            if rate := rates.get(id(p), 0.0):
                parts.setdefault(rate, []).append(p)
        found += [Share(index, rate, params) for rate, params in parts.items()]
    return found


def will_update(optimizer: Optimizer) -> bool:
    """Whether the step that is about to be taken changes anything; of sharded parameters, on any rank.

    Examples:
        >>> will_update(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
        True
    """
    overflown = getattr(optimizer, "found_inf", None)  # a gradient scaler tells a fused optimizer so
    if overflown is not None and bool(overflown):
        return False
    parts = [getattr(optimizer, side, None) for side in ("direction", "magnitude")]  # of a graft
    if all(isinstance(part, Optimizer) for part in parts):
        return all(will_update(part) for part in parts if part is not None)
    if not isinstance(optimizer, StackedOptimizer):
        return True
    looked_at = [group for group in optimizer.param_groups if group["nonfinite"] != "ignore"]
    params = [p for group in looked_at for p in group["params"]]
    grads = [p.grad for p in params]
    return holds_on_all(norms_below(SMALL, grads) or all_finite(grads), params)
