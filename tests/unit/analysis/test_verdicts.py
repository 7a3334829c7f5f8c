import json
import math
import re
import shutil
from dataclasses import replace

import polars as pl
import pytest
from rich.console import Console
from synthetic_study import write_study

from tutelage.analysis import words
from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report import headline
from tutelage.analysis.report.claim_rows import answer_table
from tutelage.analysis.report.headline import supported
from tutelage.analysis.report.html import build_report
from tutelage.analysis.report.text import print_verdicts
from tutelage.analysis.stats import Estimate
from tutelage.analysis.verdicts import Verdict, judge, nominal, relation
from tutelage.errors import UserError
from tutelage.files import short
from tutelage.study.results import load_results

HALF = 4.302653 * 0.1 / math.sqrt(3)
"""Half a 95% t interval of three seeds with gains g, g + 0.1, g - 0.1 (t(2, 0.975) from the tables)."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return findings_of(tmp_path_factory.mktemp("whole"))


def headline_of(findings, outcomes=()):
    return "\n".join(headline.headline(findings, outcomes))


def findings_of(path, **study):
    return judge(load_results(write_study(path / "study", **study)))


def verdict_of(findings, teacher, alpha):
    return next(v for v in findings.verdicts if (v.teacher, v.alpha) == (teacher, alpha))


def test_gains_and_intervals_are_the_ones_worked_out_by_hand(whole):
    weak = verdict_of(whole, "weak", 0.2)

    # speeches -0.6; fables 1.2 and recipes 2.2, mean 1.7; the seeds add 0, 0.1, -0.1
    assert weak.in_domain.mean == pytest.approx(-0.6)
    assert weak.in_domain.high == pytest.approx(-0.6 + HALF, rel=1e-5)
    assert weak.out_of_domain.mean == pytest.approx(1.7)
    assert weak.out_of_domain.low == pytest.approx(1.7 - HALF, rel=1e-5)
    assert (weak.judged, weak.n_seeds, weak.in_domain.n) == (True, 3, 3)


def test_sentence_says_numbers_and_words(whole):
    weak = verdict_of(whole, "weak", 0.2)

    assert words.sentence(weak) == (
        "weak (weaker teacher), alpha 0.2: in-domain -0.6% ± 0.2, out-of-domain +1.7% ± 0.2: "
        "helps out of domain, hurts in domain"
    )


EFFECTS = re.compile(
    r"help|hurt|no clear|\\byes\\b|some do|smoothing (alone )?(does|is)|as good|±", re.IGNORECASE
)
"""Words of judgement, and half widths of intervals."""


def test_one_seed_is_shown_and_not_judged(tmp_path):
    results = load_results(write_study(tmp_path / "study", seeds=(43,)))
    findings = judge(results)
    weak = verdict_of(findings, "weak", 0.4)

    assert (weak.judged, weak.n_seeds, weak.in_domain.n) == (False, 1, 1)
    assert weak.out_of_domain.mean == pytest.approx(3.3)
    assert (weak.out_of_domain.low, weak.out_of_domain.high) == (-math.inf, math.inf)
    assert weak.noise["raw", "in_domain"].n == 20
    assert weak.noise["raw", "out_of_domain"].n == 40
    assert weak.noise["raw", "out_of_domain"].low < 3.3 < weak.noise["raw", "out_of_domain"].high
    assert words.verdict(weak) == "one seed: not judged"
    assert all(pair.flat == () for pair in findings.pairs)
    assert supported(findings, weak.student) == {}
    said = headline_of(findings)
    assert said.startswith("Not judged: weak (weaker teacher, alpha 0.4) gains +3.3% out of domain")
    assert words.ONE_SEED in said
    first = headline.notes(results, findings)[0]
    assert first.startswith("One seed is shown, not judged")
    for text in (said, words.in_words(findings.verdicts), *headline.notes(results, findings)[1:2]):
        assert not EFFECTS.search(text.replace(words.ONE_SEED, "")), text


def test_of_a_study_with_both_only_what_has_seeds_is_judged(tmp_path):
    path = write_study(tmp_path / "study")
    for seed in (44, 45):
        for alpha in (0.2, 0.4):
            shutil.rmtree(path / "runs" / f"student-strong-{alpha}-{seed}")
    findings = judge(load_results(path))

    assert [verdict_of(findings, name, 0.4).judged for name in ("weak", "strong")] == [True, False]
    assert "1 more with one seed are shown, not judged" in headline_of(findings)
    assert "strong" not in headline_of(findings)
    assert "; 10 with one seed are not judged" in words.in_words([*findings.verdicts] * 5)


def test_the_headline_counts_what_survives_the_correction(tmp_path):
    """Each arm alone is significant at 5%; corrected for all eight it is not."""
    offsets = {43: 0.0, 44: 1.0, 45: -1.0}  # t = 3.0 / (1 / sqrt 3) = 5.2 with 2 degrees of freedom: p = .035
    gains = {("weak", a): (0.0, 2.5) for a in (0.1, 0.2, 0.4, 0.6)}
    findings = findings_of(tmp_path, gains=gains, offsets=offsets)

    assert words.effect(findings.pairs[0].best.out_of_domain) == "helps"
    assert supported(findings, "tiny 2M") == {}
    assert headline_of(findings).startswith("No clear gain: ")


def test_announced_claims_are_the_family_of_the_headline(tmp_path):
    results = load_results(write_study(tmp_path / "study", claims=[1, 2]))
    study = judge_study(results)
    findings, outcomes = study.findings, study.claims
    said = headline.headline(findings, outcomes)

    assert not EFFECTS.search("".join(said).replace("±", ""))
    assert (
        headline.tally(outcomes) == "Of 2 announced claims: 1 supported (1), 0 contradicted, 1 undecided (2)."
    )
    first, second = answer_table(study.announced).shown
    assert [cell.text for _, cell in first[:1] + first[2:5]] == ["1", "supported", "+3.30%", "+2.03 to +4.57"]
    assert first[1][1].note == "gain out of domain, best alpha: above 0"
    assert [cell.text for _, cell in second[2:]] == ["undecided", "", "", "", ""]


def test_a_claim_that_is_contradicted_without_one_of_its_tests_shows_the_number_that_does(tmp_path):
    """An undertrained teacher at large alphas alone, where it was to hurt, and helps."""
    young = {"young": (1.9, 130_000, 300_000)}
    path = write_study(tmp_path / "study", claims=[5], teachers=young, gains={("young", 0.8): (1.0, 5.0)})
    (row,) = answer_table(judge_study(load_results(path)).announced).shown
    assert [cell.text for _, cell in row[2:4] + row[5:6]] == ["contradicted", "+5.50%", "3"]
    assert row[1][1].note == "gain out of domain, alpha from 0.8: below 0"


def test_pairs_share_a_seed(tmp_path):
    path = write_study(tmp_path / "study")
    shutil.rmtree(path / "runs" / "baseline-45")

    weak = verdict_of(judge(load_results(path)), "weak", 0.2)

    assert weak.n_seeds == 2
    assert weak.in_domain.mean == pytest.approx(-0.6 + 0.05)  # seeds 43 and 44 only


def test_the_pair_is_named_by_measured_bits(whole):
    teachers = {p.teacher.name: p for p in whole.pairs}

    # no teacher: 1.65 * 1.01 * (1 + 0.001) on validation; teachers: 1.75 * 1.01 and 1.60 * 1.01
    assert teachers["weak"].bits_per_byte == pytest.approx(1.75 * 1.01)
    assert teachers["weak"].relation == "weak-to-strong"
    assert teachers["strong"].relation == "strong-to-weak"
    assert teachers["unigram"].relation is None


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (1.009, "same-level"), (0.991, "same-level"), (1.0, "same-level"),
        (1.011, "weak-to-strong"), (0.989, "strong-to-weak"),
    ],
)  # fmt: skip
def test_same_level_is_within_one_percent(teacher, expected):
    assert relation(2.0 * teacher, 2.0) == expected


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [
        (380_000, 2_000_000, "same-level"), (380_000, 1_000_000, "weak-to-strong"),
        (500_000, 2_000_000, "strong-to-weak"), (500_000, 1_000_000, "mixed"),
        (None, None, None), (500_000, None, None),
    ],
)  # fmt: skip
def test_the_nominal_label_is_by_parameters_and_tokens(whole, parameters, tokens, expected):
    pair = whole.pairs[0]
    teacher = pair.teacher.model_copy(update={"parameters": parameters, "tokens": tokens})

    assert nominal(teacher, pair.student) == expected


def test_fitted_gains_and_evaluation_noise_stand_beside_the_raw_ones(whole):
    weak = verdict_of(whole, "weak", 0.4)

    # (2.8 + 3.8) / 2 out of domain; half of each is left when calibration is fitted
    assert weak.out_of_domain.mean == pytest.approx(3.3)
    assert weak.fitted.mean == pytest.approx(1.65)
    noise = weak.noise["raw", "out_of_domain"]
    assert noise.mean == pytest.approx(3.3)
    assert noise.low < 3.3 < noise.high
    assert noise.n == 40


def test_the_flat_region_holds_alphas_that_are_as_good_on_validation(whole):
    flat = {pair.teacher.name: pair.flat for pair in whole.pairs}

    assert flat["strong"] == (0.4,)  # the other is 0.7 less at every seed
    assert flat["unigram"] == (0.2,)


def test_cells_of_several_students_are_kept_apart(tmp_path):
    gains = {
        ("tiny 2M", "weak", 0.4): (0.0, 1.0),
        ("wide 2M", "weak", 0.4): (0.0, 3.0),
        ("wide 2M", "weak", "linear start 0.8 end 0.0"): (0.0, 4.0),
        ("wide 2M", None, "compute of weak"): (2.0, 1.0),
    }
    found = findings_of(tmp_path, gains=gains, sizes={"wide 2M": (800_000, 2_000_000)})

    rows = [(v.student, v.teacher, v.arm, round(v.out_of_domain.mean, 6)) for v in found.verdicts]
    assert rows == [
        ("tiny 2M", "weak", "alpha 0.4", 1.5),
        ("wide 2M", "weak", "alpha 0.4", 3.5),
        ("wide 2M", "weak", "linear start 0.8 end 0.0", 4.5),
        ("wide 2M", None, "compute of weak", 1.5),
    ]
    assert [pair.best.arm for pair in found.pairs] == ["alpha 0.4", "alpha 0.4"]
    assert [text.split(":")[0] for text in headline.headline(found, ())] == ["tiny 2M", "wide 2M"]


def test_rounding_errors_are_no_effect():
    """Of students that score as the untaught ones do the table said `helps`, +0.0% ± 0.0."""
    assert words.effect(Estimate(8.3e-15, 3.2e-15, 1.3e-14, 3)) == "no clear difference"
    assert words.effect(Estimate(-8.3e-15, -1.3e-14, -3.2e-15, 3)) == "no clear difference"
    assert words.effect(Estimate(2e-8, 1e-8, 3e-8, 3)) == "helps"


def test_alpha_is_chosen_on_validation_not_on_test(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    student = path / "runs" / "student-weak-0.2-43"
    damage_validation(student)

    best = next(p.best for p in judge(load_results(path)).pairs if p.teacher.name == "weak")

    assert best.alpha == 0.2  # now best on validation
    assert best.out_of_domain.mean == pytest.approx(1.7)  # and still the lesser one on test


def damage_validation(run):
    """Halve the run's validation losses: a far better validation score, the same test score."""
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    halved = [r | {"value": r["value"] / 2} if r["split"] == "validation" else r for r in rows]
    (run / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in halved))
    documents = pl.read_parquet(run / "documents.parquet")
    half = pl.when(pl.col("split") == "validation").then(0.5).otherwise(1.0)
    documents.with_columns(nll=pl.col("nll") * half).write_parquet(run / "documents.parquet")


