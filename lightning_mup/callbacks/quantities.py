"""What can be said of a training step's matrices, layers and rates: a closed list of quantities, each a table entry.

Shapes: n watched matrices of a parameter, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mup.callbacks.matrices import Rates, Watched
from lightning_mup.callbacks.probe_pass import Pass, Probe
from lightning_mup.core.registry import near
from lightning_mup.metrics.functional import (
    alignments,
    decay_timescale,
    effective_learning_rate,
    norms_and_ranks,
    root_mean_squares,
)

Quantity = Literal[
    "weight/rms",
    "weight/spectral_norm",
    "weight/stable_rank",
    "update/rms",
    "update/spectral_norm",
    "update/stable_rank",
    "update/relative",
    "update/alignment",
    "feature/rms",
    "feature/change",
    "logits/rms",
    "logits/change",
    "optimizer/effective_learning_rate",
    "optimizer/decay_timescale",
]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
CHEAP: tuple[Quantity, ...] = (
    "weight/rms",
    "update/rms",
    "update/relative",
    "optimizer/effective_learning_rate",
)
"""What takes neither an SVD nor a forward pass."""
BEFORE: frozenset[str] = frozenset({"update/alignment", "feature/change", "logits/change"})
"""What needs a forward pass before the step."""
AFTER: frozenset[str] = frozenset({"feature/rms", "feature/change", "logits/rms", "logits/change"})
"""What needs a forward pass after the step."""
OF_PASSES = BEFORE | AFTER
"""What differs between ranks, which see other batches."""
_SAFE = (1e-12, 1e15)
"""Norms between which neither a square nor a sum of squares is lost in float32."""

Key = tuple[str, str, str]
"""Quantity, role, and name of the matrix or layer."""
Sum = tuple[float, float]
"""A sum of values and their number."""


def check_quantities(names: Iterable[str]) -> tuple[Quantity, ...]:
    """Return the names, each once, if all are quantities.

    Raises:
        ValueError: one is not, or there is none.

    Examples:
        >>> check_quantities(["update/rsm"])
        Traceback (most recent call last):
        ValueError: unknown quantity 'update/rsm'; allowed: weight/rms, ...; did you mean 'update/rms'?
    """
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in QUANTITIES:
            raise ValueError(
                f"unknown quantity {name!r}; allowed: {', '.join(QUANTITIES)}{near(str(name), QUANTITIES)}"
            )
    if not given:
        raise ValueError(f"quantities must name one or more, got {names!r}; allowed: {', '.join(QUANTITIES)}")
    return tuple(q for q in QUANTITIES if q in given)


@dataclass(slots=True)
class Change:
    """A parameter's watched matrices before and after a step [n, O, I]; every norm and every SVD is done once.

    Args:
        old: before.
        new: after.
    """

    old: Tensor
    new: Tensor
    _moved: Tensor | None
    _norms: dict[str, Tensor]
    _decomposed: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, old: Tensor, new: Tensor) -> Change:
        """Return the change, taken in float32 at least."""
        wide = torch.promote_types(new.dtype, torch.float32)
        return cls(old.to(wide), new.to(wide), None, {}, {})

    @property
    def moved(self) -> Tensor:
        """The applied update, ``W_new - W_old``."""
        if self._moved is None:
            self._moved = self.new - self.old
        return self._moved

    def norm(self, what: Literal["old", "new", "moved"]) -> Tensor:
        """Return the Frobenius norms of the weight, before or after, or of its update."""
        if what not in self._norms:
            self._norms[what] = _norms(getattr(self, what))
        return self._norms[what]

    def rms(self, what: Literal["new", "moved"]) -> Tensor:
        """Return the root mean squares of the weight or of its update."""
        return self.norm(what) / math.sqrt(self.new.shape[1] * self.new.shape[2])

    def relative(self) -> Tensor:
        """Return ``||dW||_F / ||W||_F``, with the weight before: 0 for no change, else inf for a zero weight."""
        moved, old = self.norm("moved"), self.norm("old")
        return torch.where((moved == 0) & ~old.isnan(), 0.0, moved / old)

    def decomposed(self, what: Literal["new", "moved"]) -> tuple[Tensor, Tensor]:
        """Return the spectral norms and stable ranks of the weight or of its update."""
        if what not in self._decomposed:
            self._decomposed[what] = norms_and_ranks(getattr(self, what))
        return self._decomposed[what]


def _norms(x_NOI: Tensor) -> Tensor:
    norm_N: Tensor = torch.linalg.vector_norm(x_NOI, dim=(1, 2))
    if bool(((norm_N > _SAFE[0]) & (norm_N < _SAFE[1])).all()):
        return norm_N
    # Squares overflow or vanish, or there is nothing; to look for the largest entry first takes three times as long.
    return root_mean_squares(x_NOI) * math.sqrt(x_NOI.shape[1] * x_NOI.shape[2])


OF_MATRICES: dict[str, Callable[[Change], Tensor]] = {
    "weight/rms": lambda change: change.rms("new"),
    "weight/spectral_norm": lambda change: change.decomposed("new")[0],
    "weight/stable_rank": lambda change: change.decomposed("new")[1],
    "update/rms": lambda change: change.rms("moved"),
    "update/spectral_norm": lambda change: change.decomposed("moved")[0],
    "update/stable_rank": lambda change: change.decomposed("moved")[1],
    "update/relative": lambda change: change.relative(),
}
OF_RATES: dict[str, Callable[[Rates], float]] = {
    "optimizer/effective_learning_rate": lambda rates: effective_learning_rate(*rates),
    "optimizer/decay_timescale": lambda rates: rates[1],  # fractions are averaged, as decay adds up
}
OF_MEANS: dict[str, Callable[[float], float]] = {"optimizer/decay_timescale": decay_timescale}
"""What is done to a mean in the end."""


def of_matrices(watched: Watched, change: Change, wanted: Sequence[str]) -> dict[Key, Sum]:
    """Return the quantities of a parameter's matrices.

    Examples:
        >>> from lightning_mup.core.spec import ParamSpec, Role
        >>> weight = Watched.of(ParamSpec("w", Role.HIDDEN, (2, 2)))
        >>> step = Change.of(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
        >>> of_matrices(weight, step, ["update/rms"])
        {('update/rms', 'hidden', 'w'): (1.0, 1.0)}
    """
    names = [name for name in wanted if name in OF_MATRICES]
    if not names:
        return {}
    values = torch.cat([OF_MATRICES[name](change) for name in names]).tolist()
    keys = [(name, watched.spec.role.value, label) for name in names for label in watched.labels]
    return {key: (value, 1.0) for key, value in zip(keys, values, strict=True)}


def of_rates(watched: Watched, rates: Rates, wanted: Sequence[str]) -> dict[Key, Sum]:
    """Return the quantities of a parameter's rates, which all its matrices share.

    Examples:
        >>> from lightning_mup.core.spec import ParamSpec, Role
        >>> of_rates(
        ...     Watched.of(ParamSpec("w", Role.HIDDEN, (2, 2))), (0.1, 1e-3), ["optimizer/effective_learning_rate"]
        ... )
        {('optimizer/effective_learning_rate', 'hidden', 'w'): (0.01, 1.0)}
    """
    return {
        (name, watched.spec.role.value, label): (OF_RATES[name](rates), 1.0)
        for name in wanted
        if name in OF_RATES
        for label in watched.labels
    }


def of_alignment(watched: Watched, change: Change, probe: Probe, early: Pass) -> dict[Key, Sum]:
    """Return the alignment exponents of a parameter's updates with what its matrices took in before the step."""
    if watched.spec.name not in probe.factors:
        return {}
    keys = [("update/alignment", watched.spec.role.value, label) for label in watched.labels]
    inputs = probe.inputs_of(watched, early)
    if inputs is None:  # another rank may have called the layer
        return dict.fromkeys(keys, (0.0, 0.0))
    sums = [alignments(x, moved) for x, moved in zip(inputs, change.moved, strict=True)]
    return {key: (float(total), float(count)) for key, (total, count) in zip(keys, sums, strict=True)}


def of_passes(probe: Probe, passes: tuple[Pass | None, Pass], wanted: Sequence[str]) -> dict[Key, Sum]:
    """Return mean squares of the layers' outputs after the step, and of their changes, as sums over entries."""
    early, late = passes
    outputs = early.outputs if early else {}
    pairs: dict[tuple[str, str, str], tuple[Tensor | None, Tensor | None]] = {
        ("feature", role.value, layer): (outputs.get(layer), late.outputs.get(layer))
        for layer, role in probe.roles.items()
    }
    pairs["logits", "", ""] = (probe.logits_of(outputs), probe.logits_of(late.outputs))
    found: dict[Key, Sum] = {}
    for (what, role, layer), (before, after) in pairs.items():
        if f"{what}/rms" in wanted:
            found[f"{what}/rms", role, layer] = _squares(after)
        if f"{what}/change" in wanted:
            found[f"{what}/change", role, layer] = _squares(_difference(before, after))
    return found


def _difference(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    return None if before is None or after is None or before.shape != after.shape else after - before


def _squares(tensor: Tensor | None) -> Sum:
    if tensor is None or not tensor.numel():
        return 0.0, 0.0
    return float(root_mean_squares(tensor)) ** 2 * tensor.numel(), float(tensor.numel())


def rooted(found: Mapping[Key, Sum]) -> dict[Key, Sum]:
    """Return the layers' mean squares as RMS, one value per layer; all else as it is.

    Examples:
        >>> rooted({("feature/rms", "hidden", "net"): (36.0, 4.0)})
        {('feature/rms', 'hidden', 'net'): (3.0, 1.0)}
    """
    return {
        key: (math.sqrt(total / count), 1.0) if key[0] in AFTER and count else (total, count)
        for key, (total, count) in found.items()
    }


def means(found: Mapping[Key, Sum], per: Literal["role", "matrix"]) -> dict[str, float]:
    """Return the mean of each quantity for each role or matrix, as ``quantity/role`` or ``quantity/matrix``.

    Alignment is the mean over all tokens of all matrices, a time scale that of the mean fraction. What nothing was
    counted for is left out.

    Examples:
        >>> means({("update/rms", "hidden", "a"): (1.0, 1.0), ("update/rms", "hidden", "b"): (3.0, 1.0)}, "role")
        {'update/rms/hidden': 2.0}
    """
    pooled: dict[tuple[str, str], list[Sum]] = {}
    for (name, role, label), pair in found.items():
        pooled.setdefault((name, role if per == "role" else label), []).append(pair)
    sums = {key: (sum(p[0] for p in pairs), sum(p[1] for p in pairs)) for key, pairs in pooled.items()}
    return {
        f"{name}/{group}".rstrip("/"): OF_MEANS.get(name, float)(total / count)
        for (name, group), (total, count) in sums.items()
        if count
    }
