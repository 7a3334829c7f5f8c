"""Values that would break the work of a settings file later are refused when it is read."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from any_settings import changed

from tutelage.config.alpha_config import PiecewiseAlpha
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import load, to_yaml, validate
from tutelage.config.objective_config import ObjectiveConfig
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import Grid, StudyConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import UserError
from tutelage.study.cost import works_of
from tutelage.study.expand import expand

RUN = """
{name: a, stage: pretrain, seed: 1, model: {shape: nano-50k}, data: {store: s, seed: 1, sequence_length: 32},
tokens: 20K, global_batch_tokens: 256, micro_batch_tokens: 128, dtype: auto, output: runs,
optim: {lr: 1e-3, betas: [.9, .95], eps: 1e-8, weight_decay: .1, clip: 1.0, schedule: wsd, warmup: .1,
  decay: .2, final_lr: .1},
teacher: {kind: model, path: x, revision: y,
  cache: {format: {kind: topk, k: 5, top_p: .9}, temperature: 1.0}},
objective: {alpha: {policy: prequential, cap: .9, floor: .1, period: 50, probe: 5, rate: 5.0},
  gate: {kind: student_entropy, keep: .2}, divergence: forward_kl, mixing: convex, temperature: 1.0,
  temperature_squared: true, tail: other_bucket, jsd_beta: .5, skew: .1, chunk_tokens: 100},
eval: {every: 1K, domains: [{name: x, store: y, role: in_domain}], max_documents: 5, max_tokens: 100},
checkpoint: {every: 1K, keep: 1, keep_before_decay: false},
runtime: {device: cpu, threads: 1, log_every: 5, trackers: [wandb]}}
"""
STORE = """
{name: a, sources: [{kind: files, paths: [a.txt], field: text, weight: 1.0},
  {kind: hub, path: p, subset: s, split: train, revision: r, field: f, weight: 1.0}],
tokenizer: {vocab_size: 300, sample_bytes: 1000, path: t}, validation: .1, test: .1, max_bytes: 1000}
"""
TEACH = """
{name: a, store: s, teacher: {kind: unigram}, context_length: 128, seed: 0, compress: false,
format: {kind: sample_min_variance, ids: 16}, temperature: 1.0, shard_tokens: 1000, batch_tokens: 4096,
dtype: float32, device: cpu, threads: 1, runs: r, output: o}
"""
STUDY = """
{name: a, title: t, corpus: {name: c, sources: [{kind: corpus, name: sotu}], tokenizer: {vocab_size: 300}},
in_domain: in, domains: {kjv: {source: {kind: corpus, name: kjv}, max_bytes: 1000}}, teacher_seed: 1,
teachers: {weak: {shape: nano-20k, tokens: 4K, seed: 2, description: d, cache: {temperature: 1.0}},
  "t-{seed}": {shape: nano-20k, tokens: 4K, grid: {product: {seed: [3, 4]}}, run: {optim: {lr: 1e-2}}}},
students: {main: {shape: nano-50k, tokens: 4K, description: d, seeds: [1, 2], run: {optim: {lr: 1e-3}},
  then: [sft],
  grid: {product: {teacher: [weak, "t-*"], alpha: [.4, {policy: linear, start: .1, end: .2}]}}}},
seeds: [43], post_training: {sft: {corpus: {name: p, sources: [{kind: corpus_pairs, name: q}]}, tokens: 4K,
  run: {optim: {lr: 1e-4}}}}, claims: [1], notes: [n],
run: {data: {sequence_length: 32}, global_batch_tokens: 256, checkpoint: {every: 1K, keep: 1},
  eval: {max_documents: 2, max_tokens: 64}, runtime: {device: cpu, threads: 1, log_every: 1}}}
