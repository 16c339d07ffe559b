"""Repeated blocks: how a deeper model's names map onto the base, and how many there are in series."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lightning_mup.core.base import canonical
from lightning_mup.core.flow import bare_path
from lightning_mup.core.spec import ONE, Dim
from lightning_mup.core.structure import SKIP_PATHS, unwrapped

_PARALLEL = ("expert", "head")  # lists of modules that are called side by side, not one after the other


@dataclass(frozen=True, slots=True)
class Container:
    """A ModuleList or Sequential of alike children, here and in the base.

    Args:
        kind: qualified class name of the children, with the container's path, numbers left out.
        size: how many children.
        base: how many in the base.
        index: the base's child for each child.
        serial: whether the children follow each other along the residual stream.
        composite: whether the children have children, hence may be residual blocks.
    """

    kind: str
    size: int
    base: int
    index: tuple[int, ...]
    serial: bool
    composite: bool


class Blocks:
    """The repeated blocks of a model against a base.

    Lists inside of a block are taken to work side by side (heads, experts), unless the block is a mere stage: holds
    nothing but the list, and what changes resolution.

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
        self._modules = {bare_path(n): m for n, m in model.named_modules(remove_duplicate=False)}
        base_names = list(base_names)
        for path, module in self._modules.items():
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(module):
                self._add(path, module, base_names)

    def _add(self, path: str, module: nn.ModuleList | nn.Sequential, base_names: list[str]) -> None:
        prefix = f"{self.base_name(path)}." if path else ""
        indices = {name[len(prefix) :].split(".")[0] for name in base_names if name.startswith(prefix)}
        base = len([index for index in indices if index.isdigit()]) or len(module)
        children = [unwrapped(child) for child in module]
        kind = f"{re.sub('[0-9]+', '#', path)} {type(children[0]).__module__}.{type(children[0]).__qualname__}"
        composite = next(children[0].children(), None) is not None
        matrices = any(p.ndim > 1 for p in children[0].parameters())
        # A list of bare matrices may be a residual network or a plain one: nothing hangs on it while the number stays.
        serial = matrices and (composite or len(module) != base) and self._in_series(path)
        self._containers[path] = Container(kind, len(module), base, _align(children, base), serial, composite)

    def _in_series(self, path: str) -> bool:
        own = [part for part in path.split(".") if not part.isdigit()]
        if own and any(word in own[-1].lower() for word in _PARALLEL):
            return False
        around = self._around(path)
        if not around:
            return True
        outer, container = around[-1]
        if not container.composite:
            return True
        index = path[len(outer) + 1 if outer else 0 :].split(".", maxsplit=1)[0]
        child = f"{outer}.{index}".lstrip(".")
        rest = (n for n, p in self._modules[child].named_parameters(prefix=child) if p.ndim > 1)
        return all(canonical(n).startswith(f"{path}.") or _changes_resolution(n) for n in rest)

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

    def side_by_side(self, name: str) -> str:
        """Return the path of the list of parallel parts (heads) around a name whose number grows, else "".

        Experts are left out: each is a matrix of its own, however many there are.
        """
        paths = [p for p, c in self._around(name) if c.size != c.base and not c.serial and c.composite]
        return next((p for p in paths if "expert" not in p.lower()), "")

    def depth(self, name: str) -> tuple[Dim, str]:
        """Return the number of residual blocks in series of the name's kind, here and in the base, and the block.

        The block is the innermost one whose number differs from the base's, else the innermost one.
        """
        around = [(path, c) for path, c in self._around(name) if c.serial]
        if not around:
            return ONE, ""
        changed = [(path, c) for path, c in around if self._total(c.kind).ratio != 1]
        path, container = (changed or around)[-1]
        index = name[len(path) + 1 if path else 0 :].split(".", maxsplit=1)[0]
        return self._total(container.kind), f"{path}.{index}".lstrip(".")

    def is_composite(self, block: str) -> bool:
        """Whether a block has parts, rather than being a single matrix of a list of matrices."""
        return self._containers[block.rpartition(".")[0]].composite

    def _total(self, kind: str) -> Dim:
        alike = [c for c in self._containers.values() if c.kind == kind]
        return Dim(sum(c.size for c in alike), sum(c.base for c in alike))

    def _around(self, name: str) -> list[tuple[str, Container]]:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(len(parts)))
        return [(p, self._containers[p]) for p in prefixes if p in self._containers]


def _changes_resolution(name: str) -> bool:
    return any(part in SKIP_PATHS or "downsampl" in part or "upsampl" in part for part in name.split("."))


def _alike(module: nn.ModuleList | nn.Sequential) -> bool:
    kinds = {type(unwrapped(child)) for child in module}
    counted = all(name == str(i) for i, (name, _) in enumerate(module.named_children()))
    return len(kinds) == 1 and counted and all(next(child.parameters(), None) is not None for child in module)


def _align(children: list[nn.Module], base: int) -> tuple[int, ...]:
    """Map first blocks to first, last to last, and those between to whichever of these they are alike."""
    size, head = len(children), (base + 1) // 2
    fixed = {i: i for i in range(min(head, size))} | {size - 1 - i: base - 1 - i for i in range(base - head)}
    alike = [[(canonical(n), p.shape) for n, p in child.named_parameters()] for child in children]
    twins = [next((fixed[k] for k in reversed(sorted(fixed)) if alike[k] == own), head - 1) for own in alike]
    return tuple(fixed.get(i, twins[i]) for i in range(size))
