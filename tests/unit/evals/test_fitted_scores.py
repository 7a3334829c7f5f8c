"""Fitted scores depend on the weights and the scored text alone, and are what an independent fit gives."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from transformers import AutoModelForCausalLM

from tutelage.data.store import open_store
from tutelage.evals import scoring
from tutelage.evals.windows import Target, read_documents
from tutelage.models import hub
from tutelage.models.shapes import find_shape
from tutelage.run import run

DOCUMENTS, TOKENS = 12, 30
LIMITS = ["--max-documents", DOCUMENTS, "--max-tokens", TOKENS, "--device", "cpu"]
FITTED = ["bits_per_byte_temperature", "bits_per_byte_unigram"]
KEYS = ["split", "metric", "version", "value", "stderr", "n", "low", "high", "fit_error"]


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """A run that has learned a little, so that its fits differ from 1."""
    output = tmp_path_factory.mktemp("home") / "runs"
    return run(tiny_config(output, tokens=100 * 256, optim={"lr": 1e-2}))


def rows_of(scores, domain="scripture"):
    return pl.read_ndjson(scores).filter(domain=domain).select(KEYS).sort("split", "metric")


@pytest.mark.slow
def test_a_run_and_its_model_have_equal_scores_from_any_directory(
    trained, other_store, tutelage, command, monkeypatch, tmp_path
):
    """In two processes and two directories; the run's configuration names its store relatively.

    With equal numbers of threads, which decide how many rows a kernel takes at a time and so the last digit.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home, abroad = trained.path.parent.parent, tmp_path / "abroad"
    abroad.mkdir()
    copy = shutil.copytree(trained.model, home / "copy")
    what = ["--store", f"scripture={other_store}", *LIMITS]
    printed = tutelage("eval", "score", trained.path, trained.model, *what, cwd=abroad).stdout
    monkeypatch.chdir(home)
    command("eval", "score", "copy", *what)
    ours = rows_of(trained.scores)
    assert set(FITTED) < set(ours["metric"])
    unknown = pl.col("metric").str.contains(
        "overlap|in_domain"
    )  # of the model, whose training text is not known
    (model,), (copied,) = abroad.glob("evals/model-*/scores.jsonl"), home.glob("evals/copy-*/scores.jsonl")
    known = ours.filter(~unknown)
    assert rows_of(model).equals(known)
    assert rows_of(copied).equals(known)
    assert "*" not in printed.split("Bits per byte")[0]  # equal: nobody is best
    assert copy.exists()


def logits_and_labels(model, document):
    """float64 logits of every scored token of a document that is one window, and the tokens."""
    tokens = torch.tensor([document.tokens_N.tolist()])
    with torch.inference_mode():
        logits_TV = model(input_ids=tokens[:, :-1]).logits[0].double()
    return logits_TV.numpy(), tokens[0, 1:].numpy()


def log_softmax(logits_NV):
    shifted = logits_NV - logits_NV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def gold(logits_NV, labels_N, temperature):
    return log_softmax(logits_NV / temperature)[np.arange(len(labels_N)), labels_N]


def scored(model, store, split):
    """Logits, labels and document of every scored token, and the bytes behind them."""
    documents = read_documents(store, split, DOCUMENTS, TOKENS)
    parts = [logits_and_labels(model, document) for document in documents]
    owner_N = np.repeat(np.arange(len(parts)), [len(labels) for _, labels in parts])
    size = sum(document.size for document in documents)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), owner_N, size


def others_unigram(labels_N, owner_N, vocab_size):
    """Share of each token in the other documents, one added to every count."""
    counts = {owner: Counter(labels_N[owner_N != owner].tolist()) for owner in set(owner_N.tolist())}
    return np.array(
        [
            (counts[owner][label] + 1) / (counts[owner].total() + vocab_size)
            for owner, label in zip(owner_N.tolist(), labels_N.tolist(), strict=True)
        ]
    )


def best_temperature(logits_NV, labels_N):
    found = minimize_scalar(
        lambda log_t: -gold(logits_NV, labels_N, math.exp(log_t)).mean(), bounds=(-1, 1.5), method="bounded"
    )
    return math.exp(found.x)


