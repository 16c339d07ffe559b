"""Parameters that a module multiplies by hand, so that its submodules do not tell what they are."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

from lightning_mup.core.base import canonical

_PRODUCTS = ("matmul", "einsum", "linear", "dot", "mv", "mm", "bmm", "inner", "tensordot")
_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.", "builtins")
_NOT_RUN = ("__init__", "reset_parameters", "tie_weights", "configure_optimizers")


def hand_products(model: nn.Module) -> set[str]:
    """Return the names of parameters that a module's own code uses as a factor of a matrix product.

    Read off the source: ``x @ self.embedding.weight.T``, ``F.linear(x, self.table)``, ``einsum(..., self.v)``. What
    is reached otherwise (through a variable, a helper function) is not seen.

    Examples:
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(8, 4)
        ...
        ...     def forward(self, x):
        ...         return self.table(x) @ self.table.weight.T
        >>> hand_products(Tied())
        {'table.weight'}
    """
    found: set[str] = set()
    factors = {kind: _factors(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        for chain in factors[type(module)]:
            owner, _, attribute = chain.rpartition(".")
            if isinstance(getattr(_reach(module, owner), attribute, None), nn.Parameter):
                found.add(canonical(f"{path}.{chain}").lstrip("."))
    return found


def _reach(module: nn.Module, path: str) -> object:
    found: object = module
    for part in path.split(".") if path else []:
        found = getattr(found, part, None)
    return found


def _factors(cls: type) -> tuple[str, ...]:
    chains: list[str] = []
    for base in inspect.getmro(cls):
        if not f"{base.__module__}.".startswith(_LIBRARIES):
            functions = [f for n, f in vars(base).items() if inspect.isfunction(f) and n not in _NOT_RUN]
            chains += [chain for function in functions for chain in _in_source(function)]
    return tuple(dict.fromkeys(chains))


def _in_source(function: object) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        for operand in _operands(node):
            chain = _chain(operand)
            if chain:
                yield chain


def _operands(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return [node.left, node.right]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _PRODUCTS:
        return [node.func.value, *node.args]
    return list(node.args) if isinstance(node, ast.Call) and _name(node.func) in _PRODUCTS else []


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _chain(node: ast.expr) -> str:
    """Return ``a.b`` for ``self.a.b``, also where it is transposed, cast or indexed; else nothing."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _chain(node.func.value)
    if isinstance(node, ast.Subscript):
        return _chain(node.value)
    if not isinstance(node, ast.Attribute):
        return ""
    if node.attr in ("T", "mT", "H", "mH", "data"):
        return _chain(node.value)
    inner = _chain(node.value)
    return node.attr if _name(node.value) == "self" else f"{inner}.{node.attr}" if inner else ""
