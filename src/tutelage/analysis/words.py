"""Findings in plain words: sentences, the headline answer, and what the numbers cannot show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.analysis.costs import overhead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.stats import Estimate
    from tutelage.analysis.verdicts import Findings, TeacherFinding, Verdict
    from tutelage.study.results import Results

GAIN_CAPTION = (
    "Gain: percent fewer bits per byte than the same student without a teacher, same seed and data; "
    "positive is better. Test split, 95% intervals."
)
_NO_CONTROL = (
    "No comparison with a control was made here: a teacher that only smooths the targets, such as the "
    "unigram, can gain out of domain too, so a gain alone does not show that the teacher taught anything."
)
_ENOUGH_SEEDS = 5
_FEW_TEACHERS = 2


def signed(percent: float, digits: int = 1) -> str:
    """`+1.1%`; never `-0.0%`."""
    return f"{round(percent, digits) + 0.0:+.{digits}f}%"


def span(estimate: Estimate) -> str:
    """`+0.82 to +1.38`, in percent: two digits, so that the side of zero an end is on shows."""
    return f"{signed(estimate.low, 2)[:-1]} to {signed(estimate.high, 2)[:-1]}"


def plus_minus(estimate: Estimate) -> str:
    """`+1.1% ± 0.3`, with half the width of the interval."""
    return f"{signed(estimate.mean)} ± {(estimate.high - estimate.low) / 2:.1f}"


def effect(estimate: Estimate) -> str:
    """`helps` or `hurts` if the whole interval is on that side of zero, else `no clear difference`."""
    if estimate.low > 0:
        return "helps"
    return "hurts" if estimate.high < 0 else "no clear difference"


def interval_name(verdict: Verdict) -> str:
    """Which interval a row carries, and over what."""
    if verdict.interval == "seeds":
        return f"t, {verdict.n_seeds} seeds"
    return "bootstrap, 1 seed"


def verdict(verdict: Verdict) -> str:
    """`helps out of domain, hurts in domain`."""
    outside, inside = effect(verdict.out_of_domain), effect(verdict.in_domain)
    if outside == inside:
        return outside if outside == "no clear difference" else f"{outside} in and out of domain"
    return f"{outside} out of domain, {inside} in domain"


def sentence(v: Verdict) -> str:
    """One row of the verdict table as a sentence."""
    return (
        f"{v.teacher} {'control' if v.control else 'teacher'}, alpha {v.alpha:g}: "
        f"in-domain {plus_minus(v.in_domain)}, out-of-domain {plus_minus(v.out_of_domain)}: {verdict(v)}"
    )


def headline(findings: Findings) -> str:
    """Answer to: does this teacher help this student? Two or three sentences."""
    best = [t.best for t in findings.teachers if t.best is not None and not t.best.control]
    if not best:
        return "No real teacher has a finished student yet; only controls can be judged."
    helping = [v for v in best if effect(v.out_of_domain) == "helps"]
    inside = [v for v in best if effect(v.in_domain) == "helps"]
    if helping and all(_matching(findings.teachers, v) for v in helping):
        lead = "Out of domain yes, but no more than smoothing does"
    elif helping:
        lead = "Yes, out of domain" if len(helping) == len(best) else "Some do, out of domain"
    elif inside:
        lead = "In domain only"
    else:
        lead = "No clear gain" if any(effect(v.out_of_domain) != "hurts" for v in best) else "No"
    answer = [f"{lead}: {_summary(best, len(helping), len(inside))}."]
    answer += control_sentences(findings.teachers) if helping else []
    if max(v.n_seeds for v in best) == 1:
        answer.append("This is one seed, so training noise is not in the intervals.")
    return " ".join(answer)


def _summary(best: Sequence[Verdict], n_outside: int, n_inside: int) -> str:
    """Every teacher's gains; with many teachers, how many help and the gains of the best."""
    gains = [
        f"{v.teacher} (alpha {v.alpha:g}) gains {plus_minus(v.out_of_domain)} out of domain, "
        f"{plus_minus(v.in_domain)} in domain"
        for v in best
    ]
    if len(best) <= _FEW_TEACHERS:
        return "; ".join(gains)
    top = max(range(len(best)), key=lambda i: best[i].out_of_domain.mean)
    return (
        f"of {len(best)} teachers, {n_outside} help out of domain and {n_inside} in domain; "
        f"best out of domain: {gains[top]}"
    )


