"""What recorded settings, epsilons and peculiarities are here: tables, and the questions to ``multipliers``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_mup import all_methods, multipliers

Record = dict[str, Any]

ONE = (1, 1)
LIMIT = "max_preconditioned_dim"
SIDES = {"fan_in": "normalized_blocks_in", "fan_out": "normalized_blocks_out"}  # and their recorded block counts

# -- settings: recorded name -> ours -------------------------------------------------------------------------------

_NEWTON_SCHULZ = {"eps": ("eps",), "nesterov": ("nesterov",), "newton_schulz_steps": ("ns_steps",)}
_FACTORED = {
    "beta1": ("beta1",),
    "beta2": ("beta2",),
    "matrix_eps": ("matrix_eps",),
    "precondition_frequency": ("precondition_every",),
    "block_size": ("block_size",),
    "max_precond_dim": (LIMIT,),
}
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "sgd": {"beta1": ("momentum",)},
    "adam": {"beta1": ("beta1",), "beta2": ("beta2",), "eps": ("eps",)},
    "muon": {"beta": ("momentum",), "beta1": ("momentum",), **_NEWTON_SCHULZ},
    "adamuon": {
        "beta1": ("momentum",),
        "beta2": ("beta2",),
        "adam_eps": ("entry_eps",),
        "rms_align": ("rms_align",),
        **_NEWTON_SCHULZ,
    },
    "shampoo": {
        **_FACTORED,
        "adam_eps": ("eps", "graft_eps"),
        "exponent": ("exponent",),
        "eigh": ("root",),
        "rel_eps": ("relative_matrix_eps",),
        "grafting": ("graft",),
    },
    "soap": {
        **_FACTORED,
        "adam_eps": ("eps",),
        "eigh": ("warmup",),
        "eigh_warmup_steps": ("warmup_steps",),
        "rel_eps": ("relative_eps",),
    },
}
VALUES: dict[str, dict[object, object]] = {
    "block_size": {0: None},
    "graft": {True: "adam", False: None},
    "root": {True: "eigh", False: "newton"},
    "warmup": {True: "eigh", False: "qr"},
}

# -- peculiarities of the recorded code ----------------------------------------------------------------------------


def _always(_: Record) -> bool:
    return True


def _one_sided(asked: Record) -> bool:
    return bool(beyond_the_limit(asked))


@dataclass(frozen=True)
class Peculiarity:
    """What a tag changes; where nothing is given, ours agrees with the recorded code anyway.

    Args:
        why: the difference.
        method: the optimizer that is concerned.
        concerns: whether a matrix is, from the arguments that ``multipliers`` is asked with.
        asked: per epsilon, other arguments to ask with.
        times: per epsilon, a further factor.
        copied: per setting, the setting whose value it starts from.
    """

    why: str
    method: str = ""
    concerns: Callable[[Record], bool] = _always
    asked: Mapping[str, Record] = field(default_factory=dict)
    times: Mapping[str, Callable[[Record], float]] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)


PECULIARITIES = {
    "soap_ignores_batch_ratio": Peculiarity(
        why="ours scales SOAP's epsilons with the batch size as Adam's and Shampoo's; so it is told of none",
        method="soap",
        asked={"eps": {"batch": ONE}, "matrix_eps": {"batch": ONE}},
    ),
    "soap_one_sided_eps_without_depth": Peculiarity(
        why="ours has the paper's 1/L whether one or both sides are preconditioned; so it is told of no depth",
        method="soap",
        concerns=_one_sided,
        asked={"eps": {"depth": ONE}},
    ),
    "graft_eps_batch_power_counts_both_sides": Peculiarity(
        why="ours counts the exponents of preconditioned sides alone; so the other side's power is multiplied on",
        method="shampoo",
        concerns=_one_sided,
        times={"graft_eps": lambda q: (q["batch"][0] / q["batch"][1]) ** q["exponent"]},
    ),
    "eps_depth_scaled_although_learning_rate_is_not": Peculiarity(
        why="epsilons are always asked with the depth ratio here, and the learning rate where the case scales it"
    ),
    "relative_eps_start_value_is_absolute": Peculiarity(
        why="ours starts at 0 under a relative ridge; so the start is given, and scaled as an absolute ridge is",
        method="shampoo",
        asked={"initial_factor": {"relative_matrix_eps": False, "batch": ONE}},
        copied={"initial_factor": "matrix_eps"},
    ),
    "soap_second_moment_not_reordered_by_eigendecomposition": Peculiarity(why="ours does not reorder it either"),
}


class UnknownError(ValueError):
    """The folder says something that this module does not know."""


def known(table: Mapping[str, Any], key: str, what: str) -> Any:  # noqa: ANN401
    """Return an entry of a table, or name what is missing."""
    if key not in table:
        raise UnknownError(f"unknown {what} {key!r}; known: {', '.join(sorted(table))}")
    return table[key]


# -- one matrix: settings and epsilons -----------------------------------------------------------------------------


def translate(name: str, recorded: Record) -> Record:
    """Return our settings for recorded ones."""
    found: Record = {}
    names = known(SETTINGS, name, "optimizer")
    for key, value in recorded.items():
        for ours in known(names, key, f"setting of {name}"):
            found[ours] = VALUES.get(ours, {}).get(value, value)
    if "beta1" in found:
        found["betas"] = (found.pop("beta1"), found.pop("beta2"))
    return found


def ratio(value: float) -> tuple[int, int]:
    """Return a ratio as (size, base)."""
    return float(value).as_integer_ratio()


def hyperparameters(case: Record, p: Record) -> Record:
    """Return the recorded settings of a matrix: its own, or the case's."""
    found: Record = p.get("hyperparameters", case.get("hyperparameters", {}))
    return found


