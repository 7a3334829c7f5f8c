import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic_study import write_study

from tutelage.analysis.claims import evidence
from tutelage.analysis.claims.evidence import GainsBySeed, has_setting, mean_of, minus, without
from tutelage.analysis.claims.judge import gains_by_fit, judge_claims, judge_study
from tutelage.analysis.claims.registry import CLAIMS, missing_of
from tutelage.analysis.verdicts import judge
from tutelage.errors import UserError
from tutelage.study.results import load_results

SEEDS = (43, 44, 45, 46, 47)
NOISE = {43: 0.0, 44: 0.1, 45: -0.1, 46: 0.05, 47: -0.05}
TEACHERS = {
    "tiny-teacher": (1.75, 130_000, 2_000_000),
    "same": (1.651, 380_000, 2_000_000),
    "strong": (1.60, 1_300_000, 4_000_000),
    "stronger": (1.50, 3_300_000, 8_000_000),
    "young": (1.95, 380_000, 400_000),
}
ALPHAS = (0.1, 0.2, 0.4, 0.8, 1.0)
SIZES = {"tiny 1M": (380_000, 1_000_000), "wide 2M": (1_000_000, 2_000_000)}


def curve(teacher, alpha):
    """Gains (in domain, out of domain) as the paper has them: weak teachers want small alphas."""
    peak = {"tiny-teacher": 0.2, "same": 0.4, "strong": 0.8, "stronger": 0.8, "young": 0.1}[teacher]
    height = {"tiny-teacher": 1.0, "same": 2.0, "strong": 4.0, "stronger": 2.0, "young": 1.5}[teacher]
    inside = {"tiny-teacher": -1.5 * alpha, "same": 0.0, "young": -4 * alpha}.get(teacher, alpha)
    outside = height - (8 if teacher == "young" else 4) * abs(alpha - peak)
    return inside, outside - 0.5  # the second domain has one point more: `outside` is the mean


def the_paper_is_right():
    """Gains of a study in which most claims hold."""
    gains = {("tiny 2M", t, a): curve(t, a) for t in TEACHERS for a in ALPHAS}
    for student, lost in (("tiny 1M", -1.0), ("wide 2M", 0.7)):
        gains |= {
            (student, t, a): (curve(t, a)[0], curve(t, a)[1] - lost)
            for t in ("tiny-teacher", "strong")
            for a in ALPHAS
        }
    best = curve("tiny-teacher", 0.2)
    gains |= {
        ("tiny 2M", "tiny-teacher", "linear start 0.8 end 0.0"): (best[0], best[1] + 0.3),
        ("tiny 2M", "tiny-teacher", "alpha 0.4, teacher_better"): (best[0], best[1] - 2.0),
        ("tiny 2M", "unigram", 0.1): (-2.0, 0.2),
        ("tiny 2M", None, "compute of tiny-teacher"): (1.5, 1.5),
        ("tiny 2M", "same", "alpha 1, temperature 4"): (0.0, -3.0),
    }
    return gains


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = write_study(
        tmp_path_factory.mktemp("claims") / "study",
        seeds=SEEDS,
        gains=the_paper_is_right(),
        teachers=TEACHERS,
        sizes=SIZES,
        offsets=NOISE,
        claims=[1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 16, 19],
    )
    results = load_results(path)
    return results, judge(results)


@pytest.fixture(scope="module")
def outcomes(study):
    return {outcome.number: outcome for outcome in judge_claims(gains_by_fit(*study))}


def test_the_registry_has_every_claim_once():
    assert list(CLAIMS) == [*range(1, 25)]
    assert len({claim.text for claim in CLAIMS.values()}) == 24
    assert {number for number, claim in CLAIMS.items() if claim.primary == "unigram"} == {12, 13, 16}
    assert [number for number, claim in CLAIMS.items() if not claim.in_family] == [17]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 16, 19])
def test_claims_that_hold_are_supported(outcomes, number):
    outcome = outcomes[number]

    assert outcome.answer == "supported", [(t.test.label, t.test.values) for t in outcome.tests]
    assert outcome.announced
    assert outcome.p <= outcome.adjusted <= 0.05
    assert outcome.open == ""


def test_a_claim_that_does_not_hold_is_contradicted(outcomes):
    gated = outcomes[15]

    assert gated.answer == "contradicted"  # two points worse than the best constant
    assert gated.tests[0].effect.mean == pytest.approx(-2.0)


