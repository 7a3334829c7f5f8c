"""Groups, tags and task files of one's own: what has scores, and when they count as the same."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import yaml
from own_task_files import QUESTION, own_task, write_rows, write_task
from told_progress import Told

from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.evaluated_model import EvaluatedModel
from tutelage.evals.lm_eval import run_downstream
from tutelage.evals.lm_eval_prepared import task_manager
from tutelage.evals.score_files import read_scores
from tutelage.models import hub
from tutelage.models.shapes import LADDER

pytest.importorskip("lm_eval")

CONTEXT = 96
ANSWERS = [" of the lord", " of the states"]
SUMMED_UP = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}


@pytest.fixture(scope="module")
def model_directory(store, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    hub.save(hub.build(LADDER["nano-50k"], open_store(store).vocab_size, CONTEXT, seed=0), directory, store)
    return directory


@pytest.fixture
def evaluated(model_directory, store, tmp_path):
    return EvaluatedModel("tiny-1", model_directory, CONTEXT, tmp_path / "out", 7, 900, store)


@pytest.fixture
def folder(tmp_path):
    """Two tasks with a tag, and a group of them that sums them up and one that does not."""
    place = tmp_path / "files"
    source = write_rows(place, ANSWERS)
    for name, text in (("first", "q"), ("second", "Now: {{q}}")):
        write_task(place, name, QUESTION | source | {"doc_to_text": text, "tag": "both"})
    for name, settings in (("summed", SUMMED_UP), ("listed", {})):
        group = {"group": name, "task": ["first", "second"], **settings}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return place


def asked(evaluated, folder, *tasks):
    return [(score.domain, score.metric) for score in run_downstream(evaluated, tasks, include=folder)]


def test_a_group_that_sums_up_has_its_own_scores_and_those_of_its_tasks(evaluated, folder):
    found = run_downstream(evaluated, ["summed"], include=folder)
    both = [(task, metric) for task in ("first", "second") for metric in ("acc", "acc_norm")]
    assert [(score.domain, score.metric) for score in found] == [("summed", "acc"), *both]
    values = {(score.domain, score.metric): score for score in found}
    mean = (values["first", "acc"].value + values["second", "acc"].value) / 2
    assert values["summed", "acc"].value == pytest.approx(mean)
    assert values["summed", "acc"].n == 12
    before = evaluated.scores.read_bytes()
    assert asked(evaluated, folder, "listed") == asked(evaluated, folder, "both") == both
    assert evaluated.scores.read_bytes() == before  # the same questions, computed already


def test_a_group_of_groups_alone_has_a_score_and_each_says_what_sums_it_up(evaluated, folder):
    """lm-eval has no direction of its metrics, so mmlu ended in a traceback once all had been answered."""
    metrics = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    settings = {"output_type": "loglikelihood", "doc_to_target": " {{a[gold]}}", "metric_list": metrics}
    write_task(folder, "third", QUESTION | write_rows(folder, ANSWERS) | settings)
    whole = {"metric": "acc"}, {"metric": "perplexity"}
    inner = {"group": "inner", "task": ["summed", "third"], "aggregate_metric_list": [{"metric": "acc"}]}
    outer = {"group": "outer", "task": ["inner"], "aggregate_metric_list": [*whole]}
    for group in (inner, outer):
        (folder / f"{group['group']}.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    found = {(one.domain, one.metric): one for one in run_downstream(evaluated, ["outer"], include=folder)}
    above = {name: one.summed_by for name, one in found.items()}
    summed = {("third", "perplexity"), *((name, "acc") for name in ("inner", "summed", "first", "second"))}
    assert {name for name, group in above.items() if group == "outer"} == summed
    assert {name for name, group in above.items() if group is None} == {
        ("outer", "acc"),
        ("outer", "perplexity"),
        ("first", "acc_norm"),
        ("second", "acc_norm"),
    }
    worse = {name for name, one in found.items() if not one.higher_is_better}
    assert worse == {("outer", "perplexity"), ("third", "perplexity")}


def test_a_group_of_which_no_task_has_the_metric_is_its_tasks_which_are_asked_once(evaluated, folder):
    group = {"group": "blank", "task": ["first"], "aggregate_metric_list": [{"metric": "exact_match"}]}
    (folder / "blank.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    told = Told(), Told()
    found = [run_downstream(evaluated, ["blank"], include=folder, progress=one) for one in told]
    assert found[0] == found[1]
    assert {score.domain for score in found[0]} == {"first"}
    assert ([*told[0].stages], [*told[1].stages]) == (["tiny-1: first"], [])


def test_of_what_is_not_summed_up_each_task_is_kept_when_it_is_done(evaluated, folder):
    """It used to have no scores at all, and end in a traceback."""
    four = write_rows(folder, [" a", " b", " c", " d"], name="four")
    write_task(folder, "second", QUESTION | four | {"metric_list": [{"metric": "f1"}]})
    with pytest.raises(UserError, match="task second: no score by the metrics"):  # f1 is for two answers
        run_downstream(evaluated, ["listed"], include=folder)
    assert {score.domain for score in read_scores(evaluated.scores)} == {"first"}


def test_ones_own_tasks_come_before_those_of_lm_eval_which_are_read_once(folder):
    write_task(folder, "hellaswag", QUESTION)
    own, without = task_manager([folder], defaults=True), task_manager([], defaults=True)
    assert own.task_index["hellaswag"].yaml_path == folder / "hellaswag.yaml"
    assert without.task_index["hellaswag"].yaml_path.parent.name == "hellaswag"  # lm-eval's own, as it was
    assert {*own.task_index} - {*without.task_index} == {"first", "second", "both", "summed", "listed"}
    assert own.task_index["piqa"] is without.task_index["piqa"]


def test_a_task_that_a_group_judges_otherwise_has_scores_of_its_own(evaluated, folder):
    group = {"group": "other", "task": [{"task": "first", "repeats": 2}]}
    (folder / "other.yaml").write_text(yaml.safe_dump(group | SUMMED_UP), encoding="utf-8")
    (first, _) = run_downstream(evaluated, ["first"], include=folder)
    (_, again, _) = run_downstream(evaluated, ["other"], include=folder)
    assert (first.domain, first.metric) == (again.domain, again.metric) == ("first", "acc")
    assert first.version != again.version


def test_included_files_and_data_beside_the_answers_count(evaluated, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    settings = {"generation_kwargs": {"max_gen_toks": 4}, "metric_list": [{"metric": "acc"}]}
    (shared / "_base").write_text(
        yaml.safe_dump(settings) + "process_results: !function judge.judge\n", encoding="utf-8"
    )
    judge = shared / "judge.py"
    judge.write_text("def judge(doc, results):\n    return {'acc': float(doc['other'] in results[0])}\n")
    folder = own_task(tmp_path / "own", ANSWERS, include="../shared/_base", output_type="generate_until")

    def version():
        (score,) = run_downstream(evaluated, ["own"], include=folder)
        return score.version

    first = version()
    assert version() == first
    judge.write_text(judge.read_text(encoding="utf-8").replace(" in ", " not in "), encoding="utf-8")
    second = version()
    assert second != first
    rows = folder / "own.jsonl"
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace('"other": "number 3"', '"other": "no. 3"'), encoding="utf-8")
    assert version() not in (first, second)


def test_every_repeated_answer_is_counted_once(evaluated, tmp_path):
    settings = {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 3}, "repeats": 3}
    folder = own_task(tmp_path / "own", ANSWERS, **settings, doc_to_choice=None, doc_to_target="other")
    told = Told()
    run_downstream(evaluated, ["own"], include=folder, progress=told)
    ((wanted, _, *done, outcome),) = told.stages.values()
    assert (wanted, done[-1], outcome) == (18, 18, "done")


def test_standard_errors_by_resampling_start_no_processes(evaluated, tmp_path, monkeypatch):
    """They had the command's handlers of signals, so that their end was a traceback now and then."""
    monkeypatch.setattr(multiprocessing, "Pool", None)
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    metrics = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    folder = own_task(tmp_path / "own", ANSWERS, metric_list=metrics)
    (score,) = run_downstream(evaluated, ["own"], include=folder)
    assert score.metric == "f1"
    assert score.stderr >= 0
    assert "DISABLE_MULTIPROC" not in os.environ


