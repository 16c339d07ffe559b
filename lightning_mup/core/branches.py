"""Where residual branches end: two readings, by structure and by source, that must agree, or the user is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_mup.core.flow import BENT, SUM, Flow, Makers, bare_path, flow_of, is_homogeneous
from lightning_mup.core.layout import Layout
from lightning_mup.core.structure import Matrix, Structure, Unclear, holds_parameters, is_norm, is_skipped, unwrapped


def branch_ends(
    model: nn.Module, block_names: Iterable[str], layouts: Mapping[str, Layout] | None = None
) -> tuple[set[str], dict[str, str]]:
    """Find the last matrix (and its bias) of each residual branch of each block.

    By structure: each part of a block that holds matrices is taken for one branch, which ends in the one matrix that
    writes the stream's width and feeds no other. By source: ``forward`` says whose results are added to the stream.
    Where the two differ the block is unclear, never half found. A norm between the matrix and the sum (batch norms in
    ResNets) rescales whatever comes, so the branch ends in the norm's gain.

    Args:
        model: the model.
        block_names: names of the repeated blocks.
        layouts: layouts that the user gave, by parameter name.

    Returns:
        Names of the parameters that end a branch, and for each block where this cannot be told the reason.

    Examples:
        >>> layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64), 1, enable_nested_tensor=False)
        >>> sorted(branch_ends(layers, ["layers.0"])[0])[::2]
        ['layers.0.linear2.bias', 'layers.0.self_attn.out_proj.bias']
    """
    ends: set[str] = set()
    unclear: dict[str, str] = {}
    modules = {bare_path(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name in block_names:
        given = {k[len(name) + 1 :]: v for k, v in (layouts or {}).items() if k.startswith(f"{name}.")}
        try:
            found = _Reading(Structure(modules[name], given)).ends(*_owner(name, modules))
            ends |= {f"{name}.{end}" for end in found}
        except Unclear as reason:
            unclear[name] = str(reason)
    return ends, unclear


def _owner(name: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module | None, str]:
    """Return the module whose ``forward`` runs through a block's container, and the container's path in it."""
    path = name.rpartition(".")[0]
    inside: list[str] = []
    while path and isinstance(modules[path], (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        path, _, last = path.rpartition(".")
        inside.insert(0, last)
    return (modules[path], ".".join(inside)) if inside else (None, "")


class _Reading:
    """One block, read both ways."""

    def __init__(self, structure: Structure) -> None:
        self.structure, self.block, self.modules = structure, structure.block, structure.modules

    def ends(self, owner: nn.Module | None, container: str) -> set[str]:
        if not self.structure.matrices:
            raise Unclear(f"{type(self.block).__name__} holds no matrices")
        parts = self.summed("")
        if not parts:
            _check_outside(owner, container)
            lists = isinstance(self.block, nn.ModuleList)
            parts = {n for n, m in self.block.named_children() if holds_parameters(m)} if lists else {""}
        return self.agreed(self.structure.candidates(), parts)

    # -- by source ------------------------------------------------------------------------------------------------

    def summed(self, path: str) -> set[str]:
        """Return the parts whose results are added up, in the outermost ``forward`` that adds any."""
        module = self.modules[path]
        flow = _flow(module)
        found = {f"{path}.{part}".lstrip(".") for part in _added(flow, module)}
        if found:
            return found
        children = [bare_path(f"{path}.{n}").strip(".") for n, m in module.named_children() if holds_parameters(m)]
        composite = [c for c in children if next(self.modules[c].children(), None) is not None and not is_skipped(c)]
        return {part for child in composite for part in self.summed(child)}

    def maker(self, path: str) -> tuple[str, str] | None:
        """Return the leaf whose result a part returns, and, where that is a norm, the leaf before it."""
        module = self.modules[path]
        if isinstance(module, nn.MultiheadAttention):
            return f"{path}.out_proj".lstrip("."), ""
        if not any(holds_parameters(child) for child in module.children()):
            return path, ""
        if isinstance(module, nn.Sequential):
            return self._last_in_chain(path, list(module.named_children()))
        flow = _flow(module)
        makers = _paths(flow.makers)
        if len(makers) != 1 or SUM in flow.makers:
            return None
        if BENT in flow.makers:
            raise Unclear(f"a nonlinearity follows {next(iter(makers))!r}")
        return self._behind(path, next(iter(makers)), flow)

    def _behind(self, path: str, maker: str, flow: Flow) -> tuple[str, str] | None:
        inner = f"{path}.{maker}".lstrip(".")
        scale = "scale" in type(self.modules[inner]).__name__.lower()  # a gain per channel (LayerScale)
        if not is_norm(self.modules[inner]) and not scale:
            return self.maker(inner)
        before = _paths(flow.inputs.get(maker, frozenset()))
        if len(before) != 1 or {SUM, BENT} & flow.inputs[maker]:
            raise Unclear(f"it cannot be told what {inner!r} rescales")
        found = self.maker(f"{path}.{before.pop()}".lstrip("."))
        return found if scale else (inner, found[0]) if found else None

    def _last_in_chain(self, path: str, children: list[tuple[str, nn.Module]]) -> tuple[str, str] | None:
        norm = ""
        for name, child in reversed(children):
            inner = bare_path(f"{path}.{name}").strip(".")
            if not holds_parameters(child):
                if not is_homogeneous(child):
                    raise Unclear(f"a nonlinearity {type(child).__name__} ends {path!r}")
            elif is_norm(unwrapped(child)) and not norm:
                norm = inner
            else:
                found = self.maker(inner)
                return (norm, found[0]) if norm and found else found
        return None

    # -- both -----------------------------------------------------------------------------------------------------

    def agreed(self, groups: Sequence[Sequence[Matrix]], parts: set[str]) -> set[str]:
        """Return the parameters that end the branches, where source and structure say the same."""
        ends: set[str] = set()
        found: set[str] = set()
        for part in sorted(parts):
            norm, matrices = self._matched(part, groups)
            found |= {matrix.owner for matrix in matrices}
            ends |= self._gain(norm) if norm else {n for m in matrices for n in (m.name, *self._biases(m))}
        for matrix in (matrix for group in groups for matrix in group):
            if matrix.owner not in found and not self._feeds(matrix.owner, found):
                raise Unclear(f"{matrix.name!r} may end a branch, but forward is not seen to add it to the stream")
        return ends

    def _matched(self, part: str, groups: Sequence[Sequence[Matrix]]) -> tuple[str, list[Matrix]]:
        found = self._named(part)
        if found is None:  # a part of many results: the ends of all that it holds
            inside = [g for g in groups if not part or all(f"{m.owner}.".startswith(f"{part}.") for m in g)]
            doubtful = [m.name for g in inside for m in g if len(g) > 1]
            if doubtful or not inside or (len(inside) > 1 and not all("expert" in g[0].owner for g in inside)):
                raise Unclear(f"forward adds the result of {part!r}, in which any of {doubtful or inside} may be last")
            return "", [m for g in inside for m in g]
        leaf, norm = (found[1], found[0]) if found[1] else (found[0], "")
        matched = [m for g in groups for m in g if m.owner == leaf]
        if len(matched) != 1:
            raise Unclear(f"forward adds the result of {leaf!r}, which is no matrix as wide as the stream")
        return norm, matched

    def _named(self, part: str) -> tuple[str, str] | None:
        path, _, name = part.rpartition(".")
        return self._behind(path, name, _flow(self.modules[path])) if part else self.maker(part)

    def _feeds(self, owner: str, found: set[str]) -> bool:
        """Whether a matrix goes into a found end, with neither a norm nor a sum between: then it is no end itself."""
        while owner:
            parent = owner.rpartition(".")[0]
            flow = flow_of(self.modules[parent])
            if flow is not None:
                inside = {end[len(parent) + 1 if parent else 0 :] for end in found if _within(end, parent)}
                own = owner[len(parent) + 1 if parent else 0 :]
                if any(_within(own, key) for key in self._fed(parent, flow, inside)):
                    return True
            owner = parent
        return False

    def _fed(self, parent: str, flow: Flow, ends: set[str]) -> set[str]:
        """Return the parts of a module whose results go into one of the ends."""
        seen: set[str] = set()
        queue = [key for key in flow.inputs if any(_within(end, key) for end in ends)]
        while queue:
            for maker in _paths(flow.inputs.get(queue.pop(), frozenset())) - seen:
                if not is_norm(self.modules[f"{parent}.{maker}".lstrip(".")]):
                    seen.add(maker)
                    queue.append(maker)
        return seen

    def _gain(self, norm: str) -> set[str]:
        """Return the parameters of a norm that ends a branch."""
        module = self.modules[norm]
        if not type(module).__module__.startswith("torch.nn") or next(module.parameters(), None) is None:
            raise Unclear(f"{norm!r} rescales the branch, and {type(module).__name__} may add 1 to its gain")
        return {f"{norm}.{n}" for n, _ in module.named_parameters()}

    def _biases(self, matrix: Matrix) -> list[str]:
        path, _, attribute = matrix.name.rpartition(".")
        wanted = (f"{attribute.removesuffix('weight')}bias", f"{attribute}_bias")
        return [f"{path}.{n}".lstrip(".") for n, _ in self.modules[path].named_parameters(recurse=False) if n in wanted]


def _check_outside(owner: nn.Module | None, container: str) -> None:
    """Check that whoever runs through the blocks adds each block's result to its input."""
    flow = None if owner is None else flow_of(unwrapped(owner))
    sides = [side for pair in flow.sums for side in pair if BENT not in side] if flow else []
    made = [paths for side in sides if len(paths := {m for m in side if _is_path(m)}) == 1]
    if not any(m.endswith(".*") and _within(container, m[:-2]) for paths in made for m in paths):
        kind = "the model" if owner is None else type(unwrapped(owner)).__name__
        raise Unclear(f"neither the block nor the forward of {kind} is seen to add its result to the stream")


