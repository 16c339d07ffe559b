"""Grafting: the length of one optimizer's step in the direction of another's, whatever configure_optimizers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_mup.callbacks.companions import optimizers_in, refuse_second
from lightning_mup.callbacks.patch import patch_method, unpatch_method
from lightning_mup.core.grafted import Grafted, Per, Side, check_settings
from lightning_mup.core.method import Decay
from lightning_mup.core.optimizer import StackedOptimizer

Factory = Callable[[list[nn.Parameter]], Optimizer]
_ATTACHED = ("log", "log_dict")  # by Lightning: bound to the module


class Grafting(Callback):
    """Train with ``U = ||U1||_F / (||U2||_F + eps) U2``, one of the two being the module's own optimizer.

    The module is not changed: the optimizer that its ``configure_optimizers`` returns becomes one part of a
    :class:`~lightning_mup.core.grafted.Grafted`, with its groups, its weight decay and its schedulers; the other part
    is built here, over the same parameters, and its rate follows the schedulers in proportion. The step is as long as
    the magnitude's at its own rate: ``Grafting(magnitude=lambda params: torch.optim.AdamW(params, lr=1e-3))`` under a
    module that trains by SGD with a cosine schedule takes SGD's direction, AdamW's length at 1e-3, and that schedule.
    A weight decay of the optimizer built here is not used. Beside :class:`~lightning_mup.Parametrize`, each part has
    the rule of its own class, and the plan shows the magnitude's.

    Args:
        direction: builds the optimizer that gives the direction, from a list of parameters; it may leave some out.
        magnitude: builds the one that gives the length; exactly one of the two is given.
        per: what has one length: each ``"matrix"``, each ``"block"``, or all of a parameter ``"group"``.
        block_size: largest side of a block (>= 1), for ``per="block"``.
        graft_eps: added to the direction's norm, in units of its update at rate 1 (>= 0).
        decay: what the module's own ``weight_decay`` means, ``"coupled"`` or ``"independent"``; None as it declares.

    Raises:
        ValueError: not exactly one factory is given; or, while fitting starts, ``configure_optimizers`` returns none or
            several optimizers, or one that decays within its gradient.
        TypeError: a factory makes something else.

    Examples:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> grafting = Grafting(magnitude=lambda params: torch.optim.AdamW(params, lr=1e-3))
        >>> trainer = Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[grafting])
        >>> trainer.fit(BoringModel())
        >>> [type(o).__name__ for o in (grafting.grafted.direction, grafting.grafted.magnitude)]
        ['SGD', 'AdamW']

    Reference:
        Agarwal et al. 2020 (arXiv:2002.11803); arXiv:2512.05620, equation 31.
    """

    def __init__(
        self,
        *,
        direction: Factory | None = None,
        magnitude: Factory | None = None,
        per: Per = "matrix",
        block_size: int | None = None,
        graft_eps: float = 1e-8,
        decay: Decay | None = None,
    ) -> None:
        if (direction is None) == (magnitude is None):
            raise ValueError(
                f"Grafting takes one of direction and magnitude, the other one being the module's own optimizer, got "
                f"direction={direction!r}, magnitude={magnitude!r}; to build both, return a Grafted from "
                f"configure_optimizers"
            )
        self._own: Side = "direction" if direction is None else "magnitude"
        check_settings(self._own, per, block_size, graft_eps, decay)
        self._factory = magnitude if direction is None else direction
        self.per, self.block_size, self.graft_eps, self.decay = per, block_size, graft_eps, decay
        self.grafted: Grafted | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the module's ``configure_optimizers``, within what Parametrize wraps around it."""
        if stage != "fit":
            return
        self.grafted = None
        refuse_second(trainer, Grafting, "a step has one length")
        patch_method(pl_module, "configure_optimizers", instead=self._configure_optimizers, inside=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was grafted onto what."""
        if self.grafted is None:
            raise ValueError(
                f"Grafting found no optimizer, since Parametrize supplies that of {type(pl_module).__name__}; leave "
                f"Grafting out and give options={{'graft': 'adam'}} there, or leave out its method="
            )
        both = self.grafted.direction, self.grafted.magnitude
        own, length = (type(optimizer).__name__ for optimizer in both)
        native = all(isinstance(optimizer, StackedOptimizer) for optimizer in both) and self.per == "matrix"
        hint = f" {own}(graft=...) does so, too, and faster." if native else ""
        rank_zero_info(f"Grafting takes the direction from {own} and the length from {length}, per {self.per}.{hint}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own ``configure_optimizers`` back."""
        unpatch_method(pl_module, "configure_optimizers", inside=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own ``configure_optimizers`` back."""
        self.teardown(trainer, pl_module, "fit")

    def _configure_optimizers(self, module: LightningModule, original: Callable[[], Any]) -> Any:  # noqa: ANN401
        result = original()
        found = optimizers_in(result)
        if len(found) != 1:
            raise ValueError(
                f"Grafting needs one optimizer from configure_optimizers of {type(module).__name__}, got {len(found)} "
                f"({[type(optimizer).__name__ for optimizer in found]}); return Grafted optimizers from there instead"
            )
        self.grafted = self._graft(found[0])
        return _attached(result, found[0], self.grafted)

    def _graft(self, own: Optimizer) -> Grafted:
        assert self._factory is not None
        other = self._factory([p for group in own.param_groups for p in group["params"] if p.requires_grad])
        if not isinstance(other, Optimizer):
            raise TypeError(f"the factory of Grafting must return a torch.optim.Optimizer, got {other!r}")
        parts = {"direction": own, "magnitude": other} if self._own == "direction" else {"direction": other}
        return Grafted(
            **{"magnitude": own, **parts},
            leader=self._own,
            per=self.per,
            block_size=self.block_size,
            graft_eps=self.graft_eps,
            decay=self.decay,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a run."""
        kept = {key: value for key, value in self.__dict__.items() if key not in _ATTACHED}
        return {**kept, "grafted": None}


def _attached(part: Any, own: Optimizer, grafted: Grafted) -> Any:  # noqa: ANN401 - whatever Lightning takes
    """Return what ``configure_optimizers`` returned with one optimizer for another, the schedulers driving the latter.

    Their numbers stay: the groups are the same.
    """
    if part is own:
        return grafted
    if isinstance(part, dict):
        return {key: _attached(value, own, grafted) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        made = [_attached(value, own, grafted) for value in part]
        return made if isinstance(part, list) else tuple(made)
    if getattr(part, "optimizer", None) is own:
        part.optimizer = grafted
        for inner in getattr(part, "_schedulers", ()):
            _attached(inner, own, grafted)
    return part
