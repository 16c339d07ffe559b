"""Sources: what becomes of texts, what is made once, and what a stream that is cut off goes on with."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.data.encoders import PRINTABLE, Bytes, Characters, TokenizerFile, find_encoder
from lightning_mup.data.files import read_header
from lightning_mup.data.folder import FolderText
from lightning_mup.data.hub import HubText
from lightning_mup.data.module import TokenDataModule
from lightning_mup.data.sharding import Prepared
from lightning_mup.data.shards import TokenShards
from lightning_mup.data.source import Source, cache_folder, is_validation
from lightning_mup.data.standard_library import StandardLibrary, clean
from lightning_mup.data.synthetic import MarkovChain


def tokens(source: Source) -> tuple[list[int], list[int]]:
    source.prepare()
    train, val = ([t for path in paths for t in read_header(path).tokens().tolist()] for paths in source.files())
    return train, val


# -- encoders ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_bytes_give_the_documents_back(texts: list[str]) -> None:
    stream = b"".join(ids.tobytes() for _, ids in Bytes().encode_all(texts) if ids is not None)
    assert stream == b"".join(text.encode() + b"\0" for text in texts)


@given(st.lists(st.text(), min_size=1))
def test_built_alphabet_gives_the_documents_back(texts: list[str]) -> None:
    encoder = Characters.of(texts)
    assert encoder.vocab_size == len(set("".join(texts)) | {"\n"})
    for text, ids in encoder.encode_all(texts):
        assert ids is not None
        assert "".join(encoder.alphabet[i] for i in ids) == text + "\n"


def test_documents_outside_are_left_out() -> None:
    found = dict(find_encoder("printable").encode_all(["plain ~\n", "caf\xe9", "tab\t", "\U0001f600"]))
    assert [text for text, ids in found.items() if ids is not None] == ["plain ~\n"]
    assert len(PRINTABLE) == 96
    assert dict(Bytes().encode_all(["a\0b"])) == {"a\0b": None}


@pytest.mark.parametrize("alphabet", ["ab", "\naa"])
def test_bad_alphabet_is_refused(alphabet: str) -> None:
    with pytest.raises(ValueError, match="alphabet must hold a newline, and each character once"):
        Characters(alphabet)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<|endoftext|>": 0, "to": 1, "be": 2, "?": 300}, unk_token="?")  # noqa: S106
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_tokenizer_file(tokenizer: str, tmp_path: Path) -> None:
    encoder = find_encoder(tokenizer)
    assert encoder.vocab_size == 301
    texts = ["to be or"] * 600
    found = [ids.tolist() for _, ids in encoder.encode_all(texts) if ids is not None]
    assert found == [[1, 2, 300, 0]] * 600
    with pytest.raises(ValueError, match=r"has no token '</s>'; .* one of \['<\|endoftext\|>'\]"):
        TokenizerFile(tokenizer, separator="</s>")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read a tokenizer from .*bad.json"):
        find_encoder(str(tmp_path / "bad.json"))


def test_files_are_named_by_their_encoder(tokenizer: str, tmp_path: Path) -> None:
    def names() -> set[Path]:
        encoders = ["byte", Bytes(), Characters("\nab"), Characters("\nba"), tokenizer, TokenizerFile(tokenizer)]
        return {HubText("some/texts", encoder=encoder, cache=str(tmp_path)).folder() for encoder in encoders}

    before = names()
    assert len(before) == 6
    content = Path(tokenizer).read_text()
    Path(tokenizer).write_text(content.replace('"be"', '"or"'))
    assert len(names() & before) == 5


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "books" / "deep").mkdir(parents=True)
    for n in range(60):
        (tmp_path / "books" / ("deep" if n % 2 else "") / f"{n}.txt").write_text(f"book {n}, by \xe9\n")
    (tmp_path / "books" / "other.md").write_text("not this one")
    return tmp_path / "books"


def folder(books: Path, **settings: str | float) -> FolderText:
    return FolderText(str(books), cache=str(books.parent / "cache"), val_fraction=0.3, **settings)  # type: ignore[arg-type]


def test_folder_is_split_by_document(books: Path) -> None:
    train, val = (bytes(side).split(b"\0")[:-1] for side in tokens(folder(books)))
    assert sorted(train + val) == sorted(f"book {n}, by \xe9\n".encode() for n in range(60))
    assert 5 < len(val) < 35
    assert all(is_validation(text.decode(), 0.3) for text in val)


def test_folder_of_characters_keeps_its_vocabulary(books: Path) -> None:
    source = folder(books, encoder="character")
    train, val = tokens(source)
    alphabet = json.loads(source.vocabulary().read_text())
    written = "".join(alphabet[i] for i in train + val)
    assert sorted(written.split("\n\n")) == sorted(["", *(f"book {n}, by \xe9" for n in range(60))])
    assert read_header(source.files().train[0]).vocab_size == len(alphabet) == len(set(alphabet))


def test_left_out_documents_are_counted(books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(60):
        (books / f"plain{n}.txt").write_text(f"plain {n}")
    tokens(folder(books, encoder="printable"))
    assert "60 documents, 530 tokens, 60 documents left out" in capsys.readouterr().err


def test_folder_is_prepared_once_and_again_when_it_changes(books: Path) -> None:
    source = folder(books)
    source.prepare()
    times = [path.stat().st_mtime_ns for paths in source.files() for path in paths]
    source.prepare()
    assert [path.stat().st_mtime_ns for paths in source.files() for path in paths] == times
    old = tokens(source)
    (books / "0.txt").write_text("changed")
    assert tokens(source) != old
    assert folder(books, encoder="character").files() != source.files()


def test_one_file_is_divided(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("\n\n".join(str(n) for n in range(100)))
    source = FolderText(str(tmp_path / "all.txt"), divider="\n\n", cache=str(tmp_path / "cache"))
    train, val = (bytes(side).split(b"\0")[:-1] for side in tokens(source))
    assert sorted(map(int, train + val)) == list(range(100))


def test_bad_folders_are_refused(books: Path) -> None:
    with pytest.raises(ValueError, match=r"no file in .*books matches '\*.rst'; set data.source.path"):
        folder(books, glob="*.rst").prepare()
    with pytest.raises(ValueError, match=r"would be empty"):
        FolderText(str(books), glob="0.txt", cache=str(books / "cache")).prepare()
    assert not any(path.suffix == ".tokens" for path in (books / "cache").iterdir())
    (books / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt is not in UTF-8"):
        folder(books).prepare()


PREPARE = """
import os, sys
from lightning_mup.data.folder import FolderText
child = os.fork()
FolderText(sys.argv[1], cache=sys.argv[2]).prepare()
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_processes_prepare_side_by_side(books: Path) -> None:
    for n in range(300):
        (books / f"more{n}.txt").write_text(f"{n} more " * 200)
    run = [sys.executable, "-c", PREPARE, str(books), str(books.parent / "cache")]
    subprocess.run(run, check=True)
    source = FolderText(str(books), cache=str(books.parent / "cache"))
    for (path,) in source.files():
        assert read_header(path).checksum == read_header(path).computed_checksum()
    assert len(os.listdir(books.parent / "cache")) == 2


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_MUP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder(None) == Path("/caches/lightning_mup")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "lightning_mup"
    monkeypatch.setenv("LIGHTNING_MUP_CACHE", "/ours")
    assert (cache_folder(None), cache_folder("given")) == (Path("/ours"), Path("given"))


