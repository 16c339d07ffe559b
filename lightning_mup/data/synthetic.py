"""A Markov chain with Zipf's law for the next token: text whose best possible loss is known."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mup.data.files import TokenWriter
from lightning_mup.data.source import Files, cache_folder, is_prepared, key_of, pair

_MOST = 4096
_CHAINS = 64  # that run side by side, one after another in the file


@dataclass(frozen=True)
class MarkovChain:
    """Tokens of a chain in which the k-th likeliest successor of any token has probability ~ ``k^-exponent``.

    Which tokens these are is drawn once for each token. There are no documents.

    Args:
        vocab_size: number of tokens (2 to 4096).
        tokens: training tokens (>= 64).
        val_tokens: validation tokens (>= 64), of the same chain.
        exponent: of Zipf's law (>= 0); 0 makes every successor as likely.
        seed: draws the successors and the tokens.
        cache: folder of the token files; None takes the user's cache.

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> round(MarkovChain(vocab_size=4, exponent=0.0).entropy, 3)  # log 4
        1.386
    """

    vocab_size: int = 64
    tokens: int = 1_000_000
    val_tokens: int = 65_536
    exponent: float = 1.0
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        least = {"vocab_size": 2, "tokens": _CHAINS, "val_tokens": _CHAINS, "exponent": 0, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.vocab_size > _MOST:
            raise ValueError(
                f"vocab_size must be at most {_MOST}, got {self.vocab_size}: the chain has a table of its square; take "
                f"data=embedded, whose bytes any larger vocabulary covers"
            )

    @property
    def entropy(self) -> float:
        """Entropy of the next token in nats: no model's expected loss is lower."""
        chances = self._chances()
        return -math.fsum(chances * np.log(chances))

    def prepare(self) -> None:
        """Write the token files, unless they are there."""
        files = self.files()
        if is_prepared(files):
            return
        for stream, ((path,), count) in enumerate(zip(files, (self.tokens, self.val_tokens), strict=True)):
            with TokenWriter(path, vocab_size=self.vocab_size) as writer:
                writer.append(self.sample(count, stream=stream))

    def files(self) -> Files:
        """Return the token files for these settings."""
        settings = {name: value for name, value in asdict(self).items() if name != "cache"}
        return pair(cache_folder(self.cache), f"markov_chain-{key_of(settings)}")

    def sample(self, count: int, *, stream: int = 0) -> NDArray[np.int64]:
        """Return tokens of the chain.

        Args:
            count: how many (>= 1).
            stream: another one gives other tokens of the same chain.
        """
        draws = np.random.default_rng([self.seed, 1 + stream])
        successors, length = self._successors(), -(-count // _CHAINS)
        ranks = np.searchsorted(np.cumsum(self._chances())[:-1], draws.random((length, _CHAINS)), side="right")
        out = np.empty((length, _CHAINS), np.int64)
        token = (draws.random(_CHAINS) * self.vocab_size).astype(np.int64)
        for step, rank in enumerate(ranks):
            out[step] = token = successors[token, rank]
        return out.T.ravel()[:count]

    def _chances(self) -> NDArray[np.float64]:
        weights = np.arange(1, self.vocab_size + 1, dtype=np.float64) ** -self.exponent
        chances: NDArray[np.float64] = weights / weights.sum()
        return chances

    def _successors(self) -> NDArray[Any]:
        """Return every token's successors, the likeliest first."""
        draws = np.random.default_rng([self.seed, 0])
        return draws.random((self.vocab_size, self.vocab_size)).argsort(axis=1)
