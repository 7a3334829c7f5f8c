"""Documents from files and data sets, and their mixture."""

from __future__ import annotations

import functools
import gzip
import json
import pickle
import sys

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from tutelage.config.data_config import CorpusSource, FilesSource, HubSource
from tutelage.data.sources import Mixture, describe
from tutelage.errors import UserError


def files(*paths, **fields) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(map(str, paths)), **fields)


def lines(*texts: str, field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def texts_of(*sources, **limits) -> list[str]:
    return [document.text for document in Mixture(sources, **limits)]


# ------------------------------------------------------------------------------------- reading files


class Planted(pa.ExtensionType):
    """A type of a column that a file brings along, which nobody here has registered."""

    def __init__(self):
        super().__init__(pa.string(), "planted.type")

    def __arrow_ext_serialize__(self):
        return pickle.dumps(print)


ONE = ["one", None, "two"]
DEEP = functools.reduce(lambda inner, _: {"a": inner}, range(60), "x")
COLUMNS = {
    "dictionary": pa.array(ONE).dictionary_encode(),
    "large": pa.array(ONE, pa.large_string()),
    "view": pa.array(ONE, pa.string_view()),
    "extension": pa.ExtensionArray.from_storage(Planted(), pa.array(ONE)),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "x", "y"), pa.array(ONE)),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16), None, bytes(16)], pa.binary(16))),
    "list": pa.array([["one"], None, []]),
    "deep": pa.array([DEEP, None, DEEP]),
    "bytes": pa.array([b"one", None, b"\xff"]).dictionary_encode(),
    "day": pa.array([2**30, None, 1], pa.date32()),  # of a year that Python cannot count
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_any_type_are_text_or_bad_rows(tmp_path, kind):
    parquet.write_table(pa.table({"text": COLUMNS[kind], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    if kind in {"dictionary", "large", "view", "extension", "opaque"}:
        assert texts_of(files(tmp_path / "a.parquet")) == ["one", "two"]
    else:
        with pytest.raises(UserError, match=r"a\.parquet: row 1: (field 'text' holds|a value that cannot)"):
            texts_of(files(tmp_path / "a.parquet"))
        assert texts_of(files(tmp_path / "a.parquet", on_bad_row="skip")) == []


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("één\r\ntwo\n".encode())
    assert texts_of(files(tmp_path / "a.txt")) == ["één\ntwo\n"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_jsonl_also_compressed(tmp_path, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    # two compressed parts behind one another, as parallel tools write them
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(lines("one", "two")) + pack(b"\n" + lines("thrée")))
    assert texts_of(files(tmp_path / f"a.jsonl{ending}")) == ["one", "two", "thrée"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_text(tmp_path, ending):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    (tmp_path / f"a.txt{ending}").write_bytes(pack(b"one\ntwo"))
    assert texts_of(files(tmp_path / f"a.txt{ending}")) == ["one\ntwo"]


def test_null_and_blank_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"text": "  \\n"}\n')
    mixture = Mixture([files(tmp_path / "a.jsonl")])
    assert [d.text for d in mixture] == ["one"]
    (tally,) = mixture.tallies
    assert (tally.documents, tally.bytes) == (1, 3)
    assert tally.dropped == {"null": 1, "blank": 1, "duplicate": 0, "bad": 0}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    source = files(tmp_path / "a.parquet", field="body")
    assert texts_of(source) == ["one", "two"]
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; it has: body, n"):
        texts_of(files(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="row 1: field 'n' holds int, expected text"):
        texts_of(files(tmp_path / "a.parquet", field="n"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        texts_of(files(tmp_path / "b.parquet"))


def test_patterns_are_sorted_and_files_taken_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = files(tmp_path / "c.txt", tmp_path / "*.txt")
    assert texts_of(source) == ["c", "a", "b"]


def test_a_name_with_brackets_is_a_name(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert texts_of(files(tmp_path / "a[1].txt")) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a\.txt: a binary file, not text"),
        ("a.txt", "façade".encode("latin-1"), r"a\.txt: not UTF-8 text \(byte 2 is 0xe7\)"),
        ("a.jsonl", lines("one") + b'{"text": "\xe7"}\n', r"a\.jsonl: line 2: not UTF-8 text"),
        ("a.jsonl", lines("one") + b'\n{"text": \n', r"a\.jsonl: line 3: not valid JSON: .* at column 1"),
        ("a.jsonl", b'{"body": "one", "id": 3}\n', r"line 1: no field 'text'; it has: body, id"),
        ("a.jsonl", b'["one"]\n', r"line 1: expected an object with the field 'text', found list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' holds int, expected text"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: damaged compressed file"),
        ("a.txt.gz", gzip.compress(b"one" * 99, mtime=0)[:-9], r"a\.txt\.gz: damaged compressed file"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst: damaged compressed file"),
        ("a.zip", b"PK", r"a\.zip: an archive, which is not read; unpack it and name the directory"),
        ("a.tar.gz", b"one", r"a\.tar\.gz: an archive, which is not read"),
        ("a.docx", b"one", r"a\.docx: unknown kind of file; \.txt, \.md, "),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts_of(files(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        texts_of(files(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match=r"\*\.txt: no such file"):
        texts_of(files(tmp_path / "*.txt"))
    with pytest.raises(UserError, match=r"no file in this directory can be read; it has: none; \.txt, "):
        texts_of(files(tmp_path))


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "it is \\ud800 here"}\n')
    with pytest.raises(
        UserError,
        match=r"a\.jsonl: line 1: field 'text' holds half of a surrogate pair \(U\+D800, character 7\)",
    ):
        texts_of(files(tmp_path / "a.jsonl"))


# ------------------------------------------------------------------------------------------ data sets


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines("one", "two", field="body"))
    (folder / "test.jsonl").write_bytes(lines("held out", field="body"))
    return folder


def test_local_data_set(dataset):
    source = HubSource(kind="hub", path=str(dataset), field="body")
    assert texts_of(source) == ["one", "two"]
    held_out = HubSource(kind="hub", path=str(dataset), field="body", split="test")
    assert texts_of(held_out) == ["held out"]


def test_data_set_errors(dataset):
    with pytest.raises(UserError, match="row 1: no field 'text'; it has: body"):
        texts_of(HubSource(kind="hub", path=str(dataset)))
    with pytest.raises(UserError, match=r"hub source .*set: .*nowhere"):
        texts_of(HubSource(kind="hub", path=str(dataset), split="nowhere"))
    with pytest.raises(UserError, match=r"hub source .*gone"):
        texts_of(HubSource(kind="hub", path=str(dataset.parent / "gone")))


def test_missing_extra_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'datasets' is missing; run: .* install .*\[hub\]'"):
        texts_of(HubSource(kind="hub", path="any"))


# -------------------------------------------------------------------------------------------- mixture


def test_sources_follow_one_another_without_weights(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two", "one"))
    (tmp_path / "b.jsonl").write_bytes(lines("two", "three", " "))
    mixture = Mixture([files(tmp_path / "a.jsonl"), files(tmp_path / "b.jsonl")])
    assert [d.text for d in mixture] == ["one", "two", "three"]
    assert [(tally.documents, tally.bytes) for tally in mixture.tallies] == [(2, 6), (1, 5)]
    assert [tally.dropped["duplicate"] for tally in mixture.tallies] == [1, 1]
    assert [tally.dropped["blank"] for tally in mixture.tallies] == [0, 1]


def test_weights_are_shares_of_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*(f"a{n:03}" * 10 for n in range(300))))
    (tmp_path / "b.jsonl").write_bytes(lines(*(f"b{n:03}" * 25 for n in range(300))))
    sources = [files(tmp_path / "a.jsonl", weight=3.0), files(tmp_path / "b.jsonl", weight=1.0)]
    mixture = Mixture(sources)
    first = [d.text for d in mixture]
    a, b = mixture.tallies
    assert a.documents == 300  # it ran out, and so did the mixture
    assert b.bytes == pytest.approx(a.bytes / 3, abs=100)
    assert first == texts_of(*sources)
    assert [text[0] for text in first[:6]] == ["a", "b", "a", "a", "a", "a"]


def test_max_bytes_ends_with_the_document_that_reaches_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("éé", "bbbb", "cccc"))
    assert texts_of(files(tmp_path / "a.jsonl"), max_bytes=5) == ["éé", "bbbb"]
    assert texts_of(files(tmp_path / "a.jsonl"), max_bytes=4) == ["éé"]


def test_position_depends_on_the_text_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*(f"document {n}" for n in range(2000))))
    (tmp_path / "b.jsonl").write_bytes(lines("new", *(f"document {n}" for n in range(2000))))
    a = {d.text: d.position for d in Mixture([files(tmp_path / "a.jsonl")])}
    b = {d.text: d.position for d in Mixture([files(tmp_path / "b.jsonl")])}
    assert a.items() < b.items()
    assert sum(position < 0.25 for position in a.values()) == pytest.approx(500, abs=80)


# ------------------------------------------------------------------------------------------- identity


def test_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = describe(files(path))
    path.touch()
    assert describe(files(path)) == before
    path.write_text("two")
    assert describe(files(path)) != before


def test_identity_of_corpus_and_hub(tmp_path):
    assert describe(CorpusSource(name="kjv"))["version"] == "0.1.3"
    fixed = describe(HubSource(kind="hub", path="some/set", revision="abc", weight=2.0))
    assert fixed == {"kind": "hub", "path": "some/set", "subset": None, "split": "train", "revision": "abc"}
    (tmp_path / "train.jsonl").write_bytes(lines("one"))
    local = HubSource(kind="hub", path=str(tmp_path))
    before = describe(local)
    (tmp_path / "train.jsonl").write_bytes(lines("two"))
    assert describe(local) != before
