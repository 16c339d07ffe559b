"""Checkpoints of sharded modules: folders in torch's distributed format, state by name; and one file of all.

Of an optimizer's state, ``{"state": {parameter: ...}, "param_groups": [{"params": [parameter, ...], ...}, ...]}``,
folders have the parameters' names, files their numbers in the order of the groups, as torch's optimizers do.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_folder
from torch.optim import Optimizer

from lightning_mup.core.base import canonical
from lightning_mup.core.grafted import Grafted
from lightning_mup.core.optimizer import StackedOptimizer

Saved = dict[str, Any]
_REST = "meta.pt"  # Lightning's name of the file of what is neither weights nor state
_OLD = ".old"  # of a checkpoint's name, while another takes it
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def state_of(optimizer: Optimizer, model: nn.Module, *, whole: bool) -> Saved:
    """Return an optimizer's state: this rank's, by name; or whole, by number, on the first rank; all ranks call it.

    Args:
        optimizer: any of torch's, of this package's, or a :class:`~lightning_mup.Grafted` of them.
        model: the sharded module.
        whole: whether to gather it.
    """
    if isinstance(optimizer, Grafted):
        sides = {side: state_of(part, model, whole=whole) for side, part in _sides(optimizer).items()}
        return {"state": {}, "param_groups": [], **sides}
    if not isinstance(optimizer, StackedOptimizer):
        found = get_optimizer_state_dict(model, optimizer, options=_WHOLE if whole else None)
        return numbered(found) if whole and found else found
    return optimizer.whole_state_dict() if whole else named(optimizer.state_dict(), _names(optimizer, model))


def load(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool, weights_only: bool | None
) -> Saved:
    """Load weights and state from a folder or a file, whatever number of ranks wrote it; all ranks call it.

    Args:
        path: a folder, or a file that this or any other strategy wrote.
        model: the sharded module.
        optimizers: its optimizers; none where nothing is trained.
        strict: whether names must be the same.
        weights_only: see ``torch.load``.

    Returns:
        what is neither weights nor state.

    Raises:
        FileNotFoundError: the folder holds no whole checkpoint.
        ValueError: the file holds no state of the optimizers.
    """
    # Before the weights: torch takes a step, of rate 0, to make the state of its own optimizers.
    states = [state_of(optimizer, model, whole=False) for optimizer in optimizers]
    if path.is_dir():
        found: Saved = {"state_dict": get_model_state_dict(model)}
        found |= {f"optimizer_{i}": state for i, state in enumerate(states)}
        if not (path / _REST).exists():
            raise FileNotFoundError(f"{path} holds no {_REST}, so it is no whole checkpoint; give one that is")
        load_folder(found, checkpoint_id=path)
        model.load_state_dict(found["state_dict"], strict=strict)
        for i, optimizer in enumerate(optimizers):
            _set_state(optimizer, model, found[f"optimizer_{i}"], whole=False)
        return dict(torch.load(path / _REST, map_location="cpu", weights_only=weights_only))
    checkpoint: Saved = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, checkpoint.pop("state_dict"), options=options)
    saved = checkpoint.get("optimizer_states", [])
    if optimizers and len(saved) != len(optimizers):
        raise ValueError(
            f"{path} holds the state of {len(saved)} optimizers, but {len(optimizers)} are to go on; give a checkpoint "
            f"that was saved with them (save_weights_only=False)"
        )
    for optimizer, state in zip(optimizers, saved, strict=False):  # none of them where nothing is trained
        _set_state(optimizer, model, state, whole=True)
    return checkpoint


def replace(new: Path, path: Path) -> None:
    """Give a whole checkpoint its name; what had it goes last, so that at every moment there is one, see :func:`last`.

    Args:
        new: the checkpoint.
        path: its name.
    """
    old = path.with_name(path.name + _OLD)
    if path.exists():
        remove(old)
        path.rename(old)
    new.rename(path)
    remove(old)


def last(path: Path) -> Path | None:
    """Return a checkpoint: that of this name, the one before where a job died between two renames, or None.

    Examples:
        >>> last(Path("nowhere.ckpt"))
    """
    return next((found for found in (path, path.with_name(path.name + _OLD)) if found.exists()), None)


def remove(path: Path) -> None:
    """Remove a file or a folder, should it be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def consolidate(folder: str | Path, file: str | Path) -> None:
    """Write a folder's checkpoint as the one file that ``ddp``, or a single process, would have written.

    No process group is needed, and memory for everything.

    Args:
        folder: what ``mup_fsdp`` wrote.
        file: where to write; it appears when it is whole.

    Raises:
        FileNotFoundError: the folder holds no whole checkpoint.
    """
    folder, file = Path(folder), Path(file)
    if not (folder / _REST).exists():
        raise FileNotFoundError(f"{folder} holds no {_REST}, so it is no whole checkpoint of mup_fsdp")
    part = file.with_name(f"{file.name}.part")
    dcp_to_torch_save(folder, part)
    tensors: Saved = torch.load(part, weights_only=False)
    rest: Saved = torch.load(folder / _REST, weights_only=False)
    count = sum(key.startswith("optimizer_") for key in tensors)
    states = [_all_numbered(tensors[f"optimizer_{i}"]) for i in range(count)]
    torch.save({**rest, "state_dict": tensors["state_dict"], "optimizer_states": states}, part)
    part.rename(file)


def named(saved: Mapping[str, Any], names: Sequence[str]) -> Saved:
    """Return an optimizer's state by name.

    Args:
        saved: state by number.
        names: of the parameters, in the order of the groups.

    Examples:
        >>> named({"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]}, ["w"])
        {'state': {'w': {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': ['w']}]}
    """
    return _renamed(saved, dict(zip(_keys(saved), names, strict=True)))


def numbered(saved: Mapping[str, Any]) -> Saved:
    """Return an optimizer's state by the parameters' numbers in the order of the groups.

    Examples:
        >>> numbered({"state": {"w": {"step": 1}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]})
        {'state': {0: {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    """
    return _renamed(saved, {key: i for i, key in enumerate(_keys(saved))})


def _keys(saved: Mapping[str, Any]) -> list[Any]:
    return list(itertools.chain(*(group["params"] for group in saved["param_groups"])))


def _renamed(saved: Mapping[str, Any], new: Mapping[Any, Any]) -> Saved:
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in saved["param_groups"]]
    state = {new[key]: saved["state"][key] for key in new if key in saved["state"]}
    return {**saved, "state": state, "param_groups": groups}


def _all_numbered(saved: Mapping[str, Any]) -> Saved:
    sides = {side: numbered(saved[side]) for side in ("direction", "magnitude") if side in saved}
    return {**saved, "state": {}, **sides} if sides else numbered(saved)


def _set_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], *, whole: bool) -> None:
    if isinstance(optimizer, Grafted):
        for side, part in _sides(optimizer).items():
            _set_state(part, model, saved[side], whole=whole)
    elif isinstance(optimizer, StackedOptimizer):
        optimizer.load_state_dict(dict(saved) if whole else numbered(saved))
    else:
        by_name = named(saved, _names(optimizer, model)) if whole else dict(saved)
        set_optimizer_state_dict(model, optimizer, by_name, options=StateDictOptions(full_state_dict=whole))


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    names: dict[torch.Tensor, str] = {p: canonical(name) for name, p in model.named_parameters()}
    return [names[p] for p in _params(optimizer)]


def _params(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    return itertools.chain(*(group["params"] for group in optimizer.param_groups))


def _sides(optimizer: Grafted) -> dict[str, Optimizer]:
    return {"direction": optimizer.direction, "magnitude": optimizer.magnitude}
