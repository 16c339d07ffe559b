"""A language model on real text, parametrized by one callback, and the check that it is right.

The text is Python's own standard library, read as bytes, so that nothing need be downloaded. The script prints the
plan that carries a width-64 proxy over to width 512, trains both parametrizations for ten steps at four widths, and
leaves tables and the picture in the folder of ``--out``.
"""

from __future__ import annotations

import argparse
import sysconfig
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_mup as mup
from lightning_mup.analysis.plots import plot_coordinates

BYTES, CONTEXT, HEAD = 256, 64, 16
WIDTHS = (64, 128, 256, 512)


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


def main() -> None:
    """Print the plan, run the coordinate check under mup and sp, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/results"), help="folder for tables and picture")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    with torch.device("meta"):
        print(mup.plan(TinyLM(512), base=lambda: TinyLM(64), method="adamw"), end="\n\n")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning calls what torch 2.13 deprecates
        reports = {
            rules: mup.coordinate_check(TinyLM, widths=WIDTHS, rules=rules, method="adamw", lr=5e-3)
            for rules in ("mup", "sp")
        }
    for rules, report in reports.items():
        print(f"\n{rules}: {'passed' if report.passed else 'FAILED'}\n{report.table()}")
        (out / f"coordinate_check_{rules}.txt").write_text(report.table() + "\n")
    plot_coordinates(reports, out / "coordinate_check.png")
    print(f"\nThe picture: {out / 'coordinate_check.png'}")


if __name__ == "__main__":
    main()
