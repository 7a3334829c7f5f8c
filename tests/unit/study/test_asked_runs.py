"""A study that asks its runs downstream tasks once they are trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from own_task_files import own_task
from tiny_study import TINY, tiny_study
from told_progress import Told

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.accuracy_rows import accuracy_table
from tutelage.errors import Stopped, UserError
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.lm_eval import run_downstream
from tutelage.evals.score_files import read_scores
from tutelage.records import write_sealed
from tutelage.study.engines import TaskOutcome
from tutelage.study.engines.local import LocalEngine
from tutelage.study.expand import expand
from tutelage.study.leases import Leases, ask_to_stop
from tutelage.study.results import load_results
from tutelage.study.run_study import run_study
from tutelage.study.side_tasks import Asker
from tutelage.verify import verify

pytest.importorskip("lm_eval")

NAMES = ["word_analogy", "last_word"]
PAIRS = {
    "name": "pairs",
    "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}],
    "max_bytes": 60_000,
}
STAGE = {"corpus": PAIRS, "tokens": "2K", "run": {"eval": {"max_documents": 2, "max_tokens": 64}}}


def run(study, directory):
    told = Told()
    run_study(expand(study), directory, LocalEngine(2, []), told)
    return [stage for stage in told.stages if stage.startswith("questions")]


def asked(directory):
    """The answers of every run, by run, task and number of questions."""
    scores = [score for file in directory.glob("runs/*/scores.jsonl") for score in read_scores(file)]
    return {(s.run, s.domain, s.n): s.value for s in scores if (s.role, s.metric) == ("downstream", "acc")}


@pytest.mark.slow
def test_all_runs_are_asked_once_and_again_when_other_questions_are_wanted(tmp_path, command):
    main = TINY["students"]["main"] | {"then": ["taught"]}
    changes = {"students": {"main": main}, "post_training": {"taught": STAGE}}
    study = tiny_study(tasks={"names": NAMES, "limit": 20}, **changes)
    assert run(study, tmp_path / "study") == ["questions to 5 runs"]
    found = asked(tmp_path / "study")
    ids = [path.name for path in tmp_path.glob("study/runs/*")]
    assert {(run, task) for run, task, _ in found} == {
        (run, task) for run in ids for task in ("word_analogy", "last_word_sotu")
    }
    for one in ids[:2]:  # what a process of its own answers
        model = find_model(str(tmp_path / "study" / "runs" / one), tmp_path)
        object.__setattr__(model, "output", tmp_path / one)
        (corpus,) = tmp_path.glob("study/data/sotu-*")
        for score in run_downstream(model, [NAMES[0], f"{NAMES[1]}:{corpus}"], limit=20):
            if score.metric == "acc":
                assert found[one, score.domain, score.n] == score.value

    table = accuracy_table(judge_study(load_results(tmp_path / "study")))
    assert [row[:2] for row in table.rows] == [
        ["nano-50k 4K from weak", "0.4"],
        ["nano-50k 4K from weak", "0.4, then taught"],
    ]

    assert run(study, tmp_path / "study") == []
    again = tiny_study(tasks={"names": NAMES, "limit": 25}, **changes)
    assert run(again, tmp_path / "study") == ["questions to 5 runs"]
    assert {n for _, _, n in asked(tmp_path / "study")} == {20, 25}

    _, shown, _ = command("eval", "tasks", tmp_path / "study", "--task", "last_word", "--limit", "6")
    assert "`tutelage report study` shows these tasks too" in shown
    by_hand = [(run, task) for run, task, n in asked(tmp_path / "study") if n == 6]
    assert sorted(by_hand) == sorted((run, "last_word_sotu") for run in ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ({"names": ["word_analogie"]}, "task 'word_analogie' is unknown; did you mean 'word_analogy'"),
        ({"names": ["last_word:kvj"]}, "domain 'kvj' is unknown; did you mean 'kjv'"),
        ({"names": ["own"], "include": "nowhere"}, "nowhere: no such directory"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_built(tmp_path, tasks, complaint):
    with pytest.raises(UserError, match=complaint):
        run(tiny_study(tasks=tasks), tmp_path / "study")
    assert not (tmp_path / "study" / "data").exists()


@pytest.mark.slow
def test_a_run_whose_answers_were_lost_is_asked_again_and_a_copy_of_results_is_not(tmp_path, command):
    study = tiny_study(tasks={"names": ["word_analogy"], "limit": 5})
    run(study, tmp_path / "study")
    (file,) = tmp_path.glob("study/runs/student-nano-50k-4K-s43-*/scores.jsonl")
    before, kept = file.read_text(), []
    kept = [line for line in before.splitlines() if json.loads(line)["role"] != "downstream"]
    file.write_text("".join(f"{line}\n" for line in kept))
    Path(f"{file}.sha256").unlink(missing_ok=True)
    assert run(study, tmp_path / "study") == ["questions to 3 runs"]
    assert asked(tmp_path / "study").keys() >= {(file.parent.name, "word_analogy", 5)}

    for part in ("model", "checkpoints"):
        shutil.rmtree(file.parent / part)
    again = tiny_study(tasks={"names": ["word_analogy"], "limit": 6})
    assert run(again, tmp_path / "study") == ["questions to 2 runs"]
    assert {run for run, _, n in asked(tmp_path / "study") if n == 6}.isdisjoint({file.parent.name})
    _, shown, _ = command("eval", "tasks", tmp_path / "study", "--task", "word_analogy", "--limit", "6")
    assert "1 runs have no finished model here and are left out" in shown


class Scripted:
    """An engine whose tasks end as they are told to."""

    slots = 2

    def __init__(self, *outcomes):
        self.outcomes, self.started = [*outcomes], []

    def start(self, key, task):
        self.started.append((key, task))

    def wait(self, seconds):
        return {self.started[-1][0]: TaskOutcome(status=self.outcomes.pop(0))}


def test_a_check_that_was_stopped_has_not_passed(tmp_path):
    study = tiny_study(tasks={"names": ["word_analogy"]})
    with Leases(tmp_path) as leases:
        engine = Scripted("stopped", "busy", "done")
        asker = Asker(study, tmp_path, engine, leases, Told())
        asker.check()
        assert engine.outcomes == []
        asker.check()  # which has passed
        assert len(engine.started) == 3
        ask_to_stop(tmp_path, leases.token)
        other = Asker(tiny_study(tasks={"names": ["sciq"]}), tmp_path, Scripted("done"), leases, Told())
        with pytest.raises(Stopped):
            other.check()
        (tmp_path / "queue" / "runners" / f"{leases.token}.stop").unlink()
        leases.refresh()
        assert leases.state("tasks", other._what) == "free"


def test_the_users_files_count_wherever_they_lie(tmp_path):
    def what(place):
        tasks = {"names": ["own"], "include": str(place)}
        return Asker(tiny_study(tasks=tasks), tmp_path, None, None, None)._what

    own_task(tmp_path / "here", [" a", " b"])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert what(tmp_path / "here") == what(tmp_path / "there")
    with (tmp_path / "there" / "helpers.py").open("a") as file:
        file.write("#\n")
    assert what(tmp_path / "here") != what(tmp_path / "there")


def test_a_run_whose_tasks_give_no_score_is_asked_once(tmp_path):
    place = SimpleNamespace(path=tmp_path, scores=tmp_path / "scores.jsonl", lacks_weights=lambda: False)
    node = SimpleNamespace(id="run-1", directory=place, cell=SimpleNamespace(name="run"))
    engine = Scripted("done")
    with Leases(tmp_path) as leases:
        study = tiny_study(tasks={"names": ["word_analogy"]})
        Asker(study, tmp_path, engine, leases, Told()).ask([node], tmp_path)
    assert [key for key, _ in engine.started] == ["run-1-tasks"]


def test_of_what_was_asked_verify_takes_nothing_for_a_lost_run(tmp_path):
    place = SimpleNamespace(path=tmp_path, scores=tmp_path / "scores.jsonl", lacks_weights=lambda: False)
    node = SimpleNamespace(id="run-0123abcd", directory=place, cell=SimpleNamespace(name="run"))
    with Leases(tmp_path) as leases:
        study = tiny_study(tasks={"names": ["word_analogy"]})
        asker = Asker(study, tmp_path, Scripted("done", "done"), leases, Told())
        asker.check()
        asker.ask([node], tmp_path)
        assert leases.acquire(node.id, "recipe")
        leases.release(node.id, done=True)
    write_sealed(tmp_path / "plan.json", {"runs": [{"run": node.id}]})
    assert len([*tmp_path.glob("queue/leases/*.json")]) == 3
    wrong = [one.path for one in verify(tmp_path, lambda _: None) if one.what == "run"]
    assert wrong == [tmp_path / "runs" / node.id]
