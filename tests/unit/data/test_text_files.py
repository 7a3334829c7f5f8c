"""Paths, damage, byte order marks and encodings: a file is read whole and as it is meant, or refused."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import struct

import pytest
import zstandard
from pyarrow import parquet, table

from tutelage.config.data_config import FilesSource
from tutelage.data.find_files import find
from tutelage.data.sources import Mixture
from tutelage.data.text_files import LINE_LIMIT, lines, text_blocks
from tutelage.errors import UserError

TEXT = "".join(f"line {n} of a text that does not repeat itself, {n * n}\n" for n in range(3000))
BOM = "\ufeff"
_ZSTD = zstandard.ZstdCompressor().compress
PACK = {".gz": gzip.compress, ".zst": _ZSTD, ".xz": lzma.compress, ".bz2": bz2.compress}
SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"hello"


def source(path, **fields) -> FilesSource:
    return FilesSource(kind="files", paths=(str(path),), document_bytes="file", **fields)


def texts(path, **fields) -> list[str]:
    return [document.text for document in Mixture([source(path, **fields)])]


def rows(*found: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in found).encode()


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_compressed_file_cut_anywhere_is_damaged(tmp_path, ending, kind, parts):
    data = TEXT.encode() if kind == "txt" else rows(*TEXT.splitlines())
    step = len(data) // parts + 1
    pieces = [PACK[ending](data[i : i + step]) for i in range(0, len(data), step)]
    whole = b"".join(pieces)
    path = tmp_path / f"a.{kind}{ending}"
    borders = {sum(map(len, pieces[:n])) for n in range(parts + 1)}  # there a shorter file is a whole one
    places = {1, 2, 3, 5, 10, 17, len(whole) // 2, len(whole) - 9, len(whole) - 3, len(whole) - 1}
    places |= {border + shift for border in borders for shift in (-1, 1, 2, 4)}
    for place in sorted(p for p in places - borders if 0 < p < len(whole)):
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match=r"a\..*: damaged compressed file") as caught:
            texts(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert "".join(texts(path)) == (TEXT if kind == "txt" else "".join(TEXT.splitlines()))


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("garbage", [b"x", b"garbage", b"\xff" * 300, b"{}\n"])
def test_what_stands_behind_the_compressed_data_is_damage(tmp_path, ending, garbage):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](TEXT.encode()) + garbage)
    with pytest.raises(UserError, match="damaged compressed file"):
        texts(path)


def test_zstd_as_other_programs_write_it(tmp_path):
    data = TEXT.encode()
    streamed = io.BytesIO()
    with zstandard.ZstdCompressor(level=19, write_checksum=True).stream_writer(
        streamed, closefd=False
    ) as out:
        for start in range(0, len(data), 777):
            out.write(data[start : start + 777])
            out.flush(zstandard.FLUSH_BLOCK)
    empty = _ZSTD(b"")
    for packed in (
        streamed.getvalue(),
        SKIPPABLE + _ZSTD(data[:100]) + SKIPPABLE + empty + _ZSTD(data[100:]) + SKIPPABLE,
        zstandard.ZstdCompressor(write_content_size=False).compress(data),
    ):
        (tmp_path / "a.txt.zst").write_bytes(packed)
        assert texts(tmp_path / "a.txt.zst") == [TEXT]
        assert zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True).read() == data
    flipped = bytearray(streamed.getvalue())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "a.txt.zst").write_bytes(flipped)
    with pytest.raises(UserError, match="damaged compressed file"):
        texts(tmp_path / "a.txt.zst")


def test_only_the_outermost_compression_is_taken_off(tmp_path):
    (tmp_path / "a.txt.gz.zst").write_bytes(_ZSTD(gzip.compress(TEXT.encode())))
    with pytest.raises(UserError, match=r"a\.txt\.gz\.zst: unknown kind of file"):
        texts(tmp_path / "a.txt.gz.zst")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(
        table({"text": TEXT.splitlines()}), path, write_page_checksum=True, use_dictionary=False
    )
    whole = path.read_bytes()
    assert len(texts(path)) == 3000
    for place in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
            texts(path)
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
        texts(path)


def test_a_jsonl_file_cut_inside_a_line_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows("one", "two")[:-4])
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: not valid JSON"):
        texts(tmp_path / "a.jsonl")


def test_text_cut_inside_a_character_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("façade, ça".encode()[:-2])
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text \(byte 9 is 0xc3\)"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a" * 2**18 + b"\xc3" + b"b" * 2**18)
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 text \(byte {2**18} is 0xc3\)"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a" * 2**19 + b"\0b")
    with pytest.raises(UserError, match=rf"a\.txt: a binary file, not text \(byte {2**19} is 0\)"):
        texts(tmp_path / "a.txt")


# -------------------------------------------------------------------------------------- byte order marks


@pytest.mark.parametrize("ending", ["", *PACK])
def test_marks_are_removed_wherever_files_were_put_behind_one_another(tmp_path, ending):
    pack = PACK.get(ending, bytes)
    one, two = (BOM + "één\n").encode(), (BOM + "twee").encode()
    (tmp_path / f"a.txt{ending}").write_bytes(pack(one) + pack(two) + pack(two))
    assert texts(tmp_path / f"a.txt{ending}") == ["één\ntweetwee"]
    one, two = (BOM.encode() + rows(text) for text in ("één", "twee"))
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(one) + pack(two))
    assert texts(tmp_path / f"a.jsonl{ending}") == ["één", "twee"]


def test_a_mark_across_two_blocks_is_removed(tmp_path):
    for shift in range(4):
        (tmp_path / "a.txt").write_bytes(b"a" * (2**18 - shift) + BOM.encode() + b"b" * 10)
        assert b"".join(text_blocks(tmp_path / "a.txt")) == b"a" * (2**18 - shift) + b"b" * 10


def test_marks_inside_rows_are_removed_where_texts_begin(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(f"{BOM}one", f"t{BOM}wo", BOM))
    parquet.write_table(table({"text": [f"{BOM}one", f"t{BOM}wo"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.jsonl") == ["one", f"t{BOM}wo"]
    assert texts(tmp_path / "a.parquet") == ["one", f"t{BOM}wo"]
    table_of_text = f"text\n{BOM}one\nt{BOM}wo\n"
    raw_rows = json.dumps({"text": f"t{BOM}wo"}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-be", "gb18030"):
        (tmp_path / "a.csv").write_bytes(table_of_text.encode(encoding))
        (tmp_path / "b.jsonl").write_bytes(raw_rows.encode(encoding))
        assert texts(tmp_path / "a.csv", encoding=encoding) == ["one", f"t{BOM}wo"]
        assert texts(tmp_path / "b.jsonl", encoding=encoding) == [f"t{BOM}wo"]


def test_a_file_with_nothing_but_a_mark_is_empty(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8)
    with pytest.raises(UserError, match=r"a\.txt: the file is empty"):
        texts(tmp_path / "a.txt")
    assert texts(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("ending", ["", *PACK])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_mark_says_which_unicode_encoding_a_file_has(tmp_path, encoding, ending, kind):
    text = f"één\n{TEXT}"
    held = rows(text).decode() if kind == "jsonl" else text
    held = BOM + held if encoding.endswith("be") else held  # Python writes the mark of the others
    path = tmp_path / f"a.{kind}{ending}"
    path.write_bytes(PACK.get(ending, bytes)(held.encode(encoding)))
    assert texts(path) == [text]
    assert texts(path, encoding="cp1252") == [text]  # a mark knows better


def test_line_ends_become_those_of_unix_in_files_and_stay_in_rows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\rthree\n")
    assert texts(tmp_path / "a.txt") == ["one\n\ntwo\nthree\n"]
    (tmp_path / "b.txt").write_bytes(b"x" * (2**18 - 1) + b"\r\n" + b"y\r")  # across two blocks
    assert texts(tmp_path / "b.txt") == ["x" * (2**18 - 1) + "\ny\n"]
    (tmp_path / "a.jsonl").write_bytes(rows("one\r\n", "two").replace(b"\n", b"\r\n"))
    assert texts(tmp_path / "a.jsonl") == ["one\r\n", "two"]


# ------------------------------------------------------------------------------------------- long lines


def test_a_line_that_is_too_long_is_handed_on_as_none(tmp_path, monkeypatch):
    assert LINE_LIMIT == 2**26
    monkeypatch.setattr("tutelage.data.text_files.LINE_LIMIT", 100)
    (tmp_path / "a.jsonl").write_bytes(b"one\n" + b"x" * 99 + b"\n" + b"x" * 100 + b"\n" + b"y" * 10**6)
    assert [line and len(line) for line in lines(tmp_path / "a.jsonl")] == [4, 100, None, None]


# ----------------------------------------------------------------------------------- paths and patterns


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("d[1]/a.txt", "d1/a.txt", "d1/b[2].txt", "d1/b2.txt", "d1/inner/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("d[1]/a.txt", ["d[1]/a.txt"]),
        ("d[1]/*.txt", ["d[1]/a.txt"]),
        ("d[0-9]/a.txt", ["d1/a.txt"]),
        ("d1/b[2].txt", ["d1/b[2].txt"]),
        ("d1/b[1-3].txt", ["d1/b2.txt"]),
        ("d1/*", ["d1/a.txt", "d1/b2.txt", "d1/b[2].txt"]),
        ("d1/**", ["d1/a.txt", "d1/b2.txt", "d1/b[2].txt", "d1/inner/c.txt"]),
        ("./d1/../d1/a.txt", ["d1/../d1/a.txt"]),
    ],
)
@pytest.mark.parametrize("is_absolute", [False, True])
def test_what_stands_there_goes_before_what_a_pattern_means(folder, pattern, names, is_absolute):
    base = f"{folder}/" if is_absolute else ""
    assert [str(path) for path in find([base + pattern])] == [base + name for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("d1/i*", r"^d1/i\*: no such file$"),
        ("none*.txt", r"^none\*\.txt: no such file$"),
        ("d1/" + "a" * 300, r"a: cannot be read \(File name too long\)$"),
        ("gone.txt", r"^gone\.txt: no such file: a link to nowhere, which is not there$"),
        ("*.txt", r"^gone\.txt: no such file: a link to nowhere, which is not there$"),
        ("pipe", r"^pipe: is no file that can be read twice$"),
        ("p*", r"^pipe: is no file that can be read twice$"),
    ],
)
def test_what_cannot_be_read_is_named_and_never_passed_over(folder, pattern, message):
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match=message):
        find([pattern])
