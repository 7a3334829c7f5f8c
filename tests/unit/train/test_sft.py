"""Stage sft: loss on completions only, and otherwise the same run as every other."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from training import StopAt, assert_same_weights, losses, opened
from transformers import AutoModelForCausalLM

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import load, validate
from tutelage.config.run_config import OptimConfig, RunConfig
from tutelage.config.teacher_config import ControlTeacher, TeachConfig
from tutelage.data.build import build_store
from tutelage.data.loader import Loader
from tutelage.data.store import SplitView, open_store
from tutelage.errors import Stopped, UserError
from tutelage.evals.evaluate import loss_gap_warning
from tutelage.evals.score_files import read_scores
from tutelage.run import run
from tutelage.run_directory import run_id
from tutelage.teachers import TeacherContext, make_teacher
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.train.step import loss_sums
from tutelage.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.run_directory import RunDirectory
    from tutelage.types import Batch

LENGTH = 32


def store_config(**changes) -> StoreConfig:
    source = {"kind": "corpus_pairs", "name": "rare_diseases"}
    fields = {"name": "pairs", "sources": [source], "validation": 0.1, "test": 0.1, "max_bytes": 60_000}
    return validate(StoreConfig, fields | changes, "test")


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> RunDirectory:
    """A student after a few steps on speeches."""
    fields = {
        "name": "base",
        "model": {"shape": "nano-50k"},
        "data": {"store": str(store), "sequence_length": LENGTH},
        "tokens": 20 * 256,
        "global_batch_tokens": 256,
        "runtime": {"device": "cpu", "threads": 1},
        "output": str(tmp_path_factory.mktemp("base")),
    }
    return run(validate(RunConfig, fields, "test"))


@pytest.fixture(scope="module")
def pairs(trained, tmp_path_factory) -> Path:
    settings = store_config(tokenizer={"path": str(trained.model)})
    return build_store(settings, tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def make_sft(make_config, trained, pairs):
    def make(**changes):
        base = {
            "name": "sft",
            "stage": "sft",
            "model": {"path": str(trained.model)},
            "data": {"store": str(pairs), "sequence_length": LENGTH},
        }
        return make_config(**base | changes)

    return make


# ----------------------------------------------------------------------------------------------- loader


def test_only_tokens_of_completions_are_labels():
    tokens, mask = np.arange(10, 21, dtype="<u2"), np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1], np.uint8)
    offsets = np.array([[0, 0], [4, 0], [10, 0], [11, 0]], np.uint64)
    batch = Loader(SplitView(tokens, offsets, mask), 5, sequences_per_step=2, seed=0).batch(0)
    by_start = dict(zip(batch.starts, batch.labels_BT.tolist(), strict=True))
    no = IGNORE_INDEX
    assert by_start == {0: [no, 12, 13, no, no], 5: [no, no, 18, 19, 20]}
    rows = dict(zip(batch.starts, batch.tokens_BT.tolist(), strict=True))
    assert rows == {0: [10, 11, 12, 13, 14], 5: [15, 16, 17, 18, 19]}


def test_the_unigram_teacher_has_the_frequencies_of_what_is_learned(pairs, tmp_path):
    """Counted from the labels of an epoch, which leaves out less than a window and the first token."""
    store = open_store(pairs)
    teacher = make_teacher(
        ControlTeacher(kind="unigram"), TeacherContext(store, tmp_path, LENGTH, torch.device("cpu"))
    )
    loader = Loader(store.split("train"), LENGTH, 1, seed=0)
    labels = torch.cat([loader.batch(step).labels_BT.flatten() for step in range(loader.n_windows)])
    labels = labels[labels != IGNORE_INDEX]
    targets = teacher.targets(loader.batch(0))
    probs_V = (targets.hidden_NE @ targets.head_VE.T).softmax(-1)[0].double()
    counts_V = probs_V * (len(labels) + store.vocab_size) - 1
    expected_V = torch.bincount(labels, minlength=store.vocab_size)
    assert (counts_V - expected_V).abs().sum() < 2 * LENGTH
    assert counts_V[store.eos_id] == pytest.approx(store.manifest.splits["train"].documents, abs=1)


def test_windows_order_and_positions_are_those_without_a_mask(pairs):
    masked = open_store(pairs).split("train")
    bare = SplitView(masked.tokens, masked.offsets)
    for step in range(3):
        a, b = (Loader(view, LENGTH, 8, seed=42).batch(step) for view in (masked, bare))
        assert a.starts == b.starts  # what a teacher cache goes by
        assert torch.equal(a.tokens_BT, b.tokens_BT)
        learned = a.labels_BT != IGNORE_INDEX
        assert torch.equal(a.labels_BT[learned], b.labels_BT[learned])
        assert 0.3 < learned.float().mean() < 0.9
        ranks = [Loader(masked, LENGTH, 8, seed=42, rank=rank, world_size=2).batch(step) for rank in (0, 1)]
        assert torch.equal(torch.cat([rank.labels_BT for rank in ranks]), a.labels_BT)


def test_steps_without_a_label_are_counted_before_they_are_met():
    mask = np.zeros(4001, np.uint8)
    mask[[7, 1600, 3203]] = 1
    view = SplitView(np.arange(4001, dtype="<u2"), np.array([[0, 0], [4001, 0]], np.uint64), mask)
    loader = Loader(view, 10, sequences_per_step=64, seed=1)
    empty = [bool((loader.batch(step).labels_BT == IGNORE_INDEX).all()) for step in range(40)]
    assert 0 < sum(empty) < 40
    assert loader.unlabelled(40) == sum(empty)
    half = Loader(view, 10, sequences_per_step=64, seed=1, rank=1, world_size=2)
    assert half.unlabelled(40) == sum(empty)
    assert Loader(SplitView(view.tokens, view.offsets), 10, 64, seed=1).unlabelled(40) == 0


# --------------------------------------------------------------------------------------------- training


def direct_loss(model: PreTrainedModel, view: SplitView, batch: Batch) -> torch.Tensor:
    """Sum of -log p over the tokens of completions, read from the store token by token."""
    logp = model(input_ids=batch.tokens_BT).logits.log_softmax(-1)
    terms = [
        -logp[row, place, int(view.tokens[:][start + place + 1])]
        for row, start in enumerate(batch.starts)
        for place in range(LENGTH)
        if view.mask[:][start + place + 1]
    ]
    assert 0 < len(terms) < batch.labels_BT.numel()
    return torch.stack(terms).sum()


def test_masked_loss_and_gradient_are_the_direct_ones(make_sft, trained, pairs):
    student = opened(make_sft())
    batch, view = student.loader.batch(3), open_store(pairs).split("train")
    ours = loss_sums(student, batch, None, 0.0)
    ours.loss.backward()
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    expected = direct_loss(model, view, batch)
    expected.backward()
    assert float(ours.ce) == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = dict(model.named_parameters())
    for name, weight in student.model.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)


def test_the_logged_loss_is_per_token_of_a_completion(make_sft, trained, pairs):
    config = make_sft()
    batch, view = opened(config).loader.batch(0), open_store(pairs).split("train")
    learned = sum(int(view.mask[start + 1 : start + LENGTH + 1].sum()) for start in batch.starts)
    with torch.no_grad():
        expected = direct_loss(AutoModelForCausalLM.from_pretrained(trained.model), view, batch) / learned
    assert losses(run(config))[0]["ce"] == pytest.approx(float(expected), rel=1e-5)


def test_a_cached_teacher_finds_its_positions_under_the_mask(make_sft, trained, pairs, tmp_path):
    teacher = {"kind": "model", "path": str(trained.model)}
    cache = {
        "store": str(pairs),
        "teacher": teacher,
        "context_length": LENGTH,
        "format": {"kind": "hidden", "dtype": "float32"},
        "output": str(tmp_path / "caches"),
    }
    path = write_cache(validate(TeachConfig, cache, "test"))
    taught = {"objective": {"alpha": 0.5}, "optim": {"lr": 1e-3}}
    online = losses(run(make_sft(name="online", teacher=teacher, **taught)))
    cached = losses(run(make_sft(name="cached", teacher={"kind": "cache", "path": str(path)}, **taught)))
    assert online[-1]["kd"] > 0.01
    for a, b in zip(online, cached, strict=True):
        for key in ("loss", "ce", "kd", "teacher_ce"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5)


def test_stopped_and_resumed_is_bitwise_uninterrupted(make_sft, tmp_path):
    taught = {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.3}}
    whole = run(make_sft(**taught))
    config = make_sft(**taught, output=str(tmp_path / "again"))
    for stop in (3, 7):
        with pytest.raises(Stopped):
            run(config, StopAt(stop))
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)


def test_micro_batches_without_completions_change_nothing(make_sft, tmp_path):
    """Of 32 tokens at a time some hold a prompt only; the denominator is that of the whole batch."""
    config = make_sft(micro_batch_tokens=LENGTH, output=str(tmp_path / "micro"), optim={"lr": 1e-3})
    batches = [opened(config).loader.batch(step) for step in range(12)]
    labels = torch.cat([batch.labels_BT for batch in batches])
    assert (labels == IGNORE_INDEX).all(1).any()
    parts, whole = run(config), run(make_sft(optim={"lr": 1e-3}))
    assert parts.id == whole.id
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert_same_weights(whole, parts, rtol=1e-3, atol=2e-4)


def completion_bits(model: Path, store: Path) -> float:
    """Bits per token of the completions of the held-out pairs, each pair by itself."""
    network = AutoModelForCausalLM.from_pretrained(model)
    view = open_store(store).split("test")
    found, count = 0.0, 0
    with torch.no_grad():
        for a, b in itertools.islice(itertools.pairwise(view.offsets[:, 0].astype(int)), 30):
            ids = torch.from_numpy(view.tokens[a:b].astype(np.int64))
            learned = torch.from_numpy(view.mask[a + 1 : b] == 1)
            logp = network(input_ids=ids[:-1].unsqueeze(0)).logits[0].log_softmax(-1)
            found -= float(logp[learned, ids[1:][learned]].sum()) / np.log(2)
            count += int(learned.sum())
    return found / count


def test_pretrain_then_fine_tune_then_the_same_evaluation(make_sft, trained, pairs, store, other_store):
    domains = [
        {"name": "speeches", "store": str(store), "role": "in_domain"},
        {"name": "scripture", "store": str(other_store)},
    ]
    config = make_sft(
        tokens=40 * 256, optim={"lr": 3e-3}, eval={"domains": domains, "max_documents": 2, "max_tokens": 64}
    )
    directory = run(config)
    assert directory.state()["status"] == "done"
    before, after = completion_bits(trained.model, pairs), completion_bits(directory.model, pairs)
    assert after < before - 0.5
    scores = [json.loads(line) for line in directory.scores.read_text().splitlines()]
    assert {row["domain"] for row in scores} == {"speeches", "scripture"}
    assert all(np.isfinite(row["value"]) for row in scores)
    log = losses(directory)
    assert log[-1]["ce"] < log[0]["ce"] - 0.3


# ------------------------------------------------------------------------------------- config and errors


def test_defaults_are_the_papers_and_are_recorded(make_sft):
    directory = run(make_sft(tokens=2 * 256, optim={"clip": 0.5}))
    used = load(RunConfig, directory.path / "config.yaml").optim
    assert (used.lr, used.warmup, used.clip, used.weight_decay) == (1e-5, 0.01, 0.5, 0.1)
    assert losses(directory)[0]["lr"] == pytest.approx(1e-5, rel=1e-6)
    card = ModelCard.load(directory.model / "README.md")
    assert card.data.tags == ["tutelage", "sft"]
    assert "A language model fine-tuned with" in card.text
    given = make_sft(optim={"lr": 2e-4, "warmup": 0.05}).optim
    assert (given.lr, given.warmup) == (2e-4, 0.05)
    assert make_sft(optim={"lr": None}).optim.lr == 1e-5
    in_python = RunConfig(**make_sft().model_dump() | {"optim": OptimConfig(eps=1e-6)})
    assert (in_python.optim.lr, in_python.optim.warmup, in_python.optim.eps) == (1e-5, 0.01, 1e-6)


def test_run_ids_of_pretraining_do_not_change_unnoticed(tmp_path, monkeypatch):
    """Another id means that no directory on disk is found again, so it is written down here."""
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
        '"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,'
        '"model":{"type":"WordLevel","vocab":{"<|endoftext|>":0,"a":1,"b":2},"unk_token":"b"}}'
    )
    Path("a.jsonl").write_text('{"text": "a b a"}\n{"text": "b b"}\n')
    source = {"kind": "files", "paths": ["a.jsonl"]}
    settings = store_config(
        sources=[source], tokenizer={"path": "tokenizer.json"}, validation=0.0, test=0.0, max_bytes=None
    )
    path = build_store(settings, Path("stores"))
    fields = {"name": "old", "model": {"shape": "nano-50k"}, "data": {"store": str(path)}, "tokens": "1M"}
    assert run_id(validate(RunConfig, fields, "test")) == "old-21e59628"
    assert run_id(validate(RunConfig, fields | {"stage": "pretrain"}, "test")) == "old-21e59628"


def test_the_stage_is_part_of_a_fine_tuned_runs_id(make_sft):
    sft = make_sft()
    other = sft.model_copy(update={"stage": "pretrain"})
    assert run_id(sft) != run_id(other)
    assert run_id(sft) == run_id(make_sft(optim={"lr": 1e-5, "warmup": 0.01}))


def test_fine_tuning_needs_a_model(make_sft):
    with pytest.raises(UserError, match=r"stage = sft continues from a trained model; give model\.path"):
        make_sft(model={"shape": "nano-50k"})
    with pytest.raises(UserError, match="stage = 'finetune': must be 'pretrain' or 'sft'"):
        make_sft(stage="finetune")


def test_stage_and_store_must_fit(make_sft, make_config, store, pairs):
    with pytest.raises(
        UserError, match=r"stage = sft: in .*speeches.* every token counts, there are no prompts"
    ):
        run(make_sft(data={"store": str(store), "sequence_length": LENGTH}))
    told = r"stage = pretrain: .*pairs.* holds prompts, which carry no loss; set stage: sft and model\.run or"
    with pytest.raises(UserError, match=told):
        run(make_config(data={"store": str(pairs), "sequence_length": LENGTH}))


def test_the_store_must_have_the_models_tokenizer(make_sft, tmp_path):
    rows = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "pairs", "paths": [str(tmp_path / "a.jsonl")]}
    other = build_store(store_config(sources=[source], tokenizer={"vocab_size": 290}), tmp_path)
    with pytest.raises(UserError, match=r"model .*: its tokenizer differs from that of"):
        run(make_sft(data={"store": str(other), "sequence_length": LENGTH}))


def test_a_step_without_a_completion_is_refused_before_training(make_sft):
    with pytest.raises(
        UserError, match=r"of the 300 steps would see no token of a completion.*raise global_ba"
    ):
        run(
            make_sft(
                global_batch_tokens=8, tokens=2400, data=make_sft().data.model_dump() | {"sequence_length": 8}
            )
        )


@pytest.mark.parametrize(("role", "warned"), [("in_domain", False), ("other", True)])
def test_held_out_completions_are_compared_with_what_training_lost_on_completions(
    make_sft, pairs, store, tmp_path, role, warned
):
    """Prompts carry no loss on either side; text of pretraining that is called in domain is far off."""
    held_out = pairs if role == "in_domain" else store
    domains = [{"name": "held-out", "store": str(held_out), "role": "in_domain"}]
    scored = {"domains": domains, "max_documents": 20, "max_tokens": 200}
    directory = run(make_sft(tokens=150 * 256, optim={"lr": 1e-2}, eval=scored))
    assert (directory.state().get("warning") is not None) == warned

    (found,) = (
        score
        for score in read_scores(directory.scores)
        if (score.domain, score.metric, score.split) == ("held-out", "perplexity", "validation")
    )
    training = directory.recent_ce()
    for gap, far in ((1.1, True), (0.9, False), (-1.1, False)):  # what it began with may lose less
        at = replace(found, value=math.exp(training + gap))
        assert (loss_gap_warning([at], directory) is not None) == far