def test_the_effect_is_the_one_worked_out_by_hand(outcomes):
    weak, suits = outcomes[1].tests[0], outcomes[4].tests[1]

    # the weak pairs are the students' best alphas with tiny-teacher and with young: the mean of
    # 1 and 1.5 for tiny 2M (two teachers), 1 + 1 for tiny 1M and 1 - 0.7 for wide 2M; and noise
    assert len(weak.test.members) == 4
    tested = SEEDS[1:]  # the first seed chose the alphas
    noise = np.mean([NOISE[seed] for seed in tested])
    assert weak.effect.mean == pytest.approx((1.0 + 1.5 + 2.0 + 0.3) / 4 + noise)
    assert weak.effect.n == 4
    assert suits.effect.mean == pytest.approx(noise)
    assert suits.test.reads() == "at most 0.5% below 0"


def test_one_kind_of_gain_decides_and_the_other_stands_beside_it(outcomes):
    # half of every real gain is left when fitted, nothing of the unigram's
    assert outcomes[1].primary == "raw"
    assert outcomes[1].other[0].effect.mean == pytest.approx(outcomes[1].tests[0].effect.mean / 2, abs=0.05)
    assert outcomes[16].primary == "unigram"
    # fitted: half of the best gains out of domain of the five teachers of tiny 2M, of which two are another's
    real = np.mean([1.0, 2.0, 4.0, 2.0, 1.5]) / 2
    assert outcomes[16].tests[0].effect.mean == pytest.approx(real)  # same noise in both


def test_a_claim_without_its_runs_is_undecided_and_says_what_is_missing(outcomes):
    assert outcomes[11].answer == "undecided"
    assert outcomes[11].p is None
    assert outcomes[11].open == "no runs with mixing keep_full_ce or keep_full_kd"
    assert "eval tokens" in outcomes[8].open


def test_a_part_alone_can_contradict_but_not_support(outcomes):
    hot = outcomes[24]  # only T = 4 was run, and is worse as claimed

    assert hot.answer == "undecided"
    assert hot.p == 1.0
    assert "hard_labels" in hot.open
    assert "temperature 0.5" in outcomes[9].open


def test_the_compute_matched_baseline_counts_the_pairs_that_still_win(outcomes):
    remark = outcomes[19].remark

    assert "0 of 1 in domain (0 clearly)" in remark
    assert "0 of 1 out of domain (0 clearly)" in remark  # gains 1.0 and 2.0: not ahead


def test_equal_compute_is_tested_as_taught_less_matched(outcomes):
    inside, outside = outcomes[19].tests

    # at alpha 0.2: -0.3 and 1.0 percent; matched: 1.5 and 2.0; noise of a seed is in both
    assert inside.effect.mean == pytest.approx(-1.8)
    assert outside.effect.mean == pytest.approx(-1.0)


def test_one_seed_decides_nothing(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,), claims=[1])
    results = load_results(path)
    outcome = judge_study(results).claims[0]

    assert (outcome.answer, outcome.p, outcome.tests[0].effect) == ("undecided", None, None)
    assert "no two tested seeds" in outcome.open


def test_more_announced_claims_need_more_evidence(study):
    results, findings = study
    one = replace(results, plan=results.plan.model_copy(update={"claims": (1,)}))

    alone, among = (
        judge_claims(gains_by_fit(one, findings))[0],
        judge_claims(gains_by_fit(results, findings))[0],
    )

    assert alone.adjusted == alone.p == among.p
    assert among.adjusted > among.p


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (1, None),
        (11, "no runs with mixing keep_full_ce or keep_full_kd"),
        (18, "no runs with a stage of post_training"),
        (20, "no runs with a teacher of a student's own batches"),
        (23, "no runs with renormalised top-k at alpha 1"),
    ],
)
def test_what_a_plan_lacks_is_named_before_anything_runs(study, claim, expected):
    assert missing_of(study[0].plan).get(claim) == expected


def test_an_unknown_claim_is_a_user_error(study):
    with pytest.raises(UserError, match="claim 25 is unknown"):
        missing_of(study[0].plan.model_copy(update={"claims": (1, 25)}))


def pair_of(view, student, teacher):
    return next(p for p in view.pairs() if (p.student.name, p.teacher.name) == (student, teacher))


def with_validation(study, cell, seed, gain):
    """The study with another validation gain of one cell and seed."""
    place = (pl.col("cell") == cell.cell) & (pl.col("seed") == seed) & (pl.col("split") == "validation")
    sides = study[1].gains.sides.with_columns(gain=pl.when(place).then(gain).otherwise(pl.col("gain")))
    return GainsBySeed(study[0], replace(study[1], gains=replace(study[1].gains, sides=sides)))


def test_alpha_is_chosen_by_seeds_that_are_not_tested(study):
    view = GainsBySeed(*study)
    cells = view.constants(pair_of(view, "tiny 2M", "tiny-teacher"), lambda alpha: alpha in (0.2, 0.4))
    assert view.choosing == {43}

    usual = view.best(cells, "out_of_domain")
    tested_luck = with_validation(study, cells[1], 44, 9.0).best(cells, "out_of_domain")
    chosen = with_validation(study, cells[1], 43, 9.0).best(cells, "out_of_domain")

    assert list(usual) == [44, 45, 46, 47]
    assert usual == tested_luck == {s: g for s, g in view.gain(cells[0], "out_of_domain").items() if s != 43}
    assert chosen == {s: g for s, g in view.gain(cells[1], "out_of_domain").items() if s != 43}


def test_an_alpha_that_the_study_file_fixes_is_tested_with_every_seed(study):
    results, findings = study
    teachers = [
        t.model_copy(update={"tested_alpha": 0.4} if t.name == "tiny-teacher" else {})
        for t in results.plan.teachers
    ]
    fixed = replace(results, plan=results.plan.model_copy(update={"teachers": tuple(teachers)}))
    view = GainsBySeed(fixed, findings)
    cells = view.constants(pair_of(view, "tiny 2M", "tiny-teacher"))
    wanted = next(cell for cell in cells if cell.alpha == 0.4)

    assert view.best(cells, "out_of_domain") == view.gain(wanted, "out_of_domain")
    assert list(view.best(cells, "out_of_domain")) == list(SEEDS)
    # a pair without that alpha is left to the seeds
    others = [cell for cell in cells if cell.alpha in (0.1, 0.8)]
    assert list(view.best(others, "out_of_domain")) == list(SEEDS[1:])


def test_one_arm_is_no_choice(study):
    view = GainsBySeed(*study)
    cell = view.constants(pair_of(view, "tiny 2M", "strong"))[0]

    assert view.best([cell], "out_of_domain") == view.gain(cell, "out_of_domain")


def test_means_are_over_all_pairs_on_the_seeds_that_all_have(tmp_path):
    """One pair has five seeds, one three, and scipy's t test of the recomputed means agrees."""
    gains = {("weak", 1.0): (-2.0, 1.0), ("strong", 1.0): (1.0, 1.0)}
    teachers = {"weak": (1.75, 1, 1), "strong": (1.80, 1, 1)}
    path = write_study(tmp_path / "study", SEEDS, gains=gains, offsets=NOISE, teachers=teachers)
    results = load_results(path)
    few = results.runs.filter((pl.col("teacher") == "strong") & (pl.col("seed") > 45))["run"].to_list()
    kept = ~pl.col("run").is_in(few)
    results = replace(results, scores=results.scores.filter(kept), documents=results.documents.filter(kept))

    found = judge_study(results).claims[1].tests[0]
    gains = pl.DataFrame(judge(results).gains.domains).filter(split="test", fit="raw", domain="speeches")
    tables = {
        run: dict(gains.filter(pl.col("run").str.contains(run)).select("seed", "gain").iter_rows())
        for run in ("weak", "strong")
    }
    truth = [np.mean([tables["weak"][s], tables["strong"][s]]) for s in (43, 44, 45)]

    assert {name: len(values) for name, values in found.test.members.items()} == {
        "tiny 2M from weak": 5,
        "tiny 2M from strong": 3,
    }
    assert found.test.values == pytest.approx(dict(zip((43, 44, 45), truth, strict=True)))
    assert found.effect.mean == pytest.approx(-0.5)
    assert found.test.evidence().support == pytest.approx(
        stats.ttest_1samp(truth, 0, alternative="less").pvalue
    )


def test_a_pair_that_shares_no_two_seeds_with_the_others_is_named(tmp_path):
    path = write_study(tmp_path / "study", gains={("weak", 1.0): (-2.0, 1.0), ("strong", 1.0): (1.0, 1.0)},
                       teachers={"weak": (1.75, 1, 1), "strong": (1.80, 1, 1)})  # fmt: skip
    results = load_results(path)
    kept = ~pl.col("run").is_in(["student-strong-1.0-44", "student-strong-1.0-45"])
    results = replace(results, scores=results.scores.filter(kept), documents=results.documents.filter(kept))

    outcome = judge_study(results).claims[1]

    assert outcome.p is None
    assert "tiny 2M from strong has seeds 43" in outcome.open


