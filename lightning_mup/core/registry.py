"""One file is one entry: folders of the package are scanned, third parties use entry points."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points


def near(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest choice, or nothing.

    Examples:
        >>> near("mupp", ["mup", "sp"])
        "; did you mean 'mup'?"
        >>> near("zzz", ["mup", "sp"])
        ''
    """
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def collect(package: str, kind: type) -> dict[str, object]:
    """Return every object of one type that a package's modules or an entry-point group of that name define, by name.

    Each module of the package (one file = one entry) and each entry point of the group ``package`` may hold objects
    with a ``name``; two different ones of the same name are refused.

    Raises:
        ValueError: two entries have one name, or an entry point is of another type.

    Examples:
        >>> from lightning_mup.core.rules import Rules
        >>> "mup" in collect("lightning_mup.rules", Rules)
        True
    """
    home = importlib.import_module(package)
    found: dict[str, object] = {}
    for info in pkgutil.iter_modules(home.__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, kind):
                _add(found, value, f"{package}.{info.name}")
    for point in entry_points(group=package):
        value = point.load()
        if not isinstance(value, kind):
            raise ValueError(f"entry point {point.value!r} of {package!r} must be a {kind.__name__}, got {value!r}")
        _add(found, value, point.value)
    return found


def _add(found: dict[str, object], value: object, where: str) -> None:
    name = str(getattr(value, "name", ""))
    if found.setdefault(name, value) is not value:
        raise ValueError(f"the name {name!r} is taken twice, the second time by {where}; rename one of the two")
