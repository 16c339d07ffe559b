"""A language model on real text, like any other LightningModule.

The text is Python's own standard library, read as bytes, so that nothing need be downloaded.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BYTES, CONTEXT, HEAD = 256, 64, 16


class TinyLM(L.LightningModule):
    """A causal transformer on bytes, like any other LightningModule: it knows nothing of parametrizations."""

    def __init__(self, width: int = 64, depth: int = 2, lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layer = nn.TransformerEncoderLayer(width, width // HEAD, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.readout = nn.Linear(width, BYTES)
        nn.init.zeros_(self.readout.weight)  # so that all logits start at 0, at every width

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes [batch, length] to logits [batch, length, 256]."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        stream = self.bytes(text) + self.positions(torch.arange(length, device=text.device))
        return self.readout(self.encoder(stream, mask=mask, is_causal=True))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the next byte, in nats."""
        (text,) = batch
        loss = F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build AdamW at the learning rate tuned at width 64."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Serve windows of the standard library's source, shuffled."""
        return DataLoader(TensorDataset(text()), batch_size=16, shuffle=True)


def text(limit: int = 500_000) -> Tensor:
    """Return windows [count, 65] of the first ``limit`` bytes of the standard library's source."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = b"".join(file.read_bytes() for file in files)[:limit]
    usable = len(source) // (CONTEXT + 1) * (CONTEXT + 1)
    return torch.frombuffer(bytearray(source[:usable]), dtype=torch.uint8).long().view(-1, CONTEXT + 1)
