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
) -> None:
    """Call something after a method of this instance, or instead of it with the original at hand.

    The wrapper is a bound method: a deep copy of the module gets one bound to the copy, a pickled module comes back
    with its class's own method, and Lightning's ``is_overridden`` sees through it. A patch replaces an earlier one.

    Examples:
        >>> module = LightningModule()
        >>> patch_method(module, "setup", after=lambda m: print("seen"))
        >>> module.setup("fit")
        seen
        >>> unpatch_method(module, "setup")
        >>> module.setup("fit")
    """
    unpatch_method(module, name)  # one may be left over from a run that raised
    earlier = module.__dict__.get(name)
    original = getattr(type(module), name) if earlier is None else _unbound(earlier, module)

    @functools.wraps(original)
    def wrapper(self: LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the original
        call = functools.partial(original, self, *args, **kwargs)
        if instead is not None:
            return instead(self, call)
        result = call()
        if after is not None:
            after(self)
        return result

    setattr(wrapper, _OURS, True)
    wrapper.__dict__["earlier"] = earlier
    module.__dict__[name] = types.MethodType(wrapper, module)


def unpatch_method(module: LightningModule, name: str) -> None:
    """Take a patch off again, if there is one; what an instance had before comes back.

    Examples:
        >>> unpatch_method(LightningModule(), "setup")
    """
    found = module.__dict__.get(name)
    if found is None or not getattr(found, _OURS, False):
        return
    del module.__dict__[name]
    if (earlier := found.__func__.earlier) is not None:
        module.__dict__[name] = earlier


def _unbound(method: Callable[..., Any], module: LightningModule) -> Callable[..., Any]:
    """Return a method that an instance had of its own, as a function of the instance, so that copies call theirs."""
    if isinstance(method, types.MethodType) and method.__self__ is module:
        return method.__func__

    @functools.wraps(method)
    def function(self: LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the original
        return method(*args, **kwargs)

    return function
