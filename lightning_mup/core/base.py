"""The base: the shapes and the initial sizes of the proxy model on which the hyperparameters were tuned."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_mup.core.registry import near

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_FORMAT = 1


def canonical(name: str) -> str:
    """Return a parameter's name without the prefixes that compiling, checkpointing and sharding put in.

    Examples:
        >>> canonical("net._orig_mod.layers.0._checkpoint_wrapped_module.fc.weight")
        'net.layers.0.fc.weight'
    """
    return _WRAPPERS.sub("", name)


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean and root mean square of a parameter's entries at initialization."""

    mean: float
    rms: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Measured:
        """Measure a tensor in float64; a sharded one gives its global values.

        Examples:
            >>> Measured.of(torch.tensor([3.0, -3.0, 3.0, -3.0]))
            Measured(mean=0.0, rms=3.0)
        """
        # Reduced in float64 piece by piece: a copy in float64 would take twice the tensor's memory.
        moments = [
            tensor.detach().mean(dtype=torch.float64),
            torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64),
        ]
        # Of a sharded tensor each rank has its shard's part so far.
        mean, norm = (float(m.full_tensor() if isinstance(m, DTensor) else m) for m in moments)
        return cls(mean, norm / math.sqrt(tensor.numel()))

    @property
    def constant(self) -> bool:
        """Whether all entries are one number (ones of a norm, zeros of a bias)."""
        return abs(abs(self.mean) - self.rms) <= 1e-12 * self.rms


