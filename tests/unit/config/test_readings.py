"""What an unquoted word means: the field decides. Judged by OmegaConf's and PyYAML's readings."""

from __future__ import annotations

import time

import pytest
import yaml
from omegaconf import OmegaConf

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import load, to_yaml
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.config.yaml_text import parse
from tutelage.errors import UserError
from tutelage.study.cells import teachers_of
from tutelage.study.expand import expand

RUN = "model: {shape: nano-50k}\ndata: {store: s}\ntokens: 1M\n"
STORE = "sources: [{kind: corpus, name: sotu}]\n"
TEACH = "teacher: {kind: unigram}\n"
STUDY = """
name: words
title: t
corpus: {name: sotu, sources: [{kind: corpus, name: sotu}]}
domains: {kjv: {source: {kind: corpus, name: kjv}}}
teachers: {"1e3": {shape: nano-20k, tokens: 1e5}, no: {control: unigram}}
students:
  main: {shape: nano-50k, tokens: 100K, grid: {product: {teacher: [1e3, no], alpha: [4e-1]}}}
seeds: [43]
run: {optim: {lr: 1e-3}, data: {sequence_length: 1.28e2}}
"""


def read(kind, text, tmp_path, *overrides):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return load(kind, path, overrides)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".001", "0.0010", "+1e-3", "1_0e-4", "0.001"])
def test_floats_as_people_write_them_in_files_and_on_the_command_line(number, tmp_path):
    judge = float(OmegaConf.create(f"x: {number}").x)
    assert judge == pytest.approx(1e-3, rel=1e-15)
    assert read(RunConfig, RUN + f"optim: {{lr: {number}}}", tmp_path).optim.lr == judge
    assert read(RunConfig, RUN, tmp_path, f"optim.lr={number}").optim.lr == judge
    text = STORE.replace("name: sotu}", f"name: sotu, weight: {number}}}") + "name: a\n"
    assert read(StoreConfig, text, tmp_path).sources[0].weight == judge


@pytest.mark.parametrize("number", ["2e0", "2", "2.0", "+2.", "20e-1"])
def test_floats_of_a_cache_file(number, tmp_path):
    assert read(TeachConfig, TEACH + f"store: s\ntemperature: {number}", tmp_path).temperature == 2.0


def test_floats_in_lists_policies_and_free_sections(tmp_path):
    knots = (
        "objective: {alpha: {policy: piecewise, knots: [[0, 1e-1], [1e0, 2e-1]]}}\nteacher: {kind: unigram}"
    )
    assert read(RunConfig, RUN + knots, tmp_path).objective.alpha.knots == ((0.0, 0.1), (1.0, 0.2))
    assert read(RunConfig, RUN + "optim: {betas: [9e-1, 9.5e-1]}", tmp_path).optim.betas == (0.9, 0.95)
    study = read(StudyConfig, STUDY, tmp_path)
    assert study.run == {"optim": {"lr": 0.001}, "data": {"sequence_length": 128}}
    assert study.students["main"].grid.points() == [
        {"teacher": "1e3", "alpha": 0.4},
        {"teacher": "no", "alpha": 0.4},
    ]


NAMES = [
    "1e3",
    "2020-13-45",
    "2020-01-01",
    "0123",
    "1_000",
    "7",
    "1.10",
    "no",
    "on",
    "Yes",
    "true",
    "0x1F",
    "1e999",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_or_path_stays_what_was_written(name, tmp_path):
    text = f"name: {name}\nmodel: {{shape: nano-50k}}\ndata: {{store: {name}}}\ntokens: 1M\noutput: {name}"
    config = read(RunConfig, text, tmp_path)
    assert (config.name, str(config.data.store), str(config.output)) == (name, name, name)
    assert read(RunConfig, RUN, tmp_path, f"name={name}").name == name
    again = read(RunConfig, to_yaml(config), tmp_path)  # quoting follows PyYAML's rules, reading ours
    assert again == config
    model = read(RunConfig, RUN.replace("shape: nano-50k", f"path: {name}"), tmp_path).model
    assert model.path == name
    teacher = f"teacher: {{kind: model, path: {name}, revision: {name}}}\nobjective: {{alpha: .5}}"
    assert read(RunConfig, RUN + teacher, tmp_path).teacher.revision == name
    files = STORE.replace("corpus, name: sotu", f"files, paths: [{name}], field: {name}") + f"name: {name}"
    source = read(StoreConfig, files, tmp_path).sources[0]
    assert (source.paths, source.field) == ((name,), name)


@pytest.mark.parametrize("name", ["1e3", "2020", "no", "2020-01-01", "0123", "yes"])
def test_a_study_names_things_by_what_was_written(name, tmp_path):
    text = (
        STUDY.replace('"1e3":', f"{name}:")
        .replace("no: {c", "other: {c")
        .replace("[1e3, no]", f"[{name}, other]")
    )
    study = read(StudyConfig, text.replace("kjv:", f"{name}:"), tmp_path)
    assert list(teachers_of(study)) == [name, "other"]
    assert list(study.domains) == [name]
    assert [cell.teacher for cell in expand(study).cells if cell.kind == "student"] == [name, "other"]


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("on", True), ("True", True), ("NO", False)])
def test_switches_take_the_words_of_either_yaml(word, value, tmp_path):
    assert read(TeachConfig, TEACH + f"store: s\ncompress: {word}", tmp_path).compress is value


