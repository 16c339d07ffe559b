"""The order of windows: each once per epoch, ranks apart, one global batch at every number of ranks, any start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.data.files import TokenWriter
from lightning_mup.data.loader import TokenLoader, Windows
from lightning_mup.data.order import Batches, Order, Share, shuffled
from lightning_mup.data.tokens import Tokens

COUNTS = st.integers(1, 300)
SEEDS = st.integers(0, 5)


@given(count=st.one_of(COUNTS, st.sampled_from([9_973, 65_536])), key=st.text(max_size=3))
def test_shuffling_is_a_permutation(count: int, key: str) -> None:
    assert np.sort(shuffled(np.arange(count), count=count, key=key)).tolist() == list(range(count))


def test_shuffling_is_the_same_for_ever() -> None:
    """A resumed run of another year must find this order."""
    assert shuffled(np.arange(10), count=10, key="seed 0, epoch 0").tolist() == [2, 5, 8, 1, 7, 0, 4, 3, 6, 9]
    assert Order(1000, seed=7).at(np.array([0, 999, 1000, 10**9])).tolist() == [971, 75, 269, 575]


def test_shuffling_is_fair() -> None:
    """Every element is as likely at every place: chi-squared of 20 x 20 counts over 2000 keys, 361 degrees."""
    counts = np.zeros((20, 20))
    for key in range(2000):
        counts[np.arange(20), shuffled(np.arange(20), count=20, key=str(key))] += 1
    assert ((counts - 100) ** 2 / 100).sum() == pytest.approx(361, abs=5 * (2 * 361) ** 0.5)
    places = shuffled(np.arange(100_000), count=100_000, key="long")
    assert abs(np.corrcoef(np.arange(100_000), places)[0, 1]) < 0.01
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.01


def test_shuffling_needs_no_memory_for_what_it_does_not_ask() -> None:
    places = shuffled(np.arange(1000), count=10**15, key="huge")
    assert len(set(places.tolist())) == 1000
    assert 0.4e15 < places.mean() < 0.6e15


@given(count=COUNTS, seed=SEEDS, epoch=st.integers(0, 3))
def test_every_window_once_per_epoch(count: int, seed: int, epoch: int) -> None:
    found = Order(count, seed).at(np.arange(count * epoch, count * (epoch + 1)))
    assert np.sort(found).tolist() == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = [Order(50, seed).at(np.arange(100)) for seed in (0, 1)]
    assert (orders[0][:50] != orders[0][50:]).any()
    assert (orders[0][:50] != orders[1][:50]).any()


@given(
    count=COUNTS,
    seed=SEEDS,
    local=st.integers(1, 5),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    start=st.integers(0, 40),
    length=st.integers(1, 8),
)
def test_ranks_share_the_batches_of_one_process(
    count: int, seed: int, local: int, ranks: int, start: int, length: int
) -> None:
    order, size = Order(count, seed), 12 * local
    alone = list(Batches(order, Share(size), start, length))
    shared = [list(Batches(order, Share(size, rank, ranks), start, length)) for rank in range(ranks)]
    for step in range(length):
        parts = [rank[step] for rank in shared]
        assert {len(part) for part in parts} == {size // ranks}
        assert np.concatenate(parts).tolist() == alone[step].tolist()
    flat = np.concatenate(alone)
    assert flat.tolist() == order.at(np.arange(start, start + size * length)).tolist()


@given(count=COUNTS, batch=st.integers(1, 9), length=st.integers(1, 30), stop=st.integers(0, 30))
def test_going_on_equals_not_stopping(count: int, batch: int, length: int, stop: int) -> None:
    stop = min(stop, length)
    order, share = Order(count), Share(batch)
    whole = [b.tolist() for b in Batches(order, share, 0, length)]
    rest = [b.tolist() for b in Batches(order, share, stop * batch, length - stop)]
    assert whole[stop:] == rest


def test_blocks_do_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [b.tolist() for b in Batches(Order(50), Share(4), 3, 30)]
    monkeypatch.setattr("lightning_mup.data.order._BLOCK", 7)
    assert [b.tolist() for b in Batches(Order(50), Share(4), 3, 30)] == whole


@pytest.mark.parametrize(("batch_size", "ranks"), [(6, 4), (0, 1), (2, 4)])
def test_unequal_shares_are_refused(batch_size: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of the {ranks} ranks that share it, got {batch_size}"):
        Share(batch_size, ranks=ranks)


def windows(folder: Path, tokens: int = 101, context: int = 5) -> Windows:
    with TokenWriter(folder / "a.tokens", vocab_size=1000) as writer:
        writer.append(range(tokens))
    return Windows(Tokens([folder / "a.tokens"], vocab_size=1000), context)


def loader(data: Windows, length: int = 6, workers: int = 0, repeats: bool = False) -> TokenLoader:
    share = Share(4, rank=1, ranks=2)
    return TokenLoader(data, order=Order(len(data)), share=share, length=length, workers=workers, repeats=repeats)


@given(tokens=st.integers(2, 200), context=st.integers(1, 60))
def test_every_token_but_the_first_is_a_target_once(
    tokens: int, context: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("windows")
    if tokens <= context:
        with pytest.raises(ValueError, match=f"context must be from 1 to {tokens - 1}"):
            windows(folder, tokens, context)
        return
    data = windows(folder, tokens, context)
    targets = data[np.arange(len(data))][:, 1:]
    assert targets.flatten().tolist() == list(range(1, len(data) * context + 1))
    assert tokens - 1 - targets.numel() < context


def test_batches_are_int64_windows(tmp_path: Path) -> None:
    batches = list(loader(windows(tmp_path)))
    assert {(batch.dtype, batch.shape) for batch in batches} == {(torch.int64, (2, 6))}
    assert all((batch[:, 0] % 5 == 0).all() and (batch.diff() == 1).all() for batch in batches)


def test_passes_go_on_or_repeat(tmp_path: Path) -> None:
    data = windows(tmp_path)
    going, repeating = loader(data), loader(data, repeats=True)
    twelve = [batch.tolist() for batch in loader(data, length=12)]
    assert [batch.tolist() for _ in range(2) for batch in going] == twelve
    assert [batch.tolist() for _ in range(2) for batch in repeating] == twelve[:6] * 2


def test_a_pass_that_is_left_goes_on_there(tmp_path: Path) -> None:
    data = windows(tmp_path)
    going, whole = loader(data), [batch.tolist() for batch in loader(data, length=8)]
    seen = [next(iter(going)).tolist(), next(iter(going)).tolist(), *(batch.tolist() for batch in going)]
    assert seen == whole
    assert going.position == 8 * 4


def test_workers_keep_the_order(tmp_path: Path) -> None:
    data = windows(tmp_path)
    alone, helped = loader(data), loader(data, workers=2)
    want = [batch.tolist() for batch in alone]
    some = iter(helped)
    seen = [next(some).tolist() for _ in range(2)]
    assert helped.position == 2 * 4  # what workers have read ahead does not count
    assert [*seen, *(batch.tolist() for batch in helped)][:6] == want


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    """A resumed run makes another number of passes, and must draw the same dropout."""
    before = torch.get_rng_state()
    list(loader(windows(tmp_path)))
    assert torch.get_rng_state().equal(before)
