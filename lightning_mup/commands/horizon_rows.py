"""What the rules of :mod:`lightning_mup.horizon` say of one run, as rows of a table, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_mup.horizon import (
    horizon,
    linear_batch,
    power_lines_weight_decay,
    power_lr,
    power_plateau,
    sqrt_batch,
    step_law,
    timescale_steps,
)

HEADER = ("of", "rule", "says", "how", "source", "holds for", "here")
LR, BATCH, DECAY = "learning rate", "batch, tokens", "weight decay"
_ADAMW = {"adam", "adamw"}
_PLATEAUS = ("wsd", "power")
_SIZES = "N 60M to 1B, D 2B to 100B (as remembered)"
_STEP_LAW = ((6e7, 1e9), (2e9, 1e11))  # these bounds of N and D
_POWER_LINES = (1.11e8, 3.3e9)  # bounds of N


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules need to know of a run.

    Args:
        params: number of parameters.
        non_embedding_params: without embeddings and readout.
        batch: sequences of one optimizer step.
        tokens_per_step: tokens of one optimizer step.
        steps: optimizer steps.
    """

    params: int
    non_embedding_params: int
    batch: int
    tokens_per_step: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    def __str__(self) -> str:
        """Print them in one line."""
        size = f"{self.params:,} parameters ({self.non_embedding_params:,} without embeddings)"
        return f"{size}, {self.tokens:,} tokens, {self.steps:,} steps of {self.batch:,} sequences"


@dataclass(frozen=True, slots=True)
class Case:
    """A run, the run at which its numbers were tuned, and these numbers.

    Args:
        run: what is to be trained.
        base: what was tuned.
        method: name of the optimizer.
        rules: names of the parametrization's rules.
        schedule: name of the learning rate's schedule.
        normalized: whether the update's size does not depend on the gradient's.
        lr: peak learning rate at the base.
        weight_decay: fraction of hidden matrices that one step of the run removes, by the configuration's policy.
        base_weight_decay: that one step of the base removes.
    """

    run: Facts
    base: Facts
    method: str
    rules: tuple[str, ...]
    schedule: str
    normalized: bool
    lr: float
    weight_decay: float
    base_weight_decay: float


@dataclass(frozen=True, slots=True)
class Row:
    """What one rule says.

    Args:
        quantity: of what.
        rule: by which rule.
        value: the number; nan where the rule has nothing to go on.
        how: how it comes about.
        source: paper.
        holds: for what it was found.
        outside: why this run is not that; "" where it may be.
    """

    quantity: str
    rule: str
    value: float
    how: str
    source: str
    holds: str
    outside: str

    def cells(self) -> list[str]:
        """Return one line of the table."""
        says = "-" if math.isnan(self.value) else f"{self.value:.4g}"
        here = f"outside its range: {self.outside}" if self.outside else ""
        return [self.quantity, self.rule, says, self.how, self.source, self.holds, here]


def rows(case: Case) -> list[Row]:
    """Return what every rule says of a case, the configuration's own numbers first."""
    return [rule.row(case) for rule in _RULES]


def spread(found: Sequence[Row]) -> list[str]:
    """Return one sentence per quantity: how far the rules are apart.

    Examples:
        >>> made = [Row("lr", name, x, "", "", "", "") for name, x in (("a", 0.01), ("b", 0.02))]
        >>> spread(made)
        ['lr: from 0.01 (a) to 0.02 (b), a factor of 2']
    """
    return [line for quantity in dict.fromkeys(row.quantity for row in found) for line in _apart(quantity, found)]


def _apart(quantity: str, found: Sequence[Row]) -> list[str]:
    known = [row for row in found if row.quantity == quantity and row.value > 0]
    inside = [row for row in known if not row.outside]
    if not known:
        return [f"{quantity}: no rule has anything to go on"]
    text = f"{quantity}: {_range(known)}"
    if len(inside) == len(known):
        return [text]
    return [f"{text}; of those not known to be outside their range {_range(inside) if inside else 'there is none'}"]


def _range(known: Sequence[Row]) -> str:
    least, most = min(known, key=lambda row: row.value), max(known, key=lambda row: row.value)
    if least.value == most.value:
        return f"{most.value:.4g} by {', '.join(row.rule for row in known)}"
    factor = most.value / least.value
    return f"from {least.value:.4g} ({least.rule}) to {most.value:.4g} ({most.rule}), a factor of {factor:.3g}"


# -- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    quantity: str
    name: str
    source: str
    holds: str
    value: Callable[[Case], float]
    how: Callable[[Case], str]
    outside: Callable[[Case], Sequence[str]] = lambda case: ()

    def row(self, case: Case) -> Row:
        why = "; ".join(filter(None, self.outside(case)))
        return Row(self.quantity, self.name, self.value(case), self.how(case), self.source, self.holds, why)


def _factor(
    name: str,
    rule: Callable[[Case], float],
    source: str,
    holds: str,
    outside: Callable[[Case], Sequence[str]],
) -> _Rule:
    def how(case: Case) -> str:
        return f"config x {rule(case):.4g}"

    return _Rule(LR, name, source, holds, lambda case: case.lr * rule(case), how, outside)


def _of_adamw(case: Case) -> str:
    return "" if case.method in _ADAMW else f"optimizer is {case.method}"