@dataclass(frozen=True, slots=True)
class Base:
    """The proxy model as a plan needs it: global shapes by name, initial sizes, sizes of attention heads.

    Args:
        shapes: global shape of every parameter, by canonical name.
        measured: mean and RMS of the initial values, by name; empty where only shapes are known.
        head_dims: attention-head size by module name, where a module states it as ``head_dim``.

    Examples:
        >>> base = Base.of(nn.Linear(4, 2))
        >>> base.shapes["weight"], round(base.measured["weight"].rms, 1) > 0
        ((2, 4), True)
    """

    shapes: Mapping[str, tuple[int, ...]]
    measured: Mapping[str, Measured] = field(default_factory=dict)
    head_dims: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Base:
        """Read a module; parameters on the meta device give shapes only.

        Raises:
            ValueError: the module has no parameters, or lazy ones.
        """
        module = bare_model(module)
        refuse_lazy(module)
        named = {canonical(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        if not named:
            raise ValueError(
                f"the base {type(module).__name__} has no parameters; build them in __init__ or configure_model"
            )
        return cls(
            shapes={n: tuple(p.shape) for n, p in named.items()},
            measured={n: Measured.of(p) for n, p in named.items() if not p.is_meta and p.numel()},
            head_dims=head_dims(module),
        )

    @classmethod
    def load(cls, path: str | Path) -> Base:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is missing or is not a base file.
        """
        try:
            data = json.loads(Path(path).read_text())
            known = data["format"]
            if known != _FORMAT:
                problem = f"base file {str(path)!r} has format {known!r}, allowed is {_FORMAT}"
            else:
                return cls(
                    shapes={n: tuple(s) for n, s in data["shapes"].items()},
                    measured={n: Measured(*m) for n, m in data["measured"].items()},
                    head_dims=data["head_dims"],
                )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"cannot read a base from {str(path)!r} ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}; write one with Base.of(module).save(path)")

    def save(self, path: str | Path) -> None:
        """Write the base as json, for runs that should not build the proxy again.

        Examples:
            >>> import tempfile, pathlib
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "base.json"
            >>> base = Base.of(nn.Linear(4, 2))
            >>> base.save(file)
            >>> Base.load(file) == base
            True
        """
        data = {
            "format": _FORMAT,
            "shapes": {n: list(s) for n, s in self.shapes.items()},
            "measured": {n: [m.mean, m.rms] for n, m in self.measured.items()},
            "head_dims": dict(self.head_dims),
        }
        Path(path).write_text(json.dumps(data, indent=1))


def bare_model(module: nn.Module) -> nn.Module:
    """Return the module inside of a data-parallel wrapper, so that no name starts with ``module.``.

    Examples:
        >>> bare_model(nn.DataParallel(nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return bare_model(module.module) if isinstance(module, wrappers) else module


def refuse_lazy(module: nn.Module) -> None:
    """Refuse parameters that have no shape before the first batch.

    Raises:
        ValueError: there is one.

    Examples:
        >>> refuse_lazy(nn.LazyLinear(2))
        Traceback (most recent call last):
        ValueError: parameter 'weight' of LazyLinear is lazy and has no shape yet; run one batch through the model ...
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of {type(module).__name__} is lazy and has no shape yet; run one batch through "
                f"the model first (in the factory, for a base)"
            )


def head_dims(module: nn.Module) -> dict[str, int]:
    """Return the attention-head size of each module that states it, as ``head_dim`` or by width and number of heads.

    Examples:
        >>> head_dims(nn.MultiheadAttention(64, 4))
        {'': 16}
    """
    found = ((canonical(f"{name}."), _head_dim(m)) for name, m in module.named_modules())
    return {name.rstrip("."): dim for name, dim in found if dim is not None}


def _head_dim(module: nn.Module) -> int | None:
    dim, heads, width = (
        next((v for n in names if type(v := getattr(module, n, None)) is int and v > 0), None)
        for names in (("head_dim",), ("num_heads", "n_heads", "n_head", "nhead"), ("embed_dim", "n_embd", "d_model"))
    )
    return dim if dim is not None or heads is None or width is None else width // heads


def resolve_base(base: object, target: nn.Module, *, materialize: bool = False) -> Base:
    """Return the base that was given in any of its forms.

    Args:
        base: ``"self"`` (this is the base run), a :class:`Base`, a module, a factory, a dict of hyperparameter
            overrides for the target's own class, or the path of a saved base.
        target: the model to be parametrized.
        materialize: build the proxy for real, so that its initial values can be measured, instead of on meta. The
            global random state is left as it was, and the draw is the same on every rank.

    Raises:
        ValueError: an override names no hyperparameter, or the class cannot be rebuilt.
        TypeError: the base is of none of these forms.

    Examples:
        >>> resolve_base(lambda: nn.Linear(8, 2), nn.Linear(16, 2)).shapes["weight"]
        (2, 8)
    """
    if isinstance(base, Base):
        return base
    if isinstance(base, nn.Module):
        return Base.of(base)
    if isinstance(base, (str, Path)):
        return Base.of(target) if base == "self" else Base.load(base)
    if not materialize:
        with contextlib.suppress(Exception):  # a constructor may read values (.item()), which meta tensors lack
            return _build(base, target, "meta")
    return _build(base, target, "cpu")


def is_base_of(base: object, target: nn.Module) -> bool:
    """Whether the run declares itself the base run: ``"self"``, itself, or overrides equal to its own values."""
    if isinstance(base, Mapping):
        own = getattr(target, "hparams", {})
        return all(key in own and own[key] == value for key, value in base.items())
    return base is target or base == "self"


def doubled(base: object, target: nn.Module) -> Base | None:
    """Return the shapes of the target with the overridden sizes doubled, to see what grows where nothing is wider.

    Only overrides can be varied; for any other form of base, or where the doubled model cannot be built, None.
    """
    if not isinstance(base, Mapping):
        return None
    own = getattr(target, "hparams", {})
    wider = {k: 2 * own[k] for k, v in base.items() if type(v) is int and type(own.get(k)) is int}  # flags are no sizes
    if not wider:
        return None
    try:
        return _build(wider, target, "meta")
    except Exception:  # any model may refuse any size; the caller then falls back on the module type
        return None


def _build(base: object, target: nn.Module, device: str) -> Base:
    # torch.manual_seed would reset the accelerators' generators too, which fork_rng leaves alone here.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(0)
        return Base.of(built(build_proxy(base, target)))


def build_proxy(base: object, target: nn.Module) -> nn.Module:
    """Build the proxy module from a factory or from overrides of the target's hyperparameters.

    Examples:
        >>> build_proxy(lambda: nn.Linear(8, 2), nn.Linear(16, 2)).in_features
        8
    """
    if isinstance(base, Mapping):
        return _rebuilt(target, cast(Mapping[str, object], base))
    if not callable(base):
        raise TypeError(
            f"base must be a factory, a dict of hyperparameter overrides, a module, a saved base or 'self', got "
            f"{base!r}; pass lambda: {type(target).__name__}(...) at the size on which you tuned"
        )
    module = cast(Callable[[], object], base)()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"the base factory must return a torch module, got {module!r}; pass lambda: {type(target).__name__}(...)"
        )
    return module


def _rebuilt(target: nn.Module, overrides: Mapping[str, object]) -> nn.Module:
    own = dict(getattr(target, "hparams", {}))
    kind = type(target).__name__
    for key in overrides:
        if key not in own:
            raise ValueError(
                f"base overrides {key!r}, which is no hyperparameter of {kind}; it saved {sorted(own)}"
                f"{near(key, own)}. Call self.save_hyperparameters() in its __init__, or pass base=lambda: {kind}(...)"
            )
    try:
        return type(target)(**{**own, **overrides})
    except TypeError as error:
        problem = f"cannot rebuild {kind} from its hyperparameters ({error}); pass base=lambda: {kind}(...)"
        raise ValueError(problem) from error


def built(module: nn.Module) -> nn.Module:
    """Run the hooks in which a LightningModule may build its layers, as a Trainer would; returns the module.

    Raises:
        ValueError: a hook needs a Trainer.

    Examples:
        >>> built(nn.Linear(2, 2)).in_features
        2
    """
    for hook, arguments in (("setup", ("fit",)), ("configure_model", ())):
        build = getattr(module, hook, None)
        # configure_model must be callable twice, says Lightning; setup need not, and may want data.
        if build is None or (hook == "setup" and next(module.parameters(), None) is not None):
            continue
        try:
            build(*arguments)
        except (TypeError, AttributeError, RuntimeError) as error:
            kind = type(module).__name__
            raise ValueError(
                f"{kind}.{hook} cannot build the base without a Trainer ({type(error).__name__}: {error}); build the "
                f"layers without one and shard only where self.device_mesh is set, or pass a factory of a plain module"
            ) from error
    return module
