"""Read a model: every parameter's role and dimensions, by what grows against the base, each with its reason."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_mup.core.base import Base, canonical, head_dims
from lightning_mup.core.blocks import SKIP_PATHS, Blocks, branch_ends
from lightning_mup.core.layout import Layout, as_role, layout_of
from lightning_mup.core.patterns import match
from lightning_mup.core.registry import near
from lightning_mup.core.spec import ONE, Dim, ParamSpec, Role

RoleLike = Role | str | Layout


def infer(
    model: nn.Module,
    base: Base,
    *,
    wider: Base | None = None,
    roles: Mapping[str, RoleLike] | None = None,
    branches: Sequence[str] | None = None,
) -> tuple[ParamSpec, ...]:
    """Read every trainable parameter of a model against its base.

    A matrix is read by which of its dimensions differ from the base: output side only is INPUT, both HIDDEN, input
    side only OUTPUT. So grouped-query attention, fixed head counts and routers come out right by themselves.

    Args:
        model: the target, on any device, sharded or not (global shapes are read).
        base: the proxy's shapes.
        wider: shapes of the same model made wider, from which roles are told where nothing grows against the base.
        roles: role (or :class:`Layout`) by name pattern, for what cannot be known.
        branches: patterns of the last matrices of the residual branches, where they cannot be found.

    Raises:
        ValueError: a parameter cannot be read, has no counterpart in the base, or a pattern matches nothing.

    Examples:
        >>> mlp = lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
        >>> specs = infer(mlp(64), Base.of(mlp(16)))
        >>> [(s.name, s.role.value) for s in specs if s.name.endswith("weight")]
        [('0.weight', 'input'), ('2.weight', 'hidden'), ('4.weight', 'output')]
    """
    _refuse_flattened(model)
    return _Reader(model, base, wider, roles or {}, branches).read()


class _Reader:
    def __init__(
        self,
        model: nn.Module,
        base: Base,
        wider: Base | None,
        roles: Mapping[str, RoleLike],
        branches: Sequence[str] | None,
    ) -> None:
        self.model, self.base, self.wider, self.branches = model, base, wider, branches
        self.blocks = Blocks(model, base.shapes)
        self.parameters = shared_names(model)
        self.owners = _owners(model)
        named = [names for names, p in self.parameters if p.requires_grad]
        self.given = match({k: _as_layout(v) for k, v in roles.items()}, named, "roles")
        self.unread: list[str] = []

    def read(self) -> tuple[ParamSpec, ...]:
        specs = [self.spec(names, p) for names, p in self.parameters if p.requires_grad]
        if self.unread:
            lines = "\n  ".join(self.unread)
            raise ValueError(f"cannot tell what these parameters do; add to roles={{...}}:\n  {lines}")
        _check_alike(specs, self.blocks)
        return self.with_branches([spec for spec in specs if spec is not None])

    def spec(self, names: list[str], parameter: nn.Parameter) -> ParamSpec | None:
        name, shape = names[0], tuple(parameter.shape)
        base_shape = self.base_shape(name, shape)
        layout = self.layout(names, shape)
        if layout is None:
            self.unread.append(_suggestion(name, shape, base_shape))
            return None
        depth, block = self.blocks.depth(name)
        if any(part in SKIP_PATHS for part in name.split(".")):
            depth = ONE  # the stream itself, which no branch multiplier scales
        spec = _read_axes(name, shape, base_shape, layout)
        grown = _read_axes(name, self._wider_shape(name, shape), shape, layout) if self.wider else spec
        role, why, certain = _role(spec if _grows(spec) else grown, layout)
        readout = tuple(n.rpartition(".")[0] for n in names[1:] if layout.lookup and not self.is_lookup(n))
        if readout:
            role, why = Role.INPUT, f"{why}, tied readout"
        return replace(
            spec,
            role=role,
            why=why,
            certain=certain,
            depth=depth,
            block=block,
            base_name=self.blocks.base_name(name),
            tied_to=tuple(names[1:]),
            readout=readout,
        )

    def base_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        base_name = self.blocks.base_name(name)
        if base_name not in self.base.shapes:
            raise ValueError(
                f"parameter {name!r} has no counterpart {base_name!r} in the base{near(base_name, self.base.shapes)}; "
                f"the base must be the same model at another size"
            )
        found = self.base.shapes[base_name]
        if len(found) != len(shape):
            raise ValueError(f"parameter {name!r} has shape {shape}, its base {found}: the number of axes must agree")
        return found

    def _wider_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        found = self.wider.shapes.get(name, shape) if self.wider else shape
        return found if len(found) == len(shape) else shape

    def layout(self, names: list[str], shape: tuple[int, ...]) -> Layout | None:
        given = self.given.get(names[0])
        known = next((x for n in names if (x := layout_of(*self.owners[n])) is not None), None)
        if given is not None:
            plain = given == Layout(role=given.role)
            return replace(known or _raw_layout(given, shape), role=given.role, why="roles") if plain else given
        if known is not None:
            return replace(known, why=type(self.owners[names[0]][0]).__name__)
        if sum(size > 1 for size in shape) <= 1:
            return Layout(fan_out=tuple(range(len(shape))), fan_in=(), why=f"{len(shape)}-D")
        return None

    def is_lookup(self, name: str) -> bool:
        layout = layout_of(*self.owners[name])
        return layout is not None and layout.lookup

    def with_branches(self, specs: list[ParamSpec]) -> tuple[ParamSpec, ...]:
        if self.branches is None:
            ends, _ = branch_ends(self.model, dict.fromkeys(s.block for s in specs if s.block))
        else:
            wanted = match(dict.fromkeys(self.branches, True), [[s.name, *s.tied_to] for s in specs], "branches")
            ends = set(wanted) | {f"{name.removesuffix('weight')}bias" for name in wanted}
        return tuple(replace(s, branch=s.name in ends) for s in specs)


def shared_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Return each parameter once with all its canonical names, in the order of registration.

    Examples:
        >>> tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
        >>> tied["b"] = tied["a"]
        >>> [names for names, _ in shared_names(tied)]
        [['a.weight', 'b.weight']]
    """
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(canonical(name))
    return list(found.values())


