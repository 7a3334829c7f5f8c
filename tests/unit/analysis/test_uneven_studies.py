"""Studies in which runs differ in seeds, texts or documents: what is compared is compared alike."""

import io
import json
import shutil

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from synthetic_study import STUDENT, bits_per_byte, run_row, write_evaluation, write_run, write_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.gains import document_draws
from tutelage.analysis.report.headline import headline, notes
from tutelage.analysis.report.html import build_report
from tutelage.analysis.report.report_rows import policy_tables, short_verdicts
from tutelage.analysis.report.text import print_verdicts
from tutelage.analysis.tables import equal_compute
from tutelage.analysis.words import interval_name
from tutelage.errors import UserError
from tutelage.records import read_sealed, write_sealed
from tutelage.study.plan import Plan, load_plan, save_plan
from tutelage.study.results import load_results

TEXTS = {"speeches": 1.65, "fables": 3.2, "recipes": 3.6}


def reported(path):
    """Judge a study, print it and write its page; return what was judged."""
    judged = judge_study(load_results(path))
    print_verdicts(judged, Console(file=io.StringIO()))
    build_report(judged, path)
    return judged


def lose(run, domain, documents=None):
    """Leave out documents of a text as scoring does where they were trained on; None: all of them."""
    frame = pl.read_parquet(run / "documents.parquet")
    lost = (pl.col("domain") == domain) & (True if documents is None else pl.col("document") >= documents)
    kept = frame.filter(~lost)
    kept.write_parquet(run / "documents.parquet")
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["domain"] != domain]
    for split in ("validation", "test"):
        own = kept.filter(domain=domain, split=split)
        of = {row["metric"]: row for row in rows if (row["domain"], row["split"]) == (domain, split)}
        for metric, row in of.items():
            losses = metric.replace("bits_per_byte", "nll")
            if metric.startswith("bits") and own.height:
                value = own[losses].sum() / np.log(2) / own["bytes"].sum()
                found.append(row | {"value": value, "n": own.height})
        share = 1 - own.height / frame.filter(domain=domain, split=split).height
        found.append(of["bits_per_byte"] | {"metric": "overlap_documents", "value": share})
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_an_arm_of_one_seed_is_best_only_beside_others_of_one_seed(tmp_path):
    study = write_study(tmp_path / "study")
    for seed in (44, 45):
        shutil.rmtree(study / "runs" / f"student-weak-0.4-{seed}")
    weak = next(pair for pair in reported(study).findings.pairs if pair.teacher.name == "weak")
    assert (weak.best.arm, weak.best.n_seeds, weak.flat) == ("alpha 0.2", 3, (0.2,))

    for seed in (44, 45):
        shutil.rmtree(study / "runs" / f"student-weak-0.2-{seed}")
    weak = next(pair for pair in reported(study).findings.pairs if pair.teacher.name == "weak")
    assert (weak.best.arm, weak.best.n_seeds, weak.flat) == ("alpha 0.4", 1, ())


def test_a_text_that_students_were_trained_on_is_left_to_teachers_of_another_corpus(tmp_path):
    study = write_study(tmp_path / "study")
    for run in (study / "runs").iterdir():
        if not run.name.startswith("teacher"):
            lose(run, "fables")
    judged = reported(study)
    verdict = next(one for one in judged.findings.verdicts if (one.teacher, one.alpha) == ("weak", 0.4))
    assert verdict.out_of_domain.mean == pytest.approx(3.8)  # of recipes alone
    noise = verdict.noise["raw", "out_of_domain"]
    assert noise.mean == pytest.approx(3.8)
    assert noise.low < noise.mean < noise.high


def test_a_study_whose_own_text_was_all_trained_on_is_refused_in_a_line(tmp_path):
    study = write_study(tmp_path / "study")
    for run in (study / "runs").iterdir():
        if not run.name.startswith("teacher"):
            lose(run, "speeches")
    with pytest.raises(UserError, match="every test document of speeches was trained on, so nothing in dom"):
        load_results(study)