def test_every_fitted_score_is_that_of_an_independent_fit(trained, store, other_store, command):
    """Raw logits of transformers in float64, fits by scipy's general minimiser: only the text is ours."""
    command("eval", "score", trained.path, "--store", f"scripture={other_store}", *LIMITS)
    model = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float64).eval()
    foreign, training = open_store(other_store), open_store(store)
    logits_NV, labels_N, owner_N, _ = scored(model, foreign, "validation")
    test_NV, test_N, _, size = scored(model, foreign, "test")
    own_N = others_unigram(labels_N, owner_N, foreign.vocab_size)
    counts = Counter(labels_N.tolist())
    unigram_N = np.array([(counts[i] + 1) / (len(labels_N) + foreign.vocab_size) for i in test_N.tolist()])

    def mixture(parameters, logits, labels, unigram):
        weight = 1 / (1 + math.exp(-parameters[1]))
        p_N = np.exp(gold(logits, labels, math.exp(parameters[0])))
        return -np.log((1 - weight) * p_N + weight * unigram).mean()

    alone = best_temperature(logits_NV, labels_N)
    mixed = minimize(
        mixture, [0.0, -1.0], (logits_NV, labels_N, own_N), method="Nelder-Mead", options={"xatol": 1e-6}
    ).x
    home = best_temperature(*scored(model, training, "validation")[:2])
    expected = {
        "bits_per_byte_temperature": -gold(test_NV, test_N, alone).mean(),
        "bits_per_byte_unigram": mixture(mixed, test_NV, test_N, unigram_N),
        "bits_per_byte_temperature_in_domain": -gold(test_NV, test_N, home).mean(),
    }
    rows = pl.read_ndjson(trained.scores).filter(split="test")
    found = dict(rows.select("metric", "value").iter_rows())
    for metric, nats in expected.items():
        assert found[metric] == pytest.approx(nats * len(test_N) / size / math.log(2), rel=3e-5)
    assert abs(found["bits_per_byte_unigram"] - found["bits_per_byte"]) > 1e-3
    errors = dict(rows.select("metric", "fit_error").drop_nulls().iter_rows())
    assert set(errors) == set(expected)
    assert all(0 < error < 0.2 for error in errors.values())
    (record,) = json.loads((trained.path / "calibration.json").read_text())["scripture"].values()
    assert record["fit"]["temperature"] == pytest.approx(alone, rel=1e-3)
    assert 0 < record["fit"]["weight"] < 1


def test_the_temperature_of_the_training_text_is_used_on_every_domain(make_config, store, other_store):
    """A run that scores its training text and one that does not have equal scores elsewhere."""
    limits = {"max_documents": DOCUMENTS, "max_tokens": TOKENS}
    inside = {"name": "speeches", "store": str(store), "role": "in_domain"}
    outside = {"name": "scripture", "store": str(other_store)}
    both = run(make_config(eval={"domains": [outside, inside], **limits}))
    found = rows_of(both.scores)
    home = rows_of(both.scores, "speeches").filter(split="test")
    both.scores.unlink()
    alone = run(make_config(eval={"domains": [outside], **limits}))
    assert rows_of(alone.scores).equals(found)
    own, everywhere = (
        home.filter(metric=f"bits_per_byte_{name}")["value"].item()
        for name in ("temperature", "temperature_in_domain")
    )
    assert own == everywhere


def test_a_model_without_a_known_training_text_has_no_score_of_its_temperature(
    other_store, command, tmp_path
):
    hub.save(
        hub.build(find_shape("nano-20k"), open_store(other_store).vocab_size, 32, 0),
        tmp_path / "m",
        other_store,
    )
    command("eval", "score", "m", "--store", f"scripture={other_store}", *LIMITS)
    (scores,) = tmp_path.glob("evals/m-*/scores.jsonl")
    metrics = set(rows_of(scores)["metric"])
    assert set(FITTED) < metrics
    assert "bits_per_byte_temperature_in_domain" not in metrics


def test_short_documents_have_tokens_in_the_fit(trained, store, monkeypatch):
    """Of many short documents no token might be so far from the beginning as every n-th one is."""
    monkeypatch.setattr(scoring, "FIT_TOKENS", 5)
    target = Target("short", "out_of_domain", open_store(store), 32, 32, 1000, 6)
    documents = target.documents("validation")
    assert sum(one.scored for one in documents) // scoring.FIT_TOKENS > max(one.scored for one in documents)
    tokens = scoring._validation_tokens(hub.load(trained.model), target, documents)
    fitted, _ = scoring._fitted(tokens, target.store.vocab_size)
    assert fitted.documents == len(documents)
    assert fitted.tokens == len(tokens.powered_MK) > 0
