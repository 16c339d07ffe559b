"""What cannot be known is asked for, and what looks wrong is told: checks of a model that has been read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_mup.core.base import Base, head_dims
from lightning_mup.core.blocks import Blocks
from lightning_mup.core.branches import branch_ends
from lightning_mup.core.products import hand_products
from lightning_mup.core.rules import Rules
from lightning_mup.core.spec import ParamSpec, Role

_LITTLE = 0.25  # ratio of logarithms: a side that grows by 1.1 where the other grows by 2 is suspicious


def check_depth(model: nn.Module, specs: Sequence[ParamSpec], rules: Rules) -> None:
    """Refuse a depth rule where nobody knows where branches end; warn where depth grows under none."""
    deeper = [s for s in specs if s.depth.ratio != 1]
    if not deeper:
        return
    if not rules.uses_depth:
        warnings.warn(
            f"the model has {deeper[0].depth.size} blocks and the base {deeper[0].depth.base}, but rules "
            f"{rules.name!r} say nothing about depth; use rules=['mup', 'complete_p'], or branches=[] if the blocks "
            f"are not residual",
            stacklevel=2,
        )
        return
    shared = [s for s in deeper if any(_block_of(name, s) != s.block for name in s.tied_to)]
    if shared:
        raise ValueError(
            f"{shared[0].name!r} is shared by several blocks ({shared[0].tied_to[0]!r}), for which rules "
            f"{rules.name!r} say nothing; use rules='mup' with branches=[], or blocks with weights of their own"
        )
    blind = sorted({s.block for s in deeper} - {s.block for s in deeper if s.branch})
    if blind:
        reason = branch_ends(model, blind[:1])[1].get(blind[0], "no branch is named in it")
        inside = [s.name for s in deeper if s.block == blind[0] and s.name.endswith("weight")]
        raise ValueError(
            f"cannot tell where the residual branches of {blind[0]!r} end: {reason}; name the last weight of each (the "
            f"gain of a norm that stands between it and the sum), with * for the block's number, in branches=[...], "
            f"out of {inside}, or give branches=[] if the blocks are not residual"
        )


def check_products(model: nn.Module, specs: Sequence[ParamSpec], rules: Rules) -> None:
    """What a module multiplies by hand may be a readout: a tied embedding, or a vector that sums over the width."""
    by_hand = hand_products(model)
    for spec in specs:
        if spec.why == "roles" or not by_hand & {spec.name, *spec.tied_to} or spec.fan_out.ratio == 1:
            continue
        row = rules.rows[Role.OUTPUT]
        if spec.role is Role.INPUT and not spec.readout and spec.evaluate(rules.tied_readout) != 1:
            raise ValueError(
                f"the embedding {spec.name!r} is used as a matrix as well, by hand, so that its readout cannot be "
                f"multiplied by {spec.evaluate(rules.tied_readout):.4g}; tie it through an nn.Linear "
                f"(self.readout.weight = self.embedding.weight), or, where your code multiplies, say so: "
                f'roles={{"{spec.name}": "input"}}'
            )
        if spec.role is Role.VECTOR and row.update_norm is not None:
            raise ValueError(
                f"{spec.name!r} {spec.shape} looks like a gain or bias, but is used in a matrix product; say what it "
                f'is: roles={{"{spec.name}": "output"}} where the product sums over it, else "vector"'
            )


def check_gains(specs: Sequence[ParamSpec], folded: Mapping[str, float], base: Base) -> None:
    """A gain that starts at 0 outside of torch's own norms stands for 1 + w, which no factor on w scales."""
    for spec in specs:
        at_zero = spec.base_name in base.measured and base.measured[spec.base_name].rms == 0
        gain = spec.role is Role.VECTOR and spec.name.endswith("weight") and not hasattr(nn, spec.why)
        if gain and at_zero and spec.branch and folded.get(spec.name, 1.0) != 1:
            raise ValueError(
                f"{spec.name!r} of a {spec.why} ends a residual branch and starts at 0, so it may stand for 1 + w, "
                f"which cannot take a folded multiplier; use multipliers='hook'"
            )


def warn_about_growth(specs: Sequence[ParamSpec]) -> None:
    """A side that grows far less than the other may be no width at all: padded vocabularies, more classes."""
    for spec in specs:
        logs = sorted((abs(math.log(spec.fan_out.ratio)), abs(math.log(spec.fan_in.ratio))))
        if spec.role is Role.HIDDEN and spec.why != "roles" and 0 < logs[0] < _LITTLE * logs[1]:
            warnings.warn(
                f"{spec.name!r} is read as hidden, since both sides differ from the base, but one hardly does "
                f"(fan_out {spec.fan_out}, fan_in {spec.fan_in}); if that side is no width (classes, a padded "
                f'vocabulary), give both models the same number there; else say roles={{"{spec.name}": "hidden"}}',
                stacklevel=3,
            )


def warn_about_heads(model: nn.Module, base: Base) -> None:
    """Warn where attention heads grow: mup wants logits over d_head, modules divide by its square root."""
    blocks = Blocks(model, base.shapes)
    grown = [(n, d, b) for n, d in head_dims(model).items() if (b := base.head_dims.get(blocks.base_name(n), d)) != d]
    if grown:
        name, dim, base_dim = grown[0]
        warnings.warn(
            f"{len(grown)} attention modules have larger heads than the base ({name!r}: head_dim {dim} against "
            f"{base_dim}); logits scaled by 1/sqrt(head_dim) then grow as its square root. Keep head_dim and let the "
            f"number of heads grow, or, where that number stays, give the query matrices "
            f"forward={{'*.q_proj.weight': Power(fan_out=-1/2)}}",
            stacklevel=2,
        )


def _block_of(name: str, spec: ParamSpec) -> str:
    """Return what stands in another name at the place of the block: ``layers.3`` in ``layers.3.fc.weight``."""
    return ".".join(name.split(".")[: len(spec.block.split("."))])
