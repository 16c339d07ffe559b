"""Whether gradients are numbers, and squares of them, with one wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mup.core.ownership import Ownership
from lightning_mup.core.parts import local

Group = Mapping[str, Any]


class NonFiniteGradientError(ValueError):
    """A gradient is not finite: training diverged, and the step was not taken."""


def all_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all entries are finite, of sharded tensors those of this rank, with one wait for the device.

    Examples:
        >>> all_finite([torch.ones(2)]), all_finite([torch.ones(2), torch.tensor([float("nan")])])
        (True, False)
    """
    return norms_below(float("inf"), tensors, order=float("inf"))


def norms_below(bound: float, tensors: Sequence[Tensor | None], order: float = 2.0) -> bool:
    """Whether each tensor's norm is a number below a bound; on a CPU, order 2 is 40 times as fast as order infinity.

    Examples:
        >>> norms_below(5.0, [torch.ones(4), None]), norms_below(5.0, [torch.full((4,), 3.0)])
        (True, False)
    """
    parts = [local(t) for t in tensors if t is not None]
    present = [part for part in parts if part.numel()]
    if not present:
        return True
    dtypes = {t.dtype for t in present}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    norms = torch._foreach_norm(present, ord=order, dtype=None if dtypes == {wide} else wide)
    return bool((torch.stack([norm.to(present[0].device) for norm in norms]) < bound).all())


def look(groups: Sequence[Group], bound: float, ownership: Ownership | None) -> tuple[bool, bool]:
    """Return whether to step, and whether norms reach a bound: one reduction over all gradients, and one wait.

    Args:
        groups: parameter groups, each of which says under ``nonfinite`` what to do.
        bound: above which squares overflow.
        ownership: of divided optimizers, whose ranks agree on it.

    Raises:
        NonFiniteGradientError: a gradient is not finite, and its group says ``"raise"``.

    Examples:
        >>> weight = torch.ones(1)
        >>> weight.grad = torch.tensor([float("nan")])
        >>> look([{"params": [weight], "nonfinite": "skip"}], 1e15, None)
        (False, True)
    """
    checked = [group for group in groups if group["nonfinite"] != "ignore"]
    grads = [
        p.grad
        for group in checked
        for p in group["params"]
        if p.grad is not None and (ownership is None or ownership.looks_at(p))
    ]
    small = norms_below(bound, grads)
    finite = small or all_finite(grads)
    if ownership is not None and checked:
        small, finite = ownership.all_say(small, finite)
    return (finite or _refuse(checked, ownership)), not small


def _refuse(checked: Sequence[Group], ownership: Ownership | None) -> bool:
    """Return False where the step is to be skipped."""
    bad = [(g, i) for g in checked for i, p in enumerate(g["params"]) if not all_finite([p.grad])]
    skip = all(group["nonfinite"] == "skip" for group in ([group for group, _ in bad] or checked))
    if ownership is not None:
        (skip,) = ownership.all_say(skip)
    if skip:
        return False
    others = f" (and those of {len(bad) - 1} others)" if bad else ""
    raise NonFiniteGradientError(
        f"the gradient {f'of {_name_of(*bad[0])!r}' if bad else 'on another rank'} is not finite{others}; nothing was "
        f"changed. Look at the loss, clip, or give nonfinite='skip' to leave such steps out, nonfinite='ignore' not to "
        f"look"
    )


def _name_of(group: Group, index: int) -> str:
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"parameter {index} of group {group.get('name', 0)}"