# -- the standard library ---------------------------------------------------------------------------------------------


def test_standard_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = StandardLibrary(cache=str(tmp_path))
    top = Path(sysconfig.get_path("stdlib"))
    names = {str(path.relative_to(top)) for path in source.paths()}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any(
        name.startswith(("test/", "idlelib", "encodings", "site-packages", "_sysconfigdata")) for name in names
    )
    train, val = (bytes(side) for side in tokens(source))
    assert 4e6 < len(train) < 20e6
    assert 0.01 < len(val) / len(train) < 0.15
    assert (top / "this.py").read_bytes() in train + val
    assert "documents" in capsys.readouterr().err
    assert len(TokenDataModule(source).fingerprint) == 12


def test_dependencies_add_to_it() -> None:
    library, site = StandardLibrary().paths(), StandardLibrary("site").paths()
    added = {str(path) for path in site[len(library) :]}
    assert site[: len(library)] == library
    assert any(path.endswith("torch/optim/adam.py") for path in added)
    assert any(path.endswith("lightning/pytorch/trainer/trainer.py") for path in added)
    assert not any("/hypothesis/" in path or "/tests/" in path for path in added)


def test_what_is_not_worth_reading_is_left_out(tmp_path: Path) -> None:
    licence = "# Copyright\n# all of it\n"
    contents = {
        "a": licence + "a = 1\n",
        "b": licence + "b = 1\n" + "x" * 1001 + "\nc = 2\n",
        "c": "a = 1\n",
        "d": "x = 1\n" * 200_000,
        "e": "",
        "f": licence,
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "g").write_bytes(b"caf\xe9")
    paths = [tmp_path / name for name in "abcdefgh"]
    assert list(clean(paths)) == [licence + "a = 1\n", "b = 1\nc = 2\n"]


# -- a Markov chain ---------------------------------------------------------------------------------------------------


