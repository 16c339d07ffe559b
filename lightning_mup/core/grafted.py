"""Grafted: any two torch optimizers, the length of one's step in the direction of the other's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mup.core.decay_step import peak_rate, rate_now, will_update
from lightning_mup.core.graft_parts import Blocks, Place, combine, move, norms_of, put_back
from lightning_mup.core.method import Decay
from lightning_mup.core.own_decay import decay_of
from lightning_mup.core.parts import local
from lightning_mup.core.registry import near
from lightning_mup.core.schedules import LR_AT_BASE, LR_MULT, Group

Per = Literal["matrix", "block", "group"]
Side = Literal["direction", "magnitude"]
_TOLERANCE = 1e-6  # quotients of rates are rounded
PEAK = "graft_lr"
"""Key of a parameter group that holds the rate from which its schedule starts, or to which it rises."""


class Grafted(Optimizer):
    """``W <- W - lr U - decay``, ``U = ||U1||_F / (||U2||_F + eps) U2``: the magnitude's U1, the direction's U2.

    Both optimizers step from the same weights, each with its own state, and with its weight decay off. The groups of
    the whole are those of the leader, with all of its settings: schedulers move their ``lr``, which the other
    optimizer's rates follow in proportion, and their ``weight_decay`` is applied beside the step. The step is as long
    as the magnitude's at its own rate, whoever leads; hence the rule for its rate is the magnitude's. The rate of the
    direction cancels. The follower may lack some of the leader's parameters, which then move as the leader has them.
    Beside both states, one copy of the parameters is held. Sharded parameters (DTensors) are stepped and copied in
    parts; norms are those of wholes, for which each step sends their squares twice, in one all-reduce per mesh axis.

    Args:
        direction: gives the direction.
        magnitude: gives the length.
        leader: whose groups are those of the whole; the weight decay of the other one is set to 0.
        per: what has one length: each ``"matrix"`` (a vector is one), each ``"block"``, or all of a ``"group"``.
        block_size: largest side of a block (>= 1), for ``per="block"``.
        graft_eps: added to the direction's norm, in units of its update at rate 1 (>= 0); no plan scales it.
        decay: what the leader's ``weight_decay`` means, ``"coupled"`` or ``"independent"``; None as it declares.

    Raises:
        ValueError: a setting is out of range, the follower holds what the leader does not, a rate is 0, or a decay is
            an L2 term.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> sgd, adam = torch.optim.SGD([weight], lr=1.0), torch.optim.Adam([weight], lr=0.1)
        >>> optimizer = Grafted(direction=sgd, magnitude=adam)
        >>> weight.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[-0.0849, -0.1131]])

    Reference:
        Agarwal et al. 2020 (arXiv:2002.11803); arXiv:2512.05620, equation 31 and Table 1 (the rate of Q1).
    """

    direction: Optimizer
    magnitude: Optimizer
    _settings: tuple[Side, Per, int | None, float, Decay | None]
    _places: dict[Tensor, Place]  # kept, since to take fresh memory costs more than to write into it

    def __init__(
        self,
        *,
        direction: Optimizer,
        magnitude: Optimizer,
        leader: Side = "magnitude",
        per: Per = "matrix",
        block_size: int | None = None,
        graft_eps: float = 1e-8,
        decay: Decay | None = None,
    ) -> None:
        check_settings(leader, per, block_size, graft_eps, decay)
        self.__setstate__(
            {
                "direction": direction,
                "magnitude": magnitude,
                "defaults": dict((magnitude if leader == "magnitude" else direction).defaults),
                "_settings": (leader, per, block_size, graft_eps, decay),
            }
        )
        self._check()

    # -- groups and state are the two optimizers' ------------------------------------------------------------------

    @property
    def leader(self) -> Optimizer:
        """The optimizer whose groups are those of the whole."""
        return self.magnitude if self._settings[0] == "magnitude" else self.direction

    @property
    def follower(self) -> Optimizer:
        """The other one, whose rates follow."""
        return self.direction if self._settings[0] == "magnitude" else self.magnitude

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The leader's groups."""
        return self.leader.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:  # type: ignore[override]
        """Both optimizers' state by parameter, under ``direction/`` and ``magnitude/``."""
        found: dict[Tensor, dict[str, Any]] = {}
        for side, optimizer in self._sides().items():
            for p, state in optimizer.state.items():
                found.setdefault(p, {}).update({f"{side}/{key}": value for key, value in state.items()})
        return found

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the leader, and its parameters to the other one."""
        group = dict(param_group)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        self.leader.add_param_group(group)
        self.follower.add_param_group({"params": list(self.leader.param_groups[-1]["params"])})
        self._check()

    def state_dict(self) -> dict[str, Any]:
        """Return both optimizers' states and groups, beside the keys that every optimizer has."""
        both: dict[str, Any] = {side: optimizer.state_dict() for side, optimizer in self._sides().items()}
        return {"state": {}, "param_groups": both[self._settings[0]]["param_groups"], **both}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: it is another optimizer's.
        """
        if missing := [side for side in get_args(Side) if side not in state_dict]:
            raise ValueError(
                f"the checkpoint holds {sorted(state_dict)}, but Grafted needs {missing}, too; load it into the "
                f"optimizer that it was saved from"
            )
        for side, optimizer in self._sides().items():
            optimizer.load_state_dict(dict(state_dict[side]))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy takes along."""
        return {key: self.__dict__[key] for key in ("direction", "magnitude", "defaults", "_settings")}

    def _sides(self) -> dict[Side, Optimizer]:
        return {"direction": self.direction, "magnitude": self.magnitude}

    # -- stepping -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay.

        Args:
            closure: evaluates the model again and returns the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._opt_called = True  # what torch's schedulers look at
        if idle := [part for part in (self.direction, self.magnitude) if not will_update(part)]:
            for part in idle:  # which raises or does nothing, as it was told
                part.step()
            return loss
        self._follow()
        self._graft([p for p in _params(self.leader) if p.grad is not None])
        return loss

    def _graft(self, params: list[Tensor]) -> None:
        """Have each optimizer take its step, within the parameters, from where they are; combine the two there."""
        if not params:
            return
        places = self._remembered(params)
        try:
            followed = set(_params(self.direction))
            lengths = norms_of([p for p in move(self.magnitude, params, places) if p in followed], places)
            norms = norms_of([p for p in move(self.direction, params, places) if p in lengths], places)
            rates = {p: float(group["lr"]) for group in self.direction.param_groups for p in group["params"]}
            present = set(params)
            for group in self.param_groups:
                members = [p for p in group["params"] if p in present]
                factors = self._factors([p for p in members if p in norms], (norms, lengths), rates)
                combine(members, places, factors, kept=1.0 - self._fraction(group))
        except BaseException:
            put_back(params, places)
            raise

    def _remembered(self, params: list[Tensor]) -> dict[Tensor, Place]:
        """Return copies of the parameters as they are."""
        held: dict[Tensor, Place] = self.__dict__.setdefault("_places", {})
        for group in self.param_groups:
            for p in group["params"]:
                part = local(p)
                if p not in held or (held[p].before.dtype, held[p].before.device) != (part.dtype, part.device):
                    held[p] = Place(torch.empty_like(part, requires_grad=False), Blocks(p, group, self._settings[2]))
        torch._foreach_copy_([held[p].before for p in params], [local(p) for p in params])
        return held

    def _factors(
        self, both: list[Tensor], norms: tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]], rates: dict[Tensor, float]
    ) -> dict[Tensor, Tensor]:
        """Return what brings the direction's steps to the magnitude's length, per parameter and block."""
        _, per, _, eps, _ = self._settings
        own, length = ([found[p] for p in both] for found in norms)
        if per == "group":
            own, length = _together(own), _together(length)
        return {
            p: torch.where(mine > 0, wanted / (mine + eps * rates[p]), 0.0)
            for p, mine, wanted in zip(both, own, length, strict=True)
        }

    def _fraction(self, group: Group) -> float:
        """Return what a step removes of the weights of one of the leader's groups."""
        if not group.get("weight_decay"):
            return 0.0
        declared = decay_of(self.leader, group) or "coupled"
        # Under a plan, a coupled decay is divided by the rate's multiplier; so it is here where it is not by itself.
        multiplier = group.get(LR_MULT, 1.0) ** ((declared == "coupled") - 1)
        rate = {"coupled": float(group["lr"]) * multiplier}
        rate["independent"] = rate_now(group) / group[PEAK] * group.get(LR_MULT, 1.0) * multiplier
        return float(group["weight_decay"] * rate[self._settings[4] or declared])

    def _follow(self) -> None:
        """Bring the follower's rates to where the leader's are on their schedules."""
        places = {p: rate_now(group) / group[PEAK] for group in self.param_groups for p in group["params"]}
        for group in self.follower.param_groups:
            found = {places[p] for p in group["params"] if p in places}
            # The rate of a direction cancels.
            if self.follower is self.magnitude and len(found) > 1 and max(found) > min(found) * (1 + _TOLERANCE):
                raise ValueError(
                    f"{type(self.follower).__name__} holds in one group what is in several groups of "
                    f"{type(self.leader).__name__}, whose schedules stand at {sorted(found)}; give it these groups, too"
                )
            at_base = group[PEAK] * max(found, default=1.0)
            if LR_AT_BASE in group:
                group[LR_AT_BASE] = at_base
            _set(group, at_base * group.get(LR_MULT, 1.0))

    def _check(self) -> None:
        for optimizer in self._sides().values():
            _check_groups(optimizer)
        led, followed = set(_params(self.leader)), set(_params(self.follower))
        if not followed or not followed <= led:
            raise ValueError(
                f"{type(self.follower).__name__} must hold some of the {len(led)} parameters of the leader, "
                f"{type(self.leader).__name__}, and no others, got {len(followed & led)} of them and "
                f"{len(followed - led)} others; build both over the same ones, or let the other one lead"
            )
        for group in self.follower.param_groups:
            if group.get("weight_decay"):
                group["weight_decay"] = 0.0
        for group in self.leader.param_groups:
            self._check_decay(group)

    def _check_decay(self, group: Group) -> None:
        declared, kind = decay_of(self.leader, group), type(self.leader).__name__
        if not group.get("weight_decay"):
            return
        if declared == "l2" or (declared is None and self._settings[4] is None):
            what = "adds it to the gradient" if declared == "l2" else "does not say what it does with it"
            raise ValueError(
                f"{kind} has weight_decay={group['weight_decay']} and {what}, so that it cannot be taken out of the "
                f"step; use an optimizer that decays beside it (AdamW), weight_decay=0, or, where nothing is declared, "
                f"decay='coupled'"
            )