def _added(flow: Flow, module: nn.Module) -> set[str]:
    """Return the parts that stand beside the stream in a sum."""
    found: set[str] = set()
    for pair in flow.sums:
        sides = [{m for m in _paths(side) if not is_skipped(m)} for side in pair]
        norms = [all(is_norm(module.get_submodule(m)) for m in side) for side in sides]
        for i, side in enumerate(sides):
            if not side or (norms[i] and not norms[1 - i]):
                continue  # nothing, or the stream itself where it comes out of a norm
            if len(side) > 1 or {BENT, SUM} & pair[i]:
                raise Unclear(f"it cannot be told which of {sorted(side)} forward adds to the stream")
            if side & flow.feeds(sides[1 - i]):
                raise Unclear(f"{min(side)!r} may carry the stream itself")
            found |= side
    return found


def _flow(module: nn.Module) -> Flow:
    flow = flow_of(module)
    if flow is None:
        raise Unclear(f"the source of {type(module).__name__}.forward cannot be read")
    return flow


def _paths(makers: Makers) -> set[str]:
    """Return the submodules among the makers; one of a list counts as the list."""
    return {m.removesuffix(".*") for m in makers if _is_path(m)}


def _is_path(maker: str) -> bool:
    return maker[0].isalnum() or maker[0] == "_"


def _within(path: str, parent: str) -> bool:
    return not parent or f"{path}.".startswith(f"{parent}.")
