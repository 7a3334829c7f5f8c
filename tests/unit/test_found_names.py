"""Stores, runs, caches and studies by name: what is found, what is ambiguous, and what stays as it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tutelage.config.load import load, to_yaml, validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import UserError
from tutelage.evals.evaluate import select
from tutelage.names import completed, find, find_run_id, kind_of, local_model, look_up, typed
from tutelage.run import run
from tutelage.run_directory import named, run_id
from tutelage.teachers.cache.job import plan_cache


def make(path: str, **settings: object) -> Path:
    """A directory that is a run by its file."""
    Path(path).mkdir(parents=True)
    Path(path, "config.yaml").write_text(yaml.safe_dump({"name": "x", "output": path, **settings}))
    return Path(path)


def make_other(path: str, kind: str, **fields: object) -> Path:
    Path(path, *(["shards"] if kind == "cache" else [])).mkdir(parents=True)
    name = "plan.json" if kind == "study" else "manifest.json"
    Path(path, name).write_text(json.dumps(fields))
    return Path(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("runs/teacher-0a1b2c3d", seed=1, optim={"lr": 0.1, "clip": 1.0})
    make("runs/teacher-large-11111111", seed=2)
    make("runs/tea.pot-22222222")
    make("elsewhere/runs/teacher-33333333")
    make_other("stores/sotu-44444444", "store")
    make_other("data/kjv-55555555", "store")
    make_other("caches/cache-66666666", "cache")
    make_other("tutelage-demo", "study")
    make_other("first", "study")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("run", "teacher", "runs/teacher-0a1b2c3d"),  # a whole name goes before a longer one
        ("run", "teacher-l", "runs/teacher-large-11111111"),
        ("run", "teacher-0", "runs/teacher-0a1b2c3d"),
        ("run", "tea.", "runs/tea.pot-22222222"),
        ("run", "runs/teacher", "runs/teacher-0a1b2c3d"),
        ("run", "elsewhere/runs/t", "elsewhere/runs/teacher-33333333"),
        ("run", "runs/teacher-0a1b2c3d", "runs/teacher-0a1b2c3d"),
        ("store", "sotu", "stores/sotu-44444444"),
        ("store", "k", "data/kjv-55555555"),
        ("cache", "cache", "caches/cache-66666666"),
        ("study", "demo", "tutelage-demo"),
        ("study", "tut", "tutelage-demo"),
        ("study", "fi", "first"),
    ],
)
def test_names_and_beginnings_are_found(place, kind, name, path):
    assert find(kind, name, "x") == Path(path)
    assert find(kind, place / path, "x") == place / path
    assert find(kind, f"./{path}/", "x") == Path(path)


def test_kinds_are_kept_apart(place):
    make("runs/sotu-77777777")
    make_other("runs/teacher-88888888", "store")
    Path("runs/teacher-99999999").mkdir()  # an empty directory is no run
    assert find("store", "sotu", "x") == Path("stores/sotu-44444444")
    assert find("run", "sotu", "x") == Path("runs/sotu-77777777")
    assert find("run", "teacher", "x") == Path("runs/teacher-0a1b2c3d")
    assert kind_of(Path("runs")) is None


def test_a_directory_of_the_name_that_is_something_else_is_no_hindrance(place):
    Path("sotu").mkdir()
    assert find("store", "sotu", "x") == Path("stores/sotu-44444444")
    Path("nothing").mkdir()
    assert find("store", "nothing", "x") == Path("nothing")  # what opens it says what is missing


def test_a_link_to_a_directory_is_the_same_one(place):
    Path("teacher-0a1b2c3d").symlink_to(Path("runs/teacher-0a1b2c3d"))
    assert find("run", "teacher", "x").resolve() == place / "runs/teacher-0a1b2c3d"


def test_a_link_to_itself_beside_a_directory_does_not_hide_it(place):
    (place / "runs" / "around").symlink_to("around")
    assert find("run", Path("teacher-large"), "name") == Path("runs/teacher-large-11111111")


def test_several_are_listed_with_what_differs(place):
    make("runs/teacher-0a000000", seed=1, optim={"lr": 0.2, "clip": 1.0}, packed=True)
    with pytest.raises(UserError) as error:
        find_run_id("teacher", Path("runs"), "teacher.run")
    first, *rest = str(error.value).splitlines()
    assert first == "teacher.run = teacher: 2 runs are called so; write more of the name"
    assert rest == [
        "  runs/teacher-0a000000  optim.lr 0.2, packed true",
        "  runs/teacher-0a1b2c3d  optim.lr 0.1",
    ]
    assert find_run_id("teacher-0a1", Path("runs"), "x") == "teacher-0a1b2c3d"
    for number in range(100, 130):
        make(f"runs/many-aaaaa{number}", seed=number)
    with pytest.raises(UserError, match=r"30 runs are called so") as error:
        look_up("run", Path("many"), "model")
    assert len(str(error.value).splitlines()) == 14
    assert str(error.value).endswith("and 18 more")


def test_stores_that_differ_say_in_what(place):
    for number, size in (("a", 300), ("b", 512)):
        config = {"tokenizer": {"vocab_size": size}, "validation": 0.1}
        make_other(f"data/news-{number * 8}", "store", config=config, created=number)
    with pytest.raises(UserError) as error:
        find("store", "news", "data.store")
    assert str(error.value).splitlines()[1:] == [
        "  data/news-aaaaaaaa  tokenizer.vocab_size 300",
        "  data/news-bbbbbbbb  tokenizer.vocab_size 512",
    ]


def test_what_differs_is_cut_between_settings(place):
    for number in ("a", "b"):
        config = {f"setting{key}": f"{number}{key:030}" for key in range(9)}
        make_other(f"caches/large-{number * 8}", "cache", config=config, seal=number)
    with pytest.raises(UserError) as error:
        find("cache", "large", "teacher.path")
    shown = ", ".join(f"setting{key} a{key:030}" for key in range(5))
    assert str(error.value).splitlines()[1] == f"  caches/large-aaaaaaaa  {shown}, ..."


def test_damaged_settings_do_not_hide_a_match(place):
    Path("runs/teacher-0a000000").mkdir()
    Path("runs/teacher-0a000000/config.yaml").write_bytes(b"\xff: [")
    with pytest.raises(UserError, match="2 runs are called so"):
        find("run", "teacher", "x")


def test_a_name_that_nothing_has_is_refused_with_the_near_ones(place):
    with pytest.raises(
        UserError, match=r"data.store = sotus: no store .*\./, stores/, data/.*did you mean 'sotu'"
    ):
        find("store", "sotus", "data.store")
    with pytest.raises(UserError, match="no run is called so in nowhere/; there are no runs yet"):
        find_run_id("teacher", Path("nowhere"), "teacher.run")
    assert find_run_id("later-12345678", Path("runs"), "x") == "later-12345678"  # of a run to come
    assert find("store", "no/where", "x") == Path("no/where")
    assert look_up("run", Path("gpt2"), "x") is None
    assert look_up("run", Path("org/model"), "x") is None


@pytest.mark.parametrize("path", ["", ".", "..", "/", "runs/.."])
def test_no_name_is_no_beginning_of_all(place, path):
    assert look_up("run", Path(path), "x") is None
    assert find("run", path, "x") == Path(path)


def test_parts_of_a_path_may_be_names(place):
    Path("runs/teacher-0a1b2c3d/model").mkdir()
    assert completed(Path("runs/teacher/model"), "x") == Path("runs/teacher-0a1b2c3d/model")
    assert completed(place / "runs/teacher/model", "x") == place / "runs/teacher-0a1b2c3d/model"
    for same in ("org/model", "gpt2", "runs/nobody/model", "runs/teacher/other"):
        assert completed(Path(same), "x") in {Path(same), Path("runs/teacher-0a1b2c3d/other")}


def test_a_run_is_the_same_by_name_and_by_path(make_config, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stores").mkdir()
    shutil.copytree(store, Path("stores", store.name))
    make("runs/weak-12345678", seed=1)
    runs = make("runs/weaker-87654321", seed=2).parent
    taught = {"objective": {"alpha": 0.4}, "output": "runs"}

    def written(place, teacher, domain):
        return make_config(
            data={"store": place, "sequence_length": 32},
            teacher={"kind": "run", "run": teacher},
            eval={"domains": [{"name": "held-out", "store": domain}]},
            **taught,
        )

    by_path = written(str(store), "weak-12345678", str(store))
    by_name = written("speeches", "weak", "spe")
    assert run_id(by_path) == run_id(by_name)
    found = named(by_name)
    assert found.data.store == Path("stores", store.name)
    assert found.teacher.run == "weak-12345678"
    assert found.eval.domains[0].store == Path("stores", store.name)
    assert named(found) == found
    assert validate(RunConfig, yaml.safe_load(to_yaml(found)), "x") == found
    with pytest.raises(UserError, match=r"teacher.run = wea: 2 runs are called so"):
        run_id(written("speeches", "wea", "spe"))
    branch = {"optim": {"schedule": "wsd", "warmup": "1K"}, "runtime": {"branch_from": "weaker"}}
    assert named(make_config(output=str(runs), **branch)).runtime.branch_from == "weaker-87654321"
    assert named(make_config(output=str(runs), model={"run": "weak"})).model.run == "weak-12345678"


def test_a_study_has_its_stores_beside_its_runs(make_config, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store, Path("study", "data", store.name))
    config = make_config(data={"store": "speeches"}, output="study/runs")
    assert named(config).data.store == Path("study", "data", store.name)


def test_a_run_and_its_cache_find_the_same_teachers(make_config, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = run(make_config(name="taught", tokens=512, output="runs")).model
    by_name = {"kind": "model", "path": "runs/taught/model"}
    cached = {"store": str(store), "context_length": 32, "format": {"kind": "topk", "k": 2}}

    def plan(teacher):
        return plan_cache(validate(TeachConfig, cached | {"teacher": teacher}, "test"))

    assert plan(by_name).path == plan(by_name | {"path": str(model)}).path
    assert named(make_config(output="runs", teacher=by_name, objective={"alpha": 0.4})).teacher.path == str(
        Path("runs", model.parent.name, "model")
    )
    mean = plan({"kind": "mean", "of": [by_name, {"kind": "run", "run": "taught"}]})
    assert [one.run for one in mean.config.teacher.of[1:]] == [model.parent.name]
    assert mean.path == plan({"kind": "mean", "of": [{"kind": "run", "run": "tau"}] * 2}).path


def test_caches_and_evaluations_take_names(store, tmp_path, monkeypatch):
    monkeypatch.chdir(store.parent)
    file = tmp_path / "teach.yaml"
    file.write_text("store: speeches\nteacher: {kind: unigram}\n")
    plan = plan_cache(load(TeachConfig, file))
    assert plan.config.store == Path(store.name)
    assert plan.path == plan_cache(load(TeachConfig, file, [f"store={store}"])).path
    assert select([], None, ["own=speeches"]) == ({}, {"own": Path(store.name)})
    with pytest.raises(UserError, match="--store own = speech_: no store is called so"):
        select([], None, ["own=speech_"])


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "hub/name", "~/nowhere", "."])
def test_a_model_that_is_not_there_keeps_its_spelling(place, path):
    """`./nowhere` is refused at once as a directory; `nowhere` might be on the Hub."""
    assert local_model(path, "teacher.path") == path


@pytest.mark.parametrize("path", ["hub/name", "./hub/name", "runs/tea.pot/model"])
def test_a_revision_of_what_is_a_directory_here_is_refused(place, make_config, store, path):
    """It was ignored, so another model than the one that was asked for trained or taught."""
    for directory in ("hub/name", "runs/tea.pot-22222222/model"):
        (place / directory).mkdir(parents=True)
    model = {"path": path, "revision": "v1"}
    teacher = model | {"kind": "model"}
    for section, more in (
        ("model", {"model": model}),
        ("teacher", {"teacher": teacher}),
        ("teacher.of[1]", {"teacher": {"kind": "mean", "of": [{"kind": "unigram"}, teacher]}}),
    ):
        with pytest.raises(UserError, match=re.escape(f"{section}.path = {path}: is a directory")):
            named(make_config(output="runs", objective={"alpha": 0.4} if "teacher" in more else {}, **more))
    with pytest.raises(UserError, match=r"teacher\.revision = 'v1' asks for one of the Hub's"):
        plan_cache(TeachConfig(store=store, teacher=teacher))
    Path("hub/name").rmdir()
    assert named(make_config(model=model | {"path": "hub/name"})).model.revision == "v1"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("stores/sotu-44444444", "sotu"),
        ("data/kjv-55555555", "kjv-55555555"),  # another is called so
        ("stores/kjv-77777777", "kjv-77777777"),
        ("my stores/speeches-88888888", "my stores/speeches-88888888"),
        ("my stores/sotu-99999999", "my stores/sotu-99999999"),  # its name would find another
    ],
)
def test_what_is_to_be_typed_for_a_store_finds_it(place, path, name):
    for other in ("stores/kjv-77777777", "my stores/speeches-88888888", "my stores/sotu-99999999"):
        make_other(other, "store")
    for given in (Path(path), place / path):
        assert typed("store", given) == (name if name != path else str(given))
        assert find("store", typed("store", given), "store").resolve() == (place / path).resolve()