def test_the_step_from_a_small_to_a_large_alpha_rises_with_strength(study, outcomes):
    """Recomputed by scipy's regression of gain(0.8) less gain(0.2) on the strength of five teachers."""
    _, findings = study
    domains = findings.gains.domains.filter(split="test", fit="raw", role="out_of_domain")
    gains = domains.group_by("cell", "seed").agg(pl.col("gain").mean()).join(findings.gains.cells, on="cell")
    pairs = {
        p.teacher.name: p for p in findings.pairs if p.student.name == "tiny 2M" and not p.teacher.control
    }

    def gain(teacher, alpha, seed):
        return gains.filter(student="tiny 2M", teacher=teacher, arm=f"alpha {alpha:g}", seed=seed)[
            "gain"
        ].item()

    strengths = [10 * (1 - p.bits_per_byte / p.student_bits) for p in pairs.values()]
    slopes = {
        seed: stats.linregress(strengths, [gain(t, 0.8, seed) - gain(t, 0.2, seed) for t in pairs]).slope
        for seed in SEEDS
    }

    assert outcomes[3].tests[0].test.values == pytest.approx(slopes)


def test_the_gain_bends_at_the_middle_teacher(study, outcomes):
    """Recomputed by fitting two lines that meet there, one to each half, by lstsq."""
    _, findings = study
    pairs = [p for p in findings.pairs if p.student.name == "tiny 2M" and not p.teacher.control]
    places = np.array([10 * (1 - p.bits_per_byte / p.student_bits) for p in pairs])
    heights = {"tiny-teacher": 1.0, "same": 2.0, "strong": 4.0, "stronger": 2.0, "young": 1.5}
    design = np.stack(
        [np.ones(5), np.minimum(places - np.median(places), 0), np.maximum(places - np.median(places), 0)]
    )
    _, before, after = np.linalg.lstsq(design.T, [heights[p.teacher.name] for p in pairs], rcond=None)[0]

    # the noise of a seed is the same in all gains, and bends nothing
    assert [*outcomes[6].tests[0].test.values.values()] == pytest.approx([after - before] * 4)
    assert outcomes[6].tests[1].effect.mean == pytest.approx(4.0 - 2.0)


def test_each_relation_is_a_test_of_its_own(outcomes):
    labels = [tested.test.label for tested in outcomes[7].tests]

    assert [label.split(", ")[1] for label in labels] == [
        "weaker teachers", "same-level teachers", "stronger teachers"
    ]  # fmt: skip


def test_copying_cannot_be_announced(study):
    results, findings = study
    every = replace(results, plan=results.plan.model_copy(update={"claims": (1, 17)}))
    one = replace(results, plan=results.plan.model_copy(update={"claims": (1,)}))

    found, alone = judge_claims(gains_by_fit(every, findings)), judge_claims(gains_by_fit(one, findings))

    assert not found[16].announced
    assert found[0].adjusted == alone[0].adjusted == found[0].p


def test_the_median_text_and_the_mean_without_the_largest_stand_beside_the_controls(tmp_path):
    """Texts gain 0 and 9 percent more than with the control: one text carries everything."""
    path = write_study(tmp_path / "study", gains={("weak", 0.2): (0.0, 1.0), ("unigram", 0.2): (0.0, 0.0)})
    results = load_results(path)
    scores = results.scores.with_columns(
        value=pl.when(
            pl.col("run").str.starts_with("student-weak") & (pl.col("domain") == "recipes")
        ).then(0.91 * pl.col("value")).otherwise(pl.col("value"))
    )  # fmt: skip
    results = replace(results, scores=scores)
    outcome = judge_study(results).claims[15]
    whole, median, without = outcome.tests

    assert [one.test.beside for one in outcome.tests] == [False, True, True]
    assert "without recipes" in without.test.label
    fables = 0.5  # half of 1 percent is left when fitted, nothing of the control
    recipes = 100 * (1 - 0.91 * (1 - 0.01)) + 0.0
    assert without.effect.mean == pytest.approx(fables)
    assert whole.effect.mean == pytest.approx((fables + recipes) / 2, abs=0.01)
    assert median.effect.mean == pytest.approx(whole.effect.mean)  # of two texts


