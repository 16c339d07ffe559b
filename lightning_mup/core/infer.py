"""Read a model: every parameter's role and dimensions, by what grows against the base, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_mup.core.bare import Bare, grown_axes, is_elementwise, read_word, suggested, unread_message
from lightning_mup.core.base import Base, bare_model, canonical, refuse_lazy
from lightning_mup.core.blocks import Blocks
from lightning_mup.core.branches import branch_ends
from lightning_mup.core.layout import Layout, as_role, layout_of
from lightning_mup.core.patterns import match
from lightning_mup.core.registry import near
from lightning_mup.core.spec import ONE, Dim, ParamSpec, Role
from lightning_mup.core.structure import is_skipped

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
        branches: patterns of the last matrices of the residual branches, where they cannot be found; an empty list
            says that there are none.

    Raises:
        ValueError: a parameter cannot be read, has no counterpart in the base, or a pattern matches nothing.
        TypeError: ``branches`` is no list.

    Examples:
        >>> mlp = lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
        >>> specs = infer(mlp(64), Base.of(mlp(16)))
        >>> [(s.name, s.role.value) for s in specs if s.name.endswith("weight")]
        [('0.weight', 'input'), ('2.weight', 'hidden'), ('4.weight', 'output')]
    """
    if isinstance(branches, str):
        raise TypeError(f"branches must be a list of patterns, got {branches!r}; write branches=[{branches!r}]")
    _refuse_flattened(model)
    return _Reader(bare_model(model), base, wider, roles or {}, branches).read()


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
        self.layouts: dict[str, Layout] = {}
        self.unread: list[Bare] = []
        self.vocabularies = self.table_lengths()

    def read(self) -> tuple[ParamSpec, ...]:
        found = [self.spec(names, p) for names, p in self.parameters if p.requires_grad]
        if self.unread:
            names = [name for names, p in self.parameters if p.requires_grad for name in names]
            raise ValueError(unread_message(self.unread, names))
        specs = [spec for spec in found if spec is not None]
        _check_alike(specs, self.blocks)
        return self.with_branches(specs)

    def spec(self, names: list[str], parameter: nn.Parameter) -> ParamSpec | None:
        name, shape = names[0], tuple(parameter.shape)
        base_shape = self.base_shape(name, shape)
        layout = self.layout(names, shape, base_shape)
        if layout is None:
            self.cannot_read(name, shape, base_shape)
            return None
        _check_axes(name, shape, layout)
        spec = _read_axes(name, shape, base_shape, layout)
        if not layout.lookup and layout.axes_in(len(shape)) and spec.fan_out in self.vocabularies:
            # A readout onto a vocabulary of another length, as the embedding's: no width.
            spec = replace(spec, fan_out=Dim(spec.fan_out.size, spec.fan_out.size))
        grown = _read_axes(name, self.wider_shape(name, shape), shape, layout) if self.wider else spec
        role, why, certain = _role(spec if _grows(spec) else grown, layout)
        if layout.role is None and role in (Role.INPUT, Role.OUTPUT) and not layout.lookup and self.is_one_of(name):
            return None
        readout = (
            tuple(n.rpartition(".")[0] for n in names if layout.lookup and not self.is_lookup(n)) if names[1:] else ()
        )
        if readout:
            role, why = Role.INPUT, f"{why}, tied readout"
        self.layouts[name] = layout
        depth, block = self.depth(name)
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

    def table_lengths(self) -> set[Dim]:
        """Return the numbers of rows of lookup tables, here and in the base, where they differ."""
        found: set[Dim] = set()
        for names, parameter in self.parameters:
            base = self.base.shapes.get(self.blocks.base_name(names[0]), ())
            if self.is_lookup(names[0]) and len(base) == 2 and base[0] != parameter.shape[0]:
                found.add(Dim(parameter.shape[0], base[0]))
        return found

    def depth(self, name: str) -> tuple[Dim, str]:
        depth, block = self.blocks.depth(name)
        return (ONE if is_skipped(name) else depth), block  # no branch multiplier scales the stream itself

    def base_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        base_name = self.blocks.base_name(name)
        if base_name not in self.base.shapes:
            raise ValueError(
                f"parameter {name!r} of shape {shape} has no counterpart {base_name!r} in the base"
                f"{near(base_name, self.base.shapes)}; the base must be the same model at another size (only repeated "
                f"blocks of one class, in a ModuleList or Sequential, may differ in number)"
            )
        found = self.base.shapes[base_name]
        if len(found) != len(shape):
            raise ValueError(
                f"parameter {name!r} has shape {shape}, its counterpart {base_name!r} in the base {found}; the number "
                f"of axes must agree, so give a base that differs in sizes alone"
            )
        return found

    def wider_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        found = self.wider.shapes.get(name, shape) if self.wider else shape
        return found if len(found) == len(shape) else shape

    def layout(self, names: list[str], shape: tuple[int, ...], base: tuple[int, ...]) -> Layout | None:
        name, given, known = names[0], self.given.get(names[0]), self.known(names)
        if given is None and known is not None:
            return replace(known, why=type(self.owners[name][0]).__name__.removeprefix("NonDynamicallyQuantizable"))
        if given is None:
            return Layout(fan_in=(), why=f"{len(shape)}-D") if is_elementwise(shape) else None
        if known is None and isinstance(given.role, Role) and given == Layout(given.role):
            grown = grown_axes(shape, base) or grown_axes(self.wider_shape(name, shape), shape)
            given = read_word(name, given.role, shape, grown)
        return replace(given.onto(known) if known else given, why="roles")

    def known(self, names: list[str]) -> Layout | None:
        """Return what the modules say; of several that share a parameter, the one that looks it up."""
        found = [layout for n in names if (layout := layout_of(*self.owners[n])) is not None]
        return next((layout for layout in found if layout.lookup), found[0] if found else None)

    def is_lookup(self, name: str) -> bool:
        layout = layout_of(*self.owners[name])
        return layout is not None and layout.lookup

    def is_one_of(self, name: str) -> bool:
        """Note a parameter whose outputs are joined with those of a growing number of siblings, as of heads."""
        siblings = self.blocks.side_by_side(name)
        if siblings:
            shape = next(tuple(p.shape) for names, p in self.parameters if names[0] == name)
            why = f"one of the parts of {siblings!r}, which grow in number (joined they are hidden),"
            self.unread.append(Bare(name, shape, self.base_shape(name, shape), '"hidden"', why))
        return bool(siblings)

    def cannot_read(self, name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> None:
        module = self.owners[name][0]
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            kernel = tuple(range(2, len(shape)))
            fixed = f"Layout(fan_out=(1,), fan_in={(0, *kernel)})"
            grows = f"Layout(fan_out=(0, 1), fan_in={kernel})"
            likely = grows if module.groups == module.in_channels else fixed
            why = f"a transposed convolution in groups ({fixed} if their number stays, {grows} if it grows)"
            self.unread.append(Bare(name, shape, base, likely, why))
        else:
            self.unread.append(Bare(name, shape, base, suggested(name, shape, base), "a bare parameter"))

    def with_branches(self, specs: list[ParamSpec]) -> tuple[ParamSpec, ...]:
        if self.branches is None:
            blocks = dict.fromkeys(s.block for s in specs if s.block)
            ends, _ = branch_ends(self.model, blocks, self.layouts)
            return tuple(replace(s, branch=s.name in ends) for s in specs)
        wanted = match(dict.fromkeys(self.branches, True), [[s.name, *s.tied_to] for s in specs], "branches")
        ends = set(wanted) | {end for name in wanted for end in (f"{name.removesuffix('weight')}bias", f"{name}_bias")}
        lists = {s.block.rpartition(".")[0] for s in specs if s.name in ends}
        marked = [replace(s, branch=s.name in ends) for s in specs]
        return tuple(
            s if not s.block or self.is_residual(s, lists) else replace(s, depth=ONE, block="") for s in marked
        )

    def is_residual(self, spec: ParamSpec, lists: set[str]) -> bool:
        """Whether a repeated block is residual, given the lists of blocks in which the user named branches."""
        return bool(lists) and (self.blocks.is_composite(spec.block) or spec.block.rpartition(".")[0] in lists)


def shared_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Return each parameter once with all its canonical names, in the order of registration.

    Examples:
        >>> tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
        >>> tied["b"] = tied["a"]
        >>> [names for names, _ in shared_names(tied)]
        [['a.weight', 'b.weight']]
    """
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in bare_model(model).named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(canonical(name))
    return list(found.values())


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        canonical(f"{path}.{attribute}").lstrip("."): (module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, _ in module.named_parameters(recurse=False)
    }


def _as_layout(value: RoleLike) -> Layout:
    return value if isinstance(value, Layout) else Layout(role=as_role(value))


def _check_axes(name: str, shape: tuple[int, ...], layout: Layout) -> None:
    axes = (*layout.axes_out(len(shape)), *layout.axes_in(len(shape)), *layout.stack)
    missing = [axis for axis, size in enumerate(shape) if size > 1 and axis not in axes]
    beyond = [axis for axis in axes if axis >= len(shape)]
    if missing or beyond:
        problem = f"says nothing of axes {missing}" if missing else f"names axes {beyond}"
        raise ValueError(
            f"the Layout of {name!r} {problem}, but its shape is {shape}; each axis from 0 to {len(shape) - 1} must be "
            f"in one of fan_out={layout.fan_out}, fan_in={layout.fan_in}, stack={layout.stack}"
        )


def _read_axes(name: str, shape: tuple[int, ...], base: tuple[int, ...], layout: Layout) -> ParamSpec:
    inputs = layout.size(shape, "in")
    # A lookup sums over nothing: one row is read at a time, however many rows there are.
    fan_in = Dim(inputs, inputs if layout.lookup else layout.size(base, "in"))
    fan_out = Dim(_rows(name, shape, layout), _rows(name, base, layout))
    return ParamSpec(
        name=name,
        role=Role.SCALAR,
        shape=shape,
        fan_in=fan_in,
        fan_out=fan_out,
        axes=(layout.axes_out(len(shape)), layout.axes_in(len(shape))),
        lookup=layout.lookup,
        split=layout.split,
        stack=math.prod(shape[a] for a in layout.stack),
    )


def _rows(name: str, shape: tuple[int, ...], layout: Layout) -> int:
    rows = layout.size(shape, "out")
    if rows % layout.split:
        raise ValueError(
            f"{name!r} has {rows} rows in shape {shape}, which do not split into {layout.split} equal blocks; give "
            f'split=1: roles={{"{name}": Layout(split=1)}}'
        )
    return rows // layout.split


def _grows(spec: ParamSpec) -> bool:
    return spec.fan_in.ratio != 1 or spec.fan_out.ratio != 1


def _role(spec: ParamSpec, layout: Layout) -> tuple[Role, str, bool]:
    if isinstance(layout.role, Role):
        return layout.role, layout.why, True
    if layout.axes_in(len(spec.shape)) == ():
        single = spec.fan_out.size == spec.fan_out.base == 1
        return (Role.SCALAR if single else Role.VECTOR), layout.why, True
    if layout.lookup:
        return Role.INPUT, layout.why, True
    sides = (spec.fan_out.ratio != 1, spec.fan_in.ratio != 1)
    role = {(True, False): Role.INPUT, (False, True): Role.OUTPUT}.get(sides, Role.HIDDEN)
    return (role, layout.why, True) if any(sides) else (role, f"{layout.why}, nothing grows", False)


def _refuse_flattened(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"module {name!r} is wrapped by FSDP1, which flattens parameters so that their shapes are lost; use "
                f"FSDP2 (strategy='mup_fsdp', or torch.distributed.fsdp.fully_shard), which keeps them"
            )
    refuse_lazy(model)


def _check_alike(specs: Sequence[ParamSpec], blocks: Blocks) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in specs:
        if not blocks.resized(spec.name):
            continue
        base_name = blocks.base_name(spec.name)
        other, shape = shapes.setdefault(base_name, (spec.name, spec.shape))
        if shape != spec.shape:
            raise ValueError(
                f"{other!r} {shape} and {spec.name!r} {spec.shape} both map onto {base_name!r} of the shallower base; "
                f"give the base as many blocks, or one of each shape"
            )
    _check_ratios(specs, blocks)


def _check_ratios(specs: Sequence[ParamSpec], blocks: Blocks) -> None:
    """Blocks of different widths in turn: a wide one that maps onto a narrow one shows by its ratios."""
    ratios: dict[str, tuple[str, tuple[float, float]]] = {}
    for spec in specs:
        if not blocks.resized(spec.name) or not spec.block:
            continue
        inside = f"{spec.block.rpartition('.')[0]}.*{spec.name[len(spec.block) :]}"
        own = (spec.fan_out.ratio, spec.fan_in.ratio)
        other, found = ratios.setdefault(inside, (spec.name, own))
        if found != own:
            raise ValueError(
                f"{other!r} and {spec.name!r} stand in like blocks, but have grown by {found} and {own} against the "
                f"shallower base; give the base as many blocks, or blocks of one kind"
            )