def test_a_control_as_good_as_the_teachers_is_called_smoothing(whole):
    said = headline_of(whole)

    assert said.startswith(
        "Out of domain yes, but no more than smoothing does: weak (weaker teacher, alpha 0.4) gains +3.3%"
    )
    assert "as much as or more than weak and strong: smoothing alone is enough to explain their gains" in said


def test_a_lesser_control_clears_the_teachers(tmp_path):
    gains = {("weak", 0.4): (-0.6, 2.0), ("unigram", 0.1): (-1.0, 0.2)}
    said = headline_of(findings_of(tmp_path, gains=gains))

    assert said.startswith(
        "Yes, out of domain: weak (weaker teacher, alpha 0.4) gains +2.5% ± 0.2 out of domain, -0.6% ± 0.2"
    )
    assert "smoothing alone does not explain theirs" in said


def test_a_control_that_is_within_noise_of_a_teacher_is_not_cleared_by_the_means(tmp_path):
    """Of two equal gains one mean is the larger, by a coin's toss."""
    gains = {("weak", 0.4): (0.0, 3.1), ("unigram", 0.1): (-1.0, 3.0)}
    found = findings_of(tmp_path, gains=gains, noise=0.3)
    real, control = (verdict_of(found, name, alpha).out_of_domain for name, alpha in gains)
    assert 0 < real.mean - control.mean < 0.5
    said = headline_of(found)

    assert said.startswith("Out of domain yes, but not clearly more than smoothing does: weak (")
    assert "out of domain, not clearly less than weak: smoothing alone may explain its gain there." in said
    assert "does not explain" not in "".join(headline.control_sentences(found, found.pairs))


