from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.cli.settings_pages import template
from tutelage.config.base import parse_tokens
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import digest, load, to_yaml, validate
from tutelage.config.objective_config import ObjectiveConfig
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.config.teacher_config import ModelTeacher, TeachConfig
from tutelage.errors import UserError

BASE = {"model": {"shape": "nano-50k"}, "data": {"store": "s"}, "tokens": "2M"}
TAUGHT = BASE | {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.4}}


def test_a_taught_run_without_alpha_is_taught_by_auto(tmp_path):
    taught = BASE | {"teacher": {"kind": "unigram"}}
    auto = validate(RunConfig, taught | {"objective": {"alpha": "auto"}}, "test")
    for objective in ({}, {"objective": {}}):
        assert validate(RunConfig, taught | objective, "test") == auto
    (tmp_path / "run.yaml").write_text(to_yaml(auto))
    assert load(RunConfig, tmp_path / "run.yaml") == auto
    made = RunConfig(
        model=auto.model, data=auto.data, tokens="2M", teacher=auto.teacher, objective=ObjectiveConfig()
    )
    assert made == auto
    with pytest.raises(UserError, match="alpha is 0; set alpha: 1, as mixing = routed has it, or drop"):
        validate(RunConfig, taught | {"objective": {"mixing": "routed"}}, "test")
    kept = validate(RunConfig, taught | {"objective": {"mixing": "keep_full_kd"}}, "test").objective.alpha
    assert kept.highest == 0  # it is always taught
    alone = validate(RunConfig, BASE, "test").objective.alpha
    assert alone == validate(RunConfig, BASE | {"teacher": None}, "test").objective.alpha
    assert alone.highest == 0


@pytest.mark.parametrize(
    ("budget", "parameters", "tokens"),
    [
        (5_000_000, None, 5_000_000),
        ("5000000", None, 5_000_000),
        ("5_000_000", None, 5_000_000),
        ("5e6", None, 5_000_000),
        ("5e3K", None, 5_000_000),
        ("50M", None, 50_000_000),
        ("52.4B", None, 52_400_000_000),
        ("150K", None, 150_000),
        ("20x", 1_000_000, 20_000_000),
        ("0.5x", 1_000_001, 500_000),
    ],
)
def test_token_budgets(budget, parameters, tokens):
    assert parse_tokens(budget, parameters) == tokens


@pytest.mark.parametrize("budget", ["", "M", "5 M", "-5M", "5m", "1e-3", "1e999", "1__0", "20X", None])
def test_what_is_no_budget(budget):
    with pytest.raises(ValueError, match="not a token budget"):
        parse_tokens(budget)


def test_multiples_of_parameters_need_parameters():
    with pytest.raises(ValueError, match="per parameter"):
        parse_tokens("20x")


