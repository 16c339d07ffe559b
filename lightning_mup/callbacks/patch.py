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
    with its class's own method, and Lightning's ``is_overridden`` sees through it. Patching twice does nothing.

    Examples:
        >>> module = LightningModule()
        >>> patch_method(module, "setup", after=lambda m: print("seen"))
        >>> module.setup("fit")
        seen
        >>> unpatch_method(module, "setup")
        >>> module.setup("fit")
    """
    if getattr(module.__dict__.get(name), _OURS, False):
        return
    earlier = module.__dict__.get(name)
    original = getattr(type(module), name)

    @functools.wraps(original)
    def wrapper(self: LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the original
        bound = earlier or types.MethodType(original, self)
        if instead is not None:
            return instead(self, bound)
        result = bound(*args, **kwargs)
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
    if not getattr(found, _OURS, False):
        return
    del module.__dict__[name]
    if (earlier := found.__func__.earlier) is not None:
        module.__dict__[name] = earlier
