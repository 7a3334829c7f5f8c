"""Claims that need token comparisons, probes, or teachers of a student's own batches."""

import json
import math
from dataclasses import asdict

import polars as pl
import pytest
from scipy import stats
from synthetic_study import TEACHERS, TOKENS, write_study
from token_files import FACTS
from token_files import write as write_comparison

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.claims.registry import missing_of
from tutelage.analysis.report.accuracy_rows import recall_table
from tutelage.study.plan import load_plan, save_plan
from tutelage.study.results import load_results
from tutelage.types import Score

CONTRASTS = {43: 0.30, 44: 0.32, 45: 0.31}


def outcome(study, number):
    results = load_results(study)
    assert results.problems == ()
    return judge_study(results).claims[number - 1]


def write_contrasts(study, sorters):
    """One token comparison per seed, of the student at alpha 0.4, sorted by `sorters[seed]`."""
    for seed, contrast in CONTRASTS.items():
        folder = study / "token-comparisons" / f"seed-{seed}" / "speeches-test-1"
        folder.mkdir(parents=True)
        write_comparison(folder)
        ids = {"student": f"student-weak-0.4-{seed}", "baseline": f"baseline-{seed}"}
        ids |= {"sorter": sorters[seed]} if sorters[seed] else {}
        (folder / "comparison.json").write_text(json.dumps(FACTS | ids))
        wanted = (pl.col("grouping") == "entropy contrast") & (pl.col("quantity") == "gain")
        cells = pl.read_parquet(folder / "summary.parquet")
        mean = pl.when(wanted).then(contrast).otherwise("mean").alias("mean")
        cells.with_columns(mean).write_parquet(folder / "summary.parquet")


def test_the_gain_by_difficulty_comes_from_token_comparisons(tmp_path):
    study = write_study(tmp_path / "study")
    assert "eval tokens --sorter" in outcome(study, 8).open

    write_contrasts(study, {43: "baseline-44", 44: "baseline-45", 45: "baseline-43"})
    found = outcome(study, 8)

    assert found.answer == "supported"
    assert found.tests[0].test.values == pytest.approx(CONTRASTS)


def test_a_comparison_without_a_hardest_fifth_says_nothing_of_difficulty(tmp_path):
    """Of a text whose tokens are all as hard; the report ended with "can only call '.item()'"."""
    study = write_study(tmp_path / "study")
    write_contrasts(study, {43: "baseline-44", 44: "baseline-45", 45: "baseline-43"})
    summary = study / "token-comparisons" / "seed-43" / "speeches-test-1" / "summary.parquet"
    pl.read_parquet(summary).filter(pl.col("grouping") != "entropy contrast").write_parquet(summary)

    assert outcome(study, 8).tests[0].test.values == pytest.approx({44: 0.32, 45: 0.31})


@pytest.mark.parametrize("sorter", [None, "baseline-{}", "student-weak-0.2-{}", "teacher-weak-42"])
def test_tokens_that_no_third_untaught_student_sorted_are_no_evidence(tmp_path, sorter):
    study = write_study(tmp_path / "study")
    write_contrasts(study, {seed: sorter and sorter.format(seed) for seed in CONTRASTS})

    assert outcome(study, 8).tests[0].test.members == {}


def test_a_token_comparison_of_another_baseline_is_no_evidence(tmp_path):
    study = write_study(tmp_path / "study")
    folder = study / "token-comparisons" / "x" / "speeches-test-1"
    folder.mkdir(parents=True)
    write_comparison(folder)
    ids = {"student": "student-weak-0.4-43", "baseline": "baseline-44", "sorter": "baseline-45"}
    (folder / "comparison.json").write_text(json.dumps(FACTS | ids))

    assert outcome(study, 8).tests[0].test.values == {}


def test_copying_is_judged_by_what_the_probes_added_to_the_scores(tmp_path):
    gains = {("weak", 1.0): (-1.0, 1.0), ("strong", 1.0): (1.0, 1.0)}  # nobody probes the second
    study = write_study(tmp_path / "study", gains=gains)
    assert "eval probe" in outcome(study, 17).open

    for seed in (43, 44, 45):
        for run, accuracy in ((f"baseline-{seed}", 0.5), (f"student-weak-1.0-{seed}", 0.4 + seed / 1000)):
            score = Score(
                run=run, step=1953, tokens=TOKENS, domain="copying", role="probe", split="test",
                metric="accuracy", value=accuracy, stderr=0.01, n=64, higher_is_better=True, version="2-1",
            )  # fmt: skip
            with (study / "runs" / run / "scores.jsonl").open("a") as file:
                file.write(json.dumps(asdict(score)) + "\n")
    found = outcome(study, 17)

    assert found.answer == "supported"
    assert found.tests[0].effect.mean == pytest.approx(-5.6)  # points: 100 (.444 - .5)
    assert list(found.tests[0].test.members) == ["tiny 2M from weak, alpha 1"]


