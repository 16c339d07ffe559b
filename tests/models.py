"""Small Lightning modules that the tests share; like a user's, they know nothing of parametrizations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY = 64
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Lion(torch.optim.Optimizer):
    """Sign of a momentum (arXiv:2302.06675), which nobody declared."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-4, beta: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum.sign(), alpha=group["lr"])
        return loss


class MLP(L.LightningModule):
    """A classifier whose labels come from a fixed random teacher."""

    def __init__(self, width: int = 64, depth: int = 2, lr: float = 1e-2, optimizer: str = "sgd") -> None:
        super().__init__()
        self.save_hyperparameters()
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), *hidden, nn.Linear(width, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.hparams["optimizer"]](self.parameters(), lr=self.hparams["lr"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        x = torch.randn(512, 16, generator=generator(0))
        teacher = torch.randn(16, 8, generator=generator(1))
        return DataLoader(TensorDataset(x, (x @ teacher).argmax(-1)), batch_size=64)


class ResidualMLP(MLP):
    """The same task with residual blocks of two layers, for depth."""

    def __init__(self, width: int = 64, depth: int = 2, lr: float = 1e-2, optimizer: str = "sgd") -> None:
        super().__init__(width, 1, lr, optimizer)
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(16, width), nn.Sequential(*[Block(width) for _ in range(depth)]), nn.Linear(width, 8)
        )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class TransformerLM(L.LightningModule):
    """A causal language model on a random Markov chain; heads of 16, so that their number grows with width."""

    def __init__(self, width: int = 64, depth: int = 2, lr: float = 1e-2, optimizer: str = "adam") -> None:
        super().__init__()
        self.save_hyperparameters()
        layer = nn.TransformerEncoderLayer(width, width // 16, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(32, width)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.readout = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device, dtype=self.dtype)
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return self.readout(self.encoder(x, mask=mask, is_causal=True))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        loss = F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.hparams["optimizer"]](self.parameters(), lr=self.hparams["lr"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(markov_text(256, 33)), batch_size=16)


def markov_text(sequences: int, length: int) -> Tensor:
    """Sequences [sequences, length] of a Markov chain whose every state has about four likely successors."""
    table = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator(2)), dim=-1)
    tokens = [torch.randint(VOCABULARY, (sequences,), generator=generator(3))]
    for step in range(length - 1):
        tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=generator(4 + step)).squeeze(-1))
    return torch.stack(tokens, dim=1)