def test_chain_has_the_stated_entropy() -> None:
    chain = MarkovChain(vocab_size=8, exponent=1.5, seed=3)
    sample = chain.sample(200_000)
    pairs = Counter(zip(sample[:-1].tolist(), sample[1:].tolist(), strict=True))
    firsts = Counter(sample[:-1].tolist())
    found = -sum(n / 199_999 * math.log(n / firsts[pair[0]]) for pair, n in pairs.items())
    assert found == pytest.approx(chain.entropy, abs=0.01)
    assert chain.entropy < math.log(8) - 0.3
    likeliest = [np.argmax([pairs[one, other] for other in range(8)]) for one in range(8)]
    assert likeliest == chain._successors()[:, 0].tolist()


def test_chain_is_reproducible(tmp_path: Path) -> None:
    chain = MarkovChain(vocab_size=8, tokens=1000, val_tokens=500, cache=str(tmp_path))
    train, val = tokens(chain)
    assert (len(train), len(val)) == (1000, 500)
    assert train[:500] != val
    assert train == chain.sample(1000).tolist() != MarkovChain(vocab_size=8, seed=1).sample(1000).tolist()


@pytest.mark.parametrize("setting", [{"vocab_size": 1}, {"tokens": 5}, {"exponent": -1.0}])
def test_chain_refuses(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be at least"):
        MarkovChain(**setting)  # type: ignore[arg-type]


# -- a stream into shards ---------------------------------------------------------------------------------------------


class Hub:
    """Documents as a hub streams them; the connection breaks before one of them."""

    def __init__(self, count: int = 100, breaks_before: int | None = None) -> None:
        self.count, self.breaks_before, self.skipped = count, breaks_before, -1

    def __call__(self, skipped: int) -> Iterator[str]:
        self.skipped = skipped
        for n in range(skipped, self.count):
            if n == self.breaks_before:
                raise ConnectionError(n)
            yield f"document {n}" if n % 10 else "\xe9"


def hub(cache: Path, wanted: int = 400) -> HubText:
    return HubText("some/texts", encoder="printable", tokens=wanted, shard_tokens=100, cache=str(cache))


def text(source: HubText) -> str:
    return "".join(PRINTABLE[i] for side in reversed(tokens(source)) for i in side)


def test_broken_preparation_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    whole, broken, again = hub(tmp_path / "whole"), hub(tmp_path / "broken"), Hub()
    whole.write(Hub())
    with pytest.raises(ConnectionError):
        broken.write(Hub(breaks_before=30))
    with pytest.raises(
        ValueError, match=r"108 of 400 training tokens are in .* data prepare hub --set name=some/texts"
    ):
        broken.prepare()
    taken = Prepared.read(broken.folder()).documents
    broken.write(again)
    assert again.skipped == taken == 22
    assert text(broken) == text(whole)
    assert text(whole).split("\n")[:10] == [f"document {n}" for n in (*range(1, 10), 11)]
    names = sorted(os.listdir(whole.folder()))
    assert names == ["prepared.json", *(f"train_{n:06d}.tokens" for n in range(1, 5)), "val_000000.tokens"]
    assert names == sorted(os.listdir(broken.folder()))


def test_more_tokens_are_added_and_fewer_are_taken(tmp_path: Path) -> None:
    hub(tmp_path, 200).write(Hub())
    more, once = hub(tmp_path, 500), Hub()
    more.write(once)
    assert once.skipped > 0
    assert len(more.files().train) == 5
    assert len(hub(tmp_path, 200).files().train) == 2
    nothing = Hub()
    more.write(nothing)
    assert nothing.skipped == -1


def test_end_of_the_stream(tmp_path: Path) -> None:
    source = hub(tmp_path, 10**9)
    source.write(Hub())
    assert text(source).count("document") == 90
    with pytest.raises(ValueError, match="not enough for a validation shard of 100"):
        hub(tmp_path / "small").write(Hub(count=5))
    with pytest.raises(ValueError, match="shard_tokens must be at least 1"):
        HubText("x", shard_tokens=0)


def test_datasets_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "all.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(99)))
    assert datasets
    source = HubText(
        str(tmp_path / "texts"), encoder="byte", tokens=300, shard_tokens=50, cache=str(tmp_path / "cache")
    )
    source.write()
    assert bytes(tokens(source)[1]).startswith(b"text 0\0text 1\0")


def test_datasets_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"some/texts needs datasets; install lightning_mup\[text\]"):
        hub(tmp_path).write()


def test_shards_must_match(tmp_path: Path) -> None:
    MarkovChain(cache=str(tmp_path), tokens=100, val_tokens=100).prepare()
    found = TokenShards(f"{tmp_path}/*.train.tokens", f"{tmp_path}/*.val.tokens").files()
    assert [len(paths) for paths in found] == [1, 1]
    with pytest.raises(ValueError, match=r"no file matches '.*nothing'; set data.source.val"):
        TokenShards(f"{tmp_path}/*.train.tokens", f"{tmp_path}/nothing").prepare()


def test_a_chain_of_a_large_vocabulary_is_refused_before_its_table_is_made() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at most 4096, got 50257: .* take data=embedded"):
        MarkovChain(vocab_size=50_257)
