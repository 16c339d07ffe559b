"""StackedOptimizer: matrices of one shape are stacked, and each transform runs once per stack.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_mup.core.chains import build_chain, full_precision
from lightning_mup.core.finite import look
from lightning_mup.core.method import Method, find_method
from lightning_mup.core.ownership import Load, Ownership, Portion, Turn, defers_state
from lightning_mup.core.settings import COMMON, Group, check_names, check_values, decay_per_lr, routes_of, settings_of
from lightning_mup.core.sharding import ShardedOwnership
from lightning_mup.core.spec import Role
from lightning_mup.core.stack import STEP, Arrangement, Stack, is_vector, portions
from lightning_mup.core.transform import SMALL, Context, Direct, Members, Rate, Transform, is_elementwise, move


class StackedOptimizer(Optimizer):
    """Base of this package's optimizers, each a declared :class:`Method` whose chain of transforms it runs.

    One step of a matrix W with gradient G: ``U = chain(G)``, then ``W <- W - lr U - decay``, where ``decay`` is

    - ``"independent"``: ``s weight_decay W``, with the schedule ``s = lr / (the group's lr when it was added)``, or
      over the ``max_lr`` of OneCycleLR;
    - ``"coupled"``: ``lr weight_decay W``, as in torch's AdamW;
    - ``"l2"``: none here, but ``weight_decay W`` is added to G, as in torch's Adam.

    Parameters of one shape, dtype and device in one group are one stack. State is created at once, lives in float32 at
    least, and is found in ``state[parameter]`` under names by meaning (``momentum/ema``), so that checkpoints know
    nothing of stacks. A group may further say:

    - ``method`` and that method's settings: one optimizer holds several (``{"params": ..., "method": "adam"}``);
    - ``role``: of its parameters, for methods that leave some roles to another; parameters of one axis are vectors;
    - ``axes``, ``split``, ``lookup``: how parameters are matrices, if not ``(out, in, ...)``; for ``nn.Embedding``,
      ``{"axes": ((1,), (0,)), "lookup": True}``. :class:`lightning_mup.Parametrize` says all of this by itself.

    Settings of all methods:

    - ``graft``: name of the method whose length each matrix' update gets. Settings of one name are shared, but for an
      epsilon that both have; further ones stand under its name (``adam={"eps": 1e-8}``);
    - ``graft_eps``: added to the norm that is divided by in grafting (>= 0);
    - ``spectral_norm``: whether updates are brought to spectral norm ``(fan_out/fan_in)^(1/2)`` (embeddings to RMS 1);
    - ``weight_decay``: see ``decay`` above (>= 0);
    - ``nonfinite``: what to do about a gradient that is not finite: ``"raise"``, ``"skip"`` the step, or ``"ignore"``,
      which does not look. To look is to wait for the device once per step.

    Args:
        params: parameters, ``named_parameters()``, or groups of either.
        method: the method of groups that name none, by name or, where no entry point offers it, itself.
        settings: the method's settings, ``lr`` among them.

    Raises:
        ValueError: a setting is unknown or out of range, or a gradient is not finite (``nonfinite="raise"``).
        TypeError: a parameter is not of a floating-point dtype, or a gradient is sparse.

    Examples:
        >>> from lightning_mup import Muon
        >>> layer = torch.nn.Linear(4, 4)
        >>> optimizer = Muon(layer.named_parameters(), lr=0.1)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[layer.weight]), sorted(optimizer.state[layer.bias])
        (['momentum/ema', 'step'], ['adam/m', 'adam/v', 'step'])

    Reference:
        arXiv:2512.05620, App. F: optimizer, normalization, learning rate, weight decay, schedule, in this order.
    """

    def __init__(self, params: ParamsT, method: str | Method, settings: Mapping[str, Any]) -> None:
        self._method = find_method(method)
        self._stacks: dict[int, tuple[list[int], list[Stack]]] = {}
        self._ownership: Ownership | None = None
        self._turns: list[Turn[Stack]] | None = None
        super().__init__(params, dict(settings))

    @property
    def method(self) -> str:
        """Name of the method of groups that name none."""
        return self._method.name

    def find(self, name: str) -> Method:
        """Return a method by name; the optimizer's own goes before the registered one of that name."""
        return self._method if name == self._method.name else find_method(name)

    # -- groups and stacks ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, fill in its method's defaults, and create its state."""
        own = self.find(param_group.get("method", self.method))
        group = dict(param_group)
        if own is not self._method:
            defaults = {**own.defaults, **{key: self.defaults[key] for key in COMMON if key in self.defaults}}
            group = {**defaults, **group}
        check_names(group, {**self.defaults, **own.defaults}, own)
        group.setdefault("method", own.name)
        known = len(self.param_groups)
        try:
            super().add_param_group(group)
            for added in self.param_groups[known:]:  # several where a plan splits it
                self._complete(added)
        except Exception:
            self._drop(self.param_groups[known:])
            del self.param_groups[known:]
            raise

    def _complete(self, group: Group) -> None:
        method = self.find(group["method"])
        group.setdefault("lr_scheduled_from", float(group["lr"]))
        for key in self.defaults.keys() - set(COMMON) - method.defaults.keys():
            group.pop(key, None)
        check_values(group)
        build_chain(method, group)
        for name in routes_of(method, group).values():
            build_chain(self.find(name), settings_of(group, name))
        if defers_state() and self._ownership is None:
            return
        if self._ownership is None and any(isinstance(p, DTensor) for p in group["params"]):
            self._ownership = ShardedOwnership()
        if self._ownership is not None:
            self._ownership.assign(self._loads(group))
        for stack in self._stacks_of(group):
            stack.adopt(self.state)

    def _drop(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._stacks.pop(id(group), None)
            for p in group["params"]:
                self.state.pop(p, None)

    def _stacks_of(self, group: Group) -> list[Stack]:
        """Return the stacks of a group; they are made anew where its parameters are others, or moved elsewhere."""
        held = [id(self._held(p)) for p in group["params"]]
        known, stacks = self._stacks.get(id(group), ([], []))
        if known != held or any(stack.moved for stack in stacks):
            stacks = self._stack(group)
            self._stacks[id(group)], self._turns = (held, stacks), None
        return stacks

    def _held(self, param: Tensor) -> Tensor:
        return param if self._ownership is None else self._ownership.held(param)

    def _stack(self, group: Group, *, whole: bool = False) -> list[Stack]:
        """Return the stacks of what this rank steps; or the whole of everything, for looking at, without memory."""
        own = (None, self._ownership.rank if self._ownership else None)
        return [
            Stack(
                [p if whole else self._held(p) for p in portion.params],
                [self._arranged(p, group, whole=whole) for p in portion.params],
                portion.method,
                self._chain(group, portion.method, portion.params[0]),
                device="meta" if whole else None,
                keys=portion.params,
            )
            for portion in self._cut(group, whole=whole)
            if whole or portion.owner in own
        ]

    def _arranged(self, param: Tensor, group: Group, *, whole: bool) -> Arrangement:
        held = param if whole else self._held(param)
        return Arrangement.of(held, group) if held.shape == param.shape else Arrangement.flat(held.shape)

    def _cut(self, group: Group, *, whole: bool = False) -> list[Portion]:
        """Return what is one stack each, of all ranks."""
        parts: dict[tuple[str, int | None], dict[tuple[object, ...], list[Tensor]]] = {}
        for p in group["params"]:
            if not p.numel():
                continue
            arrangement = self._arranged(p, group, whole=whole)
            owner = self._ownership.owner(p) if self._ownership else None
            alike = parts.setdefault((self._routed(group, p).name, owner), {})
            alike.setdefault((arrangement.rows, arrangement.columns, p.dtype, p.device), []).append(p)
        most = self._ownership.portion_bytes if self._ownership else None
        return [
            Portion(method, owner, params)
            for (method, owner), kinds in parts.items()
            for alike in kinds.values()
            for params in portions(alike, most)
        ]

    def _chain(self, group: Group, name: str, param: Tensor) -> Transform:
        return build_chain(self.find(name), settings_of(group, name), vector=is_vector(param))

    def _routed(self, group: Group, param: Tensor) -> Method:
        method, said = self.find(group["method"]), group.get("role")
        routes = routes_of(method, group)
        role = None if said in (None, "frozen", "empty") else Role(said)
        if is_vector(param) and role not in (Role.VECTOR, Role.SCALAR):
            role = Role.VECTOR if param.dim() else Role.SCALAR
        return self.find(routes[role]) if role in routes else method

    # -- stepping -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay, and so does their state.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            NonFiniteGradientError: a gradient is not finite and the group says ``nonfinite="raise"``; nothing changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise TypeError(
                f"{type(self).__name__} needs dense gradients, got a sparse one; use Embedding(sparse=False)"
            )
        step, huge = look(self.param_groups, SMALL, self._ownership)
        if step and self._ownership is None:
            for group in self.param_groups:
                self._step_stacks(group, self._stacks_of(group), _rate(group), huge)
        elif step:
            self._step_divided(huge)
        return loss

    def _step_stacks(self, group: Group, stacks: Sequence[Stack], rate: Rate, huge: bool) -> None:
        step = move if self._ownership is None else self._ownership.move
        direct: dict[tuple[Direct, Context, torch.device, torch.dtype], Members] = {}
        for stack in stacks:
            stack.adopt(self.state)
            transform = self._chain(group, stack.method, stack.params[0])
            for members, number in stack.parts():
                ctx = Context(number, huge)
                if found := stack.to_move(transform, members, ctx):
                    direct.setdefault((found[0], ctx, stack.device, stack.dtype), []).extend(found[1])
                    continue
                with full_precision(stack.device):
                    u_NOI = stack.run(transform, members, ctx, rate.l2)
                step([stack.params[i] for i in members], stack.split(u_NOI, members), rate)
        for (mover, ctx, *_), moved in direct.items():
            mover.move(moved, ctx, rate)

    # -- division over ranks ----------------------------------------------------------------------------------------

    def divide(self, ownership: Ownership) -> None:
        """Keep the state of what this rank owns alone, step that alone, and exchange weights after every step.

        All ranks call it, with equal parameters; from then on ``step``, ``add_param_group`` and ``whole_state_dict``
        are to be called on all of them together, with gradients that are equal on all ranks. ``state_dict`` is that of
        this rank; ``load_state_dict`` takes either.

        Raises:
            ValueError: it is divided already.
        """
        if self._ownership is not None:
            raise ValueError(f"the optimizer is divided over {self._ownership.ranks} ranks already; divide it once")
        ownership.assign([load for group in self.param_groups for load in self._loads(group)])
        self._ownership, self._stacks = ownership, {}
        for group in self.param_groups:
            for p in group["params"]:
                if not ownership.holds(p):
                    self.state.pop(p, None)
            for stack in self._stacks_of(group):
                stack.adopt(self.state)

    def loads(self) -> list[Load]:
        """Return what each parameter costs: its method's work on its shape, and its state."""
        return [load for group in self.param_groups for load in self._loads(group)]

    def _loads(self, group: Group) -> list[Load]:
        return [
            Load(
                p,
                stack.work_of(i, chain) if p.requires_grad else 0.0,
                sum(value.nbytes for key, value in stack.view(i).items() if key != STEP),
                is_elementwise(chain),
            )
            for stack in self._stack(group, whole=True)
            for i, p in enumerate(stack.params)
            for chain in [self._chain(group, stack.method, p)]
        ]

    def _step_divided(self, huge: bool) -> None:
        assert self._ownership is not None
        stacks = [self._stacks_of(group) for group in self.param_groups]
        if self._turns is None:
            cut = [(i, portion) for i, group in enumerate(self.param_groups) for portion in self._cut(group)]
            self._turns = self._ownership.turns(cut, [stack for own in stacks for stack in own])
        rates = [_rate(group) for group in self.param_groups]
        for turn in self._ownership.brought(self._turns, rates):
            for i, own in turn.work.items():
                self._step_stacks(self.param_groups[i], own, rates[i], huge)
            self._ownership.send(turn)
        self._ownership.receive()

    def whole_state_dict(self) -> dict[str, Any]:
        """Return ``state_dict`` with the state of all ranks on the first, ``{}`` elsewhere; all ranks call it."""
        found = super().state_dict()
        if self._ownership is None:
            return found
        keys = self._keys(found)
        for group in self.param_groups:
            for stack in self._stack(group, whole=True):
                for i, p in enumerate(stack.params):
                    if (state := self._ownership.collect(p, stack.view(i), self.state.get(p))) is not None:
                        found["state"][keys[p]] = state
        return found if self._ownership.rank == 0 else {}

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's dictionary; of divided optimizers with this rank's state, parts of which are DTensors."""
        found = super().state_dict()
        if self._ownership is not None:
            for p, key in self._keys(found).items():
                if key in found["state"]:
                    found["state"][key] = self._ownership.outward(p, found["state"][key])
        return found

    def _keys(self, saved: Mapping[str, Any]) -> dict[Tensor, Any]:
        """Return by parameter what stands for it in a checkpoint."""
        pairs = zip(self.param_groups, saved["param_groups"], strict=True)
        return {p: key for ours, theirs in pairs for p, key in zip(ours["params"], theirs["params"], strict=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, whatever it was stacked with, at full precision.

        Raises:
            ValueError: the groups or the state's names do not fit.
        """
        own: dict[str, Any] = {}

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
            own.update(self._own(given))
            return own or None

        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts state to the parameter's dtype, which halves the digits of a bfloat16 parameter's.
        for p, key in self._keys(state_dict).items():
            if key in own["state"]:
                self.state[p] = dict(own["state"][key])
        self._stacks = {}
        for group in self.param_groups:
            for stack in self._stacks_of(group):
                stack.adopt(self.state)

    def _own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what this rank takes of a checkpoint that fits; nothing of one of other groups, as torch will say."""
        if [len(g["params"]) for g in given["param_groups"]] != [len(g["params"]) for g in self.param_groups]:
            return {}
        self._check_fits(given)
        state = dict(given["state"])
        if self._ownership is not None:
            keys = self._keys(given)
            held = {p: key for p, key in keys.items() if key in state and self._ownership.holds(p)}
            state = {key: value for key, value in state.items() if key not in keys.values()}
            state |= {key: self._ownership.inward(p, given["state"][key]) for p, key in held.items()}
        return {**given, "state": state}

    def _check_fits(self, given: Mapping[str, Any]) -> None:
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            if saved.get("method") != group["method"]:
                raise ValueError(
                    f"the checkpoint's group {saved.get('name', '')!r} is of method {saved.get('method')!r}, the "
                    f"optimizer's of {group['method']!r}; load it into the optimizer that it was saved from"
                )
            keys = dict(zip(map(id, group["params"]), saved["params"], strict=True))
            for stack in self._stack({**saved, "params": group["params"]}, whole=True):
                stack.check({p: given["state"].get(keys[id(p)]) for p in stack.params})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy takes along.

        Raises:
            TypeError: the optimizer is divided, so that others have parts of its state.
        """
        if self._ownership is not None:
            raise TypeError(
                f"this {type(self).__name__} has a part of the state of {self._ownership.ranks} ranks and cannot be "
                f"copied; load what its whole_state_dict() returns into a fresh one"
            )
        return {**super().__getstate__(), "_method": self._method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from a pickle or a copy, or take a checkpoint's state: stacks are made anew around it."""
        super().__setstate__(state)
        self._stacks, self._turns = {}, None
        self.__dict__.setdefault("_ownership", None)


def _rate(group: Group) -> Rate:
    return Rate(group["lr"], decay_per_lr(group), group["weight_decay"] if group["decay"] == "l2" else 0.0)
