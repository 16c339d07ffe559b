"""Steps of sharded parameters, brought to a fixed size: factors by owners of whole matrices, the rest part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mup.core.chains import full_precision
from lightning_mup.core.linalg import widened
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.parts import local, piece_of
from lightning_mup.core.renormalize import Matrix, Renormalized
from lightning_mup.core.shards import Shards, pieces_of
from lightning_mup.core.transform import Context, State


class ShardedRenormalized(Renormalized):
    """Sharded parameters (DTensors) whose matrices have one shape, and whose steps get one size.

    A step ``D`` is taken part by part. Each matrix' parts are brought to its owner among all ranks, which finds its
    factor; the factors, and the vectors that go on, are then the same on every rank, and each applies them to its
    parts. No whole weight is made, and of whole steps only those that a rank owns.

    Bytes that a rank sends per step, for P bytes of these matrices over R ranks: P / R, and the vectors.

    Args:
        matrices: the parameters; all on one device, of one dtype and one shape of matrix.
        normalize: what brings updates to a size.
        first: owner of the first of them; the others' follow. All ranks build it together.

    Reference:
        arXiv:2512.05620, App. F.
    """

    whole = False

    def __init__(
        self, matrices: Sequence[Matrix], normalize: SpectralNormalize | RmsNormalize, *, first: int = 0
    ) -> None:
        self.matrices, self.normalize = list(matrices), normalize
        self.params = [m.param for m in matrices]
        self._counts = [m.arrangement.count for m in matrices]
        self._before = [torch.empty_like(local(p.detach())) for p in self.params]
        self._owners = [(first + i) % dist.get_world_size() for i in range(len(matrices))]
        self._pieces = pieces_of([p for p in self.params if isinstance(p, DTensor)])
        arrangement = matrices[0].arrangement
        like = widened(self._before[0].new_empty(()))
        self._state: State = normalize.init(like.expand(sum(self._counts), arrangement.rows, arrangement.columns))
        factors = torch.tensor([m.factor for m in matrices], dtype=torch.float64)
        self._factor_N11 = factors.repeat_interleave(torch.tensor(self._counts)).view(-1, 1, 1).to(like)
        self._steps = [0] * len(matrices)
        self._known: dict[tuple[int, ...], Shards] = {}

    @torch.no_grad()
    def remember(self) -> None:
        """Copy this rank's parts as they are before the step."""
        torch._foreach_copy_(self._before, [local(p) for p in self.params])

    def _rescale(self, alike: Sequence[int], ctx: Context, lr: float, rate: float, kept: float) -> None:
        now, before = [local(self.params[i]) for i in alike], [self._before[i] for i in alike]
        moved = [widened(old) - new for old, new in zip(before, now, strict=True)]
        rows = self._rows(alike)
        factor_N11 = self._factors(alike, moved, ctx, lr) * (rate * self._factor_N11[rows])
        counts = [self._counts[i] for i in alike]
        for i, part, old, new, factor in zip(alike, moved, before, now, torch.split(factor_N11, counts), strict=True):
            new.copy_(widened(old).mul(kept).sub_(part.mul_(self._by_entry(i, factor))))

    def _factors(self, alike: Sequence[int], moved: Sequence[Tensor], ctx: Context, lr: float) -> Tensor:
        """Return the factors of some members' matrices, and advance their vectors, on all ranks alike."""
        own = [k for k, i in enumerate(alike) if self._owners[i] == dist.get_rank()]
        wholes = self._shards(tuple(alike)).gather(moved).wait()
        rows = self._rows(alike)
        found = {"": torch.zeros_like(self._factor_N11[rows])}
        found |= {key: torch.zeros_like(value[rows]) for key, value in self._state.items()}
        if own:
            stack = [self.matrices[alike[k]].arrangement.take(w) for k in own if (w := wholes[k]) is not None]
            mine = self._rows([alike[k] for k in own])
            state = {key: value[mine] for key, value in self._state.items()}
            with full_precision(mine.device):
                factor_N11 = self.normalize.factors(torch.cat(stack), state, ctx, unit=lr)
            places = torch.isin(rows, mine)
            for key, value in {"": factor_N11, **state}.items():
                found[key][places] = value
        sent = torch.cat([value.flatten() for value in found.values()])
        dist.all_reduce(sent)  # every row is one rank's, and zero on the others
        parts = torch.split(sent, [value.numel() for value in found.values()])
        for (key, like), part in zip(found.items(), parts, strict=True):
            if key:
                self._state[key][rows] = part.view_as(like)
        return parts[0].view(-1, 1, 1)

    def _shards(self, alike: tuple[int, ...]) -> Shards:
        if alike not in self._known:
            owners, pieces = [self._owners[i] for i in alike], [self._pieces[i] for i in alike]
            shapes = [self.params[i].shape for i in alike]
            self._known[alike] = Shards(pieces, shapes, owners, self._factor_N11.device)
        return self._known[alike]

    def _by_entry(self, i: int, factor_N11: Tensor) -> Tensor:
        """Return one member's factors as this rank's part takes them: one number, or one for each entry."""
        if len(factor_N11) == 1:
            return factor_N11.view(())
        arrangement = self.matrices[i].arrangement
        whole = arrangement.give(factor_N11.expand(-1, arrangement.rows, arrangement.columns))
        return piece_of(self.params[i]).of(whole)