def tuned(study, stage="answers"):
    """Add a stage after every run at alpha .4 of the weak teacher and its baseline, trained on fables."""
    plan = read_sealed(study / "plan.json")
    for seed in (43, 44, 45):
        for kind, teacher, arm in (("baseline", None, None), ("student", "weak", 0.4)):
            row = run_row(kind, STUDENT, teacher, arm, seed, (380_000, 2_000_000))
            after = row | {"kind": "after", "stage": stage, "after": row["run"], "run": f"{row['run']}-tuned"}
            after["baseline"] = f"baseline-{seed}-tuned" if teacher else None
            plan["runs"].append(after)
            run, gain = study / "runs" / after["run"], (0.5, 2.0) if teacher else None

            def bits(domain, split, fit, row=row, gain=gain):
                return bits_per_byte(row, None, gain, 0.0, TEXTS, domain, split, fit)

            write_run(run, after, TEXTS, 20)
            write_evaluation(run, teacher, TEXTS, bits, 20)
            lose(run, "fables", documents=10)
            inside = [
                row | ({"role": "in_domain"} if row["domain"] == "fables" else {})
                for row in map(json.loads, (run / "scores.jsonl").read_text().splitlines())
            ]
            (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in inside))
    write_sealed(study / "plan.json", plan)


