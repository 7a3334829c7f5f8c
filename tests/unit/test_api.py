"""Configs and results from Python: what is taken for a config, and the tables that come back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from synthetic_study import write_study

import tutelage as tt
from tutelage.config.load import taken
from tutelage.config.run_config import RunConfig
from tutelage.study.plan import load_plan
from tutelage.study.results import load_results

RUN = {
    "name": "a",
    "seed": 1,
    "tokens": "4K",
    "model": {"shape": "nano-20k"},
    "data": {"store": "stores/a"},
}


def test_a_config_is_a_path_a_dict_or_the_object(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(RUN))
    same = RunConfig(**RUN)
    for given in (path, str(path), RUN, same):
        assert taken(RunConfig, given, []) == same
        changed = taken(RunConfig, given, ["tokens=8K", "optim.lr=1e-3"])
        assert (changed.tokens, changed.optim.lr) == (8000, 1e-3)
    assert taken(RunConfig, RUN | {"data": {"store": tmp_path}}, []).data.store == tmp_path
    assert RUN["tokens"] == "4K"


@pytest.mark.parametrize(
    ("given", "overrides", "sentence"),
    [
        (RUN | {"tokenz": 1}, [], r"RunConfig: tokenz: unknown setting; did you mean 'tokens'"),
        (RUN | {"seed": "1"}, [], r"RunConfig: seed = '1'"),
        (RUN, ["optim.lr"], r"override 'optim.lr': write key=value"),
        (RUN, "tokens=8K", r"overrides is a str: give a list of texts, for example \['optim.lr=1e-3'\]"),
        (RUN, {"tokens": "8K"}, r"overrides is a dict: give a list of texts"),
        ("nowhere.yaml", [], r"nowhere.yaml: no such file"),
        ([RUN], [], r"a list is no RunConfig: give one, a dict of its settings, or the path of a file"),
        (tt.Objective(), [], r"a Objective is no RunConfig"),
    ],
)
def test_what_is_wrong_is_one_line(given, overrides, sentence):
    with pytest.raises(tt.UserError, match=sentence) as refused:
        tt.run(given, overrides)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [-1, 0, 1.5, True, "2"])
def test_a_number_of_workers_that_is_none_starts_nothing(workers, tmp_path):
    with pytest.raises(tt.UserError, match=rf"workers = {workers!r}: must be a whole number, at least 1"):
        tt.run_study("demo", tmp_path / "study", workers=workers)
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_script_that_runs_its_study_wherever_it_is_imported_is_told_so(tmp_path):
    """Its processes imported it, and waited for the study that waited for them."""
    (tmp_path / "script.py").write_text('import tutelage as tt\n\ntt.run_study("demo", "study")\n')
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'put what runs it below `if __name__ == "__main__":`' in done.stderr
    assert done.stderr.splitlines()[-1] == "tutelage.errors.UserError: its process ended with exit code 1"


@pytest.mark.parametrize("given", [None, 7, ["runs"], tt.Objective()])
def test_what_is_no_path_is_one_line(given, tmp_path):
    said = rf" is a {type(given).__name__}: give a path or a name"
    with pytest.raises(tt.UserError, match=f"^store{said}$"):
        tt.open_store(given)
    with pytest.raises(tt.UserError, match=f"^study{said}$"):
        tt.open_study(given)
    with pytest.raises(tt.UserError, match=f"^directory{said}, a run or a study$"):
        tt.load_scores(given)
    with pytest.raises(tt.UserError, match=f"^run{said}$"):
        tt.find_run(given)
    if given is not None:
        with pytest.raises(tt.UserError, match=f"^output{said}$"):
            tt.run_study("demo", given)


def test_a_wrong_config_does_not_wait_for_torch():
    code = (
        "import sys, tutelage as tt\n"
        "try: tt.run({'name': 'a'})\n"
        "except tt.UserError: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_tables_of_a_study(tmp_path):
    place = write_study(tmp_path / "study")
    study = tt.open_study(str(place))
    plan, results = load_plan(place), load_results(place)
    assert study.plan["run"].to_list() == [run.run for run in plan.runs]
    assert study.plan["flops"].sum() == pytest.approx(sum(run.flops for run in plan.runs))
    assert study.results.equals(results.runs)
    assert len(study.scores) == len(results.scores.filter(split="test"))
    (verdict,) = study.verdicts.filter(teacher="strong", arm="0.4").iter_rows(named=True)
    assert verdict["words"] == "helps in and out of domain"
    gain = study.gains.filter(teacher="strong", alpha=0.4, fit="raw", side="out_of_domain").row(0, named=True)
    assert verdict["out_of_domain"] == gain["gain"]
    assert gain["gain_low"] < gain["gain"] < gain["gain_high"]


def test_scores_of_a_run_of_runs_and_of_a_study(tmp_path, monkeypatch):
    place = write_study(tmp_path / "tutelage-study")
    whole, runs = tt.load_scores(place), tt.load_scores(str(place / "runs"))
    assert whole.equals(runs)
    lines = [line for file in place.glob("runs/*/scores.jsonl") for line in file.read_text().splitlines()]
    assert len(whole) == len(lines) > 0
    some = json.loads(lines[0])
    one = tt.load_scores(place / "runs" / some["run"])
    assert set(one["run"]) == {some["run"]}
    assert tt.load_scores(tt.find_run(place / "runs" / some["run"])).equals(one)
    assert tt.load_scores(tt.open_study(place)).equals(whole)
    row = one.filter(domain=some["domain"], split=some["split"], metric=some["metric"]).row(0, named=True)
    assert row == {name: some.get(name) for name in row}
    monkeypatch.chdir(place)
    assert tt.load_scores(some["run"]).equals(one)
    (place / "runs" / some["run"] / "scores.jsonl").unlink()
    with pytest.raises(
        tt.UserError, match=rf"this run has no scores; `tutelage eval score {some['run']}` makes"
    ):
        tt.load_scores(some["run"])
    monkeypatch.chdir(tmp_path)
    assert tt.load_scores("study").equals(tt.load_scores(place))
    with pytest.raises(tt.UserError, match=r"give the directory of a run"):
        tt.load_scores(place / "queue" if (place / "queue").exists() else tmp_path)
    with pytest.raises(tt.UserError):
        tt.load_scores("no-such-run")
    with pytest.raises(tt.UserError):
        tt.open_study(tmp_path)