def test_calibration_errors_are_compared_as_log_ratios(tmp_path):
    gains = {("strong", 1.0): (0.0, 0.0), ("strong", "alpha 1, tail renormalise, top_k k 5"): (0.0, 0.0)}
    results = load_results(write_study(tmp_path / "study", gains=gains))
    cut = pl.col("run").str.contains("top_k") & (pl.col("metric") == "ece")
    scores = results.scores.with_columns(
        value=pl.when(cut)
        .then(0.02 * 2.0 ** (pl.col("run").str.slice(-1).cast(pl.Float64)))
        .otherwise("value")
    )
    results = replace(results, scores=scores)
    whole, top = judge_study(results).claims[22].tests

    assert [*whole.test.values.values()] == pytest.approx([math.log2(0.03 / 0.02)] * 3)
    assert top.test.values == pytest.approx({43: 3.0 - 1, 44: 4.0 - 1, 45: 5.0 - 1})


def test_open_claims_say_how_many_seeds_would_decide_them_which_way(tmp_path):
    offsets = {43: 0.4, 44: -0.1, 45: 0.0}
    path = write_study(tmp_path / "study", gains={("weak", 1.0): (-0.3, 0.3)}, offsets=offsets)
    results = load_results(path)
    outcome = judge_study(results).claims[1]  # alpha 1 hurts in domain: -0.2 on average
    values = [*outcome.tests[0].test.values.values()]
    d = -np.mean(values) / np.std(values, ddof=1)
    n = next(
        k for k in range(2, 101)
        if stats.nct.sf(stats.t.isf(0.025, k - 1), k - 1, d * math.sqrt(k)) >= 0.8
    )  # fmt: skip

    assert outcome.open == f"about {n} tested seeds would support it (80% power, mean and spread as they are)"


def test_arms_are_read_setting_by_setting():
    arm = {"alpha": 1, "truncation": {"kind": "top_k", "k": 5}, "tail": "renormalise"}

    assert has_setting(arm, "truncation", "top_k")
    assert has_setting(arm, "alpha", 1.0)
    assert not has_setting({"alpha": 0.1}, "alpha", 0)
    assert has_setting({"alpha": {"policy": "salt", "value": 0.8}}, "alpha", "wsd", "salt")
    assert without(arm, "truncation", "tail") == {"alpha": 1}


def test_series_pair_by_seed_and_average_on_the_seeds_that_all_have():
    assert minus({43: 1.0, 44: 2.0}, {44: 0.5}) == {44: 1.5}
    assert mean_of([{43: 1.0, 44: 2.0}, {43: 3.0, 44: 4.0}, {43: 100.0}]) == {43: pytest.approx(104 / 3)}
    assert mean_of([{43: 1.0}, {}]) == {}
    assert mean_of([]) == {}


@pytest.mark.parametrize(
    ("statement", "numbers", "direction"),
    [
        ("above 0", [0.0, 0.0, 0.1], "support"),
        ("above 0", [0.0, 0.0, -0.1], "contradict"),
        ("below 0", [0.0, 0.0, -0.1], "support"),
        ("below 0", [0.0, 0.0, 0.1], "contradict"),
        ("within", [0.1, 0.5, 0.3], "support"),
        ("within", [0.5, 0.9, 0.4], "contradict"),
        ("within", [-0.5, -0.9, -0.4], "contradict"),
        ("not below", [-0.1, -0.3, -0.6], "support"),
        ("not below", [-0.1, -0.9, -1.1], "contradict"),
        ("not 0", [0.0, 0.1, -0.4], "support"),
    ],
)
def test_tests_say_how_many_seeds_would_settle_them_in_their_direction(statement, numbers, direction):
    """Simulated with scipy's tests: so many seeds do in four of five studies."""
    test = evidence.Test("a gain", {"a pair": dict(enumerate(numbers))}, statement, margin=0.5)
    n = test.seeds_needed(0.05)
    drawn = np.random.default_rng(n).normal(np.mean(numbers), np.std(numbers, ddof=1), (4000, n))
    found = [evidence.Test("", {"": dict(enumerate(row))}, statement, margin=0.5).evidence() for row in drawn]
    settled = [one.support if direction == "support" else one.contradict for one in found]

    assert test.direction() == direction
    assert np.mean(np.array(settled) < 0.025) == pytest.approx(0.8, abs=0.2 if n < 4 else 0.1)
    assert np.mean(np.array(settled) < 0.025) > 0.8 - 3 * math.sqrt(0.16 / 4000)