def question(case: Record, p: Record) -> Record:
    """Return the arguments of ``multipliers`` for a matrix of a case."""
    name = p.get("optimizer", case["optimizer"])
    fan_in, fan_out = zip(p["shape"], p["base_shape"], strict=True)
    return {
        "method": name,
        "fan_in": fan_in,
        "fan_out": fan_out,
        "depth": ratio(p["depth_ratio"]),
        "batch": ratio(case["batch_ratio"]),
        "role": p.get("role", "hidden"),
        "rules": "mup" if case.get("width_scaling", True) else "sp",
        **translate(name, {key: value for key, value in hyperparameters(case, p).items() if key != "scale_eps"}),
        **({"spectral_norm": True} if "normalization" in case else {}),
    }


def beyond_the_limit(asked: Record) -> list[str]:
    """Return the sides that are too long for a preconditioner."""
    limit = asked.get(LIMIT)
    return [side for side in SIDES if limit is not None and asked[side][0] > limit]


def sides_as_at_size(asked: Record) -> Record:
    """Return arguments by which a side beyond the limit is so at the base, too.

    ``multipliers`` refuses other sides at the base, since no learning rate carries over then; the recorded epsilons ask
    for the size's sides alone. Of a side that is not preconditioned only the ratio counts.
    """
    sides = beyond_the_limit(asked)
    return asked | {side: tuple(size * (asked[LIMIT] + 1) for size in asked[side]) for side in sides}


def uncut_blocks(key: str, asked: Record, p: Record) -> float:
    """Return a factor for blocks that a side beyond the limit has at the base alone, as recorded counts have it."""
    powers = {"matrix_eps": -1, "initial_factor": -1, "graft_eps": asked.get("exponent")}
    blocks = math.prod(p[SIDES[side]] for side in beyond_the_limit(asked))
    return float(blocks ** powers.get(key, 0))


def settings_of(case: Record, p: Record) -> Record:
    """Return a matrix' settings, with its epsilons scaled where the case scales them."""
    asked = sides_as_at_size(question(case, p))
    tags = [known(PECULIARITIES, tag, "peculiarity") for tag in case["peculiarities"]]
    tags = [tag for tag in tags if tag.method in ("", asked["method"]) and tag.concerns(asked)]
    for tag in tags:
        asked |= {ours: asked[other] for ours, other in tag.copied.items()}
    settings = {key: asked[key] for key in asked.keys() & all_methods()[asked["method"]].defaults.keys()}
    if not hyperparameters(case, p).get("scale_eps"):
        return settings
    plain = multipliers(**asked)
    for key in plain.keys() & settings.keys():
        changed = {name: value for tag in tags for name, value in tag.asked.get(key, {}).items()}
        factor = multipliers(**{**asked, **changed})[key] if changed else plain[key]
        further = math.prod(tag.times[key](asked) for tag in tags if key in tag.times)
        settings[key] *= factor * further * uncut_blocks(key, asked, p)
    return settings


def learning_rate(case: Record, p: Record) -> float:
    """Return the learning rate of a matrix of a trajectory, by ``multipliers``."""
    asked = question(case, p)
    if not case["depth_scaling_of_learning_rate"]:
        asked["depth"] = ONE
    role_factor = case.get(f"{p['role']}_learning_rate_factor", 1.0)
    return float(case["base_learning_rate"] * role_factor * multipliers(**asked)["lr"])