def control_sentences(teachers: Sequence[TeacherFinding]) -> list[str]:
    """What each control says about the real teachers' out-of-domain gains."""
    real = [t.best for t in teachers if t.best is not None and not t.best.control]
    gaining = [v for v in real if v.out_of_domain.mean > 0]
    return [_control_sentence(control, gaining) for control in _controls(teachers) if gaining]


def _controls(teachers: Sequence[TeacherFinding]) -> list[Verdict]:
    return [t.best for t in teachers if t.best is not None and t.best.control]


def _matching(teachers: Sequence[TeacherFinding], real: Verdict) -> list[Verdict]:
    """Controls whose out-of-domain gain (point estimate) is as large as that of a real teacher."""
    return [c for c in _controls(teachers) if c.out_of_domain.mean >= real.out_of_domain.mean]


def _control_sentence(control: Verdict, gaining: Sequence[Verdict]) -> str:
    matched = [v for v in gaining if control.out_of_domain.mean >= v.out_of_domain.mean]
    size = plus_minus(control.out_of_domain)
    gain = f"The {control.teacher} control, which knows nothing of the context, gains {size}"
    if not matched:
        return f"{gain} out of domain, less than every real teacher: smoothing alone does not explain theirs."
    names = _join([v.teacher for v in matched])
    theirs = "its gain" if len(matched) == 1 else "their gains"
    return (
        f"{gain} out of domain, as much as or more than {names}: "
        f"smoothing alone is enough to explain {theirs} there."
    )


def notes(results: Results, findings: Findings) -> list[str]:
    """What the numbers can and cannot show, each as one short paragraph."""
    student = results.plan.students[0]
    n = len(findings.verdicts) * 2
    return [
        _seed_note(findings),
        *(control_sentences(findings.teachers) or [_NO_CONTROL]),
        (
            f"The student has {count(student.parameters)} parameters and saw {count(student.tokens)} tokens. "
            "Nothing here says what larger models, longer runs or other text would show."
        ),
        (
            "Scores are raw. Part of an out-of-domain gain can be calibration: a less confident model loses "
            "less where it is wrong. Scores after fitting a temperature, which this report lacks, would tell."
        ),
        (
            f"The table holds {n} intervals at 95%, uncorrected: with no effect anywhere, about "
            f"{n * 0.05:.1f} of them would still exclude zero."
        ),
        (
            "Alpha is chosen and reported on different documents but on the same trained models, so the best "
            "row is still a little flattered."
        ),
        *_cost_note(results),
        *results.plan.notes,
    ]


def _seed_note(findings: Findings) -> str:
    fewest = min(v.n_seeds for v in findings.verdicts)
    most = max(v.n_seeds for v in findings.verdicts)
    if most == 1:
        return (
            "One seed: each interval only says how much the result depends on which documents were "
            "scored. Training noise is not in it, because the seed is the replicate. Run more seeds "
            "before believing a small difference."
        )
    mixed = (
        " Rows with one seed carry a bootstrap over documents instead, which leaves out training noise."
        if fewest == 1
        else ""
    )
    weight = (
        "" if fewest >= _ENOUGH_SEEDS else " Fewer than five seeds screen ideas; they do not settle them."
    )
    return (
        f"The seed is the replicate: intervals are paired t intervals over up to {most} seeds; student and "
        f"no-teacher run share seed, data order and scored documents.{mixed}{weight}"
    )


def _cost_note(results: Results) -> list[str]:
    factors = [f"{factor:.2f} times ({name})" for name, factor in overhead(results).items()]
    if not factors:
        return []
    return [
        (
            "Runs are compared at equal tokens, not equal compute. Per token, a student with a teacher costs "
            f"{_join(factors)} the FLOPs of the student alone, the training of the teacher not counted."
        )
    ]


def count(number: float) -> str:
    """`380K`, `2M`, `52.4B`: three significant digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
