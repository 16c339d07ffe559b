"""Methods' transforms under settings: with grafting and normalization around them, in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lightning_mup.core.graft import Graft
from lightning_mup.core.method import Method, find_method
from lightning_mup.core.normalize import RmsNormalize, SpectralNormalize
from lightning_mup.core.transform import Chain, Transform


def build_chain(method: Method, settings: Mapping[str, Any], *, vector: bool = False) -> Transform:
    """Return a method's transform under settings, with grafting and normalization around it.

    Raises:
        ValueError: the method has no chain, hence is none of this package's.

    Examples:
        >>> method = find_method("muon")
        >>> [
        ...     t.name
        ...     for t in build_chain(method, {**method.defaults, "graft": "adam", "spectral_norm": True}).transforms
        ... ]
        ['graft', 'spectral_normalize']
    """
    core = _chain_of(method, settings)
    parts = core.transforms if isinstance(core, Chain) else (core,)
    if donor := settings.get("graft"):
        magnitude = _chain_of(find_method(donor), method.donor_settings(settings))
        parts = (Graft(magnitude=magnitude, direction=core, eps=settings["graft_eps"]),)
    if settings.get("spectral_norm") and not vector:
        # A looked-up row is a matrix of its own, 1 x width, whose spectral norm is its length.
        parts = (*parts, RmsNormalize() if settings.get("lookup") else SpectralNormalize())
    return Chain(parts)


def _chain_of(method: Method, settings: Mapping[str, Any]) -> Transform:
    if method.chain is None:
        raise ValueError(
            f"method {method.name!r} is declared for another optimizer class and has no chain; give chain="
        )
    # A pair comes as a list out of YAML and out of some checkpoints; transforms are compared and hashed.
    return method.chain({key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key != "params"})


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without autocast and TF32 inside: roots and factors lose their digits in either, whatever the model uses.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    before = torch.get_float32_matmul_precision()
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
