"""Run a training module on a fixed batch without a trace, and see what its submodules put out."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric

Outputs = dict[str, torch.Tensor]


@contextlib.contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Inside, the module can be run without leaving a trace: no gradients, no dropout, no logging, its own randomness.

    Afterwards every submodule's training flag, every buffer, every torchmetrics state, the module's own attributes and
    all global random states are what they were.

    Examples:
        >>> module = LightningModule()
        >>> with undisturbed(module):
        ...     module.log("loss", 1.0)
        ...     module.training
        False
        >>> module.training
        True
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(isolate_rng())
        seed_all(0)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for keep in (_plain_attention, _attributes_kept, _metrics_kept, _buffers_kept, _evaluating, _silent):
            stack.enter_context(keep(module))
        yield


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python, and no environment variable, unlike Lightning's ``seed_everything``."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextlib.contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[Outputs]:
    """Inside, collect what each module puts out; a module that is called twice gives both outputs in one tensor.

    Examples:
        >>> layer = nn.Linear(2, 3)
        >>> with captured({"fc": layer}) as outputs:
        ...     _ = layer(torch.ones(5, 2))
        >>> outputs["fc"].shape
        torch.Size([15])
    """
    found: Outputs = {}
    handles = [module.register_forward_hook(_keep(found, name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> torch.Tensor | None:  # noqa: ANN401 - whatever a module returns
    """Return the tensor that stands for a module's output: its ``logits``, or the first floating-point one in it.

    Examples:
        >>> first_tensor((torch.arange(2), {"a": torch.ones(1)}))
        tensor([1.])
    """
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is not None:
        return first_tensor(logits)
    return next((t for part in _parts(output) if (t := first_tensor(part)) is not None), None)


def _parts(output: Any) -> Iterable[Any]:  # noqa: ANN401
    if isinstance(output, Mapping):
        return output.values()
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return output if isinstance(output, (tuple, list)) else ()


def _keep(found: Outputs, name: str) -> Any:  # noqa: ANN401 - a hook
    def hook(module: nn.Module, args: object, output: object) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            flat = tensor.detach().float().flatten().clone()  # the model may go on to write into its own tensor
            found[name] = torch.cat([found[name], flat]) if name in found else flat

    return hook


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # module.eval() may be overridden, and module.train() afterwards would free what the user froze
    flags = [(part, part.training) for part in module.modules()]
    for part, _ in flags:
        part.training = False
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextlib.contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    names = ("log", "log_dict")
    parts = [part for part in module.modules() if isinstance(part, LightningModule)]
    earlier = [(part, name, part.__dict__.get(name)) for part in parts for name in names]
    for part, name, _ in earlier:
        part.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for part, name, own in earlier:
            del part.__dict__[name]
            if own is not None:
                part.__dict__[name] = own


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextlib.contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    kept = [(metric, _state(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    try:
        yield
    finally:
        for metric, state in kept:
            metric.__dict__.update(state)


def _state(metric: Metric) -> dict[str, Any]:
    names = ("_update_count", "_computed", "_forward_cache")
    return {**metric._copy_state_dict(), **{name: getattr(metric, name) for name in names}}


@contextlib.contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    # The usual way to gather results over an epoch is to append to a list of one's own in training_step.
    kept = dict(vars(module))
    lists = [(value, list(value)) for value in kept.values() if isinstance(value, list)]
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(kept)
        for value, items in lists:
            value[:] = items


@contextlib.contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    # In eval mode torch's fused encoder layer would skip the submodules, and with them our hooks.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
