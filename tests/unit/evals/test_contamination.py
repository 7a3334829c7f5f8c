"""What of a text was trained on: against plain recomputations on a real store."""

from __future__ import annotations

import itertools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.evals import contamination, scoring
from tutelage.evals.contamination import GRAM, copied_grams, kept, trained_on
from tutelage.evals.windows import read_documents
from tutelage.records import write_sealed


@pytest.fixture(scope="module")
def training(store):
    return open_store(store)


@pytest.fixture(scope="module")
def mixed(training, tmp_path_factory):
    """A text half of whose documents were trained on, and one of which quotes the training text."""
    folder = tmp_path_factory.mktemp("mixed")
    tokenizer = Tokenizer.from_file(str(training.path / "tokenizer.json"))
    view = training.split("train")
    bounds = view.offsets[:, 0].astype(int)
    texts = [tokenizer.decode(view.tokens[a : b - 1].tolist()) for a, b in itertools.pairwise(bounds[:7])]
    quoting = (
        "Of my own invention, with zeal and a kettle. " + texts[0][3000:4000] + " And so on and so forth."
    )
    for number, text in enumerate(
        [*texts, quoting, *(f"{n} geese fly over hill {n}. " * 40 for n in range(9))]
    ):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    config = StoreConfig(
        name="mixed",
        sources=({"kind": "files", "paths": (str(folder / "*.txt"),), "document_bytes": "file"},),
        tokenizer=TokenizerConfig(path=training.path),
        validation=0.5,
        test=0.5,
    )
    return open_store(build_store(config, folder))


def texts_of(store, split):
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    view = store.split(split)
    bounds = view.offsets[:, 0].astype(int)
    return [tokenizer.decode(view.tokens[a : b - 1].tolist()) for a, b in itertools.pairwise(bounds)]


def grams(text):
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]


def test_documents_that_were_trained_on_are_found(training, mixed, tmp_path):
    known = trained_on([training], {"mixed": mixed}, tmp_path)
    trained = set(texts_of(training, "train"))
    total = 0
    for split in ("validation", "test"):
        expected = {i for i, text in enumerate(texts_of(mixed, split)) if text in trained}
        assert known["mixed", split] == expected
        total += len(expected)
    assert total == 6
    (file,) = tmp_path.glob("trained-on-*.json")
    before = file.stat().st_mtime_ns
    assert trained_on([training], {"mixed": mixed}, tmp_path) == known
    assert file.stat().st_mtime_ns == before


def test_held_out_text_of_the_same_store_was_not_trained_on(training, tmp_path):
    known = trained_on([training], {"own": training}, tmp_path)
    assert known == {("own", "validation"): frozenset(), ("own", "test"): frozenset()}


def test_copied_grams_are_a_plain_count(training, mixed, tmp_path):
    documents = {
        ("mixed", split): [document.tokens_N for document in read_documents(mixed, split, 100, 10**6)]
        for split in ("validation", "test")
    }
    found = copied_grams([training], documents, tmp_path)
    there = {gram for text in texts_of(training, "train") for gram in grams(text)}
    copied = 0
    for split in ("validation", "test"):
        for text, n, m in zip(texts_of(mixed, split), *found["mixed", split], strict=True):
            assert n == len(grams(text))
            assert m == sum(gram in there for gram in grams(text))
            copied += 0 < m < n
    assert copied >= 1
    again = copied_grams([training], documents, tmp_path)
    assert all(np.array_equal(again[key], found[key]) for key in found)


def test_texts_that_were_trained_on_whole_have_no_grams(training, tmp_path):
    ((n, copied),) = copied_grams([training], {("own", "test"): []}, tmp_path).values()
    assert len(n) == len(copied) == 0


def test_short_texts_have_no_grams():
    assert len(contamination._grams([1] * (GRAM - 1))) == 0
    assert len(contamination._grams([1] * GRAM)) == 1
    assert len(contamination._grams([1] * 5 + [0] + [1] * GRAM)) == 1  # no gram reaches over a foreign word


def test_what_is_kept_under_another_name_is_found_again(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert kept(first, lambda: [1]) == [1]
    assert kept(second, lambda: [2]) == [2]
    assert kept(first, lambda: [3]) == [1]
    shutil.copyfile(second, first)
    assert kept(first, lambda: [3]) == [3]
    write_sealed(first, {"status": "done"})
    assert kept(first, lambda: [4]) == [4]


def test_documents_without_grams_leave_the_interval_a_number():
    grams_N, copied_N = np.array([0, 4, 0, 6]), np.array([0, 1, 0, 3])
    found = contamination.Contamination(4, frozenset(), grams_N, copied_N)
    target = SimpleNamespace(contamination={"test": found}, teacher_contamination={})
    (score,) = (one.estimate for one in scoring._overlaps(target) if one.metric == "overlap_8grams")
    assert score.value == 0.4
    assert 0.25 <= score.low <= 0.4 <= score.high <= 0.5