def test_a_metric_that_is_no_number_is_one_line(evaluated, tmp_path):
    folder = own_task(tmp_path / "own", ANSWERS)
    with (folder / "helpers.py").open("a", encoding="utf-8") as file:
        file.write("def table(items):\n    return {'a': 1.0}\n")
    with (folder / "own.yaml").open("a", encoding="utf-8") as file:
        file.write("metric_list: [{metric: acc, aggregation: !function helpers.table}]\n")
    with pytest.raises(UserError, match=r"task own: no score by the metrics .*TypeError: float\(\) argument"):
        run_downstream(evaluated, ["own"], include=folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unsafe_code": True}, "task own: runs code that the model writes.*--confirm_run_unsafe_code"),
        ({"doc_to_image": "q"}, "task own: shows pictures or sounds"),
    ],
)
def test_what_is_not_asked_here_is_refused_before_any_compute(evaluated, tmp_path, settings, message):
    folder = own_task(tmp_path / "own", ANSWERS, **settings)
    with pytest.raises(UserError, match=message):
        run_downstream(evaluated, ["own"], include=folder)
    assert not evaluated.scores.exists()


def test_questions_that_lose_their_beginning_are_counted(evaluated, tmp_path):
    told = Told()
    folder = own_task(tmp_path / "own", [" of the people" * 6, " of"])
    run_downstream(evaluated, ["own"], include=folder, progress=told)
    assert not told.notes
    with (folder / "helpers.py").open("a", encoding="utf-8") as file:
        file.write("def prompt(doc):\n    return doc['q'] * (1 + 20 * doc['gold'])\n")
    run_downstream(evaluated, ["own"], include=folder, progress=told)
    (note,) = told.notes
    assert "own: 3 of 6 questions are longer than the model's context of 96 tokens with an answer" in note
