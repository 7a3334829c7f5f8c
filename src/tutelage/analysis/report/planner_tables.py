"""Describe fits of the planner and their backtest, for a terminal and for the report."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.analysis.report.report_table import Column, ReportTable, TableCell
from tutelage.analysis.study_points import points_of
from tutelage.analysis.tables import equal_compute
from tutelage.analysis.words import arm, plus_minus, signed
from tutelage.errors import UserError
from tutelage.files import short
from tutelage.planner.mixing_rule import chosen_alpha
from tutelage.planner.study_fit import fit_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.tables import EqualCompute
    from tutelage.planner.backtest import Regret
    from tutelage.planner.law_fits import LawFit
    from tutelage.planner.study_fit import StudyFit

SIDE_WORDS = MappingProxyType(
    {"in_domain": "in domain", "out_of_domain": "out, raw", "fitted": "out, fitted"}
)
_ROWS = 5
_QUESTIONS = {
    "alpha": "pairs: which alpha",
    "new student": "pairs: which alpha, size and budget unseen",
    "teacher": "students: which teacher and alpha",
}


def planner_section(study: JudgedStudy) -> dict[str, Any] | None:
    """What the report says of planning by this study; None where it is too small for any fit."""
    try:
        fit = fit_points(points_of(study))
    except UserError:
        return None
    return {
        "lines": [text for _, text in fit_lines(fit)],
        "law": law_table(fit),
        "rule": surface_table(fit),
        "ranking": ranking_table(study),
    }


def ranking_table(study: JudgedStudy) -> ReportTable:
    """Teachers of each student in the order of what they give, fitted where it was, with what they cost."""
    pairs = equal_compute(study)
    several = len({one.pair.student.name for one in pairs}) > 1
    fitted = any(one.best.fitted is not None for one in pairs)
    order = [student.name for student in study.results.plan.students]
    columns = (
        *[Column("student", style="row")] * several,
        Column("teacher", style="row"),
        Column("alpha"),
        *(Column(words) for words in list(SIDE_WORDS.values())[: 3 if fitted else 2]),
        Column("cost", style="num"),
        Column("training", style="num"),
    )

    def worth(one: EqualCompute) -> tuple[int, float]:
        return order.index(one.pair.student.name), -(one.best.fitted or one.best.out_of_domain).mean

    rows: list[list[TableCell | str]] = [
        [
            *[one.pair.student.name] * several,
            one.pair.teacher.name,
            arm(one.best),
            *(
                TableCell("" if gain is None else plus_minus(gain))
                for gain in (one.best.in_domain, one.best.out_of_domain, one.best.fitted)[
                    : 3 if fitted else 2
                ]
            ),
            "" if one.cost is None else f"{one.cost:.2f} x",
            "" if one.teacher_training is None else f"{one.teacher_training:.2f} x",
        ]
        for one in sorted(pairs, key=worth)
    ]
    return ReportTable("Teachers in order", columns, rows)


def fit_lines(fit: StudyFit) -> list[tuple[str, str]]:
    """(label, sentence) on what was fitted, and what could not be."""
    settings = fit.points.settings()
    pairs = f"{len(fit.points.pairs())} pairs at {len(fit.points.taught)} alphas"
    found = [("fit", f"{fit.name}: {len(settings)} sizes and budgets without a teacher, {pairs}")]
    if not fit.points.comparable:
        found.append(
            ("law", f"none, and no losses: {len(fit.points.versions)} texts or tokenizers do not compare")
        )
    elif fit.supervised is None:
        found.append(
            ("law", f"of models without a teacher: not fitted, {len(settings)} sizes and budgets of 5")
        )
    else:
        law = fit.supervised.law
        scarce = f"({law.A:.4g} / N^{law.a:.3g} + {law.B:.4g} / D^{law.b:.3g})^{law.g:.3g}"
        words = f"{fit.supervised.free} coefficients fitted, {_off(fit.supervised)}"
        found.append(("laws", f"without a teacher: L(N, D) = {law.irreducible:.4g} + {scarce}; {words}"))
    pure = sum(point.alpha == 1 for point in fit.points.taught)
    words = f"not fitted, {pure} points of 11" if fit.distillation is None else _off(fit.distillation)
    found.append(("", f"pure distillation (alpha 1): {words}"))
    if not fit.surfaces:
        found.append(("", f"no rule for alpha: {len(fit.points.pairs())} pairs of 3, or too few alphas"))
    return found


def _off(fit: LawFit) -> str:
    inside = float(np.sqrt(np.mean(np.square(fit.residuals))))
    return f"off by {inside:.2%} of the loss, {fit.error:.2%} where left out ({len(fit.left_out)} points)"


def surface_table(fit: StudyFit) -> ReportTable:
    """The alpha that the rule names and its gain, by side and strength of the teacher."""
    columns = (
        Column("gain", style="row"),
        Column("teacher / own"),
        Column("alpha"),
        Column("gain at it"),
        Column("95% interval", style="nowrap"),
        Column("off", style="nowrap"),
    )
    rows: list[list[TableCell | str]] = []
    for side, surface in fit.surfaces.items():
        for gap in np.linspace(*surface.gaps, _ROWS):
            alpha, _ = chosen_alpha(surface, gap)
            found = surface.predict(alpha, gap)
            ends = f"{found.low:+.2f} to {found.high:+.2f}" if alpha else ""
            rows.append(
                [
                    SIDE_WORDS[side],
                    f"{np.exp(-gap):.3f}",
                    f"{alpha:g}" if alpha else "no teacher",
                    signed(found.mean, 2) if alpha else "",
                    ends,
                    f"{surface.error:.2f}",
                ]
            )
    return ReportTable("", columns, rows)


def law_table(fit: StudyFit) -> ReportTable:
    """Measured and fitted losses of models without a teacher."""
    columns = (
        Column("parameters without embeddings", style="row"),
        Column("tokens"),
        Column("measured, nats per token"),
        Column("law"),
        Column("off"),
        Column("off where left out"),
    )
    law = fit.supervised
    rows: list[list[TableCell | str]] = (
        []
        if law is None
        else [
            [
                short(n),
                short(d),
                f"{loss:.4f}",
                f"{float(law.law.loss(n, d)):.4f}",
                f"{off:+.2%}",
                f"{left:+.2%}",
            ]
            for (n, d, loss), off, left in zip(
                fit.points.settings(), law.residuals, law.left_out, strict=True
            )
        ]
    )
    return ReportTable("Law of models without a teacher", columns, rows)


def backtest_tables(found: Sequence[Regret]) -> list[ReportTable]:
    """Mean and worst regret of each way to choose, by side: alphas of given teachers, then teachers too."""
    tables = []
    for question, words in _QUESTIONS.items():
        some = [one for one in found if one.question == question]
        sides = list(dict.fromkeys(one.side for one in some))
        rows: list[list[TableCell | str]] = []
        for rule in dict.fromkeys(one.rule for one in some):
            own = {one.side: one for one in some if one.rule == rule}
            rows.append([rule, *(f"{own[side].mean:.2f} ({own[side].worst:.2f})" for side in sides)])
        if some:
            columns = Column("chosen by", style="row"), *(Column(SIDE_WORDS[side]) for side in sides)
            tables.append(ReportTable(f"{max(one.n for one in some)} {words}", columns, rows))
    return tables
