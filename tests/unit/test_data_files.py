"""Token files: what is written is read, and what is not whole, or not what it says, is refused."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.data.files import TokenWriter, read_header
from lightning_mup.data.tokens import Tokens


def write(path: Path, tokens: list[int], vocab_size: int = 256) -> Path:
    with TokenWriter(path, vocab_size=vocab_size) as writer:
        writer.append(tokens)
    return path


def shard(path: Path, tokens: list[int], *, count: int | None = None, magic: int = 20240520, version: int = 1) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return path


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_what_is_written_is_read(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    tokens = [0, vocab_size - 1, 1]
    found = read_header(write(tmp_path / "new" / "a.tokens", tokens, vocab_size))
    assert (found.count, found.dtype.name, found.vocab_size) == (3, dtype, vocab_size)
    assert found.tokens().tolist() == tokens
    assert found.checksum == found.computed_checksum()
    assert os.listdir(tmp_path / "new") == ["a.tokens"]


def test_gpt2_shard_is_read(tmp_path: Path) -> None:
    found = read_header(shard(tmp_path / "a.bin", [5, 50_256, 7]))
    assert found.tokens().tolist() == [5, 50_256, 7]
    assert (found.vocab_size, found.checksum) == (None, None)


def test_appended_blocks_follow_each_other(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.tokens", vocab_size=300) as writer:
        writer.append([1, 2])
        writer.append([])
        writer.append(np.array([299]))
        checksum = writer
    found = read_header(tmp_path / "a.tokens")
    assert found.tokens().tolist() == [1, 2, 299]
    assert found.checksum == checksum.checksum()


@pytest.mark.parametrize(
    ("tokens", "message"), [([3], "must be from 0 to 2, got 3"), ([-1], "got -1"), ([], "would be empty")]
)
def test_writer_refuses_and_leaves_nothing(tokens: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.tokens", tokens, 3)
    assert os.listdir(tmp_path) == []


def test_vocabulary_without_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"from 1 to 2\^32, got 0"):
        TokenWriter(tmp_path / "a.tokens", vocab_size=0)


KILLED = """
import os, signal, sys
from lightning_mup.data.files import TokenWriter
with TokenWriter(sys.argv[1], vocab_size=9) as one, TokenWriter(sys.argv[2], vocab_size=9) as other:
    one.append([1] * 100_000)
    other.append([1] * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_preparation_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    path = write(tmp_path / "old.tokens", [7])
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(tmp_path / "new.tokens")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_header(path).tokens().tolist() == [7]
    assert not (tmp_path / "new.tokens").exists()
    assert read_header(write(tmp_path / "new.tokens", [8])).count == 1


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "a.tokens", list(range(100)), 1000).read_bytes()
    later = good[:8] + struct.pack("<I", 2) + good[12:]
    cases = {
        "there is no token file": None,
        "neither a .tokens file nor": b"",
        "starts with b'Call me ": b"Call me Ishmael" * 100,
        "is cut off: 100 tokens of 2 bytes are 200 bytes, got 199": good[:-1],
        "has another type than it says: 100 tokens in 400 bytes are 4 bytes per token, not 2": good + good[64:],
        "is of version 2": later,
    }
    for message, content in cases.items():
        path = tmp_path / "bad.tokens"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_header(path)


def test_unreadable_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    with pytest.raises(ValueError, match="version 2; only 1"):
        read_header(shard(path, [1], version=2))
    with pytest.raises(ValueError, match="neither"):
        read_header(shard(path, [1], magic=1))
    with pytest.raises(ValueError, match="cut off: 9 tokens"):
        read_header(shard(path, [1], count=9))
    with pytest.raises(ValueError, match="holds 0 tokens"):
        read_header(shard(path, []))


def test_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [1], 300)
    with pytest.raises(ValueError, match=r"vocabulary of 300, but vocab_size is 256; set data.vocab_size=300"):
        Tokens([path], vocab_size=256)
    assert len(Tokens([path], vocab_size=300)) == 1
    with pytest.raises(ValueError, match="at least one token file"):
        Tokens([], vocab_size=9)


def test_larger_token_of_a_shard_is_found(tmp_path: Path) -> None:
    at_once, hidden = [0] * 200_000, [0] * 200_000
    at_once[-1], hidden[10_000] = 300, 300  # the second is in no sample
    with pytest.raises(ValueError, match=r"holds the token 300, but vocab_size is 256"):
        Tokens([shard(tmp_path / "a.bin", at_once)], vocab_size=256)
    tokens = Tokens([shard(tmp_path / "b.bin", hidden)], vocab_size=256)
    assert tokens.windows(np.array([9_000]), length=1000).max() == 0
    with pytest.raises(ValueError, match=r"b.bin.* holds the token 300"):
        tokens.windows(np.array([9_000]), length=1001)


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    data=st.data(),
)
def test_files_are_read_as_one(sizes: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, everything = tmp_path_factory.mktemp("shards"), list(range(sum(sizes)))
    ends = np.cumsum(sizes)
    paths = [
        shard(folder / f"{n}.bin", everything[end - size : end])
        for n, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    tokens = Tokens(paths, vocab_size=99)
    length = data.draw(st.integers(1, len(everything)))
    starts = np.arange(len(everything) - length + 1)
    assert tokens.windows(starts, length=length).tolist() == [everything[s : s + length] for s in starts]


def test_pickle_holds_no_tokens(tmp_path: Path) -> None:
    tokens = Tokens([write(tmp_path / "a.tokens", [1, 2] * 50_000)], vocab_size=256)
    before = tokens.windows(np.array([1]), length=3)
    packed = pickle.dumps(tokens)
    assert len(packed) < 2000
    assert pickle.loads(packed).windows(np.array([1]), length=3).equal(before)  # noqa: S301 - written above


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return Tokens([path], vocab_size=256).fingerprint()

    one, two = write(tmp_path / "a.tokens", [1, 2]), write(tmp_path / "b.tokens", [1, 2])
    other = write(tmp_path / "c.tokens", [1, 3])
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)
    shards = [shard(tmp_path / f"{last}.bin", [0] * 9 + [last]) for last in (1, 2)]
    assert fingerprint(shards[0]) != fingerprint(shards[1])
