"""LanguageModel: the LightningModule around any network that maps tokens to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

_LEARNING_RATE = 1e-3


class LanguageModel(LightningModule):
    """Predict the next token: ``loss = mean_t -log softmax(net(x_1..t))[x_t+1]``, in nats per token.

    A batch is tokens ``[batch, context + 1]``, of which the first ``context`` go in and the last ``context`` are the
    targets. It logs ``train/loss`` and ``val/loss``, the latter as a mean over all batches and ranks. It knows nothing
    of parametrizations; beside :class:`~lightning_mup.Parametrize` with a ``method``, that builds the optimizer.

    Args:
        net: network from tokens ``[batch, context]`` to logits ``[batch, context, vocabulary]``, or to an object that
            has them as ``logits`` (Hugging Face).
        optimizer: function from the parameters to a torch optimizer; AdamW at a rate of 1e-3 if not given.
        schedule: function from the optimizer to a torch scheduler that is stepped every step.

    Raises:
        ValueError: a batch is not tokens of two or more positions.

    Examples:
        >>> module = LanguageModel(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)))
        >>> _ = torch.nn.init.zeros_(module.net[1].weight), torch.nn.init.zeros_(module.net[1].bias)
        >>> module.loss(torch.tensor([[1, 2, 3]])).exp()  # all 8 tokens are as likely
        tensor(8., grad_fn=<ExpBackward0>)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self._optimizer, self._schedule = optimizer, schedule

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, context, vocabulary]`` of tokens ``[batch, context]``."""
        out = self.net(tokens)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch ``[batch, context + 1]``, computed in float32."""
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(f"a batch must be tokens [batch, context + 1], got shape {tuple(tokens.shape)}")
        logits = self(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return and log the loss of one batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of one batch, whose mean over batches and ranks is what runs are compared by."""
        self.log("val/loss", self.loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - whatever Lightning takes
        """Build the given optimizer and scheduler."""
        params = [p for p in self.parameters() if p.requires_grad]
        built = torch.optim.AdamW(params, lr=_LEARNING_RATE) if self._optimizer is None else self._optimizer(params)
        if self._schedule is None:
            return built
        return {"optimizer": built, "lr_scheduler": {"scheduler": self._schedule(built), "interval": "step"}}
