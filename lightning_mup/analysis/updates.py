"""Spectral norms of updates, over the norms that the spectral condition wants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.power import Power
from lightning_mup.core.rules import Rules, without_depth
from lightning_mup.core.spec import ParamSpec


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a parameter's numbers are divided by, so that a right one is flat over sizes.

    Args:
        spec: what the parameter is.
        output: the forward multiplier that its module's output carries by design: a residual branch's 1/L, or the
            user's own. A readout's or a layer's width multiplier is no part of it.
        update: spectral norm that an update of the tensor should have, ``(fan_out/fan_in)^1/2`` times ``output`` times
            the depth rule's power, in any unit that does not depend on size.
    """

    spec: ParamSpec
    output: float
    update: float

    @classmethod
    def of(cls, param: ParamPlan, rules: Rules | None) -> Yardstick:
        """Return the yardstick of a parameter under rules; without rules there are no multipliers.

        Examples:
            >>> from torch import nn
            >>> from lightning_mup import plan
            >>> from lightning_mup.core.rules import find_rules
            >>> made = plan(nn.Linear(64, 256), base=lambda: nn.Linear(16, 64))
            >>> Yardstick.of(made["weight"], find_rules("mup")).update
            2.0
        """
        spec = param.spec
        spectral = math.sqrt(spec.fan_out.size / spec.fan_in.size)
        if rules is None:
            return cls(spec, 1.0, spectral)
        row = rules.rows[spec.role]
        carried = param.folded * param.forward / spec.evaluate(without_depth(row.forward))
        depth = Power() if row.update_norm is None else Power(depth=row.update_norm.depth)
        return cls(spec, carried, spectral * carried * spec.evaluate(depth) / param.forward)

    def measure(self, change: torch.Tensor) -> float:
        """Return the spectral norm of a change of the parameter over the wanted one; inf where it is not finite.

        A fused or stacked parameter gives the largest of its matrices' norms.
        """
        return spectral_norm(as_matrices(change, self.spec)) / self.update


def as_matrices(tensor: torch.Tensor, spec: ParamSpec) -> torch.Tensor:
    """Return a parameter as a stack of matrices; a vector is one column.

    Shape:
        anything -> ``[N, O, I]``, N matrices in all (stacked experts x fused blocks).

    Examples:
        >>> from torch import nn
        >>> from lightning_mup.core.base import Base
        >>> from lightning_mup.core.infer import infer
        >>> attention = nn.MultiheadAttention(16, 2)
        >>> fused = infer(attention, Base.of(attention))[0]
        >>> as_matrices(attention.in_proj_weight, fused).shape
        torch.Size([3, 16, 16])
    """
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    rows = spec.fan_out.size * spec.split
    if sum(size > 1 for size in spec.shape) <= 1:
        return whole.reshape(1, -1, 1)
    leading = next(k for k in range(len(spec.shape)) if math.prod(spec.shape[:k]) == spec.stack)
    stack = whole.reshape(spec.stack, *spec.shape[leading:])
    # The spec tells how many rows there are, not on which axis: transposed layouts have them on the second.
    if stack.shape[1] != rows and stack.ndim > 2 and stack.shape[2] == rows:
        stack = stack.transpose(1, 2)
    return stack.reshape(spec.stack * spec.split, -1, math.prod(stack.shape[2:]))


def spectral_norm(matrices_NOI: torch.Tensor) -> float:
    """Return the largest spectral norm of a stack of matrices, exact, in float32; inf where an entry is not finite.

    Shape:
        ``[N, O, I]`` -> a number.

    Examples:
        >>> spectral_norm(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        4.0
    """
    scale = matrices_NOI.abs().amax()
    if not torch.isfinite(scale):
        return math.inf
    if scale == 0:
        return 0.0
    unit = matrices_NOI.float() / scale.float()  # squares neither overflow nor vanish
    small = unit if unit.shape[1] <= unit.shape[2] else unit.mT
    # The Gram matrix' top eigenvalue is exact enough (only small singular values suffer) and far faster than an SVD.
    top = torch.linalg.eigvalsh(small @ small.mT)[:, -1].amax()
    return float(scale * top.clamp_min(0).sqrt())
