"""Accuracy on downstream tasks in a study: gains over the untaught, recomputed from the rows themselves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic_study import write_study

from tutelage.analysis.accuracy import MEAN
from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.accuracy_rows import accuracy_section, accuracy_table
from tutelage.analysis.report.csv_tables import tables_of
from tutelage.api import open_study
from tutelage.study.results import load_results
from tutelage.types import Score

SEEDS = (43, 44, 45)
ASKED = {
    "hellaswag": ("acc_norm,none", "2-h", 400),
    "sciq": ("acc,none", "2-s", 100),
    "gsm8k": ("exact_match,strict", "2-g", 50),
}
RUNS = [
    *(f"baseline-{seed}" for seed in SEEDS),
    *(f"student-{teacher}-{seed}" for teacher in ("weak-0.4", "strong-0.4") for seed in SEEDS),
    "teacher-weak-42",
]


def answer(study, run, task, value, **changes):
    """Add a row as `tutelage eval tasks` does."""
    metric, version, n = ASKED.get(task, ("acc", "2-x", 10))
    fields = {"metric": metric.removesuffix(",none"), "version": version, "n": n} | changes
    score = Score(
        run=run, step=1953, tokens=1, domain=task, role="downstream", split="test", value=value, stderr=0.01,
        higher_is_better=True, **fields,
    )  # fmt: skip
    with (study / "runs" / run / "scores.jsonl").open("a") as file:
        file.write(json.dumps(asdict(score)) + "\n")


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path / "study")


@pytest.fixture
def values(study):
    """Shares of right answers of every run, at random, by run and task."""
    rng = np.random.default_rng(5)
    drawn = {(run, task): float(rng.uniform(0.2, 0.8)) for run in RUNS for task in ASKED}
    for (run, task), value in drawn.items():
        answer(study, run, task, value)
    return drawn


def judged(study):
    return judge_study(load_results(study))


def cell_of(found, teacher):
    return next(v.cell for v in found.findings.verdicts if (v.teacher, v.alpha) == (teacher, 0.4))


@pytest.mark.parametrize("teacher", ["weak", "strong"])
def test_gains_are_paired_by_seed_and_the_mean_is_over_tasks(study, values, teacher):
    found = judged(study)
    cell = cell_of(found, teacher)
    of_tasks = {(task,): task for task in ASKED} | {tuple(ASKED): MEAN}
    for tasks, name in of_tasks.items():
        taught, alone = (
            np.array([np.mean([100 * values[f"{kind}-{seed}", task] for task in tasks]) for seed in SEEDS])
            for kind in (f"student-{teacher}-0.4", "baseline")
        )
        low, high = stats.ttest_rel(taught, alone).confidence_interval(0.95)
        measured = found.accuracies.gains[cell, name]
        assert measured.untaught == pytest.approx(alone.mean())
        estimate = measured.gain
        wanted = [(taught - alone).mean(), low, high, 3]
        assert [estimate.mean, estimate.low, estimate.high, estimate.n] == pytest.approx(wanted)


def test_page_and_csv_say_the_same_and_teachers_stand_beside(study, values):
    found = judged(study)
    table = accuracy_table(found)
    assert table.headings == [
        "pair", "alpha", "mean of 3 tasks", "teacher itself", "hellaswag (400)", "sciq (100)", "gsm8k (50)"
    ]  # fmt: skip
    rows = {row[0]: row for row in table.rows}
    assert [*rows] == ["tiny 2M from weak", "tiny 2M from strong"]
    own = np.mean([100 * values["teacher-weak-42", task] for task in ASKED])
    assert (rows["tiny 2M from weak"][3], rows["tiny 2M from strong"][3]) == (f"{own:.1f}%", "")
    written = tables_of(found)["accuracy"].filter(task=MEAN, teacher="weak").row(0, named=True)
    shown = rows["tiny 2M from weak"][2]
    assert shown.text == f"{written['gain']:+.1f}"
    assert shown.note == (
        f"{written['gain_low']:+.2f} to {written['gain_high']:+.2f} (n = 3); alone {written['untaught']:.1f}%"
    )


def test_of_a_task_asked_in_two_ways_the_one_of_most_runs_counts(study, values):
    for run in RUNS[:2]:
        answer(study, run, "sciq", 0.99, version="2-first", n=20)  # a first try, on a few questions
    (study / "runs" / RUNS[3] / "scores.jsonl").write_text(
        (study / "runs" / RUNS[3] / "scores.jsonl").read_text().replace('"2-s"', '"2-other"')
    )
    results = load_results(study)
    (problem,) = results.problems
    assert problem.startswith(f"{RUNS[3]}: asked other questions of sciq than most runs, or in another way")
    sciq = dict(results.tasks.filter(task="sciq").select("run", "value").iter_rows())
    assert sciq == {run: values[run, "sciq"] for run in RUNS if run != RUNS[3]}
    cell = cell_of(judge_study(results), "weak")
    gains = judge_study(results).accuracies.gains
    assert (gains[cell, "sciq"].gain.n, gains[cell, MEAN].gain.n, gains[cell, "gsm8k"].gain.n) == (2, 2, 3)


def test_of_a_group_that_sums_up_its_tasks_the_mean_has_the_group_alone(study, values):
    """Its questions used to be counted twice, and each of its tasks as much as a task of its own."""
    for run in RUNS:
        answer(study, run, "subjects", 0.1)
        answer(study, run, "law", 0.3, summed_by="subjects")
        answer(study, run, "law", 0.4, metric="acc_norm")
        answer(study, run, "art", 0.7, metric="acc_norm")  # the same group, which sums up another accuracy
        answer(study, run, "art", 0.8, metric="exact_match", summed_by="subjects")
    found = judged(study)
    assert found.accuracies.in_mean == (*ASKED, "subjects")
    for run in RUNS:
        (mean,) = found.accuracies.runs.filter(run=run, task=MEAN)["accuracy"]
        assert mean == pytest.approx(100 * np.mean([*(values[run, task] for task in ASKED), 0.1]))
    assert accuracy_section(found)["is_summed"]
    told = accuracy_table(found).headings
    assert told[2] == "mean of 4 tasks"
    assert told[-2:] == ["law (10)", "art (10)"]


def test_a_task_of_a_group_that_few_were_asked_stays_in_the_mean(study, values):
    for run in RUNS:
        answer(study, run, "law", 0.3, summed_by="subjects" if run == RUNS[0] else None)
    answer(study, RUNS[0], "subjects", 0.1)
    assert judged(study).accuracies.in_mean == (*ASKED, "law")


def test_of_a_task_whose_file_was_mended_the_answers_to_the_new_one_count(study, values):
    """Those to the old one did, without a word: both have as many runs and questions."""
    for run in RUNS:
        answer(study, run, "sciq", 0.25, version="2-mended")
    assert set(load_results(study).tasks.filter(task="sciq")["value"]) == {0.25}


def test_a_task_tried_on_one_run_and_a_number_that_is_none_leave_the_others_alone(study, values):
    before = judged(study).accuracies
    answer(study, RUNS[0], "piqa", 0.5)
    answer(study, RUNS[4], "odd", math.nan, metric="bleu")
    answer(study, RUNS[4], "fables", 9.0, metric="bits_per_byte")  # a task that is called as a text
    after = judged(study)
    assert after.accuracies.in_mean == before.in_mean == tuple(ASKED)
    assert after.accuracies.gains == before.gains
    assert after.results.problems == ()
    assert after.results.scores.filter(run=RUNS[4], domain="fables", version="2-x").is_empty()


def test_a_study_that_was_asked_nothing_has_no_table(study):
    found = judged(study)
    assert accuracy_table(found).rows == []
    assert tables_of(found)["accuracy"].is_empty()
    assert open_study(study).accuracy.is_empty()


def test_answers_from_before_a_run_was_extended_are_not_its_own(study, values):
    path = study / "runs" / RUNS[3] / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps(row | ({"step": 900} if row["role"] == "downstream" else {})) + "\n" for row in rows
        )
    )
    assert load_results(study).tasks.filter(pl.col("run") == RUNS[3]).is_empty()


def test_seeds_that_agree_by_chance_are_not_certain(study):
    """Of few questions several seeds can gain just as many; what whole questions hide stays uncertain."""
    for run in RUNS[:3]:
        answer(study, run, "sciq", 0.20)
    for run in RUNS[3:6]:
        answer(study, run, "sciq", 0.22)
    found = judged(study)
    gain = found.accuracies.gains[cell_of(found, "weak"), "sciq"].gain
    half = stats.t.ppf(0.975, 2) * (1 / 12**0.5) / 3**0.5  # a question of 100 is a point
    assert [gain.mean, gain.low, gain.high] == pytest.approx([2.0, 2.0 - half, 2.0 + half])


def test_a_task_that_is_called_mean_is_a_task(study, values):
    for run in RUNS[:6]:
        answer(study, run, "mean", 0.9 if run.startswith("student") else 0.1)
    found = judged(study)
    cell = cell_of(found, "weak")
    assert found.accuracies.gains[cell, "mean"].gain.mean == pytest.approx(80)
    assert found.accuracies.gains[cell, MEAN].gain.n == 3


def test_the_mean_alone_is_coloured(study):
    """Of many tasks some would be coloured by chance."""
    for run in RUNS[:6]:
        for task in ("sciq", "hellaswag"):
            answer(study, run, task, 0.9 if run.startswith("student") else 0.1)
    (row,) = accuracy_table(judged(study)).rows
    assert [row[2].effect, *(cell.effect for cell in row[4:])] == ["helps", "unclear", "unclear"]
