"""Long text files as several documents."""

from __future__ import annotations

import gzip
import random
import re
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tutelage.config.data_config import DOCUMENT_LIMIT, FilesSource, StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.data.cutting import documents_of
from tutelage.data.sources import Mixture
from tutelage.data.store import open_store
from tutelage.errors import UserError

WORDS = ("the", "of", "king", "word", "time", "people", "great", "day", "night", "house", "good", "élan")


def book(size: int, seed: int = 0) -> str:
    """Different paragraphs, together about `size` bytes."""
    chance, parts, total = random.Random(seed), [], 0  # noqa: S311 - no secret
    while total < size:
        parts.append(" ".join(chance.choices(WORDS, k=chance.randint(20, 120))))
        total += len(parts[-1].encode()) + 2
    return "\n\n".join(parts)


def source(*paths, **fields) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(map(str, paths)), **fields)


def texts(*paths, **fields) -> list[str]:
    return [document.text for document in Mixture([source(*paths, **fields)])]


def config(*paths, **changes) -> StoreConfig:
    fields = {"name": "book", "sources": (source(*paths),), "tokenizer": TokenizerConfig(vocab_size=300)}
    return StoreConfig(**fields | changes)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.zst"])
def test_one_book_gives_every_split_something(tmp_path, name):
    text = book(515_000)
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    manifest = open_store(build_store(config(tmp_path / name), tmp_path)).manifest
    (record,) = manifest.sources
    assert 150 < record.documents < 250
    assert record.document_bytes == len(text.encode()) // 200
    assert record.bytes == len(text.encode())
    assert all(split.documents >= 3 for split in manifest.splits.values())
    assert "".join(texts(tmp_path / name)) == text
    starts = [document[:20] for document in texts(tmp_path / name)]
    assert all(f"\n\n{start}" in f"\n\n{text}" for start in starts)  # every document begins a paragraph


def test_small_files_stay_a_document_each(tmp_path):
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(book(7000, n))
    assert len(texts(tmp_path / "*.txt")) == 30
    (tmp_path / "long.txt").write_text(book(200_000, 99))
    found = texts(tmp_path / "*.txt")
    assert 130 < len(found) < 30 + 270
    assert {book(7000, n) for n in range(30)} < set(found)


def test_many_files_are_cut_only_where_they_are_very_long(tmp_path):
    for n in range(199):
        (tmp_path / f"{n}.txt").write_text(book(20_000, n))
    assert len(texts(tmp_path / "*.txt")) > 400
    (tmp_path / "199.txt").write_text(book(1_200_000, 199))
    assert len(texts(tmp_path / "*.txt")) == 200  # 1.2 MB is less than one and a half MiB
    (tmp_path / "199.txt").write_text(book(4_000_000, 199))
    assert len(texts(tmp_path / "*.txt")) == 199 + 4


def test_a_size_or_none_can_be_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(book(100_000))
    assert texts(tmp_path / "a.txt", document_bytes="file") == [book(100_000)]
    found = texts(tmp_path / "a.txt", document_bytes=2000)
    assert all(800 <= len(text.encode()) <= 4000 for text in found)
    assert sum(len(text.encode()) for text in found) / len(found) == pytest.approx(1700, abs=400)


def test_without_paragraphs_it_is_cut_between_lines_words_or_characters(tmp_path):
    path = tmp_path / "a.txt"
    for text, ends in (
        ("\n".join(["some words"] * 3000), r"\n"),
        ("\r\n".join(["some words"] * 3000), r"\n"),
        ("\r".join(["word"] * 3000), r"\r"),
        (" ".join(["word"] * 3000), r"d "),
        ("é" * 20_000, r"é"),
        ("🤗" * 9000, r"🤗"),
    ):
        path.write_bytes(text.encode())
        found = [document.decode() for document in documents_of(path, [path.read_bytes()], 1001, 0)]
        assert "".join(found) == text
        assert len(found) >= 10
        assert all(re.search(f"{ends}$", document) for document in found[:-1])
        assert all(400 < len(document.encode()) < 2100 for document in found)


@given(
    st.lists(
        st.sampled_from(["word ", "\n", "\n\n", "\r\n", "é", "🤗", "# head\n", " \n", "x" * 300]),
        max_size=400,
    ),
    st.integers(20, 700),
)
def test_nothing_is_lost_or_added(tmp_path_factory, parts, size):
    text = "".join(parts) or "x"
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    found = list(documents_of(path, [path.read_bytes()], size, 0))
    assert b"".join(found).decode() == text
    assert max(map(len, found)) <= 2 * size + 4
    assert all(document.decode() for document in found)


def test_a_file_too_long_for_one_document_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"word " * (DOCUMENT_LIMIT // 5 + 1))
    with pytest.raises(
        UserError, match=r"a\.txt: is one document and longer than 8,388,608 bytes; set document_"
    ):
        texts(tmp_path / "a.txt", document_bytes="file")


def test_an_empty_split_is_refused_with_advice(tmp_path):
    (tmp_path / "a.txt").write_text("one short document")
    with pytest.raises(
        UserError, match=r"split 'validation' is empty: its share is 0.05, .*; cut text into more of them"
    ):
        build_store(config(tmp_path / "a.txt"), tmp_path)
    with pytest.raises(UserError, match=r"split 'test' is empty: its share is 0.5"):
        build_store(config(tmp_path / "a.txt", validation=0.0, test=0.5), tmp_path)
    corpus = {"kind": "corpus", "name": "sotu"}
    few = StoreConfig(name="few", sources=(corpus,), tokenizer=TokenizerConfig(vocab_size=300), max_bytes=300)
    with pytest.raises(UserError, match=r"; add text or raise max_bytes, raise the share, or set") as caught:
        build_store(few, tmp_path)
    assert "cut" not in str(caught.value)
    assert "document_bytes" not in str(caught.value)
    assert not list(tmp_path.glob("book-*"))
    store = open_store(build_store(config(tmp_path / "a.txt", validation=0.0, test=0.0), tmp_path))
    assert [store.manifest.splits[name].documents for name in ("train", "validation", "test")] == [1, 0, 0]
    ready = TokenizerConfig(path=store.path)
    with pytest.raises(UserError, match=r"split 'train' is empty: its share is 0\.001"):
        build_store(config(tmp_path / "a.txt", validation=0.0, test=0.999, tokenizer=ready), tmp_path)


MEASURED = """
import resource, sys
from pathlib import Path
from tutelage.config.load import validate
from tutelage.config.data_config import StoreConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
source = {"kind": "files", "paths": [sys.argv[1]]}
config = {"name": "large", "sources": [source], "tokenizer": {"vocab_size": 300}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = open_store(build_store(validate(StoreConfig, config, "test"), Path(sys.argv[2])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(sum(split.bytes for split in store.manifest.splits.values()))
"""


@pytest.mark.parametrize(("name", "between"), [("lines.txt.gz", "\n"), ("line.txt", " ")])
def test_memory_does_not_grow_with_a_file(tmp_path, name, between):
    text = between.join(f"the king of house {n} and house {n + 1}" for n in range(300_000)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text, 1) if name.endswith(".gz") else text)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / name, tmp_path / "stores"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, size = map(int, done.stdout.split())
    assert size == len(text) > 10_000_000
    assert grown * 1024 < 220_000_000  # one document took 38 bytes of memory per byte of text, here 0.4 GB
