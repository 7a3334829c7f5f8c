"""Scoring counts what training counts: completions alone, and no probability for ids that nobody has."""

from __future__ import annotations

import itertools
import math

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.evals.score_files import read_scores
from tutelage.models import hub
from tutelage.models.shapes import find_shape
from tutelage.run import run

LENGTH, PADDED = 64, 84
LIMITS = {"max_documents": 5, "max_tokens": 200}
OPTIONS = ["--max-documents", "5", "--max-tokens", "200", "--device", "cpu"]


@pytest.fixture(scope="module")
def start(store, tmp_path_factory):
    """A model whose head is padded beyond the tokenizer's 300 ids, far from uniform."""
    model = hub.build(find_shape("nano-50k"), 300 + PADDED, LENGTH, seed=5)
    for weight in model.parameters():
        weight.data *= 2
    directory = tmp_path_factory.mktemp("start") / "m"
    hub.save(model, directory, store)
    return directory


@pytest.fixture(scope="module")
def pairs(store, tmp_path_factory):
    fields = {
        "name": "pairs",
        "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}],
        "tokenizer": {"path": str(store)},
        "validation": 0.2,
        "test": 0.2,
        "max_bytes": 60_000,
    }
    return build_store(validate(StoreConfig, fields, "test"), tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def tuned(start, pairs, tmp_path_factory):
    """A fine-tuned student that scores its own kind of text while it trains and at its end."""
    fields = {
        "name": "sft",
        "stage": "sft",
        "model": {"path": str(start)},
        "data": {"store": str(pairs), "sequence_length": LENGTH},
        "tokens": 12 * 256,
        "global_batch_tokens": 256,
        "optim": {"lr": 1e-3},
        "eval": {"every": 4 * 256, "domains": [{"name": "pairs", "store": str(pairs)}], **LIMITS},
        "runtime": {"device": "cpu", "threads": 1},
        "output": str(tmp_path_factory.mktemp("runs")),
    }
    return run(validate(RunConfig, fields, "test"))


def truth(directory, path, split="test"):
    """Nats, tokens and source bytes of the completions, by the store's mask and transformers in float64."""
    store = open_store(path)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    assert model.get_output_embeddings().weight.shape[0] == 300 + PADDED
    view = store.split(split)
    nats, tokens, size = 0.0, 0, 0
    for a, b in itertools.islice(itertools.pairwise(view.offsets[:, 0].astype(int)), LIMITS["max_documents"]):
        end = min(b, a + LIMITS["max_tokens"])
        ids, mask = view.tokens[a:end].astype("int64"), view.mask[a:end]
        for start in range(0, len(ids) - 1, LENGTH):
            piece = torch.from_numpy(ids[start : start + LENGTH + 1])
            with torch.inference_mode():
                logp = model(input_ids=piece[None, :-1]).logits[0, :, :300].log_softmax(1)
            learned = mask[start + 1 : start + len(piece)] != 0
            nats -= float(logp.gather(1, piece[1:, None])[learned].sum())
            tokens += int(learned.sum())
        size += int(view.bytes[a:end][mask != 0].sum())
    return nats, tokens, size


def test_a_fine_tuned_run_is_scored_on_completions_alone_everywhere(tuned, pairs, tmp_path, command):
    nats, tokens, size = truth(tuned.model, pairs)
    rows = pl.read_ndjson(tuned.scores).filter(domain="pairs", split="test")
    assert set(rows["step"]) == {4, 8, 12}
    last = dict(rows.filter(step=12).select("metric", "value").iter_rows())
    assert last["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert last["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-4)
    documents = pl.read_parquet(tuned.documents).filter(domain="pairs", split="test")
    assert (documents["tokens"].sum(), documents["bytes"].sum()) == (tokens, size)
    assert documents["window_tokens"].list.sum().to_list() == documents["tokens"].to_list()
    assert documents["window_bytes"].list.sum().to_list() == documents["bytes"].to_list()

    command("eval", "score", tuned.model, "--store", f"pairs={pairs}", *OPTIONS)
    (scores,) = tmp_path.glob("evals/*/scores.jsonl")
    again = dict(pl.read_ndjson(scores).filter(split="test").select("metric", "value").iter_rows())
    for metric in ("perplexity", "bits_per_byte", "ece", "brier"):
        assert again[metric] == pytest.approx(last[metric], rel=1e-6)


def test_the_token_comparison_reads_completions_alone(tuned, pairs, start, tmp_path, command):
    command("eval", "tokens", tuned.path, "--teacher", start, "--baseline", start, *OPTIONS)
    (found,) = tmp_path.glob("evals/token-comparisons/*/*/tokens.parquet")
    table = pl.read_parquet(found)
    nats, tokens, _ = truth(tuned.model, pairs)
    assert table.height == tokens
    assert -table["gold_logp.student"].sum() == pytest.approx(nats, rel=1e-4)


def test_heads_padded_or_cut_to_the_ids_have_equal_scores(start, store, tmp_path, command):
    """Raw, fitted and calibration scores, and bits per byte under transformers with the rows cut off."""
    cut = hub.load(start)
    cut.resize_token_embeddings(300)
    hub.save(cut, tmp_path / "cut", store)
    command("eval", "score", start, tmp_path / "cut", "--store", f"speeches={store}", *OPTIONS)
    first, second = (
        {(score.split, score.metric): score.value for score in read_scores(path)}
        for path in sorted(tmp_path.glob("evals/*/scores.jsonl"))
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value == pytest.approx(second[key], rel=1e-4, abs=1e-6), key
    with torch.inference_mode():
        mass = hub.load(start)(input_ids=torch.arange(5, 25)[None]).logits[0].softmax(1)[:, 300:].sum(1)
    assert mass.mean() > 0.05  # or nothing was shown