def test_noise_of_a_stage_that_lacks_documents_is_of_those_that_it_has(tmp_path):
    study = write_study(tmp_path / "study")
    tuned(study)
    judged = reported(study)
    (later,) = (one for one in judged.findings.verdicts if one.stage is not None)
    found = later.noise["raw", "out_of_domain"]
    assert found.mean == pytest.approx(later.out_of_domain.mean, rel=1e-12)
    assert found.n == 10 + 20

    drawn = []  # by its definition, a draw after the other
    for seed in (43, 44, 45):
        gains = []
        for text, documents in (("fables", 10), ("recipes", 20)):
            taught, alone = (
                pl.read_parquet(study / "runs" / name / "documents.parquet")
                .filter(domain=text, split="test")
                .sort("document")["nll"]
                for name in (f"student-weak-0.4-{seed}-tuned", f"baseline-{seed}-tuned")
            )
            assert len(taught) == documents
            draws = document_draws(documents, np.random.default_rng([*text.encode()])).T
            gains.append([100 * (1 - (taught * draw).sum() / (alone * draw).sum()) for draw in draws])
        drawn.append(np.mean(gains, axis=0))
    ends = np.quantile(np.mean(drawn, axis=0)[1:], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(ends)


def test_what_a_stage_alone_was_trained_on_is_said_of_the_stage(tmp_path):
    """Students before it are scored on all documents of the text, and were trained on none of its kind."""
    study = write_study(tmp_path / "study")
    tuned(study)
    assert [line for line in load_results(study).warnings if line.startswith("fables")] == [
        *(
            f"fables, then answers: 50.0% of its {split} documents were trained on; they are left out"
            for split in ("validation", "test")
        ),
        "fables, then answers: counts as out of domain, but answers trains on text of its kind",
    ]


def test_a_text_that_a_stage_leaves_nothing_to_fit_on_is_said_to_be_in_no_fitted_mean(tmp_path):
    """All its validation documents were trained on: raw means are of two texts, fitted ones of one."""
    study = write_study(tmp_path / "study")
    tuned(study)
    before = load_results(study).warnings
    for scores in (study / "runs").glob("*-tuned/scores.jsonl"):
        rows = map(json.loads, scores.read_text().splitlines())
        kept = [row for row in rows if row["domain"] != "fables" or "bits_per_byte_" not in row["metric"]]
        scores.write_text("".join(json.dumps(row) + "\n" for row in kept))
    (told,) = (line for line in load_results(study).warnings if line not in before)
    assert told == (
        "fables, then answers: no validation documents are left to fit calibration on, so it counts in raw "
        "gains and in no fitted ones, whose means are of fewer texts"
    )


def test_where_only_stages_can_be_compared_the_report_says_so(tmp_path):
    """The untaught students are lost, and what followed them is not: this was a traceback."""
    study = write_study(tmp_path / "study")
    tuned(study)
    for seed in (43, 44, 45):
        shutil.rmtree(study / "runs" / f"baseline-{seed}")
    judged = reported(study)
    assert {verdict.stage for verdict in judged.findings.verdicts} == {"answers"}
    (answer,) = headline(judged.findings, judged.claims)
    assert answer.startswith("Not judged: no student of a real teacher is finished together with")


def test_without_a_constant_alpha_nothing_is_called_the_best_constant(tmp_path):
    gains = {
        ("weak", "linear start 0.8 end 0.0"): (1.0, 2.0),
        ("weak", "salt value 0.8 until 0.3"): (2.0, 1.0),
        ("strong", 0.2): (1.0, 2.0),
        ("strong", "salt value 0.8 until 0.3"): (2.0, 1.0),
    }
    weak, strong = policy_tables(judge_study(load_results(write_study(tmp_path / "study", gains=gains))))
    shown = [[[cell.text for _, cell in row] for row in table.shown] for table in (weak, strong)]
    assert [row[0] for row in shown[0]] == ["linear start 0.8 end 0.0", "salt value 0.8 until 0.3"]
    assert [row[0] for row in shown[1]] == ["0.2 (best constant)", "salt value 0.8 until 0.3"]
    assert [row["ahead"] for row in weak.records()] == [None, None]
    assert strong.records()[1]["ahead"] == pytest.approx(-1)


def test_what_a_student_of_cached_targets_costs_says_what_is_not_in_it(tmp_path):
    """The same teacher was 2.69 times the student live, and 1.00 times from a cache that cost 28 students."""
    path = write_study(tmp_path / "study")
    plan = load_plan(path)
    teachers = [one.model_copy(update={"targets": "topk"}) for one in plan.teachers if one.name == "weak"]
    others = [one for one in plan.teachers if one.name != "weak"]
    save_plan(path, plan.model_copy(update={"teachers": (*teachers, *others)}))
    judged = judge_study(load_results(path))
    (cost,) = [note for note in notes(judged.results, judged.findings) if "equal compute" in note]
    assert cost.endswith("not counted; nor are the forward passes that made the cached targets of weak.")
    assert "mean over students" not in cost


def test_an_untaught_arm_is_a_control_but_none_of_smoothing(tmp_path):
    gains = {("weak", 0.4): (-0.6, 2.0), (None, "compute of weak"): (1.0, 1.0)}
    judged = reported(write_study(tmp_path / "study", gains=gains))
    found = judged.findings

    assert {verdict.teacher: verdict.control for verdict in found.verdicts} == {"weak": False, None: True}
    shown = {row[0]: row[1] for row in short_verdicts(found, "gains").rows}
    assert shown == {"weak": "weaker", "no teacher": ""}  # not "not measured": there is none to measure
    assert any(note.startswith("No comparison with a control") for note in notes(judged.results, found))


@pytest.mark.parametrize(
    ("teacher_seeds", "lost", "expected"),
    [
        ([42, 142, 242], [], (3, 3, "t, 3 seeds, a teacher each")),
        ([42, 142, 242], [45], (2, 2, "t, 2 seeds, a teacher each")),
        ([42, 142, 242], [44, 45], (1, 1, "none, 1 seed")),
        ([42], [45], (2, 1, "t, 2 seeds, one teacher")),
    ],
)
def test_a_mean_has_as_many_teachers_as_seeds_that_are_there(tmp_path, teacher_seeds, lost, expected):
    gains = {("weak", 0.4): (-0.6, 2.0), ("both", 0.4): (1.0, 1.0)}
    study = write_study(tmp_path / "study", gains=gains)
    plan = json.loads(load_plan(study).model_dump_json())
    once = next(run for run in plan["runs"] if run["kind"] == "teacher")
    plan["runs"] += [once | {"run": f"weak-s{seed}", "seed": seed} for seed in teacher_seeds[1:]]
    mean = next(teacher for teacher in plan["teachers"] if teacher["name"] == "both")
    mean["of"] = ["weak"]
    save_plan(study, Plan.model_validate_json(json.dumps(plan)))
    for seed in lost:
        shutil.rmtree(study / "runs" / f"student-both-0.4-{seed}")

    verdict = next(v for v in reported(study).findings.verdicts if v.teacher == "both")
    assert (verdict.n_seeds, verdict.n_teachers, interval_name(verdict)) == expected


@pytest.mark.parametrize(
    ("arm", "forward", "led"),
    [(0.4, 0.25, True), ("salt value 0.8 until 0.3", 0.075, False), ("salt value 0.8 until 0.3", 0.0, True)],
    ids=["beside every step", "beside three steps in ten", "cached"],
)
def test_a_teacher_that_ran_in_part_is_not_led_by_the_compute_of_a_whole_one(tmp_path, arm, forward, led):
    gains = {("weak", arm): (1.0, 2.0), (None, "compute of weak"): (1.0, 1.0)}
    study = write_study(tmp_path / "study", gains=gains)
    for state in (study / "runs").glob("student-*/state.json"):
        found = json.loads(state.read_text())
        matched, train = "compute" in state.parent.name, found["train_flops"]
        costs = {"train_flops": 1.25 * train, "teacher_flops": 0.0} if matched else {}
        state.write_text(json.dumps(found | {"teacher_flops": forward * train} | costs))
    (one,) = equal_compute(reported(study))
    assert one.cost == pytest.approx(1 + forward)
    assert (one.matched is not None) == led
    assert (one.lead["out_of_domain"] is not None) == led
