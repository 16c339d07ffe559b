"""Settings by name pattern: every pattern must match, and none twice."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lightning_mup.core.registry import near

T = TypeVar("T")


def match(patterns: Mapping[str, T], names: Iterable[Iterable[str]], what: str) -> dict[str, T]:
    """Return the setting of each parameter that a pattern names.

    Args:
        patterns: shell-style patterns (``*.q_proj.weight``) or plain names, with their settings.
        names: for each parameter all its names, the canonical one first.
        what: what the patterns are, for the error.

    Raises:
        ValueError: a pattern matches no parameter, or two patterns match one.

    Examples:
        >>> match({"*.wq": 1}, [["a.wq"], ["a.wo"]], "multipliers")
        {'a.wq': 1}
        >>> match({"a.wk": 1}, [["a.wq"], ["a.wo"]], "multipliers")
        Traceback (most recent call last):
        ValueError: multipliers: pattern 'a.wk' matches no parameter; did you mean 'a.wq'?
    """
    groups = [list(group) for group in names]
    found: dict[str, T] = {}
    used: dict[str, str] = {}
    for pattern, value in patterns.items():
        hits = [group[0] for group in groups if any(fnmatch.fnmatchcase(name, pattern) for name in group)]
        if not hits:
            known = [name for group in groups for name in group]
            raise ValueError(f"{what}: pattern {pattern!r} matches no parameter{near(pattern, known)}")
        for name in hits:
            if name in used:
                raise ValueError(
                    f"{what}: {name!r} is matched by {used[name]!r} and by {pattern!r}; make the patterns disjoint"
                )
            used[name], found[name] = pattern, value
    return found
