"""`tutelage eval score` on texts, end to end: real runs and models through the command line's own entry."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals import evaluate
from tutelage.models import hub
from tutelage.models.shapes import LADDER

LIMITS = ["--max-documents", "4", "--max-tokens", "90", "--device", "cpu"]


@pytest.fixture
def model(store, tmp_path):
    built = hub.build(LADDER["nano-50k"], open_store(store).vocab_size, 48, seed=0)
    hub.save(built, tmp_path / "tiny", store)
    return tmp_path / "tiny"


def test_a_run_and_a_model_on_stores_and_a_domain(tiny_run, other_store, model, command):
    trained = tiny_run
    what = [trained.path, model, "--store", f"scripture={other_store}", "--domain", "phenotypes", *LIMITS]
    code, printed, complaint = command("eval", "score", *what)
    assert code == 0
    notes = [line for line in complaint.splitlines() if ": done · " not in line]
    assert all("reading ended at max_bytes" in line for line in notes)
    for text in (
        "scripture",
        "phenotypes",
        "temperature fitted",
        "and unigram mixed in",
        "temperature fitted in domain",
        "error of the fits",
        "*",
        "[",
        trained.id,
    ):
        assert text in printed
    rows = pl.read_ndjson(trained.scores)
    assert rows.select("domain", "split", "metric", "version", "step").is_unique().all()
    assert set(rows["domain"]) == {"scripture", "phenotypes"}
    assert rows["step"].unique().to_list() == [12]
    assert rows["code"].str.starts_with("tutelage ").all()
    raw = rows.filter(metric="bits_per_byte")
    assert (raw["low"] <= raw["value"]).all()
    assert (raw["value"] <= raw["high"]).all()
    expected = {"bits_per_byte", "perplexity", "ece", "ece_adaptive", "brier", "overlap_documents"}
    fitted = {"bits_per_byte_temperature", "bits_per_byte_unigram", "bits_per_byte_temperature_in_domain"}
    expected |= fitted | {"overlap_8grams", "overlap_near_documents"}
    expected |= {"first_window_excess"}
    assert set(rows.filter(domain="scripture", split="test")["metric"]) == expected
    documents = pl.read_parquet(trained.documents).filter(domain="scripture", split="test")
    for metric in ("bits_per_byte", *fitted):
        column = metric.replace("bits_per_byte", "nll")
        value = rows.filter(domain="scripture", split="test", metric=metric)["value"].item()
        bits = documents[column].sum() / documents["bytes"].sum() / 0.6931471805599453
        assert value == pytest.approx(bits)
    (curves,) = json.loads((trained.path / "calibration.json").read_text())["scripture"].values()
    assert sum(point["tokens"] for point in curves["reliability"]["ece"]) == sum(documents["tokens"])
    assert curves["fit"]["documents"] == 4
    (scores,) = model.parent.glob("evals/tiny-*/scores.jsonl")
    assert len(scores.read_text().splitlines()) == rows.height - 4 * 2  # its training text is not known


def test_evaluating_again_computes_and_adds_nothing(store, model, command, monkeypatch):
    what = ["eval", "score", model, "--store", f"speeches={store}", *LIMITS]
    _, first, _ = command(*what)
    (scores,) = model.parent.glob("evals/tiny-*/scores.jsonl")
    before = scores.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_domain", None)
        code, second, _ = command(*what, model)
        assert code == 0
    assert second == first
    assert scores.read_bytes() == before
    command(
        "eval", "score", model, "--store", f"speeches={store}", "--max-documents", "3", "--max-tokens", "90"
    )
    assert len(scores.read_bytes().splitlines()) == 2 * len(before.splitlines())


def test_scores_of_an_older_scoring_are_named_and_made_again(store, model, command):
    what = ["eval", "score", model, "--store", f"speeches={store}", *LIMITS]
    command(*what)
    (scores,) = model.parent.glob("evals/tiny-*/scores.jsonl")
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    old = [row | {"version": row["version"].partition("-")[2], "value": 99.0} for row in rows]
    scores.write_text("".join(json.dumps(row) + "\n" for row in old))
    (scores.parent / "checksums.json").unlink()
    code, printed, complaint = command(*what)
    assert code == 0
    assert "99.0" not in printed
    assert "scores of speeches by scoring version 1 are left out; this is version 2" in complaint
    again = [json.loads(line) for line in scores.read_text().splitlines()]
    keys = [(row["metric"], row["split"], row["version"]) for row in rows]
    assert [(row["metric"], row["split"], row["version"]) for row in again] == [
        *((metric, split, version.partition("-")[2]) for metric, split, version in keys),
        *keys,
    ]


@pytest.mark.parametrize("line", ["?", '{"run": "x"}', "{}"])
def test_a_damaged_line_of_scores_is_named(line, store, model, command):
    what = ["eval", "score", model, "--store", f"speeches={store}", *LIMITS]
    command(*what)
    (scores,) = model.parent.glob("evals/tiny-*/scores.jsonl")
    whole = scores.read_text()
    scores.write_text(whole + line + "\n")
    code, _, complaint = command(*what)
    assert code == 2
    assert f"error: {scores.parent.relative_to(model.parent)}: scores.jsonl, line" in complaint
    assert complaint.count("\n") == 1
    scores.write_text("")
    assert command(*what)[0] == 0
    assert scores.read_text() == whole


def test_first_windows_that_are_much_worse_are_a_warning_with_model_and_text(store, model, command):
    what = ["eval", "score", model, "--store", f"speeches={store}", *LIMITS]
    _, printed, _ = command(*what)
    assert "warning" not in printed
    (scores,) = model.parent.glob("evals/tiny-*/scores.jsonl")
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    for row in rows:
        if row["metric"] == "first_window_excess":
            row["value"] = 0.21
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scores.parent / "checksums.json").unlink()
    _, printed, _ = command(*what)
    assert "warning  speeches: first windows of documents are worse than the others by" in printed
    assert f"nats per token for {scores.parent.name} (0.21)" in printed


def split_otherwise(store, folder, validation, test):
    """The training store's own source, some of whose documents for scoring are training documents."""
    config = StoreConfig(
        name="again",
        sources=({"kind": "corpus", "name": "sotu"},),
        tokenizer=TokenizerConfig(path=store),
        validation=validation,
        test=test,
        max_bytes=400_000,
    )
    return build_store(config, folder)