# Torch's schedulers wrap the step of an instance to know that it was called, unless it says that it is wrapped.
Grafted.step.__dict__["_wrapped_by_lr_sched"] = True


def check_settings(leader: str, per: str, block_size: int | None, graft_eps: float, decay: str | None) -> None:
    """Check the settings of a graft.

    Raises:
        ValueError: one is out of range.

    Examples:
        >>> check_settings("magnitude", "matrx", None, 0.0, None)
        Traceback (most recent call last):
        ValueError: per must be one of ('matrix', 'block', 'group'), got 'matrx'; did you mean 'matrix'?
    """
    closed = {
        "leader": (leader, get_args(Side)),
        "per": (per, get_args(Per)),
        "decay": (decay, (None, "coupled", "independent")),
    }
    for key, (value, allowed) in closed.items():
        if value not in allowed:
            raise ValueError(f"{key} must be one of {allowed}, got {value!r}{near(str(value), map(str, allowed))}")
    if (per == "block") != (block_size is not None) or (block_size is not None and block_size < 1):
        raise ValueError(f"block_size >= 1 goes with per='block', got {block_size} with per={per!r}; give both or none")
    if not graft_eps >= 0:
        raise ValueError(f"graft_eps must be >= 0, got {graft_eps}; 1e-8 is usual")


def _together(norms: Sequence[Tensor]) -> list[Tensor]:
    if not norms:
        return []
    total = torch.stack([norm.square().sum().to(norms[0].device) for norm in norms]).sum().sqrt()
    return [total.to(norm.device).expand_as(norm) for norm in norms]


def _check_groups(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group.setdefault(PEAK, peak_rate(group))
        if not group[PEAK] > 0:
            raise ValueError(
                f"{type(optimizer).__name__} starts at lr={group[PEAK]}, from which no schedule can be followed; give "
                f"the peak rate and let a scheduler lower it"
            )


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _set(group: Group, rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