@pytest.mark.parametrize(
    ("gains", "lead"),
    [
        ({("weak", 0.4): (-0.6, 2.0), ("strong", 0.4): (0.0, -2.0)}, "Some do, out of domain: "),
        ({("weak", 0.4): (1.0, -0.5)}, "In domain only: "),
        ({("weak", 0.4): (0.0, -0.5)}, "No clear gain: "),
        ({("weak", 0.4): (-1.0, -2.0)}, "No: "),
    ],
)
def test_headline_leads_with_the_answer(tmp_path, gains, lead):
    assert headline_of(findings_of(tmp_path, gains=gains)).startswith(lead)


def test_headline_of_many_teachers_counts_them_and_names_the_best(tmp_path):
    gains = {("weak", 0.4): (-0.6, 2.0), ("strong", 0.4): (2.0, 1.0), ("same", 0.4): (0.0, -2.0)}

    assert headline_of(findings_of(tmp_path, gains=gains)) == (
        "Some do, out of domain: 2 of 3 teachers help out of domain and 1 in domain, corrected for all their "
        "alphas; best of 3 teachers out of domain: weak (weaker teacher, alpha 0.4) gains +2.5% ± 0.2 out of "
        "domain, -0.6% ± 0.2 in domain. "
        "With calibration fitted, weak keeps +1.2% ± 0.2 and strong keeps +0.8% ± 0.2 out of domain."
    )


