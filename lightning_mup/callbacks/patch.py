"""Wrap a method of one module instance so that copies and pickles stay sound."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

_OURS = "_lightning_mup_patch"


def patch_method(
    module: LightningModule,
    name: str,
    *,
    after: Callable[[LightningModule], None] | None = None,
    instead: Callable[[LightningModule, Callable[..., Any]], Any] | None = None,
    inside: bool = False,
) -> None:
    """Call something after a method of this instance, or instead of it with the original at hand.

    The wrapper is a bound method: a deep copy of the module gets one bound to the copy, a pickled module comes back
    with its class's own method, and Lightning's ``is_overridden`` sees through it. A patch replaces an earlier one;
    but one ``inside`` and one that is not stand together, whichever came first: the former is the latter's original.

    Examples:
        >>> module = LightningModule()
        >>> patch_method(module, "setup", after=lambda m: print("seen"))
        >>> module.setup("fit")
        seen
        >>> unpatch_method(module, "setup")
        >>> module.setup("fit")
    """

    def layer(self: LightningModule, call: Callable[..., Any]) -> Any:  # noqa: ANN401 - as the original
        if instead is not None:
            return instead(self, call)
        result = call()
        if after is not None:
            after(self)
        return result

    layers = {**_layers(module, name), inside: layer}  # one may be left over from a run that raised
    _install(module, name, layers)


def unpatch_method(module: LightningModule, name: str, *, inside: bool = False) -> None:
    """Take a patch off again, if there is one; what an instance had before comes back.

    Examples:
        >>> unpatch_method(LightningModule(), "setup")
    """
    layers = _layers(module, name)
    if inside in layers:
        _install(module, name, {key: layer for key, layer in layers.items() if key != inside})


def _layers(module: LightningModule, name: str) -> dict[bool, Callable[..., Any]]:
    found = getattr(module.__dict__.get(name), _OURS, None)
    return dict(found) if found else {}


def _install(module: LightningModule, name: str, layers: dict[bool, Callable[..., Any]]) -> None:
    earlier = module.__dict__.pop(name, None)
    if getattr(earlier, _OURS, None):
        earlier = earlier.__func__.earlier
    if earlier is not None:
        module.__dict__[name] = earlier
    if not layers:
        return
    original = getattr(type(module), name) if earlier is None else _unbound(earlier, module)

    @functools.wraps(original)
    def wrapper(self: LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the original
        call: Callable[..., Any] = functools.partial(original, self, *args, **kwargs)
        for inside in sorted(layers, reverse=True):
            call = functools.partial(layers[inside], self, call)
        return call()

    setattr(wrapper, _OURS, layers)
    wrapper.__dict__["earlier"] = earlier
    module.__dict__[name] = types.MethodType(wrapper, module)


def _unbound(method: Callable[..., Any], module: LightningModule) -> Callable[..., Any]:
    """Return a method that an instance had of its own, as a function of the instance, so that copies call theirs."""
    if isinstance(method, types.MethodType) and method.__self__ is module:
        return method.__func__

    @functools.wraps(method)
    def function(self: LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the original
        return method(*args, **kwargs)

    return function
