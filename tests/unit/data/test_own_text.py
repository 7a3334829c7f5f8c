"""Own text of every kind, beside other readers: directories, encodings, tables, pages, marks in the text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import resource
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import html as lxml_html

from tutelage.config.data_config import FilePairs, FilesSource, StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.cutting import _divided, _parts
from tutelage.data.find_files import find, passed_over
from tutelage.data.row_readers import BadRowError, file_rows, file_texts
from tutelage.data.store import open_store
from tutelage.data.store_manifest import remarks
from tutelage.errors import UserError

REPOSITORY = Path(__file__).parents[3]


def source(*paths, **fields) -> FilesSource:
    given = {"kind": "files", "paths": tuple(map(str, paths)), "document_bytes": "file"}
    return FilesSource(**given | fields)


def texts(*paths, **fields) -> list[object]:
    return list(file_texts(source(*paths, **fields)))


# ----------------------------------------------------------------------------------------------- encodings

LATIN = "Käse, façade, señor — “ready”…\n"


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("ISO8859-1", "Käse, façade, señor\n"),
        ("cp1252", LATIN),
        ("UTF-16LE", LATIN),
        ("koi8-r", "Жили-были дед да баба\n"),  # noqa: RUF001
        ("shift_jis", "吾輩は猫である\n"),
        ("gb18030", "学而时习之，不亦说乎 😀\n"),  # noqa: RUF001
        ("big5", "學而時習之\n"),
        ("euc-kr", "나랏말싸미\n"),
    ],
)
def test_encodings_are_read_as_iconv_wrote_them(tmp_path, encoding, line):
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not on PATH")
    text = "".join(
        f"{n} {line}" for n in range(20_000)
    )  # several blocks, whose borders lie inside characters
    done = subprocess.run(
        ["iconv", "-f", "UTF-8", "-t", encoding], input=text.encode(), capture_output=True, check=True
    )
    (tmp_path / "a.txt").write_bytes(done.stdout)
    assert texts(tmp_path / "a.txt", encoding=encoding) == [text]
    table = 'n,text\n1,"' + line.strip() + '"\n'
    (tmp_path / "a.csv").write_bytes(table.encode(encoding))
    assert texts(tmp_path / "a.csv", encoding=encoding) == [line.strip()]
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "{line.strip()}"}}\n'.encode(encoding))
    assert texts(tmp_path / "a.jsonl", encoding=encoding) == [line.strip()]


def test_another_encoding_is_an_error_that_says_how_to_name_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 300_000 + "señor".encode("latin-1"))
    for kind in ("txt", "md", "html", "csv", "txt.gz"):
        other = tmp_path / f"b.{kind}"
        held = b"text\n" + path.read_bytes()
        other.write_bytes(gzip.compress(held) if kind.endswith("gz") else held)
        with pytest.raises(
            UserError, match=rf"b\.{kind}: not UTF-8 text \(byte 300007 is 0xf1\); name its enc"
        ):
            texts(other)
    path.write_bytes("naïve".encode() + b"\x81")
    with pytest.raises(UserError, match=r"a\.txt: not CHARMAP text \(byte 6 is 0x81\)"):
        texts(path, encoding="cp1252")
    path.write_text("plain text, no UTF-16 at all")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-32-LE text \(byte 0 is 0x70\)"):
        texts(path, encoding="utf-32")
    path.write_bytes("text".encode("utf-32-le"))
    with pytest.raises(UserError, match=r"a\.txt: not utf-16-le text \(it has characters of code 0\)"):
        texts(path, encoding="utf-16-le")


def test_one_encoding_has_one_name_and_what_is_none_is_refused():
    assert source("a", encoding="latin-1").encoding == source("a", encoding="ISO_8859-1").encoding
    for name in ("latin-one", "hex", "rot13", "undefined", ""):
        with pytest.raises(UserError, match=r"encoding = .*' is no encoding; write for example latin-1"):
            validate(FilesSource, {"kind": "files", "paths": ["a"], "encoding": name}, "test")


# -------------------------------------------------------------------------------------------------- tables


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff"), min_size=1),
            st.integers(),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_tables_are_read_as_pandas_wrote_and_reads_them(tmp_path_factory, rows, kind, line_end):
    ending, delimiter = kind
    path = tmp_path_factory.mktemp("table") / f"a.{ending}"
    if line_end == "\r\n":
        rows = [(text.replace("\n", "\r\n"), number) for text, number in rows]
    frame = pd.DataFrame(rows, columns=["text", "n"])[["n", "text"]]
    frame.to_csv(path, index=False, sep=delimiter, lineterminator=line_end)
    again = pd.read_csv(path, sep=delimiter, keep_default_na=False, dtype=str, lineterminator=None)
    unix = [re.sub("\r\n?", "\n", text) for text, _ in rows]
    assert texts(path) == unix
    assert [re.sub("\r\n?", "\n", text) for text in again["text"]] == unix


def test_tables_packed_with_a_mark_or_a_long_field(tmp_path):
    frame = pd.DataFrame({"body": ["one", "x" * 200_000, 'she said "no"\nand left']})
    for ending in ("csv", "csv.gz", "csv.xz", "csv.bz2", "csv.zst"):
        frame.to_csv(tmp_path / f"a.{ending}", index=False, encoding="utf-8-sig")
        assert texts(tmp_path / f"a.{ending}", field="body") == list(frame["body"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "body,n\none,1\n",
            r"a\.csv: no column 'text'; it has: body, n; field \(of pairs .* says which is read$",
        ),
        ("text,text\none,1\n", r"a\.csv: 2 columns 'text'; it has: text, text; field "),
        (
            'n,text\n1,one\n2,"two\n3,three\n',
            r"a\.csv: line 3: not valid CSV: unexpected end of data; inside",
        ),
        ('n,text\n1,"a "quoted" word"\n', r"a\.csv: line 2: not valid CSV: ',' expected after '\"'; inside"),
    ],
)
def test_a_broken_table_names_its_line(tmp_path, table, message):
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "a.csv", on_bad_row="skip")


def test_a_row_with_too_many_fields_is_one_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text('n,text\n1,"a\nb"\n2,c,d\n\n3,e\n4\n')
    one, bad, three, short = texts(tmp_path / "a.csv")
    assert (one, three) == ("a\nb", "e")
    assert isinstance(bad, BadRowError)
    assert str(bad).endswith("a.csv: line 4: 3 fields, and 2 columns in the first line")
    assert str(short).endswith("a.csv: line 7: 1 fields, and 2 columns in the first line")


def test_prompts_and_completions_come_from_tables_too(tmp_path):
    (tmp_path / "a.tsv").write_text("completion\tprompt\nParis\tcapital of France?\n")
    found = file_rows(FilePairs(kind="pairs", paths=(str(tmp_path),)), ("prompt", "completion"))
    assert [row for _, row in found] == [{"prompt": "capital of France?", "completion": "Paris"}]
    (tmp_path / "a.html").write_text("<p>one")
    with pytest.raises(UserError, match=r"a\.html: text has no fields; prompts and completions come from"):
        list(file_rows(FilePairs(kind="pairs", paths=(str(tmp_path),)), ("prompt", "completion")))


# --------------------------------------------------------------------------------------------------- pages


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text))


@pytest.mark.parametrize(
    "page",
    [
        Path(sysconfig.get_paths()["stdlib"], "idlelib", "help.html"),
        REPOSITORY / "docs/results/replication/report.html",
    ],
    ids=["help", "report"],
)
def test_pages_give_the_words_that_another_parser_finds_in_them(page):
    if not page.exists():
        pytest.skip("this Python comes without it")
    (found,) = texts(page)
    tree = lxml_html.fromstring(page.read_text(encoding="utf-8"))
    for unseen in tree.xpath("//head | //script | //style | //template | //noscript | //*[name()='svg']"):
        unseen.drop_tree()
    expected = " ".join(tree.itertext())
    lost = words(expected) - words(found)
    assert sum(words(expected).values()) > 1000
    assert sum(lost.values()) < 0.01 * sum(words(expected).values()), lost.most_common(20)
    assert not re.search(r"</?(p|div|span|td|script)\b", found)
    assert "\n\n" in found


PAGE = """<!doctype html><html><head>{head}<title>T</title><style>p {{}}</style>
<script>var a = "<p>no</p>"</script>
</head><body><h1>Caf\xe9 &amp; bar</h1><p>One <b>bold</b>word,
  broken.</p><p>Two<br>lines</p><pre>def f():
    return 1</pre><!-- no --><ul><li>first<li>second</ul></body></html>"""


@pytest.mark.parametrize(
    ("head", "encoding", "given"),
    [
        ("", "utf-8", None),
        ("", "utf-8-sig", "latin-1"),
        ("<meta charset='iso-8859-1'>", "cp1252", None),
        ('<meta http-equiv="Content-Type" content="text/html; charset=Windows-1252">', "cp1252", None),
        ("<meta charset=koi8-r>", "latin-1", "latin-1"),
        ("<meta charset=utf-16>", "utf-8", None),
        ("<meta charset=nonsense>", "utf-8", None),
        ("", "utf-16", None),
    ],
)
def test_a_page_is_what_a_reader_sees_of_it(tmp_path, head, encoding, given):
    for name, pack in (("a.html", bytes), ("a.HTM.gz", gzip.compress), ("a.xhtml.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(PAGE.format(head=head).encode(encoding)))
        (found,) = texts(tmp_path / name, encoding=given)
        assert found == (
            "Café & bar\n\nOne boldword, broken.\n\nTwo\nlines\n\n"
            "def f():\n    return 1\n  • first\n  • second"
        )


def test_a_page_in_xhtml_says_its_encoding_too(tmp_path):
    page = '<?xml version="1.0" encoding="ISO-8859-1"?>\n' + PAGE.format(head="")
    (tmp_path / "a.xhtml").write_bytes(page.encode("latin-1"))
    assert texts(tmp_path / "a.xhtml")[0].startswith("Café & bar\n")


def test_a_cdata_section_of_xhtml_is_text(tmp_path):
    sections = {
        "<![CDATA[a < b && c > d <b>not bold</b> ]]>": "a < b && c > d <b>not bold</b>",
        "<![CDATA[x <br/> <![CDATA[ y]]>z": "x <br/> <![CDATA[ yz",
        "<script>//<![CDATA[\nf('</script>') //]]></script>one": "one",
        "<!-- <![CDATA[ x > y ]]> -->two": "two",
        "three<![CDATA[]]>four": "threefour",
    }
    for section, text in sections.items():
        (tmp_path / "a.xhtml").write_text(f"<?xml version='1.0'?><html><body><p>{section}</p></body></html>")
        assert texts(tmp_path / "a.xhtml") == [text]


def test_a_tag_that_is_closed_at_once_takes_no_text_with_it_in_xhtml(tmp_path):
    body = (
        '<p><a id="one"/>One<br/>two</p><div class="x" /><iframe src="a"/><p>three</p><textarea/><p>four</p>'
    )
    for head in ("<title/>", '<script src="a.js" />', '<style type="text/css"/>', '<meta name="a"/><title/>'):
        page = f"<html xmlns='http://www.w3.org/1999/xhtml'><head>{head}</head><body>{body}</body></html>"
        for start in ("", '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n'):
            (tmp_path / "a.xhtml").write_text(start + page)
            assert texts(tmp_path / "a.xhtml") == ["One\ntwo\n\nthree\n\nfour"]


def test_a_page_without_text_is_a_blank_document_and_one_that_is_too_long_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("<script>draw()</script>")
    assert texts(tmp_path / "a.html") == [""]
    monkeypatch.setattr("tutelage.data.text_files.PAGE_LIMIT", 10)
    with pytest.raises(UserError, match=r"a\.html: a page longer than 10 bytes"):
        texts(tmp_path / "a.html")


def test_a_tag_whose_attributes_would_take_minutes_is_refused(tmp_path):
    names = " ".join(f"a{i}" for i in range(100_000))
    (tmp_path / "a.html").write_text(f'<p a=b=" {names} ">text')  # quotes in a value without quotes
    began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with pytest.raises(UserError, match=r"a\.html: its .* bytes of HTML cannot be parsed in 3 seconds"):
        texts(tmp_path / "a.html")
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began < 5


def test_a_large_page_is_read_as_a_small_one_is(tmp_path):
    (tmp_path / "a.html").write_text("<p>one</p><ul><li>two</ul>\n" * 9)
    (small,) = texts(tmp_path / "a.html")
    (tmp_path / "a.html").write_text("<p>one</p><ul><li>two</ul>\n" * 9000)
    assert texts(tmp_path / "a.html") == ["\n\n".join([small] * 1000)]
    (tmp_path / "a.html").write_text(f'<img src="data:image/png;base64,{"ab/c" * 100_000}"><p>text')
    assert texts(tmp_path / "a.html") == ["text"]


# --------------------------------------------------------------------------------------------- directories


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine" / "deep" / ".git").mkdir(parents=True)
    held = {
        "mine/b.txt": b"b",
        "mine/a.MD": b"# a",
        "mine/deep/c.html": b"<p>c",
        "mine/deep/d.csv": b"text\nd\n",
        "mine/deep/e.jsonl.bz2": bz2.compress(b'{"text": "e"}\n'),
        "mine/deep/f.txt.xz": lzma.compress(b"f"),
        "mine/deep/photo.PNG": b"\x89PNG",
        "mine/deep/LICENSE": b"licence",
        "mine/deep/.git/config": b"hidden",
        "mine/deep/empty.txt": b"",
        "mine/all.zip": b"PK",
    }
    for name, content in held.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "mine" / "again").symlink_to("deep")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_directory_stands_for_what_can_be_read_in_it(folder):
    assert texts("mine") == ["# a", "b", "c", "d", "e", "f"]
    assert [str(path) for path in find(["mine/deep/d.csv", "mine"])] == [
        "mine/deep/d.csv", "mine/a.MD", "mine/b.txt", "mine/deep/c.html", "mine/deep/e.jsonl.bz2",
        "mine/deep/f.txt.xz",
    ]  # fmt: skip
    assert passed_over(["mine"], None) == {
        ".png": 1, ".zip": 1, "empty files": 1, "files without an ending": 1, "hidden": 1,
        "links to directories": 1,
    }  # fmt: skip
    assert passed_over(["mine/b.txt", "mine/*.MD"], None) == {}
    below = {"in directories that a pattern matches": 4}
    assert passed_over(["mine/*"], None) == below
    assert passed_over(["mine/*", "mine/deep/d.csv"], None) == {**below, **dict.fromkeys(below, 3)}
    assert passed_over(["mine/**"], None) == passed_over(["mine/**/*.txt"], None) == {}


def test_what_a_directory_has_besides_is_said_after_the_build(folder):
    made = StoreConfig(
        name="mine", sources=(source("mine", document_bytes="auto"),), validation=0.0, test=0.0
    )
    notes = remarks(open_store(build_store(made, folder / "stores")).manifest)
    assert any(
        "files of its directories that were not read: 1 .png, 1 .zip, 1 empty files, 1 files w" in n
        for n in notes
    )
    assert not any("are cut" in note for note in notes)  # of six short files


def test_a_directory_with_nothing_to_read_says_what_it_has(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(
        UserError, match=r"^pictures: no file in this directory can be read; it has: 1 \.png; \.tx"
    ):
        texts("pictures")


def test_a_format_reads_files_whatever_they_are_called(folder):
    assert texts("mine/deep/LICENSE", format="text") == ["licence"]
    assert texts("mine/a.MD", "mine/b.txt", format="html") == ["# a", "b"]
    with pytest.raises(
        UserError, match=r"LICENSE: unknown kind of file; .*format: text reads other plain text"
    ):
        texts("mine/deep/LICENSE")
    with pytest.raises(UserError, match=r"photo\.PNG: not UTF-8 text \(byte 0 is 0x89\)"):
        texts("mine/deep", format="text")
    with pytest.raises(UserError, match=r"paths\.0: '' is too short|paths"):
        validate(FilesSource, {"kind": "files", "paths": [""]}, "test")


# ---------------------------------------------------------------------------------- marks between documents

BOOK = "Front matter\n\nCHAPTER I\nOne.\n\nCHAPTER II\nSee CHAPTER I.\n\nCHAPTER III\nThree.\n"


def test_a_book_is_cut_before_its_chapters(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOOK.replace("\n", "\r\n").encode())
    found = texts(tmp_path, cut_before="CHAPTER [IVX]+$", document_bytes="auto")
    assert found == re.split(r"(?m)^(?=CHAPTER [IVX]+$)", BOOK)
    assert len(found) == 4
    (tmp_path / "a.html").write_text("<h2>CHAPTER I</h2><p>One.</p><h2>CHAPTER II</h2><p>Two.</p>")
    (tmp_path / "a.txt").unlink()
    assert texts(tmp_path, cut_before="CHAPTER", document_bytes="auto") == [
        "CHAPTER I\n\nOne.\n\n", "CHAPTER II\n\nTwo.",
    ]  # fmt: skip


def test_text_is_cut_at_a_mark_that_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one\nmore\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert texts(tmp_path, cut_at="<|endoftext|>", document_bytes="auto") == ["one\nmore", "two", ""]
    assert texts(tmp_path, cut_at="\n", document_bytes="auto")[:2] == ["one", "more"]


def test_cuts_at_marks_are_not_said_to_be_of_a_length(tmp_path):
    (tmp_path / "a.txt").write_text("one---two---three---" + "\n\n".join(["four"] * 5000))
    for fields, said in (({"cut_at": "---"}, False), ({"cut_before": "four"}, False), ({}, True)):
        made = StoreConfig(
            name="mine",
            sources=(source(str(tmp_path / "a.txt"), document_bytes="auto", **fields),),
            tokenizer={"vocab_size": 260},
            validation=0.0,
            test=0.0,
        )
        notes = remarks(open_store(build_store(made, tmp_path / "stores")).manifest)
        assert any("cut into documents of about" in note for note in notes) is said, fields


def test_long_parts_are_cut_further(tmp_path):
    line = "word " * 100
    (tmp_path / "a.txt").write_text("---".join("\n\n".join([line] * 100) for _ in range(3)))
    assert [len(text) for text in texts(tmp_path, cut_at="---", document_bytes="auto")] == [50_198] * 3
    found = texts(tmp_path, cut_at="---", document_bytes=2048)
    assert all(800 < len(text) < 4096 for text in found)
    assert sum(map(len, found)) == 3 * 50_198


def test_a_mark_that_is_nowhere_is_an_error(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(BOOK)
    with pytest.raises(
        UserError, match=r"cut_at: '<s>' cuts none of the 2 text files; mend it, or leave it out"
    ):
        texts(tmp_path, cut_at="<s>", document_bytes="auto")
    with pytest.raises(UserError, match=r"cut_before: 'Book' cuts none of the 2 text files"):
        texts(tmp_path, cut_before="Book", document_bytes="auto")
    (tmp_path / "a.txt").write_text("one<s>two")
    assert len(texts(tmp_path, cut_at="<s>", document_bytes="auto")) == 3
    monkeypatch.setattr("tutelage.data.cutting.DOCUMENT_LIMIT", 20)
    for mark in ({"cut_at": "<s>"}, {"cut_before": "Book"}):
        with pytest.raises(UserError, match=r"b\.txt: more than 20 characters in which cut_at or cut_before"):
            texts(tmp_path / "b.txt", document_bytes="auto", **mark)


@given(st.text("ab\n", max_size=60), st.text("ab\n", min_size=1, max_size=3), st.lists(st.integers(1, 9)))
def test_blocks_are_divided_as_the_whole_text_is(text, mark, sizes):
    blocks, rest = [], text
    for size in sizes:
        blocks, rest = [*blocks, rest[:size].encode()], rest[size:]
    blocks.append(rest.encode())
    assert list(_divided(Path("a"), iter(blocks), mark)) == text.split(mark)
    parts = list(_parts(Path("a"), iter(blocks), source("a", cut_before="ab", document_bytes="auto")))
    assert [part for part in parts if part] == [part for part in re.split("(?m)^(?=ab)", text) if part]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cut_at": "a", "cut_before": "b"},
            r"cut_at and cut_before are two ways to cut the same text; keep one",
        ),
        ({"cut_at": "a", "document_bytes": "file"}, r"document_bytes: file asks for no cuts"),
        ({"cut_before": "CHAPTER ("}, r"cut_before = .*: not a regular expression \(missing"),
    ],
)
def test_contradictory_cuts_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        validate(FilesSource, {"kind": "files", "paths": ["a"]} | fields, "test")