def warn_about_heads(model: nn.Module, base: Base) -> None:
    """Warn where attention heads grow: mup wants logits over d_head, modules divide by its square root."""
    blocks = Blocks(model, base.shapes)
    grown = [(n, d, b) for n, d in head_dims(model).items() if (b := base.head_dims.get(blocks.base_name(n), d)) != d]
    if grown:
        name, dim, base_dim = grown[0]
        warnings.warn(
            f"{len(grown)} attention modules have larger heads than the base ({name!r}: head_dim {dim} against "
            f"{base_dim}); logits scaled by 1/sqrt(head_dim) then grow as its square root. Keep head_dim and let the "
            f"number of heads grow, or give forward={{'*.q_proj.weight': Power(fan_out=-1/2)}}",
            stacklevel=2,
        )


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        canonical(f"{path}.{attribute}").lstrip("."): (module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, _ in module.named_parameters(recurse=False)
    }


def _as_layout(value: RoleLike) -> Layout:
    return value if isinstance(value, Layout) else Layout(role=as_role(value))


def _raw_layout(given: Layout, shape: tuple[int, ...]) -> Layout:
    """Axes of a bare parameter whose role alone was given: torch's (out, in), further leading axes are stacks."""
    last = len(shape) - 1
    if given.role in (Role.VECTOR, Role.SCALAR):
        return Layout(fan_out=tuple(range(len(shape))), fan_in=())
    if given.role is Role.INPUT:  # added to or looked up by the stream: the last axis is the stream's
        return Layout(fan_out=(last,), lookup=True)
    if given.role is Role.OUTPUT and len(shape) == 1:
        return Layout(fan_out=(), fan_in=(0,))
    return Layout(fan_out=(last - 1,), fan_in=(last,), stack=tuple(range(last - 1)))


def _read_axes(name: str, shape: tuple[int, ...], base: tuple[int, ...], layout: Layout) -> ParamSpec:
    axes_in = layout.axes_in(len(shape))
    # A lookup sums over nothing: one row is read at a time, however many rows there are.
    rows = math.prod(shape[a] for a in axes_in)
    fan_in = Dim(rows, rows if layout.lookup else math.prod(base[a] for a in axes_in))
    fan_out = Dim(_rows(name, shape, layout), _rows(name, base, layout))
    return ParamSpec(
        name=name,
        role=Role.SCALAR,
        shape=shape,
        fan_in=fan_in,
        fan_out=fan_out,
        split=layout.split,
        stack=math.prod(shape[a] for a in layout.stack),
    )


def _rows(name: str, shape: tuple[int, ...], layout: Layout) -> int:
    rows = math.prod(shape[a] for a in layout.fan_out)
    if rows % layout.split:
        raise ValueError(f"{name!r} has {rows} rows, which do not split into {layout.split} equal blocks; give split=1")
    return rows // layout.split


def _grows(spec: ParamSpec) -> bool:
    return spec.fan_in.ratio != 1 or spec.fan_out.ratio != 1


def _role(spec: ParamSpec, layout: Layout) -> tuple[Role, str, bool]:
    if isinstance(layout.role, Role):
        return layout.role, layout.why, True
    if layout.fan_in == ():
        single = spec.fan_out.size == spec.fan_out.base == 1
        return (Role.SCALAR if single else Role.VECTOR), layout.why, True
    if layout.lookup:
        return Role.INPUT, layout.why, True
    sides = (spec.fan_out.ratio != 1, spec.fan_in.ratio != 1)
    role = {(True, False): Role.INPUT, (False, True): Role.OUTPUT}.get(sides, Role.HIDDEN)
    return (role, layout.why, True) if any(sides) else (role, f"{layout.why}, nothing grows", False)


def _suggestion(name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> str:
    grown = [axis for axis, (size, small) in enumerate(zip(shape, base, strict=True)) if size != small]
    role = "input" if len(grown) == 1 and grown[0] == len(shape) - 1 else "output" if len(grown) == 1 else "hidden"
    return f'"{name}": "{role}",  # {shape}, base {base}: a bare parameter; input, hidden, output or a Layout'


def _refuse_flattened(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"module {name!r} is wrapped by FSDP1, which flattens parameters so that their shapes are lost; use "
                f"FSDP2 (torch.distributed.fsdp.fully_shard, or ModelParallelStrategy), which keeps them"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet; run one batch through the model first")


def _check_alike(specs: Sequence[ParamSpec | None], blocks: Blocks) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in specs:
        if spec is None or not blocks.resized(spec.name):
            continue
        base_name = blocks.base_name(spec.name)
        other, shape = shapes.setdefault(base_name, (spec.name, spec.shape))
        if shape != spec.shape:
            raise ValueError(
                f"{other!r} {shape} and {spec.name!r} {spec.shape} both map onto {base_name!r} of the shallower base; "
                f"give the base as many blocks, or one of each shape"
            )
