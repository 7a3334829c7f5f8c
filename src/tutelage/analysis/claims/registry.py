"""The claims that a study can test: CLAIMS, and what each of them needs of a study file.

Each is a statement of arXiv 2605.23857 or of the work around it, with the tests that it stands or falls with.
Gains are percent fewer bits per byte than the untaught student of the same seed and data.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tutelage.analysis.claims import objective_tests, teacher_tests
from tutelage.analysis.claims.evidence import Claim, Requirement, has_setting
from tutelage.analysis.verdicts import nominal
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutelage.study.plan import Plan, PlanRun, PlanStudent, PlanTeacher


Taught = tuple["PlanRun", "PlanStudent", "PlanTeacher"]
"""A planned run with a real teacher."""


def missing_of(plan: Plan) -> dict[int, str]:
    """What `plan` lacks to test claims: "no runs with ...", by the number of each claim that lacks something.

    Args:
        plan: of a study, before or after anything was run. Pairs are named by parameters and tokens here,
            because nothing is measured yet.

    Raises:
        UserError: it announces a claim that does not exist.
    """
    if unknown := [claim for claim in plan.claims if claim not in CLAIMS]:
        raise UserError(
            f"study {plan.name}: claim {unknown[0]} is unknown; claims: {min(CLAIMS)} to {max(CLAIMS)}"
        )
    taught = _taught(plan)
    needed = dict.fromkeys(need for claim in CLAIMS.values() for need in claim.requirements)
    lacking = [need for need in needed if not need.met(plan, taught)]
    missing = {
        number: [need.what for need in claim.requirements if need in lacking]
        for number, claim in CLAIMS.items()
    }
    return {number: f"no runs with {' and '.join(what)}" for number, what in missing.items() if what}


def _taught(plan: Plan) -> list[Taught]:
    """Runs with a real teacher, one of each student, teacher and arm: requirements do not ask for seeds."""
    students = {student.name: student for student in plan.students}
    teachers = {teacher.name: teacher for teacher in plan.teachers}
    rows = {}
    for run in plan.runs:
        if run.kind == "student" and run.student is not None and run.teacher is not None:
            rows[run.student, run.teacher, run.arm] = run, students[run.student], teachers[run.teacher]
    return [row for row in rows.values() if not row[2].control]


def _some(what: str, wanted: Callable[[PlanRun, PlanStudent, PlanTeacher], bool]) -> Requirement:
    """A requirement that one run with a real teacher meets."""
    return Requirement(what, lambda _, taught: any(wanted(*row) for row in taught))


def _arm(what: str, **settings: object) -> Requirement:
    """A requirement that a run meets whose arm has all of `settings`."""

    def wanted(run: PlanRun, _student: PlanStudent, _teacher: PlanTeacher) -> bool:
        arm = run.arm_settings or {}
        return all(has_setting(arm, name, value) for name, value in settings.items())

    return _some(what, wanted)


def _several(
    what: str, number: int, of: Callable[[PlanRun, PlanStudent, PlanTeacher], tuple[object, object]]
) -> Requirement:
    """A requirement for `number` values of the second of a pair, beside the same value of the first."""

    def met(_plan: Plan, taught: Sequence[Taught]) -> bool:
        found: dict[object, set[object]] = {}
        for row in taught:
            key, value = of(*row)
            found.setdefault(key, set()).add(value)
        return any(len(values) >= number for values in found.values())

    return Requirement(what, met)


def _weaker(student: PlanStudent, teacher: PlanTeacher) -> bool:
    return nominal(teacher, student) in {"weak-to-strong", "mixed"}


def _undertrained(student: PlanStudent, teacher: PlanTeacher) -> bool:
    return teacher.tokens is not None and teacher.tokens <= teacher_tests.UNDERTRAINED * student.tokens


def _stepped(taught: Sequence[Taught]) -> int:
    """Teachers of one student that are used at the small and at the large alpha; of the student with most."""
    alphas: dict[tuple[str, str], set[float | None]] = {}
    for run, student, teacher in taught:
        if run.constant:
            alphas.setdefault((student.name, teacher.name), set()).add(run.alpha)
    both = [
        student for (student, _), own in alphas.items() if {teacher_tests.SMALL, teacher_tests.LARGE} <= own
    ]
    return max(Counter(both).values(), default=0)


_TEACHER = _some("a real teacher and constant alphas", lambda run, _s, _t: run.constant)
_WEAK = _some("a weaker teacher", lambda run, s, t: run.constant and _weaker(s, t))
_WEAK_ALONE = _some(
    "a weaker teacher at alpha 1", lambda r, s, t: r.constant and r.alpha == 1 and _weaker(s, t)
)
_SAME = _some("a teacher of the student's shape and tokens", lambda _r, s, t: nominal(t, s) == "same-level")
_SMALL = _some(
    f"an undertrained teacher and alpha <= {teacher_tests.SMALL:g}",
    lambda run, s, t: _undertrained(s, t) and (run.alpha or 1.0) <= teacher_tests.SMALL,
)
_LARGE = _some(
    f"an undertrained teacher and alpha >= {teacher_tests.LARGE:g}",
    lambda run, s, t: _undertrained(s, t) and (run.alpha or 0.0) >= teacher_tests.LARGE,
)
_STEPS = Requirement(
    f"three teachers of one student at alpha {teacher_tests.SMALL:g} and {teacher_tests.LARGE:g}",
    lambda _, taught: _stepped(taught) >= teacher_tests.LINE,
)
_FOUR = _several("four teachers of one student", 4, lambda _r, s, t: (s.name, t.name))
_BUDGETS = _several("one student shape at two budgets", 2, lambda _r, s, t: ((s.shape, t.name), s.tokens))
_SIZES = _several(
    "students of two sizes at one budget", 2, lambda _r, s, t: ((s.tokens, t.name), s.parameters)
)
_PURE = _some("a real teacher at alpha 1", lambda run, _s, _t: run.constant and run.alpha == 1)
_CONTROL = Requirement(
    "a control in the teacher's place", lambda plan, _: any(t.control for t in plan.teachers)
)
_TOP_K = _arm("renormalised top-k at alpha 1", truncation="top_k", tail="renormalise", alpha=1)
_SAMPLED = _some("sampled targets", lambda _r, _s, t: (t.targets or "").startswith("sample"))
_UNSCALED = _some(
    "mixing keep_full_ce or keep_full_kd",
    lambda run, _s, _t: has_setting(run.arm_settings or {}, "mixing", *objective_tests.UNSCALED),
)
_FIRST = _some("a KD-first schedule", lambda run, _s, _t: objective_tests.kd_first(run.arm_settings or {}))
_STAGE = Requirement(
    "a stage of post_training", lambda plan, _: any(run.kind == "after" for run in plan.runs)
)
_MATCHED = Requirement(
    "compute_of", lambda plan, _: any("compute_of" in (r.arm_settings or {}) for r in plan.runs)
)
_OWN_DATA = Requirement(
    "a teacher of a student's own batches",
    lambda plan, _: (
        not _students_of(plan).isdisjoint(
            (teacher.name, teacher.data_seed) for teacher in plan.teachers if teacher.corpus is None
        )
    ),
)
_FOREIGN = _some("a teacher of another corpus", lambda _r, _s, t: t.corpus is not None)


def _students_of(plan: Plan) -> set[tuple[str | None, int | None]]:
    """(teacher, seed of the student's batches) of every taught run."""
    return {(run.teacher, run.seed) for run in plan.runs if run.kind == "student"}


CLAIMS: dict[int, Claim] = {
    1: Claim("A weaker teacher, at its best alpha, helps out of domain.", (_WEAK,), teacher_tests.weak_gains),
    2: Claim("A weaker teacher at alpha 1 hurts in domain.", (_WEAK_ALONE,), teacher_tests.weak_alone_hurts),
    3: Claim(
        "A large alpha gains more over a small one with a stronger teacher (out of domain).",
        (_STEPS,),
        teacher_tests.alpha_rises,
    ),
    4: Claim(
        "A teacher of the student's own shape and tokens helps out of domain and costs nothing in domain.",
        (_SAME,),
        teacher_tests.same_level,
    ),
    5: Claim(
        "An undertrained teacher (at most a quarter of the student's tokens) helps out of domain at small "
        "alphas and hurts at large ones.",
        (_SMALL, _LARGE),
        teacher_tests.undertrained,
    ),
    6: Claim(
        "The gain saturates in the teacher's strength, and for some student the strongest is not the best.",
        (_FOUR,),
        teacher_tests.saturates,
    ),
    7: Claim(
        "The gain is larger out of domain than in domain, whatever the teacher's level.",
        (_TEACHER,),
        teacher_tests.outside_more,
    ),
    8: Claim("The gain grows with the difficulty of tokens.", (_TEACHER,), objective_tests.difficulty),
    9: Claim(
        "At alpha 1, temperatures 0.5, 1 and 2 are alike.",
        tuple(_arm(f"temperature {t:g}", temperature=t, alpha=1) for t in (0.5, 2)),
        objective_tests.temperatures_alike,
    ),
    10: Claim(
        "At alpha 1, renormalised top-k hurts and sampled targets match the whole distribution.",
        (_TOP_K, _SAMPLED),
        objective_tests.truncation,
    ),
    11: Claim(
        "What counts is the mixture, not the scale of the loss.",
        (_UNSCALED,),
        objective_tests.not_scale,
    ),
    12: Claim(
        "The gain falls as the student's tokens grow.",
        (_BUDGETS,),
        teacher_tests.falls_with_tokens,
        primary="unigram",
    ),
    13: Claim(
        "The gain changes with the student's size.",
        (_SIZES,),
        teacher_tests.changes_with_size,
        primary="unigram",
    ),
    14: Claim(
        "For weaker teachers, schedules that begin with distillation do no worse than the best constant.",
        (_WEAK, _FIRST),
        objective_tests.early_teaching,
    ),
    15: Claim(
        "Teaching only where the teacher is better does no worse than the best constant.",
        (_arm("the gate teacher_better", gate="teacher_better"),),
        objective_tests.gating,
    ),
    16: Claim(
        "Teachers that know no context (unigram, uniform) give less than real ones.",
        (_TEACHER, _CONTROL),
        teacher_tests.controls_give_less,
        primary="unigram",
    ),
    17: Claim(
        "Copying in context suffers at alpha 1.",
        (_PURE,),
        objective_tests.copying,
        in_family=False,
    ),
    18: Claim("The gain survives the same post-training.", (_TEACHER, _STAGE), teacher_tests.after_tuning),
    19: Claim(
        "An untaught student with the teacher's compute is the stronger baseline: a taught one is behind it.",
        (_MATCHED,),
        teacher_tests.compute_matched,
        teacher_tests.compute_matched_remark,
    ),
    20: Claim(
        "The gain survives a teacher trained on the student's own data.",
        (_OWN_DATA,),
        teacher_tests.identical_data,
    ),
    21: Claim("The gain survives a teacher of another corpus.", (_FOREIGN,), teacher_tests.cross_corpus),
    22: Claim(
        "Reverse KL is worse in domain than forward KL.",
        (_arm("divergence reverse_kl", divergence="reverse_kl"),),
        objective_tests.reverse_kl,
    ),
    23: Claim(
        "At alpha 1 the calibration error is between half and twice that without a teacher; with a top-k of "
        "the distribution it is more than twice.",
        (_PURE, _TOP_K),
        objective_tests.calibration,
    ),
    24: Claim(
        "At alpha 1, temperature 4 and hard labels are worse than temperature 1.",
        (
            _arm("temperature 4", temperature=4, alpha=1),
            _arm("hard_labels", divergence="hard_labels", alpha=1),
        ),
        objective_tests.temperatures_worse,
    ),
}
"""By the numbers that a study file lists under `claims`."""
