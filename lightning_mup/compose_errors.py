"""Hydra's errors in words that say what was given, what there is, and what to write instead."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import cast

from hydra import compose, initialize_config_module
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mup.core.registry import near

_SHOWN = 12
_EXTRAS = {"joblib": "launchers", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""Launcher -> the extra that brings it."""
_PREFIXES = "+~"


def run_plainly(program: Callable[[], object], words: Sequence[str], *, name: str, script: str) -> int:
    """Run a Hydra program with the words of a command line; return 0, or 2 and say why it could not be carried out.

    Args:
        program: decorated by ``hydra.main``.
        words: overrides and Hydra's own options.
        name: of the program, for its messages.
        script: its file, by which Lightning starts further ranks.
    """
    before, sys.argv = sys.argv, [script, *words]
    try:
        with _raising():
            program()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"{name}: {explain(error, config=composed(words))}", file=sys.stderr)
        return 2
    finally:
        sys.argv = before
    return 0


@contextmanager
def _raising() -> Iterator[None]:
    """Let Hydra raise its errors, rather than print them and end the process."""
    key = "HYDRA_FULL_ERROR"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def composed(words: Sequence[str]) -> DictConfig | None:
    """Return the configuration of those words that compose, one after the other; it tells which keys there are.

    Args:
        words: of a command line, options included.

    Examples:
        >>> composed(["--multirun", "method=muon", "seed=oops=", "trainer.max_step=3"]).method.name
        'muon'
    """
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        good: list[str] = []
        for word in words:
            if _compose([*good, word]) is not None:
                good.append(word)
        return _compose(good)


def _compose(words: list[str]) -> DictConfig | None:
    try:
        return compose("train", words, return_hydra_config=True)
    except Exception:  # whatever is wrong with these words, others are tried
        return None


def explain(error: Exception, *, config: DictConfig | None = None) -> str:
    """Return what an error of Hydra says, with a near match among what there is.

    Args:
        error: raised while a configuration was composed or built.
        config: what the rest of the command line composes to.

    Examples:
        >>> from hydra.errors import ConfigCompositionException
        >>> error = ConfigCompositionException("Could not override 'net.widht'.")
        >>> explain(error, config=OmegaConf.create({"net": {"width": 64, "depth": 2}}))
        "unknown key net.widht; did you mean 'net.width'? in net there are: width, depth; a new one is +net.widht=VALUE"
    """
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override!r} is no override; write KEY=VALUE, or ~KEY to leave something out"
        reason = str(error.message).splitlines()[0]
        return (
            f"cannot read the override {error.override!r} ({reason}); quote a value with special signs: KEY='\"a=b\"'"
        )
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, (ValueError, TypeError)):
        where = re.search(r"full_key: (\S+)", str(error))
        return f"{where[1]}: {error.__cause__}" if where else str(error.__cause__)
    message = str(error)
    for pattern, say in _FORMS.items():
        if found := re.search(pattern, message):
            return say(found[1], config)
    return message if error.__cause__ is None else f"{message}\n{error.__cause__}"


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or ())
    if group == "hydra/launcher" and choice in _EXTRAS:
        return f"launcher {choice} is not installed; pip install 'lightning_mup[{_EXTRAS[choice]}]'"
    if not group:
        return f"there is no configuration called {choice}; give --config-dir where it is one of yours"
    if not options:
        return f"there is no {group}/{choice}.yaml, nor any other file of the group {group}; give --config-dir"
    known = f"there are: {', '.join(options)}"
    return f"unknown choice {group}={choice}{_then(near(choice, options))}{known}"


def _unknown_key(key: str, config: DictConfig | None) -> str:
    plain = key.lstrip(_PREFIXES)
    known = [] if config is None else list(dotted(cast(Mapping[str, object], OmegaConf.to_container(config))))
    if plain in known:  # one combination of a sweep lacks what the others have
        return f"{plain} is not there with every choice that the sweep makes; ++{plain}=VALUE sets it with all of them"
    parent = plain
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    beside = [k.removeprefix(prefix) for k in known if k.startswith(prefix) and "." not in k.removeprefix(prefix)]
    like = [prefix + name for name in get_close_matches(plain.removeprefix(prefix), beside, n=1)]
    like = like or _same_word(plain.rpartition(".")[2], known)
    nearest = f"; did you mean {' or '.join(map(repr, like))}?" if like else ""
    beside = [name for name in beside if name != "hydra"]
    shown = ", ".join(beside[:_SHOWN]) + ", ..." * (len(beside) > _SHOWN)
    there = f"{f'in {parent}' if parent else 'on top'} there are: {shown}; " if beside else ""
    return f"unknown key {plain}{_then(nearest)}{there}a new one is +{plain}=VALUE"


def _same_word(word: str, keys: Sequence[str]) -> list[str]:
    """Return the keys anywhere that end in a word, or in one like it."""
    last = {key: key.rpartition(".")[2] for key in keys if not key.startswith("hydra.")}
    like = get_close_matches(word, list(dict.fromkeys(last.values())), n=1, cutoff=0.75)
    return [key for key, name in last.items() if name in like]


def _then(match: str) -> str:
    return f"{match} " if match else "; "


def dotted(tree: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every node that an override may change: none that follows another, or names a class.

    Examples:
        >>> list(dotted({"net": {"_target_": "torch.nn.Linear", "width": 64}, "width": "${net.width}", "seed": 0}))
        ['net', 'net.width', 'seed']
    """
    for key, value in tree.items():
        if str(key).startswith("_") or str(value).startswith("${"):
            continue
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


_FORMS: dict[str, Callable[[str, DictConfig | None], str]] = {
    r"Could not override '([^']+)'": _unknown_key,
    r"Could not delete from config\. '([^']+)' does not exist": _unknown_key,
    r"config group '([^']+)' does not exist": _unknown_key,
    r"already at '([^']+)'": lambda key, _: f"{key} is there already; write {key}=VALUE, without the +",
    r"(?:Multiple values for )?([^ ]+?)(?:\. To override| appears more than once)": lambda key, _: (
        f"{key} is chosen already; write {key}=CHOICE, without the +"
    ),
    r"Ambiguous value for argument '([^']+)'": lambda word, _: (
        f"{word} are several values; add --multirun for one run each, or write {word.replace('=', '=[', 1)}]"
    ),
}
