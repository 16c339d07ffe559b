"""What a module's own ``forward`` adds to what: read off its source, since no inputs are at hand to trace it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from lightning_mup.core.base import canonical

Makers = frozenset[str]
"""The submodules that made a value, as paths, beside the marks below."""
NOTHING: Makers = frozenset()
SUM, BENT, GIVEN = "+", "~", "."
"""Marks of values: a sum, past a nonlinearity, an argument of ``forward``."""
_SUM: Makers = frozenset({SUM})
_BENDING = ("gelu", "silu", "swish", "tanh", "sigmoid", "softmax", "softplus", "elu", "mish", "exp", "norm")
# Between a matrix and the sum these change nothing but a positive factor: f(a x) = a f(x) for a > 0.
HOMOGENEOUS = ("Dropout", "DropPath", "StochasticDepth", "Identity", "ReLU", "LeakyReLU", "Pool", "Flatten", "Upsample")
_SIZES = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")  # say nothing of a tensor's values
_MAX_CALLS = 6


@dataclass(slots=True)
class Flow:
    """What a ``forward`` does with its submodules' results.

    Args:
        sums: the makers of the two sides of every sum.
        makers: the makers of what is returned (the first of several).
        inputs: the makers of each submodule's first argument.
    """

    sums: list[tuple[Makers, Makers]] = field(default_factory=list)
    makers: Makers = NOTHING
    inputs: dict[str, Makers] = field(default_factory=dict)

    def feeds(self, makers: Iterable[str]) -> set[str]:
        """Return everything whose results go into these submodules, up to sums.

        Examples:
            >>> sorted(flow_of(nn.TransformerEncoderLayer(16, 2, norm_first=True)).feeds(["linear2"]))
            ['+', 'linear1', 'norm2', '~']
        """
        seen: set[str] = set()
        queue = list(makers)
        while queue:
            new = self.inputs.get(queue.pop(), NOTHING) - seen
            seen |= new
            queue += new
        return seen


def flow_of(module: nn.Module) -> Flow | None:
    """Read a module's ``forward``; None where its source cannot be had.

    Branches of an ``if`` on a plain attribute of the module (``norm_first``) are decided, others are both followed.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(16, 2, norm_first=True)
        >>> [sorted(side) for pair in flow_of(layer).sums for side in pair]
        [['.'], ['self_attn'], ['+'], ['linear2']]
    """
    tree = _source(type(module).forward)
    if tree is None:
        return None
    arguments = [a.arg for a in (*tree.args.args[1:], *tree.args.kwonlyargs)]
    walker = _Walker(module, Flow(), dict.fromkeys(arguments, frozenset({GIVEN})), 0)
    walker.run(tree.body)
    walker.flow.makers = walker.returned
    return walker.flow


@cache
def _source(function: Callable[..., object]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # built in a notebook that is gone, by exec, or in C
        return None
    found = tree.body[0]
    return found if isinstance(found, ast.FunctionDef) else None


class _Walker:
    """Runs through a function body once, in order, with names bound to makers."""

    def __init__(self, module: nn.Module, flow: Flow, names: dict[str, Makers], calls: int) -> None:
        self.module, self.flow, self.names, self.calls = module, flow, names, calls
        self.returned: Makers = NOTHING

    # -- statements -----------------------------------------------------------------------------------------------

    def run(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            self.bind(node.targets[0], self.value(node.value))
        elif isinstance(node, (ast.AnnAssign, ast.Expr, ast.Return)):
            self._single(node)
        elif isinstance(node, ast.AugAssign):
            both = (self.value(node.target), self.value(node.value))
            self.bind(node.target, self._binary(node.op, *both))
        elif isinstance(node, ast.If):
            self._if(node)
        elif isinstance(node, (ast.For, ast.With, ast.Try, ast.While)):
            if isinstance(node, ast.For):
                self.bind(node.target, self._each(self.value(node.iter)))
            self.run(node.body)

    def _each(self, made: Makers) -> Makers:
        """Mark what runs through a list of modules: ``layers.*`` is one of them, ``layers`` the whole in a row."""
        lists = (nn.ModuleList, nn.Sequential)
        return frozenset(
            f"{m}.*" if m[0].isalpha() and isinstance(self.module.get_submodule(m), lists) else m for m in made
        )

    def _single(self, node: ast.AnnAssign | ast.Expr | ast.Return) -> None:
        made = NOTHING if node.value is None else self.value(node.value)
        if isinstance(node, ast.AnnAssign):
            self.bind(node.target, made)
        elif isinstance(node, ast.Return):
            self.returned |= made

    def bind(self, target: ast.expr, made: Makers) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = made
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.bind(part, made)

    def _if(self, node: ast.If) -> None:
        known = self._known(node.test)
        if known is not None:
            self.run(node.body if known else node.orelse)
            return
        start = dict(self.names)
        self.run(node.body)
        first, self.names = self.names, start
        self.run(node.orelse)
        ended = node.body and isinstance(node.body[-1], (ast.Return, ast.Raise))
        if not ended:
            self.names = {key: first.get(key, NOTHING) | self.names.get(key, NOTHING) for key in first | self.names}

    def _known(self, test: ast.expr) -> bool | None:
        """Whether a test on an attribute of the module holds, None where that cannot be told."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._known(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            found = self._attribute(test.left)
            if found is ... or not isinstance(test.comparators[0], ast.Constant):
                return None
            return (found is None) == isinstance(test.ops[0], ast.Is)
        found = self._attribute(test)
        return bool(found) if isinstance(found, (bool, nn.Module, type(None))) else None

    def _attribute(self, node: ast.expr) -> object:
        """Return what ``self.config.parallel`` holds now, ``...`` where it is no such thing or changes in training."""
        path = _dotted(node)
        found: object = self.module if path and path != "training" else ...
        for part in (path or "").split("."):
            found = getattr(found, part, ...)
        return found

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Makers:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, NOTHING)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp):
            return self._sum_or_product(node)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._part(node)
        if isinstance(node, (ast.Tuple, ast.List)) and node.elts:
            made = [self.value(part) for part in node.elts]
            return made[0] if isinstance(node, ast.Tuple) else NOTHING.union(*made)
        return NOTHING.union(*(self.value(c) for c in _values_in(node)))

    def _sum_or_product(self, node: ast.BinOp) -> Makers:
        sides = [self.value(side) for side in (node.left, node.right)]
        if any(_is_number_or_tuple(side) for side in (node.left, node.right)):
            return sides[0] | sides[1]
        return self._binary(node.op, *sides)

    def _part(self, node: ast.Attribute | ast.Subscript) -> Makers:
        path = self._submodule(node)
        if path is not None:
            return frozenset({path}) if self._holds(path) else NOTHING
        return NOTHING if isinstance(node, ast.Attribute) and node.attr in _SIZES else self.value(node.value)

    def _holds(self, path: str) -> bool:
        module = self.module.get_submodule(path)
        return isinstance(module, (nn.ModuleList, nn.ModuleDict)) or next(module.parameters(), None) is not None

    def _binary(self, operator: ast.operator, left: Makers, right: Makers) -> Makers:
        if not isinstance(operator, (ast.Add, ast.Sub)):
            return left | right
        self.flow.sums.append((left, right))
        return _SUM

    def _call(self, node: ast.Call) -> Makers:
        given = [self.value(part) for part in (*node.args, *(k.value for k in node.keywords))]
        path, name = self._submodule(node.func), _dotted(node.func)
        if path is not None:
            return self._pass_through(path, given[0] if given else NOTHING)
        if isinstance(node.func, ast.Subscript):  # one of a list, whichever
            return self._each(self.value(node.func))
        if name is not None and inspect.isfunction(getattr(type(self.module), name, None)):
            return self._method(name, node, given)
        if isinstance(node.func, ast.Attribute):
            return self._attribute_call(node.func, given)
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        # A name bound by a loop is one of the modules looped over, any other a function.
        return self.names.get(called) or _bent(called, NOTHING.union(*given))

    def _attribute_call(self, function: ast.Attribute, given: list[Makers]) -> Makers:
        """Follow ``x.view(...)``, ``F.gelu(x)``, ``torch.add(x, y)`` and functions held by the module."""
        if function.attr in _SIZES:
            return NOTHING
        held = _dotted(function) is not None  # self.activation = F.relu
        own = NOTHING if held else self.value(function.value)
        if function.attr in ("add", "add_", "sub", "sub_"):
            return self._binary(ast.Add(), *([own, *given] if own or len(given) == 1 else given)[:2])
        every = own.union(*given)
        return every | {BENT} if held and every else _bent(function.attr, every)

    def _pass_through(self, path: str, given: Makers) -> Makers:
        module = self.module.get_submodule(path)
        if self._holds(path):
            self.flow.inputs[path] = given
            return frozenset({path})
        return given | {BENT} if given and not is_homogeneous(module) else given

    def _method(self, name: str, node: ast.Call, given: list[Makers]) -> Makers:
        tree = _source(getattr(type(self.module), name))
        if tree is None or self.calls >= _MAX_CALLS:
            return NOTHING.union(*given)
        bound = dict(zip([a.arg for a in tree.args.args[1:]], given, strict=False))
        bound |= {k.arg: self.value(k.value) for k in node.keywords if k.arg}
        inner = _Walker(self.module, self.flow, bound, self.calls + 1)
        inner.run(tree.body)
        return inner.returned

    def _submodule(self, node: ast.expr) -> str | None:
        """Return the path of the submodule that an expression such as ``self.mlp.net[2]`` names."""
        path = _dotted(node)
        if not path:
            return None
        try:
            self.module.get_submodule(path)
        except (AttributeError, KeyError, IndexError):
            return None
        return path


