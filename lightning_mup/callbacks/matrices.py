"""The matrices of a training module that are watched: which ones, in which roles, and under which rates.

Shapes: n chosen matrices of a parameter, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mup.callbacks.parametrize import Parametrize
from lightning_mup.callbacks.spectral_normalization import SpectralNormalization
from lightning_mup.callbacks.weight_decay import WeightDecay
from lightning_mup.core.base import Base
from lightning_mup.core.infer import RoleLike, infer, shared_names
from lightning_mup.core.method import all_methods
from lightning_mup.core.optimizer import StackedOptimizer
from lightning_mup.core.settings import decay_per_lr
from lightning_mup.core.spec import ParamSpec
from lightning_mup.core.stack import Arrangement


@dataclass(frozen=True, slots=True)
class Watched:
    """A parameter, and those of its matrices that are watched.

    Args:
        spec: what the parameter is.
        arrangement: how it is matrices; a vector is one column.
        indices: which of the matrices are watched.

    Examples:
        >>> from lightning_mup.core.spec import Role
        >>> spec = ParamSpec("in_proj_weight", Role.HIDDEN, (6, 2), split=3)
        >>> watched = Watched.of(spec, (0, 2))
        >>> watched.labels, watched.take(torch.zeros(6, 2)).shape
        (['in_proj_weight[0]', 'in_proj_weight[2]'], torch.Size([2, 2, 2]))
    """

    spec: ParamSpec
    arrangement: Arrangement
    indices: tuple[int, ...]

    @classmethod
    def of(cls, spec: ParamSpec, indices: Sequence[int] | None = None) -> Watched:
        """Return some matrices of a parameter, all of them by default."""
        arrangement = Arrangement.of(torch.empty(spec.shape, device="meta"), {"axes": spec.axes, "split": spec.split})
        return cls(spec, arrangement, tuple(range(arrangement.count) if indices is None else indices))

    @property
    def labels(self) -> list[str]:
        """The matrices' names: the parameter's, with a number where it holds several."""
        name = self.spec.name
        return [name] if self.arrangement.count == 1 else [f"{name}[{i}]" for i in self.indices]

    def take(self, parameter: Tensor) -> Tensor:
        """Return a copy [n, O, I] of the matrices' values; all ranks of a sharded parameter must call it together."""
        seen, every = self.see(parameter), len(self.indices) == self.arrangement.count
        return seen.clone() if every and not isinstance(parameter.data, DTensor) else seen

    def see(self, parameter: Tensor) -> Tensor:
        """Return the matrices' values [n, O, I], as a view where that can be; of a sharded parameter as ``take``."""
        data = parameter.detach()
        whole = self.arrangement.take(data.full_tensor() if isinstance(data, DTensor) else data)
        return whole if len(self.indices) == len(whole) else whole[list(self.indices)]


def read_specs(
    trainer: Trainer, module: LightningModule, roles: Mapping[str, RoleLike] | None
) -> tuple[ParamSpec, ...]:
    """Return what each trainable parameter is: from the trainer's plan, or from module types and ``roles`` alone.

    Raises:
        ValueError: a parameter cannot be read, or there are both a plan and roles.
    """
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    found = next((c for c in callbacks if isinstance(c, Parametrize)), None)
    if found is None or found.plan is None:
        shapes = {name: tuple(p.shape) for names, p in shared_names(module) for name in names}
        return infer(module, Base(shapes), roles=roles)
    if roles:
        raise ValueError(f"roles={dict(roles)} are those of the plan; give them to Parametrize(roles=...) alone")
    return tuple(param.spec for param in found.plan.params)


def choose(specs: Iterable[ParamSpec], most: int | None) -> tuple[Watched, ...]:
    """Return the matrices to watch: of each role at most so many, spread evenly, the first and the last among them.

    Examples:
        >>> from lightning_mup.core.spec import Role
        >>> layers = [ParamSpec(f"{i}.weight", Role.HIDDEN, (4, 4)) for i in range(9)]
        >>> [watched.spec.name for watched in choose(layers, 3)]
        ['0.weight', '4.weight', '8.weight']
    """
    everything = [Watched.of(spec) for spec in specs if 0 not in spec.shape]
    chosen: dict[str, list[int]] = {}
    for role in dict.fromkeys(watched.spec.role for watched in everything):
        pairs = [(w.spec.name, i) for w in everything if w.spec.role is role for i in w.indices]
        for name, i in (pairs[k] for k in _spread(len(pairs), most)):
            chosen.setdefault(name, []).append(i)
    return tuple(
        Watched(w.spec, w.arrangement, tuple(chosen[w.spec.name])) for w in everything if w.spec.name in chosen
    )


def _spread(count: int, most: int | None) -> list[int]:
    if most is None or count <= most:
        return list(range(count))
    return [round(k * (count - 1) / max(1, most - 1)) for k in range(most)]


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return each parameter once, by its canonical name.

    Examples:
        >>> list(parameters_of(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    return {names[0]: p for names, p in shared_names(module)}


Rates = tuple[float, float]
"""A learning rate, and the fraction of a weight that a step removes."""


def rates_of(
    optimizer: Optimizer, decays: Mapping[int, float] | None = None, moved_at: Mapping[int, float] | None = None
) -> dict[int, Rates]:
    """Return each parameter's rates, by ``id``, as the next step will use them.

    The fraction is the weight decay of this package's optimizers under their ``decay``, and ``lr * weight_decay`` for
    torch's and unknown ones. A decay that is added to a gradient which is normalized afterwards (torch's Adam)
    removes no fraction that is known beforehand and counts as 0.

    Args:
        optimizer: the optimizer.
        decays: fractions that are removed around the optimizer, by ``id`` of the parameter.
        moved_at: learning rates at which steps are taken that are brought to a size afterwards, by ``id``.

    Examples:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> rates_of(torch.optim.AdamW([weight], lr=0.5, weight_decay=0.5))[id(weight)]
        (0.5, 0.25)
    """
    around, others = decays or {}, moved_at or {}
    return {
        id(p): (others.get(id(p), float(group["lr"])), around.get(id(p), 0.0) + own)
        for group in optimizer.param_groups
        for own in [_fraction(optimizer, group)]
        for p in group["params"]
    }


def decays_of(trainer: Trainer, optimizer: Optimizer) -> dict[int, float]:
    """Return the fractions that :class:`WeightDecay` callbacks will remove on an optimizer's next step, by ``id``."""
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    found = (c.fractions(optimizer) for c in callbacks if isinstance(c, WeightDecay))
    return {key: value for fractions in found for key, value in fractions.items()}


def normalized_rates_of(trainer: Trainer, optimizer: Optimizer) -> dict[int, float]:
    """Return the rates at which :class:`SpectralNormalization` will have an optimizer's next step, by ``id``."""
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    found = (c.rates(optimizer) for c in callbacks if isinstance(c, SpectralNormalization))
    return {key: value for rates in found for key, value in rates.items()}


def _fraction(optimizer: Optimizer, group: dict[str, Any]) -> float:
    rate = float(group["lr"])
    if isinstance(optimizer, StackedOptimizer):
        return rate * decay_per_lr(group)
    if _is_l2(optimizer) and not group.get("decoupled_weight_decay"):
        return 0.0
    return rate * float(group.get("weight_decay") or 0.0)


def _is_l2(optimizer: Optimizer) -> bool:
    declared = {cls: method.decay for method in all_methods().values() for cls in method.optimizers}
    return next((declared[cls] for cls in type(optimizer).__mro__ if cls in declared), "coupled") == "l2"
