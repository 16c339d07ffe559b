"""Find what a command line names, and call it: every failure becomes one sentence for the user."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_mup.core.registry import near

Settings = Mapping[str, object]


def load(target: str) -> Callable[..., object]:
    """Return the class or function that ``package.module:name`` names.

    Args:
        target: module and attribute, separated by a colon; the attribute may be dotted.

    Raises:
        ValueError: there is no such module or attribute, or importing it fails.

    Examples:
        >>> load("torch.optim:Adam").__name__
        'Adam'
        >>> load("torch.optim:Adamm")
        Traceback (most recent call last):
        ValueError: 'torch.optim' has no 'Adamm'; name a class or a function in it; did you mean 'Adam'?
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"{target!r} must be package.module:name, as in my_project.model:LitGPT")
    found: object = _import(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise ValueError(f"{module_name!r} has no {path!r}; name a class or a function in it{near(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{target!r} must be a class or a function, got {found!r}")
    return found


def keywords(function: Callable[..., object]) -> list[str] | None:
    """Return the keywords that a function takes; None where it takes any or does not say.

    Examples:
        >>> keywords(lambda width, *, depth=1: None)
        ['width', 'depth']
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def build_module(factory: Callable[..., object], target: str, settings: Settings) -> nn.Module:
    """Return the module that a factory makes, with the parameters that its ``configure_model`` builds.

    Args:
        factory: what :func:`load` found.
        target: how the user named it, for messages.
        settings: keyword arguments.

    Raises:
        ValueError: the factory does not take a keyword, fails, or makes something else.

    Examples:
        >>> build_module(nn.Linear, "torch.nn:Linear", {"in_feature": 2})
        Traceback (most recent call last):
        ValueError: torch.nn:Linear takes no 'in_feature'; it takes in_features, ..., dtype; did you mean 'in_features'?
    """
    made = _called(factory, target, (), settings)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{target} must make a torch module, got {made!r}")
    configure = getattr(made, "configure_model", None)
    if configure is not None and next(made.parameters(), None) is None:
        _called(configure, f"{target}.configure_model", (), {})
    return made


def build_optimizer(
    kind: Callable[..., object], target: str, params: Sequence[nn.Parameter], settings: Settings
) -> Optimizer:
    """Return the optimizer of some parameters.

    Args:
        kind: what :func:`load` found.
        target: how the user named it, for messages.
        params: the parameters, its first argument.
        settings: further arguments.

    Raises:
        ValueError: it does not take a keyword, fails, or makes something else.
    """
    made = _called(kind, target, (list(params),), settings)
    if not isinstance(made, Optimizer):
        raise ValueError(f"{target} must make a torch optimizer, got {made!r}")
    return made


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"importing {name!r} failed: {error}") from error
        beside = [info.name for info in pkgutil.iter_modules([os.getcwd()])]
        raise ValueError(
            f"no module {error.name!r} in {os.getcwd()} or in the environment{near(error.name, beside)}; run in the "
            f"folder that holds it, or install it"
        ) from error
    except Exception as error:  # the module is the user's, and may fail in any way
        raise ValueError(f"importing {name!r} failed with {type(error).__name__}: {error}") from error


def _called(function: Callable[..., object], target: str, positional: Sequence[object], settings: Settings) -> object:
    _check_keywords(function, target, settings)
    try:
        return function(*positional, **settings)
    except Exception as error:  # the function is the user's, and may fail in any way
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise ValueError(f"{target} called with ({given}) failed with {type(error).__name__}: {error}") from error


def _check_keywords(function: Callable[..., object], target: str, settings: Settings) -> None:
    known = keywords(function)
    unknown = [] if known is None else [key for key in settings if key not in known]
    if known is not None and unknown:
        raise ValueError(f"{target} takes no {unknown[0]!r}; it takes {', '.join(known)}{near(unknown[0], known)}")
