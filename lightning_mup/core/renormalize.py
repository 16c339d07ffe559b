"""Steps that any optimizer took, brought to a fixed size afterwards: stack by stack, with its own memory.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mup.core.linalg import widened
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.optimizer import full_precision
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

    def __init__(self, matrices: Sequence[Matrix], normalize: SpectralNormalize | RmsNormalize) -> None:
        self.matrices, self.normalize = list(matrices), normalize
        self.params = [m.param for m in matrices]
        self._before = [torch.empty_like(p, requires_grad=False) for p in self.params]
        like = widened(self.params[0].new_zeros(()))
        self._states: list[State] = [normalize.init(like.expand(_shape(m))) for m in matrices]
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
            u_NOI = torch.cat([self._update(i, lr) for i in alike])
            state = {key: torch.cat([self._states[i][key] for i in alike]) for key in self._states[alike[0]]}
            with full_precision(u_NOI.device):
                out_NOI = self.normalize.update(u_NOI, state, Context(step))
            counts = [self.matrices[i].arrangement.count for i in alike]
            for key, value in state.items():
                for i, part in zip(alike, torch.split(value, counts), strict=True):
                    self._states[i][key].copy_(part)
            for i, part_NOI in zip(alike, torch.split(out_NOI, counts), strict=True):
                self._write(i, part_NOI, rate * self.matrices[i].factor, fraction)

    def _update(self, i: int, lr: float) -> Tensor:
        moved = widened(self._before[i]).sub(self.params[i])
        return self.matrices[i].arrangement.take(moved / lr if lr else moved)

    def _write(self, i: int, out_NOI: Tensor, rate: float, fraction: float) -> None:
        step = self.matrices[i].arrangement.give(out_NOI)
        self.params[i].copy_(widened(self._before[i]).mul(1.0 - fraction).sub(step, alpha=rate))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the vectors and the numbers of steps, by the parameter's name."""
        return {
            matrix.name: {"step": torch.tensor(step), **{key: value.clone() for key, value in state.items()}}
            for matrix, state, step in zip(self.matrices, self._states, self._steps, strict=True)
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
            for key, value in self._states[i].items():
                if key not in found or found[key].shape != value.shape:
                    got = {k: tuple(v.shape) for k, v in found.items()}
                    raise ValueError(
                        f"the checkpoint's vectors of {matrix.name!r} have shapes {got}, but {key!r} must have "
                        f"{tuple(value.shape)}; resume with the model and the readout that it was saved with"
                    )
                value.copy_(found[key])
            self._steps[i] = int(found["step"])


def _shape(matrix: Matrix) -> tuple[int, int, int]:
    return matrix.arrangement.count, matrix.arrangement.rows, matrix.arrangement.columns
