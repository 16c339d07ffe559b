"""Repeated blocks: how a deeper model's names map onto the base, and where its residual branches end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_mup.core.base import canonical
from lightning_mup.core.layout import layout_of
from lightning_mup.core.spec import Dim

SKIP_PATHS = ("downsample", "shortcut", "skip", "skip_connection")
"""Children of a block that carry the stream itself (ResNets), not a branch."""


@dataclass(frozen=True, slots=True)
class Container:
    """A ModuleList or Sequential of alike children, here and in the base."""

    kind: str  # qualified class name of the children
    size: int
    base: int
    index: tuple[int, ...]  # the base's child for each child
    composite: bool  # children have submodules, hence may be residual blocks


class Blocks:
    """The repeated blocks of a model against a base.

    Args:
        model: the target.
        base_names: parameter names of the base.

    Examples:
        >>> layer = lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        >>> model = nn.Sequential(*[layer() for _ in range(6)])
        >>> blocks = Blocks(model, [f"{i}.1.weight" for i in range(3)])
        >>> blocks.base_name("5.1.weight"), str(blocks.depth("5.1.weight")[0])
        ('2.1.weight', '6/3')
    """

    def __init__(self, model: nn.Module, base_names: Iterable[str]) -> None:
        self._containers: dict[str, Container] = {}
        base_names = list(base_names)
        for path, module in model.named_modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(module):
                self._add(canonical(f"{path}.").strip("."), module, base_names)

    def _add(self, path: str, module: nn.ModuleList | nn.Sequential, base_names: list[str]) -> None:
        prefix = f"{self.base_name(path)}." if path else ""
        indices = {name[len(prefix) :].split(".")[0] for name in base_names if name.startswith(prefix)}
        base = len([index for index in indices if index.isdigit()]) or len(module)
        first = module[0]
        kind = f"{type(first).__module__}.{type(first).__qualname__}"
        composite = next(first.children(), None) is not None
        self._containers[path] = Container(kind, len(module), base, _align(list(module), base), composite)

    def base_name(self, name: str) -> str:
        """Return the base's name for a name of the target: first and last blocks to first and last, others to alike."""
        mapped: list[str] = []
        seen: list[str] = []
        for part in name.split("."):
            container = self._containers.get(".".join(seen))
            mapped.append(str(container.index[int(part)]) if container else part)
            seen.append(part)
        return ".".join(mapped)

    def resized(self, name: str) -> bool:
        """Whether the name lies in a container whose number of children differs from the base's."""
        return any(c.size != c.base for _, c in self._around(name))

    def depth(self, name: str) -> tuple[Dim, str]:
        """Return the number of residual blocks in series of the name's kind, here and in the base, and the block.

        The block is the innermost one whose number differs from the base's, else the outermost one.
        """
        around = [(path, c) for path, c in self._around(name) if c.composite]
        if not around:
            return Dim(1, 1), ""
        changed = [(path, c) for path, c in around if self._total(c.kind).ratio != 1]
        path, container = changed[-1] if changed else around[0]
        index = name[len(path) + 1 if path else 0 :].split(".")[0]
        return self._total(container.kind), f"{path}.{index}".lstrip(".")

    def _total(self, kind: str) -> Dim:
        alike = [c for c in self._containers.values() if c.kind == kind]
        return Dim(sum(c.size for c in alike), sum(c.base for c in alike))

    def _around(self, name: str) -> list[tuple[str, Container]]:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(len(parts)))
        return [(p, self._containers[p]) for p in prefixes if p in self._containers]


def branch_ends(model: nn.Module, block_names: Iterable[str]) -> tuple[set[str], list[str]]:
    """Find the last matrix (and its bias) of each residual branch of each block.

    Each submodule of a block that holds matrices is taken for one branch, and so are all matrices that the block
    holds directly; the branch ends in its last matrix that writes the stream's width. A batch norm registered right
    after that matrix rescales it, so the branch ends there instead.

    Returns:
        Names of the parameters that end a branch, and names of the blocks where this cannot be told.

    Examples:
        >>> layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64), 1, enable_nested_tensor=False)
        >>> sorted(branch_ends(layers, ["layers.0"])[0])[::2]
        ['layers.0.linear2.bias', 'layers.0.self_attn.out_proj.bias']
    """
    ends: set[str] = set()
    unclear: list[str] = []
    modules = {canonical(f"{name}.").strip("."): module for name, module in model.named_modules()}
    for name in block_names:
        found = _ends_of(modules[name])
        if found:
            ends |= {f"{name}.{end}" for end in found}
        else:
            unclear.append(name)
    return ends, unclear


def _ends_of(block: nn.Module) -> set[str]:
    width = _stream_width(block)
    groups: Mapping[str, list[tuple[str, nn.Module]]] = _branches(block)
    if any(len(_matrices(owners)) > 3 for child, owners in groups.items() if not child):
        return set()  # attention and MLP side by side in the block itself: order does not tell where one ends
    ends: set[str] = set()
    for owners in groups.values():
        writers = [i for i, (_, m) in enumerate(owners) if _written(m) == width]
        if not writers:
            continue
        last = writers[-1]
        if last + 1 < len(owners) and isinstance(owners[last + 1][1], nn.modules.batchnorm._BatchNorm):
            last += 1
        path, owner = owners[last]
        ends |= {canonical(f"{path}.{n}").lstrip(".") for n, _ in owner.named_parameters(recurse=False)}
    return ends


def _branches(block: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    groups: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, module in block.named_modules():
        child = path.split(".")[0]
        if next(module.parameters(recurse=False), None) is None or child in SKIP_PATHS:
            continue
        direct = next(block.get_submodule(child).children(), None) is None
        groups["" if direct else child].append((path, module))
    return groups


def _matrices(owners: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    return [m for _, m in owners if _written(m) is not None]


def _stream_width(block: nn.Module) -> int | None:
    norms = (p for p in block.parameters() if p.ndim == 1 and p.numel() > 1)
    widths = [w for m in block.modules() if (w := _written(m)) is not None]
    named = next((p.numel() for n, p in block.named_parameters() if "norm" in n.lower() or "ln" in n.lower()), None)
    if named in widths:
        return named
    return widths[-1] if widths else next((p.numel() for p in norms), None)


def _written(module: nn.Module) -> int | None:
    """Width that a module's own matrix writes; None where it has no matrix."""
    for attribute, parameter in module.named_parameters(recurse=False):
        layout = layout_of(module, attribute)
        if layout is not None and parameter.ndim >= 2 and attribute == "weight":
            return int(parameter.shape[layout.fan_out[0]])
    return None


def _alike(module: nn.ModuleList | nn.Sequential) -> bool:
    kinds = {type(child) for child in module}
    return len(kinds) == 1 and all(next(child.parameters(), None) is not None for child in module)


def _align(children: list[nn.Module], base: int) -> tuple[int, ...]:
    """Map first blocks to first, last to last, and those between to whichever of these they are alike."""
    size, head = len(children), (base + 1) // 2
    fixed = {i: i for i in range(min(head, size))} | {size - 1 - i: base - 1 - i for i in range(base - head)}
    alike = [[(n, p.shape) for n, p in child.named_parameters()] for child in children]
    twins = [next((fixed[k] for k in reversed(sorted(fixed)) if alike[k] == own), head - 1) for own in alike]
    return tuple(fixed.get(i, twins[i]) for i in range(size))