def test_yaml_round_trip_and_overrides(tmp_path):
    config = validate(RunConfig, TAUGHT, "here")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert load(RunConfig, path) == config
    changed = load(RunConfig, path, ["optim.lr=1e-3", "tokens=5x", "objective.alpha=0.2", "data.seed=7"])
    assert changed.optim.lr == pytest.approx(1e-3)
    assert changed.tokens == "5x"
    assert changed.objective.alpha.value == pytest.approx(0.2)
    assert changed.data.seed == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"lrr": 1}}, "optim.lrr: unknown setting; did you mean 'lr'?"),
        ({"optimm": {}}, "optimm: unknown setting; did you mean 'optim'?"),
        ({"teacher": {"kind": "run", "runn": "x"}}, "teacher.runn: unknown setting; did you mean 'run'?"),
        ({"teacher": {"kind": "run"}}, "teacher.run: required but not given"),
        (
            {"teacher": {"kind": "oracle"}},
            "teacher.kind = 'oracle': unknown; choose from cache, mean, model, run, uniform",
        ),
        ({"teacher": None}, "there is no teacher; add one or drop alpha"),
        ({"objective": {"alpha": 0}}, "alpha is 0; raise alpha or drop 'teacher'"),
        (
            {"teacher": {"kind": "uniform"}, "objective": {"alpha": 0.1, "divergence": "hard_labels"}},
            "objective.divergence = hard_labels: the uniform teacher has no most probable ids; drop it",
        ),
        (
            {
                "teacher": {"kind": "uniform"},
                "objective": {"alpha": 0.1, "truncation": {"kind": "top_k", "k": 5}},
            },
            "objective.truncation: the uniform teacher has no most probable ids; drop it",
        ),
        (
            {"teacher": None, "objective": {"mixing": "keep_full_kd"}},
            "objective.mixing is keep_full_kd but there is no teacher; add one or drop mixing",
        ),
        (
            {"objective": {"mixing": "keep_full_kd", "gate": {"kind": "teacher_better"}}},
            "an objective.gate but objective.alpha is 0; raise alpha or drop 'gate'",
        ),
        (
            {"objective": {"alpha": 1.4}},
            "objective.alpha.value = 1.4: must be at most 1.0",
        ),
        ({"objective": {"alpha": -0.1}}, "objective.alpha.value = -0.1"),
        ({"objective": {"alpha": "much"}}, "objective.alpha"),
        (
            {"objective": {"alpha": {"policy": "constant", "valu": 1}}},
            "objective.alpha.valu: unknown setting",
        ),
        (
            {"objective": {"alpha": {"policy": "piecewise", "knots": [[0.5, 1], [0.5, 0]]}}},
            "fractions must rise",
        ),
        ({"objective": {"alpha": 0.4, "temperature": 0}}, "objective.temperature = 0"),
        ({"objective": {"alpha": 0.4, "divergence": "kl"}}, "objective.divergence = 'kl'"),
        ({"tokens": "5Q"}, "tokens = '5Q'"),
        ({"checkpoint": {"every": "2x"}}, "checkpoint.every"),
        ({"global_batch_tokens": 100}, "multiple of data.sequence_length (128)"),
        ({"micro_batch_tokens": 384}, "divide global_batch_tokens"),
        ({"model": {}}, "exactly one of 'shape', 'path' and 'run'"),
        (
            {"model": {"shape": "a", "path": "b"}},
            "exactly one of 'shape', 'path' and 'run'; shape and path are given; null takes one back",
        ),
        ({"model": {"run": "runs/a"}}, "model.run = 'runs/a': a path; write the name of a run in"),
        (
            {"teacher": {"kind": "run", "run": "/a"}, "objective": {"alpha": 0.4}},
            "teacher.run = '/a': a path; write the name of a run in",
        ),
        ({"seed": "43"}, "seed = '43'"),
        ({"optim": {"betas": [0.9]}}, "optim.betas"),
        ({"eval": {"domains": [{"name": "x", "stor": "y"}]}}, "eval.domains.0.stor: unknown setting"),
        ({"name": "a/b"}, "name = 'a/b': must be ASCII letters, digits"),
        ({"name": "schüler"}, "name = 'schüler': must be ASCII letters, digits"),
        ({"teacher": {}}, "teacher.kind: required but not given; choose from cache, mean, model, run"),
        ({"teacher": 5}, "teacher = 5: must be a section of settings"),
        (
            {"data": "s"},
            "data = 's': must be a section of settings (key: value); allowed: document_mask, seed, ",
        ),
        ({"tokens": None}, "tokens: not a token budget"),
        ({"optim": {"betas": [0.9, 1]}}, "optim.betas.1 = 1: must be less than 1.0"),
        ({"runtime": {"compile": 5}}, "runtime.compile = 5: must be true or false, or 'auto'"),
        ({"parallel": {"shard": "all"}}, "parallel.shard = 'all': must be a whole number, or 'auto'"),
        ({"runtime": {"trackers": "wandb"}}, "runtime.trackers = 'wandb': must be a list"),
        ({"stage": "pretran"}, "stage = 'pretran': did you mean 'pretrain'? must be 'pretrain' or 'sft'"),
        ({"seed": 2**64}, "seed = 18446744073709551616: must be less than 4,294,967,296"),
        ({"seed": 10**5000}, "run.yaml: no settings (Exceeds the limit"),
        ({"objective": {"alpha": {"policy": "constan"}}}, "did you mean 'constant'? choose from auto"),
    ],
)
def test_errors_name_file_field_value_and_remedy(changes, message):
    with pytest.raises(UserError) as caught:
        validate(RunConfig, TAUGHT | changes, "run.yaml")
    assert message in str(caught.value)
    assert not re.search(r"Input|\btag\b|discriminator|tuple|dict|None", str(caught.value))
    assert all(line.startswith("run.yaml: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no settings: expected lines of 'name: value'"),
        (b"- 1\n", "no settings: expected lines of 'name: value'"),
        (b"a: [1\n", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_settings(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(RunConfig, path)


def test_numbers_of_numpy_are_numbers():
    settings = {"name": "a", "seed": np.int64(3), "model": {"shape": "nano-20k"}, "tokens": np.int32(8000)}
    settings |= {"data": {"store": "s"}, "optim": {"lr": np.float32(0.5), "betas": [np.float64(0.5), 0.5]}}
    config = validate(RunConfig, settings, "a run")

    assert (config.seed, config.optim.lr, config.optim.betas) == (3, 0.5, (0.5, 0.5))
    made = ObjectiveConfig(alpha=np.float32(0.5), chunk_tokens=np.int64(4), temperature=np.float16(2))
    assert (made.alpha.value, made.chunk_tokens, made.temperature) == (0.5, 4, 2.0)
    for wrong in (np.True_, np.array([1]), np.complex64(1)):
        with pytest.raises(UserError, match="chunk_tokens"):
            ObjectiveConfig(chunk_tokens=wrong)


def test_override_without_equals_sign(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(validate(RunConfig, BASE, "here")))
    with pytest.raises(UserError, match="write key=value"):
        load(RunConfig, path, ["optim.lr"])


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False) | st.text() | st.booleans()))
def test_digest_depends_on_content_and_not_on_order(data):
    assert digest(data) == digest(dict(reversed(data.items())))
    assert digest(data) != digest(data | {"one more": 1})


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_builds_on_others_section_by_section(tmp_path):
    write(
        tmp_path,
        first="{model: {shape: nano-50k}, data: {store: s, seed: 1}, tokens: 1M}",
        second="{data: {seed: 2}, optim: {betas: [0.8, 0.9]}}",
        third="{base: second, optim: {clip: 0.5}}",
        own="{base: [first, third], tokens: 2M}",
    )
    config = load(RunConfig, tmp_path / "own.yaml", ["seed=5"])
    assert (config.model.shape, config.tokens, config.seed) == ("nano-50k", 2_000_000, 5)
    assert (str(config.data.store), config.data.seed) == ("s", 2)
    assert (config.optim.betas, config.optim.clip) == ((0.8, 0.9), 0.5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"own": "{base: nowhere}"},
            r"own\.yaml: base = 'nowhere': there is no .*nowhere\.yaml and no",
        ),
        ({"own": "{base: {a: 1}}"}, r"own\.yaml: base = \{'a': '1'\}: give the name"),
        ({"own": "{base: own}"}, r"base = 'own': .*own\.yaml builds on .*own\.yaml, so neither has an end"),
        ({"own": "{base: b}", "b": "{base: own}"}, r"b\.yaml: base = 'own'"),
        ({"own": "{base: b}", "b": "[1]"}, r"b\.yaml: no settings: expected lines of 'name: value'"),
        ({"own": "{base: b}", "b": "{tokenss: 1}"}, r"own\.yaml on .*b\.yaml: tokenss: unknown setting"),
    ],
)
def test_a_base_that_is_wrong_is_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        load(RunConfig, write(tmp_path, **files) / "own.yaml")


