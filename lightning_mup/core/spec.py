"""What a parameter is: its role, its dimensions against the base, and why we think so."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mup.core.power import Power


class Role(enum.Enum):
    """What a parameter does, told from which of its dimensions grow with the model.

    ``INPUT`` writes a growing dimension from a fixed one (embeddings, first layers), ``HIDDEN`` maps growing to
    growing, ``OUTPUT`` reads a growing dimension into a fixed one (readouts, routers), ``VECTOR`` is a bias or gain,
    ``SCALAR`` a single number. ``"embedding"`` and ``"readout"`` are accepted as other words for input and output.

    Examples:
        >>> Role("hidden"), Role("embedding") is Role.INPUT
        (<Role.HIDDEN: 'hidden'>, True)
    """

    INPUT = "input"
    HIDDEN = "hidden"
    OUTPUT = "output"
    VECTOR = "vector"
    SCALAR = "scalar"

    @classmethod
    def _missing_(cls, value: object) -> Role | None:
        return {"embedding": cls.INPUT, "readout": cls.OUTPUT}.get(str(value))


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension, at the target and at the base (both counts, >= 1).

    Examples:
        >>> print(Dim(1024, 128), Dim(1024, 128).ratio)
        1024/128 8.0
    """

    size: int
    base: int

    @property
    def ratio(self) -> float:
        """Target size over base size; 1 means that the dimension does not scale."""
        return self.size / self.base

    def __str__(self) -> str:
        """Print as ``size/base``."""
        return f"{self.size}/{self.base}"


ONE = Dim(1, 1)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Everything that a scaling rule may know of one parameter.

    Args:
        name: the parameter's canonical name in the module.
        role: what it does.
        shape: its GLOBAL shape, never a shard's.
        fan_in: what one output sums over (kernel positions counted in).
        fan_out: how many outputs it writes.
        depth: residual blocks of its kind in the model; 1/1 outside of repeated blocks.
        axes: axes of the shape that index outputs, and those that are summed over; the rest are stacked. None is
            ``((0,), (1, ...))``.
        lookup: whether rows are looked up one at a time, as in an embedding.
        split: number of equal row blocks that are matrices of their own (fused query-key-value: 3).
        stack: number of matrices stacked along leading axes (experts); 1 for a plain matrix.
        base_name: its counterpart's name in the base.
        tied_to: the parameter's other names, where several modules share it.
        readout: names of modules that use a tied embedding as the readout.
        branch: whether it ends a residual branch, so that a branch multiplier applies to it.
        block: the kind of repeated block that it lives in, ``""`` outside.
        certain: False where nothing grows and the role is only the usual one for the module type.
        why: the reason for the role, for people.

    Examples:
        >>> ParamSpec("w", Role.HIDDEN, (1024, 1024), Dim(1024, 128), Dim(1024, 128)).ratios["fan_in"]
        8.0
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    fan_in: Dim = ONE
    fan_out: Dim = ONE
    depth: Dim = ONE
    axes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    lookup: bool = False
    split: int = 1
    stack: int = 1
    base_name: str = ""
    tied_to: tuple[str, ...] = ()
    readout: tuple[str, ...] = ()
    branch: bool = False
    block: str = ""
    certain: bool = True
    why: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios that :meth:`Power.evaluate` takes."""
        return {"fan_in": self.fan_in.ratio, "fan_out": self.fan_out.ratio, "depth": self.depth.ratio}

    def evaluate(self, power: Power, *, batch: float = 1.0, blocks: tuple[float, float] = (1.0, 1.0)) -> float:
        """Return the value of a monomial at this parameter's ratios, and at those of batch and (in, out) block counts.

        Examples:
            >>> spec = ParamSpec("w", Role.HIDDEN, (256, 256), Dim(256, 64), Dim(256, 64))
            >>> spec.evaluate(Power(fan_in=-1))
            0.25
        """
        return power.evaluate(batch=batch, blocks_in=blocks[0], blocks_out=blocks[1], **self.ratios)


def as_roles_line(specs: Sequence[ParamSpec]) -> str:
    """Return the line that settles the roles of some parameters, for error messages.

    Examples:
        >>> as_roles_line([ParamSpec("w", Role.HIDDEN, (2, 2))])
        'roles={"w": "hidden"}'
    """
    inner = ", ".join(f'"{spec.name}": "{spec.role.value}"' for spec in specs[:8])
    return f"roles={{{inner}{', ...' if len(specs) > 8 else ''}}}"
