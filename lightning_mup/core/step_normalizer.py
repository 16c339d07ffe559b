"""Hooks around an optimizer's step, between which its matrices' steps are brought to a fixed size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mup.core.decay_step import rate_now, will_update
from lightning_mup.core.method import Decay
from lightning_mup.core.own_decay import fraction_of
from lightning_mup.core.parts import local
from lightning_mup.core.renormalize import Renormalized, share_memory


class StepNormalizer:
    """Each step of an optimizer: its matrices' steps get one size, at the group's learning rate at the base.

    The weights are looked at right before the update: where ``step`` is given a closure, after it. The optimizer's own
    weight decay is off meanwhile and applied beside its step, but for an L2 term, which is part of the gradient. A step
    that a gradient scaler or ``nonfinite`` skips changes nothing; parameters without a gradient are left alone.

    Args:
        optimizer: the optimizer.
        stacks: what is brought to a size, each with the index of its parameter group.
        decays: what the weight decay of each group means.
        active: tells whether a step is one of training; distributed checkpoints take others to create state.

    Examples:
        >>> from lightning_mup.core.normalize import RmsNormalize
        >>> from lightning_mup.core.renormalize import Matrix
        >>> from lightning_mup.core.stack import Arrangement
        >>> weight = torch.nn.Parameter(torch.ones(2, 1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> stack = Renormalized([Matrix("w", weight, Arrangement((2, 1), (0,), (1,)))], RmsNormalize())
        >>> normalizer = StepNormalizer(optimizer, [(0, stack)], ["coupled"])
        >>> weight.grad = torch.full((2, 1), 3.0)
        >>> optimizer.step()
        >>> weight.data.T
        tensor([[0.5000, 0.5000]])
        >>> normalizer.remove()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        stacks: Sequence[tuple[int, Renormalized]],
        decays: Sequence[Decay | None],
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self._optimizer, self.stacks, self._decays, self._active = optimizer, list(stacks), list(decays), active
        share_memory(stack for _, stack in self.stacks)
        self._normalized = {p for _, stack in self.stacks for p in stack.params}
        self._kept: dict[int, float] = {}  # weight decays that are off
        self._stepping = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def rates(self, optimizer: Optimizer) -> dict[int, float]:
        """Return the rates at which an optimizer's next step moves what is normalized, by ``id``; no other's."""
        if optimizer is not self._optimizer:
            return {}
        groups = optimizer.param_groups
        return {id(m.param): rate_now(groups[i]) * m.factor for i, stack in self.stacks for m in stack.matrices}

    def remove(self) -> None:
        """Take the hooks off, and give the groups their weight decay back, should a step have failed."""
        for handle in self._handles:
            handle.remove()
        self._give_back()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._give_back()
        self._stepping = False
        if not self._active():
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin()
            return None
        wrapped = self._after_closure(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _after_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def beginning() -> Any:  # noqa: ANN401 - the closure's own result
            result = closure()
            if not self._stepping:  # LBFGS evaluates several times within one step
                self._begin()
            return result

        return beginning

    @torch.no_grad()
    def _begin(self) -> None:
        if not will_update(self._optimizer):
            return
        self._stepping = True
        for _, stack in self.stacks:
            stack.remember()
        for index, (group, decay) in enumerate(zip(self._optimizer.param_groups, self._decays, strict=True)):
            if not (fraction := fraction_of(group, decay)):
                continue
            rest = [p for p in group["params"] if p.grad is not None and p not in self._normalized]
            if rest:
                torch._foreach_mul_([local(p) for p in rest], 1.0 - fraction)
            self._kept[index], group["weight_decay"] = group["weight_decay"], 0.0

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._give_back()
        if not self._stepping:
            return
        self._stepping = False
        for index, stack in self.stacks:
            group = optimizer.param_groups[index]
            members = [i for i, p in enumerate(stack.params) if p.grad is not None]
            fraction = fraction_of(group, self._decays[index])
            stack.rescale(members, lr=float(group["lr"]), rate=rate_now(group), fraction=fraction)

    def _give_back(self) -> None:
        for index, value in self._kept.items():
            self._optimizer.param_groups[index]["weight_decay"] = value
        self._kept = {}


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer.

    Examples:
        >>> len(parameters_of(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])))
        1
    """
    return [p for group in optimizer.param_groups for p in group["params"]]