def test_only_controls_is_no_answer(tmp_path):
    findings = findings_of(tmp_path, gains={("unigram", 0.1): (-1.0, 0.2)})

    assert headline_of(findings).startswith("No real teacher has a finished student yet")


def test_without_validation_text_out_of_domain_nothing_is_chosen(tmp_path):
    """As where all of it was trained on."""
    path = write_study(tmp_path / "study", gains={("weak", 0.4): (-0.6, 2.0), ("unigram", 0.4): (0.0, 0.1)})
    results = load_results(path)
    outside = [domain.name for domain in results.plan.domains if domain.role == "out_of_domain"]
    kept = ~(pl.col("domain").is_in(outside) & (pl.col("split") == "validation"))
    scores, documents = (table.filter(kept) for table in (results.scores, results.documents))
    study = judge_study(replace(results, scores=scores, documents=documents))

    assert all(pair.best is None for pair in study.findings.pairs)
    assert headline_of(study.findings).startswith("Not judged: an arm is chosen by validation text out of d")
    assert "Not judged: an arm is chosen" in build_report(study, path).read_text()


def test_without_a_control_the_notes_say_so(tmp_path):
    results = load_results(write_study(tmp_path / "study", gains={("weak", 0.4): (-0.6, 2.0)}))

    assert any(
        note.startswith("No comparison with a control") for note in headline.notes(results, judge(results))
    )


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ((0.1, 0.3), (0.2, 0.4), "helps in and out of domain"),
        ((-0.3, -0.1), (-0.4, -0.2), "hurts in and out of domain"),
        ((-0.1, 0.1), (-0.1, 0.1), "no clear difference"),
        ((-0.1, 0.1), (0.2, 0.4), "helps out of domain, no clear difference in domain"),
        ((0.1, 0.3), (-0.4, -0.2), "hurts out of domain, helps in domain"),
        ((0.0, 0.3), (-0.4, 0.0), "no clear difference"),
    ],
)
def test_words_come_from_the_intervals(inside, outside, expected):
    estimates = [Estimate((low + high) / 2, low, high, 3) for low, high in (inside, outside)]

    gains = {("raw", "in_domain"): estimates[0], ("raw", "out_of_domain"): estimates[1]}
    arm = ("alpha 0.2", {"alpha": 0.2})
    v = Verdict(0, "tiny", "weak", *arm, None, 0.2, True, False, None, gains, {}, {}, 3, 1)

    assert words.verdict(v) == expected


def test_numbers_are_worded_without_a_negative_zero():
    assert words.signed(-0.04) == "+0.0%"
    assert words.signed(-0.06) == "-0.1%"
    numbers = (12, 380_000, 999_700, 2_000_000, 52_400_000_000)
    assert [short(n) for n in numbers] == ["12", "380K", "1M", "2M", "52.4B"]


def test_no_finished_student_is_a_user_error(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    for run in (path / "runs").glob("student-*"):
        (run / "state.json").unlink()

    with pytest.raises(UserError, match="no student run is finished and scored"):
        judge(load_results(path))


def test_no_finished_baseline_is_a_user_error(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    (path / "runs" / "baseline-43" / "state.json").unlink()

    with pytest.raises(UserError, match="no-teacher run of the same seed"):
        judge(load_results(path))


def test_the_terminal_gets_table_answer_and_gaps(tmp_path):
    path = write_study(tmp_path / "study", title="a [bold] title")
    (path / "runs" / "student-weak-0.2-44" / "scores.jsonl").write_text("?\n")
    (path / "runs" / "student-weak-0.2-45" / "state.json").unlink()
    console = Console(width=200, record=True, file=(tmp_path / "out.txt").open("w"))

    print_verdicts(judge_study(load_results(path)), console)
    text = console.export_text()
    console.file.close()

    assert "a [bold] title" in text
    assert re.search(r"weak +weaker +0.4 ", text)
    assert "+3.3% ± 0.2" in text
    assert "one seed: not judged" in text
    assert "Intervals: none, 1 seed; t, 3 seeds; t, 3 seeds, one teacher." in text
    assert "left out: student-weak-0.2-44: scores.jsonl, line 1" in text
    assert "left out: student-weak-0.2-45: state.json: no such file" in text
    assert "1 of 20 planned runs are not done: student-weak-0.2-45 (unreadable)" in text