def is_homogeneous(module: nn.Module) -> bool:
    """Whether a module without parameters lets a positive factor through unchanged.

    Examples:
        >>> is_homogeneous(nn.Dropout(0.1)), is_homogeneous(nn.ReLU()), is_homogeneous(nn.GELU())
        (True, True, False)
    """
    parts = [m for m in module.modules() if next(m.children(), None) is None]
    return all(any(word in type(part).__name__ for word in HOMOGENEOUS) for part in parts)


def _bent(function: str, made: Makers) -> Makers:
    return made | {BENT} if made and any(word in function.lower() for word in _BENDING) else made


def bare_path(name: str) -> str:
    """Return a module's path without the parts that compiling and checkpointing put in.

    Examples:
        >>> bare_path("layers.0._checkpoint_wrapped_module")
        'layers.0'
    """
    return canonical(f"{name}.").strip(".")


def _dotted(node: ast.expr) -> str | None:
    """Return ``a.b.0`` for ``self.a.b[0]``, None for anything that does not start at ``self``."""
    if isinstance(node, ast.Name):
        return "" if node.id == "self" else None
    part: object = node.attr if isinstance(node, ast.Attribute) else None
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        part = node.slice.value
    if part is None or not isinstance(node, (ast.Attribute, ast.Subscript)):
        return None
    before = _dotted(node.value)
    return None if before is None else f"{before}.{part}".lstrip(".")


def _is_number_or_tuple(node: ast.expr) -> bool:
    sliced = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)
    return sliced or isinstance(node, (ast.Constant, ast.Tuple))


def _values_in(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the operands of an expression whose value may be any of them (``a if c else b``, ``a or b``, ``*a``)."""
    skipped = node.test if isinstance(node, ast.IfExp) else None
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) and child is not skipped:
            yield child