def test_why_nothing_is_fitted_to_a_text_is_said(tiny_run, store, tmp_path, command):
    again = split_otherwise(store, tmp_path, 0.03, 0.5)
    code, printed, said = command("eval", "score", tiny_run.path, "--store", f"again={again}", *LIMITS)
    assert (code, "calibration fitted" in printed) == (0, False)
    assert "every document of split 'validation' was trained on and is left out, so nothing is fitted" in said


def test_a_document_that_was_trained_on_is_left_out(tiny_run, store, tmp_path, command):
    again = split_otherwise(store, tmp_path, 0.4, 0.6)
    trained = tiny_run
    code, printed, _ = command("eval", "score", trained.path, "--store", f"again={again}", *LIMITS)
    assert code == 0
    rows = pl.read_ndjson(trained.scores).filter(split="test")
    share = rows.filter(metric="overlap_documents")["value"].item()
    assert 0.05 < share < 0.9
    assert set(rows["role"]) == {"in_domain"}
    assert f"trained on {share:.1%} of its documents (left out)" in printed
    left = pl.read_parquet(trained.documents).filter(split="test")["document"].to_list()
    bounds, known = open_store(again).split("test"), open_store(store).split("train")
    train = known.tokens[:].tobytes()
    for index in left:
        a, b = (int(x) for x in bounds.offsets[index : index + 2, 0])
        assert bounds.tokens[a:b].tobytes() not in train


def without_weights(model):
    (model / "model.safetensors").unlink()


def with_another_tokenizer(model):
    config = StoreConfig(
        name="other",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(vocab_size=290),
        max_bytes=100_000,
    )
    other = build_store(config, model.parent)
    shutil.copy(other / "tokenizer.json", model / "tokenizer.json")
    (model / "checksums.json").unlink()


def untouched(model):
    pass


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (untouched, ["--domain", "kvj"], "domain 'kvj' is unknown; did you mean 'kjv'"),
        (untouched, ["--suite", "online"], "choose offline or paper"),
        (untouched, ["--store", "x"], "write NAME=STORE"),
        (untouched, ["--store", "x=nowhere"], "nowhere"),
        (untouched, ["--device", "tpu"], "device = tpu: torch sees no such device here"),
        (without_weights, ["--domain", "kjv"], "tiny"),
        (with_another_tokenizer, ["--store", "speeches=STORE"], "its tokenizer differs from that of"),
        (untouched, ["--store", "empty=EMPTY"], "domain empty: split 'validation' of"),
    ],
)
def test_what_cannot_work_is_said_before_any_compute(
    damage, arguments, message, store, model, command, tmp_path, monkeypatch
):
    if "empty=EMPTY" in arguments:
        text = tmp_path / "text.txt"
        text.write_text("All of it is for training.\n" * 50)
        config = StoreConfig(
            name="empty",
            sources=({"kind": "files", "paths": (str(text),)},),
            tokenizer=TokenizerConfig(path=store),
            validation=0.0,
            test=0.0,
        )
        arguments = ["--store", f"empty={build_store(config, tmp_path)}"]
    damage(model)
    monkeypatch.setattr(evaluate, "load_evaluated", None)
    code, _, complaint = command(
        "eval", "score", model, *(text.replace("STORE", str(store)) for text in arguments)
    )
    assert code != 0
    assert message in complaint
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    "how",
    [
        ("score", "MODEL", "--store", "held-out=STORE"),
        ("tasks", "MODEL", "--task", "word_analogy"),
        ("probe", "MODEL", "--store", "STORE"),
        ("recall", "MODEL", "--store", "STORE"),
        ("tokens", "MODEL", "--teacher", "OTHER", "--baseline", "OTHER", "--store", "t=STORE"),
    ],
    ids=lambda how: how[0],
)
def test_a_model_that_is_written_while_it_is_read_gets_no_score(
    how, store, model, tmp_path, command, monkeypatch
):
    places = {"MODEL": str(model), "OTHER": str(shutil.copytree(model, tmp_path / "other"))}
    (model / "checksums.json").unlink(missing_ok=True)

    def changed(path, *settings):
        if path == model:
            weights = load_file(path / "model.safetensors")
            save_file({name: 2 * one for name, one in weights.items()}, path / "model.safetensors")
        return load(path, *settings)

    load = hub.load
    monkeypatch.setattr(hub, "load", changed)
    monkeypatch.chdir(tmp_path)
    words = [places.get(word, word.replace("STORE", str(store))) for word in how]
    code, _, complaint = command("eval", *words)
    assert code != 0
    assert "tiny: its files were changed while they were read; run the same command again" in complaint
    assert not list(tmp_path.rglob("scores.jsonl"))
    assert not list(tmp_path.rglob("comparison*"))


def test_a_missing_field_and_an_empty_text_are_said(tmp_path, store):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "It is here."}\n{"txt": "It is not."}\n')
    for source, message in (
        ({"kind": "files", "paths": (str(file),)}, "text"),
        ({"kind": "files", "paths": (str(tmp_path / "none-*.txt"),)}, "none-"),
    ):
        config = StoreConfig(name="x", sources=(source,), tokenizer=TokenizerConfig(path=store))
        with pytest.raises(UserError, match=message):
            build_store(config, tmp_path / "stores")


def test_scores_made_without_the_training_text_are_made_again_with_it(tiny_run, store, tmp_path, command):
    directory = tiny_run.path
    hidden = tmp_path / "hidden"
    what = ["eval", "score", directory, "--store", f"text={hidden / 'text'}", *LIMITS]
    shutil.copytree(store, hidden / "text")
    config = directory / "config.yaml"
    known = config.read_text()
    config.write_text(known.replace(str(store), str(tmp_path / "gone" / store.name)))
    (directory / "checksums.json").unlink()
    _, printed, complaint = command(*what)
    assert "is not known" in complaint
    assert "fitted in domain" not in printed
    config.write_text(known)
    _, printed, _ = command(*what)
    assert "fitted in domain" in printed
    rows = [json.loads(line) for line in (directory / "scores.jsonl").read_text().splitlines()]
    assert {row["role"] for row in rows if row["domain"] == "text"} == {"in_domain"}
    assert len({(r["domain"], r["split"], r["metric"], r["version"]) for r in rows}) == len(rows)


def test_two_runs_of_one_name_are_refused_naming_both(tiny_run, store, tmp_path, command):
    directory = tiny_run.path
    copy = shutil.copytree(directory, tmp_path / "elsewhere" / directory.name)
    code, _, complaint = command("eval", "score", directory, copy, "--store", f"speeches={store}", *LIMITS)
    assert code != 0
    assert f"both are called {directory.name}" in complaint


def test_a_card_lists_of_each_text_the_scores_made_last(tiny_run, store, command):
    directory = tiny_run.path
    for documents in ("3", "2"):
        command("eval", "score", directory, "--store", f"held-out={store}", "--max-documents", documents)
    lines = (directory / "model" / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if "| held-out | test | bits_per_byte |" in line)
    rows = [json.loads(text) for text in (directory / "scores.jsonl").read_text().splitlines()]
    last = [
        r for r in rows if (r["domain"], r["split"], r["metric"]) == ("held-out", "test", "bits_per_byte")
    ]
    assert f"| {last[-1]['value']:.4g} |" in line
    assert len(last) == 2
