"""TokenLoader: batches of windows for one rank, which goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mup.data.order import Batches, Order, Positions, Share
from lightning_mup.data.tokens import Tokens


@dataclass(frozen=True)
class Windows(Dataset[Tensor]):
    """Windows of ``context + 1`` tokens, one every ``context`` tokens: each token but the first is a target once.

    Args:
        tokens: what the windows are cut from.
        context: tokens that go in (>= 1).

    Raises:
        ValueError: there are too few tokens for one window.
    """

    tokens: Tokens
    context: int

    def __post_init__(self) -> None:
        if self.context < 1 or len(self) < 1:
            raise ValueError(
                f"context must be from 1 to {len(self.tokens) - 1} for {len(self.tokens)} tokens, got {self.context}"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, windows: Positions) -> Tensor:
        return self.tokens.windows(windows * self.context, length=self.context + 1)


class TokenLoader:
    """Serve batches ``[batch_size / ranks, context + 1]`` of int64 tokens.

    Each pass gives ``len(self)`` batches. The first begins at ``position`` of the order, the next one where the last
    pass stopped, wherever that was. It is no ``DataLoader``, so that Lightning has no sampler to replace in it.

    Args:
        windows: what to serve.
        order: the order of the windows.
        share: batch size and this rank's part.
        length: batches in a pass.
        workers: processes that read ahead; 0 reads when asked. The order is the same.
        pin: put batches into page-locked memory, for a GPU.
        repeats: every pass is the first one (validation).

    Examples:
        >>> from lightning_mup.data.files import TokenWriter
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/a.tokens"
        >>> with TokenWriter(path, vocab_size=9) as writer:
        ...     writer.append(range(9))
        >>> windows = Windows(Tokens([path], vocab_size=9), context=2)
        >>> loader = TokenLoader(windows, order=Order(len(windows)), share=Share(2), length=2)
        >>> sorted(window for batch in loader for window in batch.tolist())
        [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
        >>> loader.position
        4
    """

    def __init__(
        self,
        windows: Windows,
        *,
        order: Order,
        share: Share,
        length: int,
        workers: int = 0,
        pin: bool = False,
        repeats: bool = False,
    ) -> None:
        self.windows, self.order, self.share, self.length = windows, order, share, length
        self.workers, self.pin, self.repeats = workers, pin, repeats
        self.position = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        if self.repeats:
            self.position = 0
        for batch in self._reader():
            self.position += self.share.batch_size  # before it is out of hands: whoever has a batch has it counted
            yield batch

    def _reader(self) -> DataLoader[Tensor]:
        return DataLoader(
            self.windows,
            batch_size=None,  # an index is a whole batch
            sampler=Batches(self.order, self.share, self.position, self.length),
            num_workers=self.workers,
            pin_memory=self.pin,
            generator=torch.Generator(),  # else each pass would draw from the global one, and resuming adds a pass
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position. Lightning looks whether the method is there."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, as :meth:`state_dict`."""