def test_recall_is_compared_where_the_same_questions_were_asked(tmp_path):
    study = write_study(tmp_path / "study")
    for seed in (43, 44, 45):
        for run, accuracy in ((f"baseline-{seed}", 0.5), (f"student-weak-0.4-{seed}", 0.4 + seed / 1000)):
            for name in ("0", "10+"):
                other = seed == 45 and accuracy != 0.5 and name == "10+"  # of another data order
                score = Score(
                    run=run, step=1953, tokens=TOKENS, domain="recall", role="probe", split="test",
                    metric=f"accuracy_{name}", value=accuracy, stderr=0.01, n=200, higher_is_better=True,
                    version="2-2" if other else "2-1",
                )  # fmt: skip
                with (study / "runs" / run / "scores.jsonl").open("a") as file:
                    file.write(json.dumps(asdict(score)) + "\n")
    table = recall_table(judge_study(load_results(study)))

    assert table.headings == ["pair", "alpha", "not read", "read 10 times or more"]
    ((pair, alpha, unread, often),) = table.rows
    assert (pair, alpha, unread.text, often.text) == ("tiny 2M from weak", "0.4", "-5.6", "-5.7")
    assert unread.value.mean == pytest.approx(-5.6)  # points: 100 (.444 - .5)
    assert often.value.mean == pytest.approx(-5.65)
    assert "(n = 3); alone 50.0%" in unread.note
    assert "(n = 2); alone 50.0%" in often.note


def test_seeds_that_agree_on_recall_are_as_unsure_as_whole_questions_are(tmp_path):
    """With two of 40 questions right more in each seed, so far +5.0, from +5.0 to +5.0."""
    study = write_study(tmp_path / "study")
    for seed in (43, 44, 45):
        rows = [(f"baseline-{seed}", 0.5, 40), (f"student-weak-0.4-{seed}", 0.55, 40)]
        for run, accuracy, n in [*rows, (f"student-weak-0.2-{seed}", 0.5, 20)]:  # of another cell
            score = Score(
                run=run, step=1953, tokens=TOKENS, domain="recall", role="probe", split="test",
                metric="accuracy_1", value=accuracy, stderr=0.01, n=n, higher_is_better=True, version="2-1",
            )  # fmt: skip
            with (study / "runs" / run / "scores.jsonl").open("a") as file:
                file.write(json.dumps(asdict(score)) + "\n")
    ((_, _, once),) = recall_table(judge_study(load_results(study))).rows

    half = stats.t.ppf(0.975, 2) * 2.5 / math.sqrt(12) / math.sqrt(3)
    assert (once.value.low, once.value.high) == (pytest.approx(5 - half), pytest.approx(5 + half))


def test_teachers_of_a_students_own_batches_count_for_that_student_alone(tmp_path):
    own = {f"own-{seed}": (1.7, 130_000, TOKENS) for seed in (43, 44, 45)}
    gains = {(name, alpha): (0.0, 2.0 + alpha) for name in own for alpha in (0.2, 0.4)}
    study = write_study(tmp_path / "study", gains=gains, teachers=own)
    plan = load_plan(study)
    assert missing_of(plan)[20] == "no runs with a teacher of a student's own batches"

    teachers = [t.model_copy(update={"data_seed": int(t.name.removeprefix("own-"))}) for t in plan.teachers]
    save_plan(study, plan.model_copy(update={"teachers": tuple(teachers)}))
    found = outcome(study, 20)

    assert 20 not in missing_of(load_plan(study))
    assert found.answer == "supported"
    # alpha 0.4 on fables, a point more on recipes, and the noise of each seed but 43, which chose the alpha
    assert found.tests[0].test.values == pytest.approx({44: 3.0, 45: 2.8})


def test_a_teacher_of_another_corpus_counts_for_its_own_claim_alone(tmp_path):
    teachers = {"weak": TEACHERS["weak"], "foreign": (1.9, 130_000, TOKENS)}
    gains = {("weak", alpha): (0.0, 1.0) for alpha in (0.2, 0.4)}
    gains |= {("foreign", 0.2): (-3.0, 6.0)}
    study = write_study(tmp_path / "study", gains=gains, teachers=teachers)
    plan = load_plan(study)

    def with_foreign(**fields):
        of = [t.model_copy(update=fields if t.name == "foreign" else {}) for t in plan.teachers]
        save_plan(study, plan.model_copy(update={"teachers": tuple(of)}))

    with_foreign(corpus="plays")
    # recipes gain a point more; seeds 44 and 45 are tested, 43 chose the alpha
    assert outcome(study, 1).tests[0].effect.mean == pytest.approx(1.5)
    assert outcome(study, 21).tests[0].effect.mean == pytest.approx(6.5)

    with_foreign(corpus="plays", texts=("recipes",))
    assert outcome(study, 21).tests[0].effect.mean == pytest.approx(6.0)  # on fables alone


def test_students_with_other_settings_do_not_hide_the_gain_by_tokens(tmp_path):
    gains = {("tiny 2M", "weak", alpha): (0.0, 1.0) for alpha in (0.2, 0.4)}
    gains |= {("tiny 1M", "weak", alpha): (0.0, 3.0) for alpha in (0.2, 0.4)}
    gains |= {("tiny 2M lr 0.1", "weak", 0.6): (0.0, 9.0)}
    sizes = {"tiny 1M": (380_000, 1_000_000), "tiny 2M lr 0.1": (380_000, 2_000_000)}
    study = write_study(tmp_path / "study", gains=gains, sizes=sizes)

    assert outcome(study, 12).primary == "unigram"
    assert outcome(study, 12).other[0].effect.mean == pytest.approx(-2.0)  # raw, per doubling
    assert outcome(study, 12).tests[0].effect.mean == pytest.approx(-1.0)  # half is left when fitted
