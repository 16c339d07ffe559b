"""StackedOptimizer: matrices of one shape are stacked, and each transform runs once per stack.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_mup.core.graft import Graft
from lightning_mup.core.method import Method, find_method
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.settings import COMMON, Group, check_names, check_values, decay_per_lr, routes_of, settings_of
from lightning_mup.core.spec import Role
from lightning_mup.core.stack import Arrangement, Stack
from lightning_mup.core.transform import SMALL, Chain, Context, Direct, Members, Rate, Transform

_STACK_ENTRIES = {"cpu": 2**18, "accelerator": 2**26}  # at 4 bytes each, 1 MB and 256 MB


class NonFiniteGradientError(ValueError):
    """A gradient is not finite: training diverged, and the step was not taken."""


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
        for stack in self._stacks_of(group):
            stack.adopt(self.state)

    def _drop(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._stacks.pop(id(group), None)
            for p in group["params"]:
                self.state.pop(p, None)

    def _stacks_of(self, group: Group) -> list[Stack]:
        """Return the stacks of a group; they are made anew where its parameters are others, or moved elsewhere."""
        held = [id(p) for p in group["params"]]
        known, stacks = self._stacks.get(id(group), ([], []))
        if known != held or any(stack.moved for stack in stacks):
            stacks = self._stack(group)
            self._stacks[id(group)] = held, stacks
        return stacks

    def _stack(self, group: Group, device: str | None = None) -> list[Stack]:
        parts: dict[tuple[object, ...], list[Tensor]] = {}
        for p in group["params"]:
            if not p.numel():
                continue
            routed = self._routed(group, p)
            arrangement = Arrangement.of(p, group)
            parts.setdefault((routed.name, arrangement.rows, arrangement.columns, p.dtype, p.device), []).append(p)
        return [
            Stack(
                params,
                [Arrangement.of(p, group) for p in params],
                str(key[0]),
                self._chain(group, str(key[0]), params[0]),
                device,
            )
            for key, alike in parts.items()
            for params in portions(alike)
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
        step, huge = self._look()
        if step:
            for group in self.param_groups:
                self._step_group(group, huge)
        return loss

    def _look(self) -> tuple[bool, bool]:
        """Return whether to step, and whether squares overflow: one reduction over all gradients, and one wait."""
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise TypeError(
                f"{type(self).__name__} needs dense gradients, got a sparse one; use Embedding(sparse=False)"
            )
        checked = [g for g in self.param_groups if g["nonfinite"] != "ignore"]
        grads = [p.grad for g in checked for p in g["params"] if p.grad is not None]
        if norms_below(SMALL, grads):
            return True, False
        if all_finite(grads):
            return True, True
        bad = [(g, i) for g in checked for i, p in enumerate(g["params"]) if not all_finite([p.grad])]
        if all(group["nonfinite"] == "skip" for group, _ in bad):
            return False, False
        group, i = bad[0]
        name = group["param_names"][i] if "param_names" in group else f"parameter {i} of group {group.get('name', 0)}"
        raise NonFiniteGradientError(
            f"the gradient of {name!r} is not finite (and those of {len(bad) - 1} others); nothing was changed. Look "
            f"at the loss, clip, or give nonfinite='skip' to leave such steps out, nonfinite='ignore' not to look"
        )

    def _step_group(self, group: Group, huge: bool) -> None:
        rate = Rate(group["lr"], decay_per_lr(group), group["weight_decay"] if group["decay"] == "l2" else 0.0)
        direct: dict[tuple[Direct, Context, torch.device, torch.dtype], Members] = {}
        for stack in self._stacks_of(group):
            stack.adopt(self.state)
            transform = self._chain(group, stack.method, stack.params[0])
            for members, step in stack.parts():
                ctx = Context(step, huge)
                if found := stack.to_move(transform, members, ctx):
                    direct.setdefault((found[0], ctx, stack.device, stack.dtype), []).extend(found[1])
                    continue
                with full_precision(stack.device):
                    u_NOI = stack.run(transform, members, ctx, rate.l2)
                _apply([stack.params[i] for i in members], stack.split(u_NOI, members), rate)
        for (mover, ctx, *_), moved in direct.items():
            mover.move(moved, ctx, rate)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, whatever it was stacked with, at full precision.

        Raises:
            ValueError: the groups or the state's names do not fit.
        """
        handle = self.register_load_state_dict_pre_hook(lambda _, given: self._check_fits(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts state to the parameter's dtype, which halves the digits of a bfloat16 parameter's.
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(ours, theirs, strict=True):
            if key in state_dict["state"]:
                self.state[p] = dict(state_dict["state"][key])
        self._stacks = {}
        for group in self.param_groups:
            for stack in self._stacks_of(group):
                stack.adopt(self.state)

    def _check_fits(self, given: Mapping[str, Any]) -> None:
        if [len(g["params"]) for g in given["param_groups"]] != [len(g["params"]) for g in self.param_groups]:
            return  # torch says so
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            if saved.get("method") != group["method"]:
                raise ValueError(
                    f"the checkpoint's group {saved.get('name', '')!r} is of method {saved.get('method')!r}, the "
                    f"optimizer's of {group['method']!r}; load it into the optimizer that it was saved from"
                )
            keys = dict(zip(map(id, group["params"]), saved["params"], strict=True))
            for stack in self._stack({**saved, "params": group["params"]}, device="meta"):  # takes no memory
                stack.check({p: given["state"].get(keys[id(p)]) for p in stack.params})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy takes along."""
        return {**super().__getstate__(), "_method": self._method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from a pickle or a copy: stacks are made anew around the state."""
        super().__setstate__(state)
        self._stacks = {}


def portions(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut parameters of one shape into stacks of a size that a CPU's cache, or spare memory elsewhere, can hold."""
    entries = _STACK_ENTRIES["cpu" if params[0].device.type == "cpu" else "accelerator"]
    most = max(1, entries // params[0].numel())
    for start in range(0, len(params), most):
        yield list(params[start : start + most])


def build_chain(method: Method, settings: Mapping[str, Any], *, vector: bool = False) -> Transform:
    """Return a method's transform under settings, with grafting and normalization around it.

    Raises:
        ValueError: the method has no chain, hence is none of this package's.

    Examples:
        >>> method = find_method("muon")
        >>> [
        ...     t.name
        ...     for t in build_chain(method, {**method.defaults, "graft": "adam", "spectral_norm": True}).transforms
        ... ]
        ['graft', 'spectral_normalize']
    """
    core = _chain_of(method, settings)
    parts = core.transforms if isinstance(core, Chain) else (core,)
    if donor := settings.get("graft"):
        magnitude = _chain_of(find_method(donor), method.donor_settings(settings))
        parts = (Graft(magnitude=magnitude, direction=core, eps=settings["graft_eps"]),)
    if settings.get("spectral_norm") and not vector:
        # A looked-up row is a matrix of its own, 1 x width, whose spectral norm is its length.
        parts = (*parts, RmsNormalize() if settings.get("lookup") else SpectralNormalize())
    return Chain(parts)


def _chain_of(method: Method, settings: Mapping[str, Any]) -> Transform:
    if method.chain is None:
        raise ValueError(
            f"method {method.name!r} is declared for another optimizer class and has no chain; give chain="
        )
    # A pair comes as a list out of YAML and out of some checkpoints; transforms are compared and hashed.
    return method.chain({key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key != "params"})


def is_vector(param: Tensor) -> bool:
    """Whether a parameter has no matrix shape."""
    return param.dim() < 2


def all_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all entries are finite, with one wait for the device.

    Examples:
        >>> all_finite([torch.ones(2)]), all_finite([torch.ones(2), torch.tensor([float("nan")])])
        (True, False)
    """
    return norms_below(float("inf"), tensors, order=float("inf"))


def norms_below(bound: float, tensors: Sequence[Tensor | None], order: float = 2.0) -> bool:
    """Whether each tensor's norm is a number below a bound; on a CPU, order 2 is 40 times as fast as order infinity.

    Examples:
        >>> norms_below(5.0, [torch.ones(4), None]), norms_below(5.0, [torch.full((4,), 3.0)])
        (True, False)
    """
    present = [t for t in tensors if t is not None and t.numel()]
    if not present:
        return True
    dtypes = {t.dtype for t in present}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    norms = torch._foreach_norm(present, ord=order, dtype=None if dtypes == {wide} else wide)
    return bool((torch.stack([norm.to(present[0].device) for norm in norms]) < bound).all())


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without autocast and TF32 inside: roots and factors lose their digits in either, whatever the model uses.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    before = torch.get_float32_matmul_precision()
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _apply(params: list[Tensor], updates: list[Tensor], rate: Rate) -> None:
    if rate.decay:
        torch._foreach_add_(updates, params, alpha=rate.decay)
    if isinstance(rate.lr, Tensor):
        torch._foreach_mul_(updates, rate.lr)
        torch._foreach_sub_(params, updates)
    else:
        torch._foreach_add_(params, updates, alpha=-rate.lr)
