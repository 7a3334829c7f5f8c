"""Teachers of their own for each seed, and several untaught runs: which runs there are, once each."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from scipy import stats
from study_files import group, study
from tiny_study import run_tiny, tiny_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.html import build_report
from tutelage.analysis.verdicts import judge
from tutelage.errors import UserError
from tutelage.study.cost import works_of
from tutelage.study.expand import expand
from tutelage.study.plan import draft_of
from tutelage.study.results import load_results

GRID = {"product": {"teacher": ["nano-20k@1M", "unigram"], "alpha": [0.2, 0.6]}}
CACHED = {
    "live": {"shape": "nano-20k", "tokens": "1M"},
    "kept": {"shape": "nano-20k", "tokens": "1M", "cache": {"format": {"kind": "topk", "k": 5}}},
    "fixed": {"shape": "nano-50k", "tokens": "1M", "seed": 7},
    "unigram": {"control": "unigram"},
}


def replicated(**changes):
    return study(**({"students": group(GRID), "teacher_seeds": [1043, 1044]} | changes))


def by_kind(cells, kind):
    return [cell for cell in cells if cell.kind == kind]


def test_each_seed_learns_from_a_teacher_of_its_own():
    cells = expand(replicated()).cells

    teachers = {cell.name: cell for cell in by_kind(cells, "teacher")}
    assert len(teachers) == 4 * 2
    assert {cell.settings["seed"] for cell in teachers.values()} == {1043, 1044}
    assert all(cell.settings["seed"] == cell.settings["data"]["seed"] for cell in teachers.values())
    taught = [cell for cell in by_kind(cells, "student") if cell.teacher != "unigram"]
    assert len(taught) == 2 * 2
    for cell in taught:
        (teacher,) = cell.needs
        assert teachers[teacher].seed == cell.seed + 1000
    assert all(cell.needs == () for cell in by_kind(cells, "student") if cell.teacher == "unigram")


def test_targets_alone_make_no_further_teacher_and_a_seed_of_its_own_makes_one_for_all():
    grid = {"product": {"teacher": ["live", "kept", "fixed"], "alpha": [0.4]}}
    cells = expand(replicated(teachers=CACHED, students=group(grid))).cells

    names = [cell.name for cell in by_kind(cells, "teacher")]
    assert names == ["teacher-live-s1043", "teacher-live-s1044", "teacher-fixed"]
    needs = {(cell.teacher, cell.seed): cell.needs[0] for cell in by_kind(cells, "student")}
    assert needs["kept", 44] == needs["live", 44] == "teacher-live-s1044"
    assert needs["fixed", 43] == needs["fixed", 44] == "teacher-fixed"


def test_further_untaught_runs_differ_in_their_initial_weights_alone():
    stages = {"sft": {"corpus": {"name": "p", "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}]},
                      "tokens": "10K"}}  # fmt: skip
    main = group(GRID, then=["sft"])
    cells = expand(study(students=main, baselines=3, post_training=stages)).cells

    untaught = by_kind(cells, "baseline")
    assert len(untaught) == 2 * 3
    seeds = sorted((cell.settings["data"]["seed"], cell.settings["seed"], cell.twin) for cell in untaught)
    assert seeds[:3] == [(43, 43, 0), (43, 1_000_043, 1), (43, 2_000_043, 2)]
    first, second = (cell.settings | {"seed": None} for cell in untaught[:2])
    assert first == second
    assert {cell.baseline for cell in by_kind(cells, "student")} == {
        cell.name for cell in untaught if cell.twin == 0
    }
    after = [cell for cell in by_kind(cells, "after") if cell.teacher is None]
    assert sorted(cell.twin for cell in after) == [0, 0, 1, 1, 2, 2]


def test_a_plan_knows_which_teacher_a_seed_had_and_which_runs_are_twins():
    plan = draft_of(expand(replicated(baselines=2)))

    runs = {run.run: run for run in plan.runs}
    taught = [run for run in plan.runs if run.kind == "student" and run.teacher == "nano-20k@1M"]
    assert [runs[run.teacher_run].seed for run in taught] == [run.seed + 1000 for run in taught]
    assert all(teacher.run is None and teacher.data_seed is None for teacher in plan.teachers)
    assert [t.parameters is None for t in plan.teachers] == [False] * 4 + [True]
    assert [run.twin for run in plan.runs if run.kind == "baseline"].count(1) == 2
    once = draft_of(expand(study(students=group(GRID))))
    assert all(run.teacher_run is None for run in once.runs)


def test_an_estimate_counts_every_run_once():
    grid = {"product": {"teacher": ["live", "kept"], "alpha": [0.2, 0.4]}}
    both = replicated(teachers=CACHED, students=group(grid), baselines=2)
    works, caches, _ = works_of([expand(both), expand(both)])

    kinds = [work.cell.kind for work in works]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"teacher": 3, "baseline": 4, "student": 8}
    once = works_of([expand(study(teachers=CACHED, students=group(grid)))])[1]
    assert caches.bytes == 2 * once.bytes  # each seed's teacher has its cache, made by runs that count once


def test_seeds_of_several_groups_find_their_teachers():
    part = {"one": {"shape": "nano-50k", "tokens": "1M", "seeds": [44], "grid": GRID}}
    cells = expand(replicated(students=part)).cells
    assert {cell.needs for cell in by_kind(cells, "student")} == {("teacher-nano-20k-1M-s1044",), ()}

    part["one"]["seeds"] = [45]
    with pytest.raises(UserError, match=r"students\.one: seed 45 is not among the study's seeds \[43, 44\]"):
        expand(replicated(students=part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_seeds": [1043]}, "teacher_seeds: 1 for 2 seeds; give one for each"),
        ({"teacher_seeds": [1043, 1043]}, "teacher_seeds: 1043 is listed twice"),
        ({"teacher_seeds": [43, 1044]}, "teacher_seeds: 43 is in seeds too"),
        ({"seeds": [43, 43], "teacher_seeds": []}, "seeds: 43 is listed twice"),
        ({"baselines": 0}, "baselines"),
    ],
)
def test_what_is_no_replicate_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replicated(**changes)


@pytest.mark.slow
def test_a_real_study_with_replicates_computed_again_from_its_scores(tmp_path):
    texts = ("kjv", "shakespeare")
    study = tiny_study(
        seeds=[43, 44, 45],
        teacher_seeds=[1043, 1044, 1045],
        baselines=2,
        domains={n: {"source": {"kind": "corpus", "name": n}, "max_bytes": 100_000} for n in texts},
    )
    run_tiny(study, tmp_path, workers=2)
    plan = json.loads((tmp_path / "plan.json").read_text())
    scores = pl.concat(pl.read_ndjson(path) for path in (tmp_path / "runs").glob("*/scores.jsonl"))
    bits = {
        (row["run"], row["domain"]): row["value"]
        for row in scores.filter(metric="bits_per_byte", split="test").iter_rows(named=True)
    }
    gains = np.zeros((3, 2))
    for i, seed in enumerate(study.seeds):
        (taught,) = [r["run"] for r in plan["runs"] if r["kind"] == "student" and r["seed"] == seed]
        untaught = [r["run"] for r in plan["runs"] if r["kind"] == "baseline" and r["seed"] == seed]
        assert len(untaught) == 2
        assert bits[untaught[0], "kjv"] != bits[untaught[1], "kjv"]
        for j, text in enumerate(texts):
            gains[i, j] = 100 * (1 - bits[taught, text] / np.mean([bits[run, text] for run in untaught]))
    by_hand = stats.ttest_1samp(gains.mean(axis=1), 0).confidence_interval(0.95)

    findings = judge(load_results(tmp_path))
    (verdict,) = findings.verdicts
    assert verdict.out_of_domain.mean == pytest.approx(gains.mean())
    assert (verdict.out_of_domain.low, verdict.out_of_domain.high) == pytest.approx(tuple(by_hand))
    assert (verdict.n_seeds, verdict.n_teachers) == (3, 3)
    assert verdict.noise["raw", "out_of_domain"].mean == pytest.approx(gains.mean())
    spread = verdict.texts["raw"]
    assert (spread.least, spread.most) == pytest.approx(tuple(sorted(gains.mean(axis=0))))
    teachers = [r["run"] for r in plan["runs"] if r["kind"] == "teacher"]
    own = scores.filter(
        pl.col("run").is_in(teachers), metric="bits_per_byte", split="validation", domain="in-domain"
    )
    assert findings.pairs[0].bits_per_byte == pytest.approx(own["value"].mean())
    assert own.height == 3
    page = build_report(judge_study(load_results(tmp_path)), tmp_path).read_text()
    assert "t, 3 seeds, a teacher each" in page
    assert "training its teacher again would (weak: one for each seed)" in page
    assert "against the mean of 2 untaught runs of its seed" in page
