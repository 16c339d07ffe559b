"""The matrices of a block: which of them may end a residual branch, by width, place and name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_mup.core.bare import is_elementwise
from lightning_mup.core.flow import bare_path
from lightning_mup.core.layout import Layout, layout_of
from lightning_mup.core.spec import Role

SKIP_PATHS = ("downsample", "shortcut", "skip", "skip_connection", "downsampling_layer")
"""Children of a block that carry the stream itself (ResNets), not a branch."""
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# Matrices that only feed others: q, k and v where all three are there, and those before a last one of this name.
_ATTENTION = (
    *(("q", "k", "v"), ("wq", "wk", "wv"), ("w_q", "w_k", "w_v"), ("q_proj", "k_proj", "v_proj")),
    *(("query", "key", "value"), ("queries", "keys", "values"), ("to_q", "to_k", "to_v"), ("q_lin", "k_lin", "v_lin")),
    ("query_proj", "key_proj", "value_proj"),
)
_FEEDS = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "c_proj": ("c_fc", "c_attn"),
    "wo": ("wi", "wi_0", "wi_1"),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "out_proj": ("in_proj", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_LAST = ("o_proj", "out_proj", "c_proj", "wo", "w_o", "to_out", "down_proj", "out_lin", "output")
_NUMBERED = re.compile(r"(conv|fc|linear|lin|dense|pwconv)_?(\d+)")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix inside a block.

    Args:
        name: the parameter's name inside the block.
        owner: the path of the module that holds it.
        writes: how many outputs it has.
        reads: how many inputs one output sums over.
    """

    name: str
    owner: str
    writes: int
    reads: int

    @property
    def short(self) -> str:
        """The name by which people call it."""
        attribute = self.name.rpartition(".")[2]
        return self.owner.rpartition(".")[2] if attribute == "weight" else attribute


class Unclear(Exception):
    """It cannot be told where a block's branches end."""


class Structure:
    """A block's modules and matrices.

    Args:
        block: one of several repeated blocks.
        layouts: layouts that are known beyond the module types', by the parameter's name inside the block.

    Raises:
        Unclear: the block holds a matrix that nobody can read.

    Examples:
        >>> block = nn.TransformerEncoderLayer(16, 2, 64)
        >>> [[matrix.name for matrix in group] for group in Structure(block, {}).candidates()]
        [['self_attn.out_proj.weight'], ['linear2.weight']]
    """

    def __init__(self, block: nn.Module, layouts: Mapping[str, Layout]) -> None:
        self.block = unwrapped(block)
        self.modules = {bare_path(n): unwrapped(m) for n, m in self.block.named_modules()}
        self.matrices = [
            m for n, module in self.modules.items() if not is_skipped(n) for m in _matrices(n, module, layouts)
        ]

    def candidates(self) -> list[list[Matrix]]:
        """Return, for each part of the block (and each expert), the matrices that may end a branch.

        These write the width of the stream and are not known to feed others; one alone is certain.
        """
        width = self._width()
        parts: dict[tuple[str, str], list[Matrix]] = {}
        for matrix in self.matrices:
            parts.setdefault((self._part(matrix), _expert(matrix.owner)), []).append(matrix)
        found = [self._last(part[0], [m for m in all_ if m.writes == width], all_) for part, all_ in parts.items()]
        return [group for group in found if group]

    def _width(self) -> int:
        """Return the width of the residual stream: the block's own norms', else what the last matrix writes."""
        norms = {p.numel() for n, m in self.block.named_children() if is_norm(m) for p in m.parameters()}
        return norms.pop() if len(norms) == 1 else self.matrices[-1].writes

    def _part(self, matrix: Matrix) -> str:
        """Return the part of the block that a matrix belongs to; all leaves of the block are one."""
        path, parts = "", matrix.owner.split(".") if matrix.owner else []
        for part in parts:
            path = f"{path}.{part}".lstrip(".")
            if not isinstance(self.modules[path], (nn.ModuleList, nn.ModuleDict)):
                break
        leaf = next(self.modules[path].children(), None) is None
        return path.rpartition(".")[0] if leaf else path

    def _last(self, part: str, writers: list[Matrix], members: list[Matrix]) -> list[Matrix]:
        fed = _feeding({m.short for m in members})
        rest = [m for m in writers if m.short not in fed]
        if len(rest) <= 1:
            return rest or writers
        siblings = len({m.owner.rpartition(".")[0] for m in members}) == 1
        named = [m for m in writers if m.short in _LAST]
        if part and siblings and len(named) == 1 and named[0] is writers[-1]:
            return named
        return writers[-1:] if _is_numbered(members) or self._is_chained(members) else rest

    def _is_chained(self, members: list[Matrix]) -> bool:
        """Whether the matrices stand in different places of one Sequential, hence follow each other."""
        owners = [m.owner.split(".") for m in members]
        common = 0
        while len({tuple(owner[: common + 1]) for owner in owners}) == 1:
            common += 1
        chain = self.modules[".".join(owners[0][:common])]
        return isinstance(chain, nn.Sequential) and len({owner[common] for owner in owners}) == len(members)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that compiling or checkpointing wrapped.

    Examples:
        >>> unwrapped(nn.Identity())
        Identity()
    """
    inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization, by its class's name.

    Examples:
        >>> is_norm(nn.BatchNorm1d(2)), is_norm(nn.Linear(2, 2))
        (True, False)
    """
    return next(module.children(), None) is None and "norm" in type(module).__name__.lower()


def holds_parameters(module: nn.Module) -> bool:
    """Whether a module or one of its children has parameters.

    Examples:
        >>> holds_parameters(nn.Sequential(nn.ReLU())), holds_parameters(nn.Linear(1, 1))
        (False, True)
    """
    return next(module.parameters(), None) is not None


def is_skipped(path: str) -> bool:
    """Whether a path inside a block carries the stream itself.

    Examples:
        >>> is_skipped("downsample.0"), is_skipped("conv1")
        (True, False)
    """
    return any(part in SKIP_PATHS for part in path.split("."))


def _matrices(path: str, module: nn.Module, layouts: Mapping[str, Layout]) -> Iterator[Matrix]:
    for attribute, parameter in module.named_parameters(recurse=False):
        name, shape = f"{path}.{attribute}".lstrip("."), tuple(parameter.shape)
        layout = layouts.get(name) or layout_of(module, attribute)
        if layout is None and not is_elementwise(shape):
            raise Unclear(f"{name!r} of shape {shape} is a bare parameter")
        if layout is None or layout.lookup or len(shape) < 2 or layout.role in (Role.VECTOR, Role.SCALAR):
            continue
        if layout.axes_in(len(shape)) and not _is_depthwise(module):
            yield Matrix(name, path, layout.size(shape, "out"), layout.size(shape, "in"))


def _expert(owner: str) -> str:
    """Return the path of the expert that a module belongs to, "" outside of experts."""
    found = re.match(r"(.*expert[^.]*(\.\d+)?)(\.|$)", owner)
    return found[1] if found else ""


def _is_numbered(members: list[Matrix]) -> bool:
    """Whether the names count up (conv1, conv2, conv3), as of layers that follow each other."""
    found = [_NUMBERED.fullmatch(m.short) for m in members]
    stems = {m[1] for m in found if m}
    numbers = [int(m[2]) for m in found if m]
    return all(found) and len(stems) == 1 and numbers == sorted(numbers)


def _feeding(names: set[str]) -> set[str]:
    trios = {name for trio in _ATTENTION if names >= set(trio) for name in trio}
    return trios | {name for last, feeds in _FEEDS.items() if last in names for name in feeds}


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels
