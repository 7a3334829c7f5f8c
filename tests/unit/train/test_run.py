"""Training runs on a real store: the equivalences of the design that one process can pin."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from training import StopAt, assert_same_weights, losses, opened, rows, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.errors import Stopped, UserError
from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id
from tutelage.train.checkpoint import Checkpoints
from tutelage.train.step import loss_sums


def test_run_trains_exports_and_accounts_for_every_token(make_config):
    config = make_config()
    directory = run(config)
    log = rows(directory)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert log[-1]["tokens"] == 12 * 256 == directory.state()["tokens"]
    assert log[-1]["ce"] < log[0]["ce"] - 0.1
    assert directory.state()["status"] == "done"
    assert directory.path.name == run_id(config)
    provenance = json.loads((directory.path / "provenance.json").read_text())
    assert torch.__version__.startswith(provenance["versions"]["torch"])  # "+cu130" is no part of a package's


def test_stopped_and_resumed_is_bitwise_uninterrupted(make_config, tmp_path):
    teacher = {"kind": "unigram"}
    whole = run(make_config(teacher=teacher, objective={"alpha": 0.3}))
    config = make_config(teacher=teacher, objective={"alpha": 0.3}, output=str(tmp_path / "again"))
    for stop in (3, 7):
        with pytest.raises(Stopped):
            run(config, StopAt(stop))
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)
    for key in ("tokens", "train_flops", "teacher_flops"):
        assert resumed.state()[key] == whole.state()[key]


def test_micro_batches_do_not_change_the_result(make_config, tmp_path):
    whole = run(make_config())
    parts = run(make_config(micro_batch_tokens=32, output=str(tmp_path / "micro")))
    assert parts.id == whole.id  # the hash holds only what changes the result
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert_same_weights(whole, parts, rtol=1e-3, atol=2e-4)


def test_finished_run_is_not_trained_again(make_config):
    config = make_config()
    directory = run(config)
    before = (directory.path / "metrics.jsonl").stat().st_mtime_ns
    run(config)
    assert (directory.path / "metrics.jsonl").stat().st_mtime_ns == before


def test_exported_model_has_the_logits_of_the_trained_one(make_config):
    config = make_config()
    directory = run(config)
    student = opened(config)
    Checkpoints(config, directory, student.world).load(student.model, student.optimizer)
    tokens = torch.arange(64).view(2, 32)
    exported = AutoModelForCausalLM.from_pretrained(directory.model)
    with torch.no_grad():
        torch.testing.assert_close(
            exported(input_ids=tokens).logits, student.model(input_ids=tokens).logits, rtol=0, atol=0
        )
    tokenizer = AutoTokenizer.from_pretrained(directory.model)
    assert (
        tokenizer.decode(tokenizer("Fellow-Citizens of the Senate").input_ids)
        == "Fellow-Citizens of the Senate"
    )


def test_teacher_run_teaches_and_its_cost_is_counted(make_config):
    teacher = run(make_config(name="teacher", seed=7))
    student = run(make_config(teacher={"kind": "run", "run": teacher.id}, objective={"alpha": 0.5}))
    row = rows(student)[-1]
    assert row["kd"] > 0
    assert row["teacher_ce"] > 0
    assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * row["kd"], rel=1e-5)
    state = student.state()
    assert state["teacher_flops"] == pytest.approx(
        state["train_flops"] / 3
    )  # the teacher is the student's twin


def test_a_student_that_is_its_teacher_has_no_divergence(make_config):
    teacher = run(make_config(name="teacher"))
    config = make_config(
        model={"path": str(teacher.model)},
        teacher={"kind": "model", "path": str(teacher.model)},
        objective={"alpha": 1.0},
    )
    student = opened(config)
    batch = student.loader.batch(0)
    sums = loss_sums(student, batch, student.teacher.targets(batch), 1.0)
    assert abs(sums.kd.item()) < 1e-3
    assert sums.ce.item() == pytest.approx(sums.teacher_ce.item(), rel=1e-6)


def test_scheduled_alpha_starts_where_it_says_and_skips_the_teacher_at_zero(make_config):
    policy = {"policy": "piecewise", "knots": [[0.0, 0.8], [0.5, 0.0]]}
    directory = run(make_config(teacher={"kind": "unigram"}, objective={"alpha": policy}))
    alphas = [row["alpha"] for row in rows(directory)]
    assert alphas[0] == pytest.approx(0.8)
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[6:] == [0.0] * 6
    assert all(row["kd"] == 0 for row in rows(directory)[6:])


def test_scores_of_all_domains_are_written_once(make_config, store, other_store):
    domains = [
        {"name": "speeches", "store": str(store), "role": "in_domain"},
        {"name": "scripture", "store": str(other_store)},
    ]
    limits = {"max_documents": 5, "max_tokens": 100}
    first = run(make_config(eval={"domains": domains[:1], **limits}))
    trained = weights(first)
    second = run(make_config(eval={"domains": domains, **limits}))  # a new domain: scored, not trained
    assert second.id == first.id
    scores = pl.read_ndjson(second.scores)
    metrics = {
        name: set(scores.filter(domain=name, split="test")["metric"]) for name in ("speeches", "scripture")
    }
    assert metrics["speeches"] == metrics["scripture"] >= {"bits_per_byte", "perplexity", "ece", "brier"}
    assert set(scores.filter(split="validation")["metric"]) == {
        "bits_per_byte",
        "perplexity",
        "first_window_excess",
    }
    assert scores.select("domain", "split", "metric").is_unique().all()
    documents = pl.read_parquet(second.documents)
    test = documents.filter(domain="scripture", split="test")
    value = scores.filter(domain="scripture", split="test", metric="bits_per_byte")["value"].item()
    assert value == pytest.approx(test["nll"].sum() / test["bytes"].sum() / 0.6931471805599453)
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(second).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "teacher": {"kind": "unigram"},
                "objective": {"alpha": 0.5, "truncation": {"kind": "top_k", "k": 301}},
            },
            "objective.truncation.k = 301: .* has a vocabulary of 300",
        ),
        ({"tokens": 100}, "less than one batch"),
        (
            {"teacher": {"kind": "run", "run": "nobody-12345678"}, "objective": {"alpha": 0.5}},
            "train that run",
        ),
        (
            {"teacher": {"kind": "model", "path": "/nowhere/at-all"}, "objective": {"alpha": 0.5}},
            "/nowhere/at-all",
        ),
        ({"model": {"shape": "nano-51k"}}, "did you mean 'nano-50k'"),
        (
            {
                "model": {"shape": "nano-50k", "attn_implementation": "flex_attention"},
                "runtime": {"device": "cpu"},
            },
            "model.attn_implementation = flex_attention: it has no backward pass on cpu",
        ),
        ({"data": {"store": "/nowhere"}}, "/nowhere"),
        ({"output": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_training(make_config, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        run(make_config(**changes))
    assert "\n" not in str(caught.value)


def test_teacher_with_another_tokenizer_is_refused(make_config, tmp_path):
    other = build_store(
        StoreConfig(
            name="other",
            sources=({"kind": "corpus", "name": "kjv"},),
            tokenizer=TokenizerConfig(vocab_size=300),
            max_bytes=200_000,
        ),
        tmp_path,
    )
    teacher = run(make_config(name="teacher", data={"store": str(other), "sequence_length": 32}))
    with pytest.raises(UserError, match="tokenizer differs"):
        run(make_config(teacher={"kind": "model", "path": str(teacher.model)}, objective={"alpha": 0.5}))


def test_damaged_checkpoint_is_named(make_config):
    config = make_config()
    with pytest.raises(Stopped):
        run(config, StopAt(5))
    newest = max(RunDirectory(config.output / run_id(config)).checkpoints.glob("step-*"))
    [file] = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be resumed from"):
        run(config)


def test_loss_that_explodes_stops_the_run_and_says_what_to_lower(make_config):
    config = make_config(optim={"lr": 1e30, "clip": 1e30, "warmup": 0.0})
    with pytest.raises(UserError, match=r"lower optim\.lr"):
        run(config)


def test_a_trained_run_whose_export_failed_is_exported_by_the_next_call(make_config, tmp_path, monkeypatch):
    config = make_config()
    whole = run(config.model_copy(update={"output": tmp_path / "whole"}))

    def full(*_arguments):
        raise UserError("no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr("tutelage.models.hub.save", full)
        with pytest.raises(UserError, match="no space left"):
            run(config)
    directory = RunDirectory(config.output / run_id(config))
    assert directory.state()["status"] == "failed"
    run(config)
    assert directory.state()["status"] == "done"
    assert losses(directory) == losses(whole)
    assert_same_weights(directory, whole)
