import json
import shutil

import polars as pl
import polars.selectors as cs
import pytest
from synthetic_study import write_study

from tutelage.errors import UserError
from tutelage.records import read_sealed, write_sealed
from tutelage.study.plan import load_plan, save_plan
from tutelage.study.results import load_results
from tutelage.types import SCORING_VERSION

RUN = "student-weak-0.2-44"
OTHER = {"version": f"{SCORING_VERSION}-2"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("pristine") / "study")


@pytest.fixture
def study(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "study")


def edit_lines(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_whole_study_loads_without_a_problem(study):
    results = load_results(study)

    assert results.problems == ()
    assert results.unfinished.is_empty()
    assert results.runs.height == 2 + 3 + 5 * 3
    assert results.scores.height == 20 * 3 * (2 + 6)  # runs, domains, metrics of validation and of test
    assert results.documents.height == 20 * 3 * 2 * 20
    assert set(results.provenance) == set(results.runs["run"])
    assert results.curves.filter(run=RUN).height == 199


def test_a_plan_survives_writing_and_reading(study, tmp_path):
    plan = load_plan(study)
    save_plan(tmp_path, plan)

    assert load_plan(tmp_path) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == 3


def test_no_plan_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no study is here, (.*); `tutelage study run FILE"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema = 1: of another version, this one reads 3"),
        ({"in_domain": "fables"}, "in_domain is 'fables'"),
        (
            {"domains": [{"name": "speeches", "role": "in_domain"}]},
            "at least one must have the role out_of_domain",
        ),
        ({"teachers": []}, r"teachers that are not in 'teachers': \['strong', 'unigram', 'weak'\]"),
        ({"colour": "red"}, "colour: unknown setting"),
    ],
)
def test_a_wrong_plan_is_a_user_error(study, change, message):
    write_sealed(study / "plan.json", read_sealed(study / "plan.json") | change)

    with pytest.raises(UserError, match=message):
        load_plan(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "baseline"}, "has neither arm nor baseline"),
        ({"student": None}, "every run but a teacher's has a student"),
        ({"arm_settings": None}, "needs an arm and a baseline"),
        ({"baseline": "baseline-46"}, "its baseline is not among the runs"),
        ({"kind": "after"}, "stage and after belong to"),
        ({"run": "baseline-43"}, "the same run appears twice"),
        ({"seed": 43}, "the same cell appears twice"),
    ],
)
def test_a_wrong_run_in_the_plan_is_a_user_error(study, change, message):
    plan = read_sealed(study / "plan.json")
    row = next(row for row in plan["runs"] if row["run"] == RUN)
    row |= change
    write_sealed(study / "plan.json", plan)

    with pytest.raises(UserError, match=message):
        load_plan(study)


def edit_state_version(path, version):
    state = json.loads(path.read_text())
    state["evaluations"]["e1"] = dict.fromkeys(state["evaluations"]["e1"], version)
    path.write_text(json.dumps(state))


def break_line(path):
    path.write_text(path.read_text().replace('"value"', '"va', 1))


def drop_domain(path):
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(row for row in rows if "fables" not in row))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("scores.jsonl", break_line, "scores.jsonl, line 1"),
        ("scores.jsonl", drop_domain, r"no bits_per_byte of fables \(validation\)"),
        ("scores.jsonl", lambda p: p.unlink(), "scores.jsonl: no such file"),
        ("scores.jsonl", lambda p: p.write_text(""), "scores.jsonl: empty"),
        ("scores.jsonl", lambda p: p.write_bytes(b"\xff\xfe"), "scores.jsonl: .*utf-8"),
        ("scores.jsonl", lambda p: edit_lines(p, lambda r: r | {"value": float("nan")}), "the value is nan"),
        ("scores.jsonl", lambda p: edit_lines(p, lambda r: r | {"value": "1.2"}), "line 1: value"),
        ("scores.jsonl", lambda p: edit_lines(p, lambda r: r | {"run": "other"}), "belongs to run other"),
        ("scores.jsonl", lambda p: edit_lines(p, lambda r: r | {"value": 2.0}), "documents.parquet says"),
        ("scores.jsonl", lambda p: edit_lines(p, lambda r: r | OTHER), "no bits_per_byte of"),
        ("state.json", lambda p: edit_state_version(p, "v2"), "no bits_per_byte of speeches"),
        ("documents.parquet", lambda p: p.unlink(), "documents.parquet: no such file"),
        ("documents.parquet", lambda p: p.write_bytes(p.read_bytes()[:-20]), "documents.parquet: "),
        ("documents.parquet", lambda p: pl.read_parquet(p).drop("nll").write_parquet(p), "parquet: .*nll"),
        (
            "documents.parquet",
            lambda p: pl.concat([pl.read_parquet(p)] * 2).write_parquet(p),
            "a document appears twice",
        ),
        (
            "documents.parquet",
            lambda p: pl.read_parquet(p).with_columns(nll=float("nan")).write_parquet(p),
            "not finite",
        ),
        (
            "documents.parquet",
            lambda p: pl.read_parquet(p).filter(pl.col("domain") != "recipes").write_parquet(p),
            "no documents of recipes",
        ),
    ],
)  # fmt: skip
def test_a_damaged_evaluation_is_reported_and_left_out_whole(study, name, damage, message):
    damage(study / "runs" / RUN / name)

    results = load_results(study)

    assert len(results.problems) == 1
    assert results.problems[0].startswith(f"{RUN}: ")
    assert pl.Series([results.problems[0]]).str.contains(message).item()
    assert RUN not in results.scores["run"]
    assert RUN not in results.documents["run"]
    assert results.runs.filter(run=RUN)["status"].item() == "done"
    assert results.scores["run"].n_unique() == 19


def test_a_run_scored_again_counts_with_its_latest_rows(study):
    path = study / "runs" / RUN / "scores.jsonl"
    old = [json.loads(line) | OTHER | {"value": 9.9} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in old) + path.read_text())

    results = load_results(study)

    assert results.problems == ()
    assert results.scores.filter(run=RUN, metric="bits_per_byte")["value"].max() < 5


def test_scores_of_an_older_scoring_are_named_and_left_out(study):
    path = study / "runs" / RUN / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    old = [row | {"value": 9.9, "version": "1a2b3c4d"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *old)))
    assert load_results(study).problems == ()
    assert load_results(study).scores.filter(run=RUN, metric="bits_per_byte")["value"].max() < 5

    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    (problem,) = load_results(study).problems
    assert problem.startswith(
        f"{RUN}: scores.jsonl: all scores are by scoring version 1, this is version 2; "
    )
    assert RUN not in load_results(study).scores["run"]


def test_scores_from_the_middle_of_a_run_do_not_count(study):
    path = study / "runs" / RUN / "scores.jsonl"
    early = [json.loads(line) | {"value": 9.9, "step": 100} for line in path.read_text().splitlines()]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in early))

    results = load_results(study)

    assert results.problems == ()
    assert results.scores.filter(run=RUN, metric="bits_per_byte")["value"].max() < 5


def test_a_run_without_fitted_scores_among_runs_that_have_them_is_left_out(study):
    path = study / "runs" / RUN / "scores.jsonl"
    path.write_text(
        "".join(row for row in path.read_text().splitlines(keepends=True) if "_unigram" not in row)
    )

    assert "other text or settings" in load_results(study).problems[0]


def test_a_study_without_fitted_scores_loads(study):
    for path in (study / "runs").iterdir():
        rows = (path / "scores.jsonl").read_text().splitlines(keepends=True)
        (path / "scores.jsonl").write_text("".join(row for row in rows if "byte_" not in row))
        documents = pl.read_parquet(path / "documents.parquet").select(~cs.starts_with("nll_"))
        documents.write_parquet(path / "documents.parquet")

    results = load_results(study)

    assert results.problems == ()
    assert results.documents["nll_unigram"].null_count() == results.documents.height


def test_many_damaged_runs_are_each_told_apart(study):
    runs = sorted((study / "runs").iterdir())
    (runs[0] / "documents.parquet").write_bytes(b"PAR1")
    (runs[1] / "documents.parquet").unlink()
    fitted = pl.read_parquet(runs[2] / "documents.parquet").with_columns(
        nll_unigram=pl.col("nll_unigram") * 2
    )
    fitted.write_parquet(runs[2] / "documents.parquet")

    problems = load_results(study).problems

    assert [problem.split(":")[0] for problem in sorted(problems)] == [run.name for run in runs[:3]]
    assert "bits_per_byte_unigram" in sorted(problems)[2]


def test_a_damaged_curve_leaves_the_scores_alone(study):
    path = study / "runs" / RUN / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])

    results = load_results(study)

    assert results.problems[0].startswith(f"{RUN}: metrics.jsonl, line 199")
    assert RUN not in results.curves["run"]
    assert RUN in results.scores["run"]


def test_a_damaged_provenance_is_reported(study):
    (study / "runs" / RUN / "provenance.json").write_text("{}")

    results = load_results(study)

    assert results.problems == (f"{RUN}: provenance.json: time: Field required",)
    assert RUN not in results.provenance


def test_runs_that_are_not_done_are_listed_and_not_counted(study):
    edit_json(study / "runs" / RUN / "state.json", status="failed", error="loss is not finite")
    edit_json(study / "runs" / "baseline-45" / "state.json", status="running")
    shutil.rmtree(study / "runs" / "baseline-44")
    (study / "runs" / "teacher-weak-42" / "state.json").write_text("{")

    results = load_results(study)

    listed = dict(results.unfinished.select("run", "status").iter_rows())
    assert listed == {
        RUN: "failed",
        "baseline-45": "running",
        "baseline-44": "not started",
        "teacher-weak-42": "unreadable",
    }
    assert results.unfinished.filter(run=RUN)["error"].item() == "loss is not finite"
    assert not set(listed) & set(results.scores["run"])
    assert results.problems[0].startswith("teacher-weak-42: state.json: ")


@pytest.mark.parametrize("lost", ["state.json", "scores.jsonl", "model"])
def test_what_is_lost_of_a_run_that_was_done_is_named(study, lost):
    run = study / "runs" / RUN
    for part in ("model", "checkpoints/step-1953"):
        (run / part).mkdir(parents=True)
        (run / part / "config.json").write_text("{}")
    edit_json(run / "state.json", step=1953)
    assert load_results(study).problems == ()

    shutil.rmtree(run / lost) if lost == "model" else (run / lost).unlink()
    results = load_results(study)

    assert len(results.problems) == 1
    assert results.problems[0].startswith(f"{RUN}: {lost}: ")
    status = "unreadable" if lost == "state.json" else "stopped"
    assert results.unfinished.select("run", "status").rows() == [(RUN, status)]


def test_a_run_of_a_cohort_has_its_share_of_the_seconds(study):
    """Six that took turns looked ten times slower than one alone, in the table of what a run costs."""
    edit_json(study / "runs" / RUN / "state.json", cohort=5, seconds=600.0, tokens_per_second=1000.0)
    edit_json(study / "runs" / "student-weak-0.2-43" / "state.json", cohort=1)

    runs = load_results(study).runs.rows_by_key("run", named=True, unique=True)

    assert (runs[RUN]["seconds"], runs[RUN]["tokens_per_second"]) == (120.0, 5000.0)
    assert (runs["student-weak-0.2-43"]["seconds"], runs["student-weak-0.2-45"]["seconds"]) == (100.0, 100.0)


def test_a_done_run_without_its_ledger_is_unreadable(study):
    (study / "runs" / RUN / "state.json").write_text('{"status": "done"}')

    results = load_results(study)

    assert results.unfinished["run"].to_list() == [RUN]
    assert results.problems == (f"{RUN}: state.json: tokens: Field required",)


def test_a_stage_may_come_after_more_than_a_hundred_runs_without_one(tmp_path):
    study = write_study(
        tmp_path / "study", range(43, 98), gains={("weak", 0.2): (0.0, 1.0)}, documents=2, points=2
    )
    plan = read_sealed(study / "plan.json")
    stage = {"run": "late", "kind": "after", "stage": "answers", "after": "baseline-43", "baseline": None}
    plan["runs"].append(plan["runs"][1] | stage)
    write_sealed(study / "plan.json", plan)

    assert load_results(study).unfinished["run"].to_list() == ["late"]