def test_an_unknown_setting_of_a_named_entry_gets_what_is_allowed():
    with pytest.raises(UserError, match=r"teachers\.small\.rung: unknown setting; (.*)allowed: .*shape"):
        validate(StudyConfig, {"teachers": {"small": {"rung": "nano-20k"}}}, "study.yaml")


def test_a_file_of_another_kind_is_named_in_one_line(tmp_path):
    """Each template in the place of each other; and the table of kinds knows what the models require."""
    kinds = {"run": RunConfig, "store": StoreConfig, "study": StudyConfig, "cache": TeachConfig}
    for written in kinds:
        path = tmp_path / f"{written}.yaml"
        path.write_text(template(written, path.name))
        for read, kind in kinds.items():
            if read == written:
                load(kind, path)
                continue
            with pytest.raises(
                UserError, match=rf"{written}\.yaml: this file describes a [\w ]+, for `tut"
            ) as wrong:
                load(kind, path)
            assert "\n" not in str(wrong.value)
    with pytest.raises(UserError, match="a directory; give a file of settings"):
        load(RunConfig, tmp_path)
    (tmp_path / "config.yaml").write_text("name: a")
    with pytest.raises(UserError, match=r"\(YAML\); .*config\.yaml has those of this run$"):
        load(RunConfig, tmp_path)


def test_a_section_of_another_kind_replaces_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "{model: {shape: nano-20k}, data: {store: s}, tokens: 2K, objective: {alpha: 0.1}, "
        "teacher: {kind: run, run: r, dtype: float32}}"
    )
    assert load(RunConfig, path, ["teacher={kind: model, path: p}"]).teacher == ModelTeacher(
        kind="model", path="p"
    )
    same = load(RunConfig, path, ["teacher={kind: run, run: q}"]).teacher
    assert (same.run, same.dtype) == ("q", "float32")


def test_unknown_settings_at_the_top_of_a_study_are_named():
    with pytest.raises(UserError, match=r"studdy\.yaml: sedes: unknown setting; did you mean 'seeds'\?"):
        validate(StudyConfig, {"sedes": 1}, "studdy.yaml")


def test_wrong_entries_do_not_make_a_list_too_short():
    with pytest.raises(UserError) as wrong:
        validate(StoreConfig, {"name": "a", "sources": ["x.txt"]}, "s")
    assert str(wrong.value) == "s: sources.0 = 'x.txt': must be a section of settings (key: value)"


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (RunConfig, "{lr: 1e-3}", "lr: unknown setting; did you mean 'optim.lr'?"),
        (RunConfig, "{shape: nano-50k}", "shape: unknown setting; did you mean 'model.shape'?"),
        (StudyConfig, "{nonsense: 1}", "nonsense: unknown setting; did you mean"),
    ],
)
def test_a_setting_of_a_section_is_recognised_and_each_is_named(tmp_path, kind, text, said):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path}: {said}")):
        load(kind, path)