@pytest.mark.parametrize("written", ["1e6", "1_000_000", "1000000", "1e+6", "1.0e6"])
def test_whole_numbers_too(written, tmp_path):
    assert read(StoreConfig, STORE + f"name: a\nmax_bytes: {written}", tmp_path).max_bytes == 1_000_000


@pytest.mark.parametrize(
    "written", ["010", "0x10", "0o10", "1:30", "1e-1", "1e999", ".inf", ".nan", "9" * 5000]
)
def test_what_readers_of_yaml_disagree_about_is_no_number(written, tmp_path):
    with pytest.raises(UserError, match=r"max_bytes"):
        read(StoreConfig, STORE + f"name: a\nmax_bytes: {written}", tmp_path)
    if written in {"010", "1:30"}:  # the old reading, which nobody asked for
        assert yaml.safe_load(written) in {8, 90}


BOMB = "\n".join(
    f"{name}: &{name} [{', '.join([part] * 9)}]"
    for name, part in zip("abcde", ("x", "*a", "*b", "*c", "*d"), strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "no end"),
        ("a: {b: 1, b: 2}", "b is given twice"),
        ('a: {b: 1, "b": 2}', "b is given twice"),
        ("a: " + "[" * 5000, "deep"),
        ("a: " + "[" * 60 + "]" * 60, "deep"),
        ("? [a]\n: 1", "a key must be a word"),
        ("a: !!python/name:os.system x", "tag"),
        ("a: !!timestamp 2020-01-01", "tag"),
        ('a: "\\0"', r"U\+0000"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: &a 1\nb: *c", "undefined alias"),
        ("<<: 5", "<< needs a map"),
        ("x" * 70_000, "65,536"),
        (BOMB, "aliases"),
    ],
)
def test_documents_without_end_or_sense_are_refused_at_once(text, message):
    began = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        parse(text, "run.yaml")
    assert time.process_time() - began < 3
    assert str(caught.value).startswith("run.yaml: ")
    assert "\n" not in str(caught.value)


def test_merge_keys_and_quotes_are_yaml_as_ever():
    text = "base: &b {x: '1e3', y: 2}\nuse: {<<: *b, y: three}\nempty:\nflow: [a, \"no\", !!str 5]"
    judge = yaml.safe_load(text)
    ours = parse(text, "t")
    assert ours["use"] == judge["use"] | {"y": "three", "x": "1e3"}
    assert ours["flow"] == judge["flow"]


def test_the_environment_is_not_read(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "shh")
    config = read(RunConfig, RUN.replace("store: s", "store: '${oc.env:SECRET}'"), tmp_path)
    assert str(config.data.store) == "${oc.env:SECRET}"


@pytest.mark.parametrize(
    "override", ["optim.lr", "=1", ".a=1", "a..b=1", "optim.=1", "optim=", "optim.lr=[1", "tokens={a: 1}"]
)
def test_malformed_overrides_are_one_line(override, tmp_path):
    with pytest.raises(UserError) as caught:
        read(RunConfig, RUN, tmp_path, override)
    assert "\n" not in str(caught.value)


MIXTURE = """
name: a
sources: [{kind: corpus, name: sotu, weight: 1}, {kind: files, paths: [a.txt, b.txt], weight: 2}]
"""


def test_overrides_reach_into_lists(tmp_path):
    store = read(StoreConfig, MIXTURE, tmp_path, "sources.1.weight=3e0", "sources.1.paths.0=c.txt")
    assert (store.sources[0].weight, store.sources[1].weight) == (1.0, 3.0)
    assert store.sources[1].paths == ("c.txt", "b.txt")
    store = read(StoreConfig, MIXTURE, tmp_path, "sources=[{kind: corpus, name: kjv}]")
    assert [source.name for source in store.sources] == ["kjv"]
    domains = RUN + "eval: {domains: [{name: a, store: x}, {name: b, store: y}]}"
    run = read(RunConfig, domains, tmp_path, "eval.domains.1.store=z", "eval.domains.0.role=in_domain")
    assert [(one.name, str(one.store)) for one in run.eval.domains] == [("a", "x"), ("b", "z")]
    study = read(StudyConfig, STUDY, tmp_path, "seeds.0=7", "students.main.grid.product.alpha.0=.2")
    assert study.seeds == (7,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.2.weight=1", r"'2' is no entry of a list of 2; entries count from 0 to 1, and key=\[...\]"),
        ("sources.-1.weight=1", "'-1' is no entry of a list of 2"),
        ("sources.weight=1", "'weight' is no entry of a list of 2"),
        ("sources.1.weight=0", r"sources\.1\.weight = 0: "),
        ("sources.1.paths.0.x=1", r"sources\.1\.files?\.?paths|sources\.1\.paths\.0"),
        ('sources.1.paths.0="\\ud800"', r"line 1: text with U\+D800, which is no character of any text"),
    ],
)
def test_overrides_that_lead_nowhere_are_named(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(StoreConfig, MIXTURE, tmp_path, override)