"""
KINDS: dict[type, str] = {RunConfig: RUN, StoreConfig: STORE, TeachConfig: TEACH, StudyConfig: STUDY}


def numbers(tree: Any) -> Any:
    """PyYAML leaves 1e-3 a text; the base files here have to be right in Python too."""
    if isinstance(tree, dict):
        return {key: numbers(part) for key, part in tree.items()}
    if isinstance(tree, list):
        return [numbers(part) for part in tree]
    return float(tree) if isinstance(tree, str) and tree.startswith("1e-") else tree


TREES = {kind: numbers(yaml.safe_load(text)) for kind, text in KINDS.items()}


def read(kind: type, tree: object) -> None:
    config = validate(kind, tree, "file.yaml")
    if isinstance(config, StudyConfig):
        works_of([expand(config)])
    else:
        assert validate(kind, yaml.safe_load(to_yaml(config)), "again") == config


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_right_to_begin_with(kind, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(KINDS[kind])
    assert load(kind, path) == validate(kind, TREES[kind], "file.yaml")
    if kind is StudyConfig:
        assert works_of([expand(load(kind, path))])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_taken_in_calls_as_they_are_in_files(kind):
    assert kind(**TREES[kind]) == validate(kind, TREES[kind], "file.yaml")


def test_lists_are_taken_at_any_depth_and_stay_what_they_are_where_anything_may_stand():
    knots = ObjectiveConfig(alpha={"policy": "piecewise", "knots": [[0.0, 0.1], [1.0, 0.2]]}).alpha
    assert knots == PiecewiseAlpha(policy="piecewise", knots=((0.0, 0.1), (1.0, 0.2)))
    mean = {"kind": "mean", "of": [{"kind": "unigram"}, {"kind": "run", "run": "a"}]}
    assert [one.kind for one in TeachConfig(store="s", teacher=mean).teacher.of] == ["unigram", "run"]
    sources = ({"kind": "files", "paths": ["a.txt"]},)
    assert StoreConfig(name="s", sources=sources).sources[0].paths == ("a.txt",)
    cross = [{"product": {"teacher": ["t"]}}, {"zip": {"objective.gate": [["x"], "y"]}}]
    grid = Grid(cross=cross, exclude=[{"objective.gate": ["y", "z"]}])
    assert grid.points() == [{"teacher": "t", "objective.gate": ["x"]}]
    study = StudyConfig(**changed(TREES[StudyConfig], ("run", "optim"), {"betas": [0.9, 0.99]}))
    assert study.run["optim"] == {"betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("at", "value", "sentence"),
    [
        (("seed",), "3", "RunConfig: seed = '3': must be a whole number"),
        (("eval", "recall"), 1, "RunConfig: eval.recall = 1: must be"),
        (("optim", "betas"), ["0.9", 0.99], r"RunConfig: optim.betas.0 = '0.9': must be a number"),
        (("optim", "betas"), [0.9], r"RunConfig: optim.betas"),
        (("optim", "betas"), {0.9, 0.99}, "RunConfig: optim.betas: must be a list"),
        (("eval", "domains"), "text", "RunConfig: eval.domains = 'text': must be a list"),
        (("name",), ["a"], "RunConfig: name: must be text"),
    ],
)
def test_other_types_stay_strict_in_calls(at, value, sentence):
    with pytest.raises(UserError, match=sentence):
        RunConfig(**changed(TREES[RunConfig], at, value))


@pytest.mark.parametrize(
    ("at", "value", "what"), [(("domains",), {}, "a mapping"), (("seeds",), [], "a list")]
)
def test_what_lacks_entries_is_called_what_it_is(at, value, what):
    with pytest.raises(UserError, match=rf"{at[0]}: must be {what} of 1 or more, not of 0"):
        StudyConfig(**changed(TREES[StudyConfig], at, value))


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    [
        (RunConfig, ("optim", "betas"), [1.0, 1.0]),
        (RunConfig, ("optim", "betas"), [0.9, 1.0]),
        (RunConfig, ("seed",), 2**64),
        (RunConfig, ("data", "seed"), 2**64),
        (TeachConfig, ("seed",), 2**64),
        (StudyConfig, ("seeds",), [2**64]),
        (StudyConfig, ("teacher_seed",), 2**64),
        (StudyConfig, ("students", "main", "grid", "product", "seed"), [2**64]),
        (RunConfig, ("runtime", "threads"), 10**6),
        (TeachConfig, ("threads",), 10**6),
        (StudyConfig, ("run", "runtime", "threads"), 10**6),
        (RunConfig, ("objective", "truncation"), {"kind": "top_k", "k": 10**9}),
        (RunConfig, ("teacher", "cache", "format", "k"), 10**9),
        (RunConfig, ("data", "sequence_length"), 10**12),
        (RunConfig, ("global_batch_tokens",), 2**40),
        (RunConfig, ("tokens",), 10**18),
        (RunConfig, ("tokens",), "1e99"),
        (RunConfig, ("output",), "x" * 300),
        (RunConfig, ("objective", "temperature"), 1e-45),
        (RunConfig, ("optim", "lr"), float("inf")),
        (RunConfig, ("optim", "clip"), float("nan")),
        (TeachConfig, ("batch_tokens",), 2**40),
        (StoreConfig, ("sources", 0, "weight"), 1e300),
        (RunConfig, ("runtime", "trackers"), ["wandb", "wandb"]),
    ],
)
def test_what_would_break_later_is_refused_now(kind, at, value):
    if kind is StudyConfig and at[-1] == "seed":
        tree = changed(TREES[kind], ("students", "main", "seeds"), [])
    else:
        tree = TREES[kind]
    with pytest.raises(UserError):
        read(kind, changed(tree, at, value))