def _within(name: str, value: float, bounds: tuple[float, float]) -> str:
    low, high = bounds
    return "" if low <= value <= high else f"{name} is {value:.3g}"


def _same_batch(case: Case) -> str:
    same = case.run.tokens_per_step == case.base.tokens_per_step
    return "" if same else "batch is not the base's"


def _step_law_range(case: Case, facts: Facts) -> list[str]:
    sizes, lengths = _STEP_LAW
    n, d = facts.non_embedding_params, case.run.tokens
    return [_of_adamw(case), _within("N", n, sizes), _within("D", d, lengths)]


def _kept_timescale(case: Case) -> float:
    """Return the decay that averages over the same share of the run as the base's does of the base's."""
    if not case.base_weight_decay:
        return math.nan
    return 1 / (timescale_steps(case.base_weight_decay) * case.run.steps / case.base.steps)


def _share(weight_decay: float, steps: int) -> str:
    if not weight_decay:
        return "no weight decay"
    return f"averages over {1 / weight_decay / steps:.3g} of the run"


_RULES = (
    _Rule(LR, "config", "method.lr", "the base", lambda case: case.lr, lambda case: f"{case.method}, at the base"),
    _Rule(
        LR,
        "step law, N of the base",
        "arXiv:2503.04715",
        f"AdamW; {_SIZES}",
        lambda case: step_law(case.base.non_embedding_params, case.run.tokens).lr,
        lambda case: f"N={case.base.non_embedding_params:.3g}, D={case.run.tokens:.3g}",
        lambda case: _step_law_range(case, case.base),
    ),
    _Rule(
        LR,
        "step law, N of the run",
        "arXiv:2503.04715",
        f"AdamW in SP; {_SIZES}",
        lambda case: step_law(case.run.non_embedding_params, case.run.tokens).lr,
        lambda case: f"N={case.run.non_embedding_params:.3g}, D={case.run.tokens:.3g}",
        lambda case: [
            *_step_law_range(case, case.run),
            "" if case.rules == ("sp",) else f"{' x '.join(case.rules)} scales with size by itself",
        ],
    ),
    _Rule(
        LR,
        "power scheduler",
        "arXiv:2408.13359",
        "AdamW under muP, wsd or power schedule; constants from memory",
        lambda case: power_lr(case.run.batch, case.run.tokens),
        lambda case: f"config's rate would fall after {power_plateau(case.lr, case.run.batch):.3g} tokens",
        lambda case: [
            _of_adamw(case),
            "" if "mup" in case.rules else f"rules are {' x '.join(case.rules)}",
            "" if case.schedule in _PLATEAUS else f"schedule is {case.schedule}",
        ],
    ),
    _factor(
        "square-root batch",
        lambda case: sqrt_batch(case.run.tokens_per_step, case.base.tokens_per_step),
        "arXiv:2205.10287",
        "Adam, normalized updates; below the critical batch",
        lambda case: ["" if case.normalized else f"update of {case.method} is not normalized"],
    ),
    _factor(
        "linear batch",
        lambda case: linear_batch(case.run.tokens_per_step, case.base.tokens_per_step),
        "arXiv:1706.02677",
        "SGD; below the critical batch",
        lambda case: [f"update of {case.method} is normalized" if case.normalized else ""],
    ),
    _factor(
        "1/sqrt(tokens)",
        lambda case: horizon(case.run.tokens, case.base.tokens, exponent=0.5),
        "arXiv:2410.05838",
        "muP at a fixed batch",
        lambda case: [_same_batch(case)],
    ),
    _factor(
        "tokens^-0.32",
        lambda case: horizon(case.run.tokens, case.base.tokens, exponent=0.32),
        "arXiv:2603.28743, 2409.19913",
        "normalized Muon, AdamW",
        lambda case: [_of_adamw(case)],
    ),
    _Rule(
        BATCH,
        "config",
        "data.batch_size",
        "",
        lambda case: case.run.tokens_per_step,
        lambda case: f"{case.run.batch} sequences",
    ),
    _Rule(
        BATCH,
        "step law",
        "arXiv:2503.04715",
        f"AdamW; {_SIZES}",
        lambda case: step_law(case.run.non_embedding_params, case.run.tokens).batch_tokens,
        lambda case: f"D={case.run.tokens:.3g}",
        lambda case: _step_law_range(case, case.run),
    ),
    _Rule(
        DECAY,
        "config",
        "weight_decay",
        "",
        lambda case: case.weight_decay,
        lambda case: f"of hidden matrices; {_share(case.weight_decay, case.run.steps)}",
    ),
    _Rule(
        DECAY,
        "EMA time scale",
        "arXiv:2405.13698",
        "AdamW; lambda well below 1",
        _kept_timescale,
        lambda case: f"base {_share(case.base_weight_decay, case.base.steps)}",
        lambda case: [_of_adamw(case)],
    ),
    _Rule(
        DECAY,
        "Power Lines",
        "arXiv:2505.13738",
        "AdamW under muP, N 111M to 3.3B; constant from memory",
        lambda case: power_lines_weight_decay(case.run.tokens / case.run.params, case.run.steps),
        lambda case: f"{case.run.tokens / case.run.params:.3g} tokens per parameter",
        lambda case: [_of_adamw(case), _within("N", case.run.params, _POWER_LINES)],
    ),
)
