"""TokenDataModule: training and validation batches of tokens, the same at every number of ranks, resumed exactly."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, cast

from lightning.pytorch import LightningDataModule

from lightning_mup.data.loader import TokenLoader, Windows
from lightning_mup.data.order import Order, Share
from lightning_mup.data.source import Source
from lightning_mup.data.tokens import Tokens

_KEPT = ("fingerprint", "context", "seed")  # what says which window is where


class TokenDataModule(LightningDataModule):
    """Serve a source's tokens in windows of ``context + 1``, shuffled anew each epoch.

    Batch ``t`` holds windows ``t * batch_size`` to ``(t + 1) * batch_size - 1`` of one endless order, in which every
    window stands once per epoch; ranks share it. Hence nothing is left out at an epoch's end, and the number of ranks
    does not change what is trained on. The checkpoint holds the position in that order: a resumed run repeats and skips
    nothing, also under another number of ranks or another ``batch_size``. What Lightning counts as an epoch is the
    largest number of whole optimizer steps in one epoch.

    Validation reads the same windows each time, spread over the validation tokens, whatever the seed.

    Args:
        source: where the tokens come from.
        vocab_size: number of different tokens that the model knows.
        context: tokens that go into the model (>= 1).
        batch_size: sequences per batch, over all ranks (>= 1, a multiple of the ranks).
        val_batches: batches of a validation; None takes all whole ones.
        seed: another one gives another order.
        workers: processes that read ahead; 0 reads when asked, which is fast enough for files in memory.

    Raises:
        ValueError: a number is out of range, the source's vocabulary is larger than ``vocab_size``, there are fewer
            windows than a batch needs, or a checkpoint is of other data, context or seed.

    Examples:
        >>> from lightning_mup.data.synthetic import MarkovChain
        >>> import tempfile
        >>> source = MarkovChain(vocab_size=32, cache=tempfile.mkdtemp())
        >>> data = TokenDataModule(source, vocab_size=32, context=64, batch_size=4)
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([4, 65])
        >>> data.tokens_per_step
        256
    """

    def __init__(
        self,
        source: Source,
        *,
        vocab_size: int = 256,
        context: int = 128,
        batch_size: int = 16,
        val_batches: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("vocab_size", vocab_size, 1),
            ("context", context, 1),
            ("batch_size", batch_size, 1),
            ("val_batches", val_batches, 1),
            ("workers", workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.source, self.vocab_size, self.context, self.batch_size = source, vocab_size, context, batch_size
        self.val_batches, self.seed, self.workers = val_batches, seed, workers
        self._opened: tuple[Tokens, Tokens] | None = None
        self._train: TokenLoader | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that are predicted in one optimizer step, over all ranks and accumulated batches."""
        return self.batch_size * self.context * self._accumulated()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell this data from other data; it prepares the source where need be."""
        both = "".join(tokens.fingerprint() for tokens in self._open())
        return hashlib.sha256(both.encode()).hexdigest()[:12]

    def prepare_data(self) -> None:
        """Have the source write its token files, unless they are there."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Open the token files and, for ``"fit"``, start at the beginning of the order.

        Args:
            stage: ``"fit"`` or another one of Lightning's.
        """
        self._open()
        goes_on = self.trainer is not None and self.trainer.global_step > 0 and self._train is not None
        if stage == "fit" and not goes_on:
            self._train = self._training()

    def train_dataloader(self) -> TokenLoader:
        """Return the loader of this rank's part of the training batches."""
        if self._train is None:
            raise ValueError(f"{type(self).__name__} is not set up; call prepare_data() and setup('fit') first")
        return self._train

    def val_dataloader(self) -> TokenLoader:
        """Return the loader of this rank's part of the validation batches."""
        windows = Windows(self._open()[1], self.context)
        length = len(windows) // self.batch_size
        if length < 1:
            raise ValueError(self._too_few("validation", windows))
        return self._loader(windows, min(length, self.val_batches or length), seed=0, repeats=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order, and what says which windows it counts."""
        if self._train is None:
            return {}
        windows = self._train.position - self._in_flight() * self.batch_size
        return {"windows": windows, **{name: getattr(self, name) for name in _KEPT}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: the checkpoint is of other data, context or seed.
        """
        if self._train is None:
            return  # it only validates
        for name in _KEPT:
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's data has {name} {state_dict[name]!r}, this data {getattr(self, name)!r}: the "
                    "order of windows cannot go on; resume with the same, or load the weights alone"
                )
        self._train.position = int(state_dict["windows"])

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[Tokens, Tokens]:
        if self._opened is None:
            self.source.prepare()
            files = self.source.files()
            train, val = (Tokens(paths, vocab_size=self.vocab_size) for paths in files)
            self._opened = train, val
        return self._opened

    def _training(self) -> TokenLoader:
        windows = Windows(self._open()[0], self.context)
        accumulated = self._accumulated()
        steps = len(windows) // (self.batch_size * accumulated)
        if steps < 1:
            raise ValueError(self._too_few("training", windows))
        overfits = self.trainer is not None and cast(Any, self.trainer).overfit_batches > 0
        return self._loader(windows, steps * accumulated, seed=self.seed, repeats=overfits)

    def _loader(self, windows: Windows, length: int, *, seed: int, repeats: bool) -> TokenLoader:
        trainer = self.trainer
        ranks = (trainer.distributed_sampler_kwargs if trainer else None) or {"rank": 0, "num_replicas": 1}
        return TokenLoader(
            windows,
            order=Order(len(windows), seed),
            share=Share(self.batch_size, ranks["rank"], ranks["num_replicas"]),
            length=length,
            workers=self.workers,
            pin=trainer is not None and trainer.strategy.root_device.type == "cuda",
            repeats=repeats,
        )

    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _in_flight(self) -> int:
        """Return 1 where a checkpoint is written in the middle of a step: its batch has not been trained on."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.ready - progress.processed)

    def _too_few(self, which: str, windows: Windows) -> str:
        needed = self.batch_size * (self._accumulated() if which == "training" else 1)
        return (
            f"{which} needs at least {needed} windows of {self.context} tokens, got {len(windows)} from "
            f"{len(windows.tokens)} tokens; take a smaller batch_size ({self.batch_size}) or context, or more text"
        )
