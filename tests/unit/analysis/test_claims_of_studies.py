import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from make_study import write_study

from tutelage.analysis.claims import CLAIMS, missing_for
from tutelage.analysis.outcomes import judge_claims
from tutelage.analysis.parts import Part
from tutelage.analysis.verdicts import judge
from tutelage.analysis.view import View, mean_of, minus, says, without
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
        ("tiny 2M", None, "compute of tiny-teacher"): (1.5, 0.5),
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
    return {outcome.number: outcome for outcome in judge_claims(*study)}


def test_the_registry_has_every_claim_once():
    assert list(CLAIMS) == [*range(1, 24)]
    assert len({claim.text for claim in CLAIMS.values()}) == 23


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 16, 19])
def test_claims_that_hold_are_supported(outcomes, number):
    outcome = outcomes[number]

    assert outcome.answer == "supported", [(t.part.label, t.part.values) for t in outcome.tested]
    assert outcome.announced
    assert outcome.p <= outcome.adjusted <= 0.05
    assert outcome.open == ""


def test_a_claim_that_does_not_hold_is_contradicted(outcomes):
    gated = outcomes[15]

    assert gated.answer == "contradicted"  # two points worse than the best constant
    assert gated.tested[0].effect.mean == pytest.approx(-2.0)


def test_the_effect_is_the_one_worked_out_by_hand(outcomes):
    weak, suits = outcomes[1].tested[0], outcomes[4].tested[1]

    # the weak pairs are the students' best alphas with tiny-teacher and with young: the mean of
    # 1 and 1.5 for tiny 2M (two teachers), 1 + 1 for tiny 1M and 1 - 0.7 for wide 2M
    assert weak.effect.mean == pytest.approx((1.0 + 1.5 + 2.0 + 0.3) / 4)
    assert weak.effect.n == 5
    assert suits.effect.mean == pytest.approx(0.0)
    assert suits.part.reads() == "within 0.5% of 0"


def test_fitted_gains_are_tested_beside_the_raw_ones(outcomes):
    # half of every real gain is left, nothing of the unigram's
    assert outcomes[1].fitted == "supported"
    assert outcomes[1].fitted_tested[0].effect.mean == pytest.approx(outcomes[1].tested[0].effect.mean / 2)


def test_a_claim_without_its_runs_is_undecided_and_says_what_is_missing(outcomes):
    assert outcomes[11].answer == "undecided"
    assert outcomes[11].p is None
    assert outcomes[11].open == "no runs with mixing keep_full_ce or keep_full_kd"
    assert "eval --mechanism" in outcomes[8].open


def test_a_part_alone_can_contradict_but_not_support(outcomes):
    hot = outcomes[9]  # only T = 4 was run, and is worse as claimed

    assert hot.answer == "undecided"
    assert hot.p == 1.0
    assert "temperature 0.5" in hot.open


def test_the_compute_matched_baseline_counts_the_pairs_that_still_win(outcomes):
    remark = outcomes[19].remark

    assert "0 of 1 in domain (0 clearly)" in remark
    assert "0 of 1 out of domain (0 clearly)" in remark  # gains 1.0 and 1.0: not ahead


def test_one_seed_decides_nothing(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,), claims=[1])
    results = load_results(path)
    outcome = judge_claims(results, judge(results))[0]

    assert (outcome.answer, outcome.p, outcome.tested[0].effect) == ("undecided", None, None)
    assert outcome.open.startswith("one seed")


def test_more_announced_claims_need_more_evidence(study):
    results, findings = study
    one = replace(results, plan=results.plan.model_copy(update={"claims": (1,)}))

    alone, among = judge_claims(one, findings)[0], judge_claims(results, findings)[0]

    assert alone.adjusted == alone.p == among.p
    assert among.adjusted > among.p


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (1, None),
        (11, "no runs with mixing keep_full_ce or keep_full_kd"),
        (18, "no runs with a stage of post_training"),
        (20, "no runs with a teacher of a student's own batches"),
        (23, "no runs with top-k truncation at alpha 1"),
    ],
)
def test_what_a_plan_lacks_is_named_before_anything_runs(study, claim, expected):
    assert missing_for(study[0].plan, claim) == expected


