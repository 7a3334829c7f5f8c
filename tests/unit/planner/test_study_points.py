"""From result files to points and a fit file and back, in study directories with known effects."""

from __future__ import annotations

import json
import math

import pytest
import synthetic_study
from synthetic_study import write_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.html import build_report
from tutelage.analysis.report.planner_tables import fit_lines, planner_section
from tutelage.analysis.study_points import points_of
from tutelage.errors import UserError
from tutelage.models.flops import parameters
from tutelage.models.shapes import find_shape
from tutelage.planner.points import together
from tutelage.planner.study_fit import basis_of, fit_points, load_fit, save_fit
from tutelage.study.results import load_results

STUDENT = "nano-50k 1M"
TEACHERS = {
    "weak": (1.75, 54_432, 1_000_000),
    "same": (1.65, 102_384, 1_000_000),
    "strong": (1.55, 213_440, 2_000_000),
}
GAINS = {
    (STUDENT, "weak", 0.2): (0.2, 1.0), (STUDENT, "weak", 0.6): (-3.0, 0.5),
    (STUDENT, "same", 0.2): (0.8, 1.0), (STUDENT, "same", 0.6): (1.2, 1.4),
    (STUDENT, "strong", 0.2): (1.5, 1.2), (STUDENT, "strong", 0.6): (3.5, 2.2),
    (STUDENT, "unigram", 0.2): (-2.0, 3.0),
}  # fmt: skip
SHAPES = {"weak": "nano-20k", "same": "nano-50k", "strong": "nano-150k"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "made"
    write_study(path, gains=GAINS, teachers=TEACHERS, sizes={STUDENT: (102_384, 1_000_000)})
    plan = json.loads((path / "plan.json").read_text())
    del plan["seal"]
    for teacher in plan["teachers"]:
        if teacher["name"] in SHAPES:
            teacher["shape"] = SHAPES[teacher["name"]]
    (path / "plan.json").write_text(json.dumps(plan))
    return path


@pytest.fixture(scope="module")
def judged(made):
    return judge_study(load_results(made))


def test_points_are_what_the_files_say(judged):
    points = points_of(judged)
    assert {one.teacher for one in points.taught} == {"weak", "same", "strong"}  # no control
    assert len(points.taught) == 6
    one = next(p for p in points.taught if (p.teacher, p.alpha) == ("strong", 0.6))
    assert one.gains["in_domain"] == pytest.approx(3.5)
    assert one.gains["out_of_domain"] == pytest.approx(2.7)  # the mean of two texts, the second 1 more
    assert one.gains["fitted"] == pytest.approx(1.35)
    bits = synthetic_study.DOMAINS["speeches"] * 1.01
    assert one.alone_loss == pytest.approx(2 * bits * math.log(2), rel=2e-3)  # two bytes a token
    assert one.gap == pytest.approx(math.log(1.65 / 1.55), abs=3e-3)
    assert one.parameters == parameters(find_shape("nano-50k"), 512).non_embedding == 53_232
    assert [p.alpha for p in points.pairs()["demo", STUDENT, "weak"]] == [0.2, 0.6]
    assert {(p.name, p.runs) for p in points.alone} == {("weak", 1), ("same", 1), ("strong", 1), (STUDENT, 3)}


def test_a_fit_is_the_same_when_read_back(judged, tmp_path):
    fit = fit_points(points_of(judged))
    assert fit.supervised is None  # three sizes and budgets
    save_fit(tmp_path / "fit.json", fit)
    assert load_fit(tmp_path / "fit.json") == fit
    basis = basis_of(fit)
    assert basis.law is None
    assert basis.alone(53_232, 1e6).mean == pytest.approx(
        next(loss for n, d, loss in fit.points.settings() if n == 53_232)
    )
    assert basis.alone(53_232, 2e6) is None
    both = fit_points(together([fit.points, fit.points.model_copy(update={"studies": ("again",)})]))
    assert both.name == "demo and again"


def test_studies_of_one_name_are_not_taken_for_one(judged):
    """The pairs of a preset on two texts were one pair each, which was hidden as a whole and averaged."""
    one = points_of(judged)
    both = together([one, one, one])
    assert both.studies == ("demo", "demo (2)", "demo (3)")
    assert (len(one.pairs()), len(both.pairs())) == (3, 9)
    assert fit_points(both).surfaces["in_domain"].pairs == 9


def test_losses_of_two_texts_make_no_law_and_are_no_measurements(judged):
    one = points_of(judged)
    assert one.versions == (synthetic_study.VERSION,)
    sizes = [(n, d) for n in (1e5, 4e5, 1e6) for d in (1e6, 4e6)]
    alone = [
        one.alone[0].model_copy(update={"parameters": n, "tokens": d, "loss": 9 * n**-0.1}) for n, d in sizes
    ]
    one = one.model_copy(update={"alone": tuple(alone)})
    again = one.model_copy(update={"studies": ("other",)})
    other = again.model_copy(update={"versions": ("another text",)})
    alike, both = fit_points(together([one, again])), fit_points(together([one, other]))
    assert alike.supervised is not None
    assert alike.surfaces == both.surfaces
    assert (both.supervised, both.distillation) == (None, None)
    assert basis_of(alike).alone(1e6, 1e6) is not None
    assert basis_of(both).alone(1e6, 1e6) is None
    assert any("2 texts or tokenizers do not compare" in text for _, text in fit_lines(both))


def test_a_study_that_is_named_twice_counts_once(made, command):
    code, out, err = command("plan", "fit", made, made.parent / ".." / made.parent.name / made.name, "--json")
    assert (code, json.loads(out)["points"]["studies"]) == (0, ["demo"]), err


def test_a_damaged_fit_is_one_line(judged, tmp_path):
    path = tmp_path / "fit.json"
    save_fit(path, fit_points(points_of(judged)))
    path.write_text(path.read_text().replace('"alpha": 0.6', '"alpha": 0.7', 1))
    with pytest.raises(UserError, match=r"fit\.json: no fit \(.*\); `tutelage plan fit"):
        load_fit(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="no fit"):
        load_fit(path)


def test_a_study_too_small_for_any_fit_is_named(judged):
    few = points_of(judged).model_copy(update={"taught": points_of(judged).taught[:2]})
    with pytest.raises(
        UserError, match=r"demo: nothing can be fitted: 3 sizes and budgets .* 1 pairs at 2 alphas"
    ):
        fit_points(few)


@pytest.mark.slow
def test_the_report_has_the_section_where_there_is_a_fit(judged, tmp_path):
    page = build_report(judged, tmp_path).read_text()
    assert "Planning by this study" in page
    section = page.partition('<h2 id="planner">')[2].partition("</section>")[0]
    assert (
        section.index("strong") < section.index("same") < section.index("weak")
    )  # in order of what they give
    assert "+1.4% ± " in section


def test_teachers_are_ranked_by_what_they_give_fitted(judged):
    rows = planner_section(judged)["ranking"].rows
    assert [row[0] for row in rows] == ["strong", "same", "weak"]
    assert rows[0][1] == "0.6"
    assert rows[0][4].text == "+1.4% ± 0.2"
    assert rows[0][5] == "1.25 x"
