"""Steps that any optimizer took, brought to a fixed size afterwards: stack by stack, with its own memory.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mup.core.chains import full_precision
from lightning_mup.core.linalg import widened
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.stack import Arrangement
from lightning_mup.core.transform import Context, State


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter, how it is matrices, and its factor on the learning rate.

    Args:
        name: the parameter's name, under which its vectors are saved.
        param: the parameter.
        arrangement: how it is matrices.
        factor: factor on the learning rate (> 0).
    """

    name: str
    param: Tensor
    arrangement: Arrangement
    factor: float = 1.0


class Renormalized:
    """Parameters whose matrices have one shape, in one parameter group, and whose steps get one size.

    Between :meth:`remember` and :meth:`rescale` the optimizer steps. Then, per matrix,
    ``W <- W_old - rate x factor x normalize((W_old - W_new) / lr) - fraction W_old``.

    Args:
        matrices: the parameters; all on one device, of one dtype and one shape of matrix.
        normalize: what brings updates to a size.

    Examples:
        >>> weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> stack = Renormalized([Matrix("w", weight, Arrangement((2, 2), (0,), (1,)))], SpectralNormalize())
        >>> stack.remember()
        >>> weight[0, 0] -= 0.3
        >>> stack.rescale([0], lr=0.1, rate=0.5, fraction=0.0)
        >>> weight
        tensor([[0.5000, 1.0000],
                [0.0000, 0.0000]])

    Reference:
        arXiv:2512.05620, App. F.
    """

    whole: ClassVar[bool] = True
    """Whether the parameters are, so that stacks can share memory for their steps."""

    def __init__(self, matrices: Sequence[Matrix], normalize: SpectralNormalize | RmsNormalize) -> None:
        self.matrices, self.normalize = list(matrices), normalize
        self.params = [m.param for m in matrices]
        self._counts = [m.arrangement.count for m in matrices]
        first = matrices[0].arrangement
        # All weights before the step in one tensor, so that a stack is taken in a few operations.
        self._before_NOI = self.params[0].new_empty(sum(self._counts), first.rows, first.columns)
        self._before = self._in_shape(self._before_NOI, range(len(matrices)))
        like = widened(self.params[0].new_empty(()))
        self._work, self._room = like.dtype, like.new_empty(0)  # for one step's work
        self._state: State = normalize.init(like.expand(self._before_NOI.shape))
        factors = torch.tensor([m.factor for m in matrices], dtype=torch.float64)
        self._factor_N11 = factors.repeat_interleave(torch.tensor(self._counts)).view(-1, 1, 1).to(like)
        self._steps = [0] * len(matrices)

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the parameters as they are before the step."""
        torch._foreach_copy_(self._before, self.params)

    @torch.no_grad()
    def rescale(self, members: Sequence[int], *, lr: float, rate: float, fraction: float) -> None:
        """Bring the steps that some members just took to their size.

        Args:
            members: indices of the parameters that the optimizer updated.
            lr: learning rate with which it did; 0 if it did not move them.
            rate: wanted learning rate.
            fraction: removed of each weight.
        """
        for step in dict.fromkeys(self._steps[i] + 1 for i in members):
            alike = [i for i in members if self._steps[i] + 1 == step]
            for i in alike:
                self._steps[i] = step
            self._rescale(alike, Context(step), lr or 1.0, rate, 1.0 - fraction)

    def _rescale(self, alike: Sequence[int], ctx: Context, lr: float, rate: float, kept: float) -> None:
        whole = len(alike) == len(self.params)
        rows = slice(None) if whole else self._rows(alike)
        before_NOI, state = self._before_NOI[rows], {key: value[rows] for key, value in self._state.items()}
        moved_NOI = self._moved(alike, before_NOI)
        with full_precision(moved_NOI.device):
            factor_N11 = self.normalize.factors(moved_NOI, state, ctx, unit=lr)
        for key, value in {} if whole else state.items():
            self._state[key][rows] = value
        self._write(alike, kept, (before_NOI, moved_NOI), factor_N11 * (rate * self._factor_N11[rows]))

    def _moved(self, members: Sequence[int], before_NOI: Tensor) -> Tensor:
        """Return ``W_old - W_new``, in memory that the next step takes again."""
        if self._room.numel() < before_NOI.numel():
            self._room = self._room.new_empty(before_NOI.numel())
        out_NOI = self._room[: before_NOI.numel()].view(before_NOI.shape)
        if (now_NOI := self._as_stack(members)) is not None:
            return torch.sub(before_NOI, now_NOI, out=out_NOI)
        views = self._in_shape(out_NOI.copy_(before_NOI), members)
        torch._foreach_sub_(views, [self.params[i] for i in members])
        return out_NOI

    def _write(self, members: Sequence[int], kept: float, both: tuple[Tensor, Tensor], factor_N11: Tensor) -> None:
        """Set ``W <- kept x before - factor x moved``; what moved is overwritten."""
        before_NOI, moved_NOI = both
        if (now_NOI := self._as_stack(members)) is not None:
            start_NOI = before_NOI if kept == 1 else torch.mul(before_NOI, kept, out=now_NOI)
            torch.addcmul(start_NOI, moved_NOI, factor_N11, value=-1, out=now_NOI)
            return
        views = self._in_shape(moved_NOI.mul_(-factor_N11).add_(before_NOI, alpha=kept), members)
        torch._foreach_copy_([self.params[i] for i in members], views)

    def _as_stack(self, members: Sequence[int]) -> Tensor | None:
        """Return a lone parameter as its matrices, where it lies in memory as they do; large ones are stacks alone."""
        param, arrangement = self.params[members[0]].detach(), self.matrices[members[0]].arrangement
        plain = arrangement.in_order and param.is_contiguous() and param.dtype == self._work
        return arrangement.take(param) if len(members) == 1 and plain else None

    def _rows(self, members: Sequence[int]) -> Tensor:
        """Return the places of some parameters' matrices in the stack."""
        ends = list(itertools.accumulate(self._counts))
        places = [row for i in members for row in range(ends[i] - self._counts[i], ends[i])]
        return torch.tensor(places, device=self._factor_N11.device)

    def _in_shape(self, x_NOI: Tensor, members: Sequence[int]) -> list[Tensor]:
        """Return the members' matrices as views of their parameters' shapes."""
        parts = torch.split(x_NOI, [self._counts[i] for i in members])
        return [self.matrices[i].arrangement.give(part) for i, part in zip(members, parts, strict=True)]

    def _own(self, i: int) -> dict[str, Tensor]:
        return {key: torch.split(value, self._counts)[i] for key, value in self._state.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the vectors and the numbers of steps, by the parameter's name."""
        return {
            matrix.name: {"step": torch.tensor(step), **{key: value.clone() for key, value in self._own(i).items()}}
            for i, (matrix, step) in enumerate(zip(self.matrices, self._steps, strict=True))
        }

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what ``state_dict`` returned, of the parameters that are here.

        Raises:
            ValueError: the vectors have another shape.
        """
        for i, matrix in enumerate(self.matrices):
            found = saved.get(matrix.name)
            if found is None:
                continue
            for key, value in self._own(i).items():
                if key not in found or found[key].shape != value.shape:
                    got = {k: tuple(v.shape) for k, v in found.items()}
                    raise ValueError(
                        f"the checkpoint's vectors of {matrix.name!r} have shapes {got}, but {key!r} must have "
                        f"{tuple(value.shape)}; resume with the model, the readout and vectors=... that it was saved "
                        f"with"
                    )
                value.copy_(found[key])
            self._steps[i] = int(found["step"])


def share_memory(stacks: Iterable[Renormalized]) -> None:
    """Let stacks that are rescaled one after another work in the same memory, as large as the largest one needs."""
    alike: dict[tuple[torch.dtype, torch.device], list[Renormalized]] = {}
    for stack in (stack for stack in stacks if stack.whole):
        alike.setdefault((stack._work, stack._room.device), []).append(stack)
    for found in alike.values():
        room = found[0]._room.new_empty(max(stack._before_NOI.numel() for stack in found))
        for stack in found:
            stack._room = room