def test_an_unknown_claim_is_a_user_error(study):
    with pytest.raises(UserError, match="claim 24 is unknown"):
        missing_for(study[0].plan, 24)


def test_the_best_alpha_of_a_seed_is_chosen_by_the_other_seeds(study):
    view = View(*study)
    pair = next(p for p in view.pairs() if (p.student.name, p.teacher.name) == ("tiny 2M", "tiny-teacher"))
    cells = view.constants(pair, lambda alpha: alpha in (0.2, 0.4))
    # at seed 43 alone, 0.4 looks far better on validation
    sides = study[1].gains.sides.with_columns(
        gain=pl.when(
            (pl.col("cell") == cells[1].cell) & (pl.col("seed") == 43) & (pl.col("split") == "validation")
        )
        .then(9.0)
        .otherwise(pl.col("gain"))
    )
    findings = replace(study[1], gains=replace(study[1].gains, sides=sides))
    lucky = View(study[0], findings)

    assert lucky.best(cells, "out_of_domain")[43] == view.gain(cells[0], "out_of_domain")[43]
    assert lucky.best(cells, "out_of_domain")[44] == view.gain(cells[1], "out_of_domain")[44]
    assert lucky.best_alpha(cells)[43] == 0.4


def test_null_studies_are_rarely_called_anything(study):
    """With no effect anywhere, claims of an effect are decided in at most 5% of studies (family-wise).

    The bound adds three standard errors of a proportion over the simulated studies. Training noise of the
    baseline is shared by all students of a seed, and that of a student by its validation and test scores.
    """
    results, findings = study
    studies, level = 200, 0.05
    names = dict(findings.gains.cells.select("cell", "student").iter_rows())
    sides = findings.gains.sides
    keys = sides.select("cell", "seed", "role", "split", "fit").rows()
    effects = {1, 2, 3, 5, 6, 7, 12, 13, 16, 19}
    plan = results.plan.model_copy(update={"claims": tuple(sorted(effects))})
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(studies):
        drawn = null_gains(keys, names, rng)
        null = replace(findings, gains=replace(findings.gains, sides=sides.with_columns(gain=drawn)))
        decided = [o for o in judge_claims(replace(results, plan=plan), null) if o.number in effects]
        wrong += any(outcome.answer != "undecided" for outcome in decided)

    assert wrong / studies <= level + 3 * math.sqrt(level * (1 - level) / studies)


def null_gains(keys, names, rng):
    """Gains of students no different from their baselines: training noise and a little of scoring."""
    shared, own = {}, {}
    gains = []
    for cell, seed, role, _split, _fit in keys:
        base = shared.setdefault((names[cell], seed, role), rng.normal(0, 0.5))
        run = own.setdefault((cell, seed, role), rng.normal(0, 0.5))
        gains.append(run - base + rng.normal(0, 0.1))
    return pl.Series("gain", gains)


def test_arms_are_read_setting_by_setting():
    arm = "alpha 1, top_k k 5, tail renormalise"

    assert says(arm, "top_k")
    assert says(arm, "alpha 1")
    assert not says("alpha 0.1", "alpha 0")
    assert without(arm, "top_k", "tail") == "alpha 1"


def test_series_pair_by_seed_and_average_the_complete_ones():
    assert minus({43: 1.0, 44: 2.0}, {44: 0.5}) == {44: 1.5}
    assert mean_of([{43: 1.0, 44: 2.0}, {43: 3.0, 44: 4.0}, {43: 100.0}]) == {43: 2.0, 44: 3.0}
    assert mean_of([{}, {}]) == {}


def test_parts_say_how_many_seeds_would_settle_them():
    part = Part("a gain", {43: 0.1, 44: 0.5, 45: 0.3}, "within", margin=0.5)

    assert part.seeds_needed(0.05) > 3
    assert part.reads() == "within 0.5% of 0"
    assert Part("a gain", {43: 0.0, 44: 0.0, 45: 0.1}, "above 0").seeds_needed(0.05) > 3
