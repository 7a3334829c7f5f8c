"""The headline answer of a study, and what its numbers cannot show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.analysis.costs import overhead
from tutelage.analysis.words import count, effect, join, plus_minus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.outcomes import Outcome
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.results import Results

_NO_CONTROL = (
    "No comparison with a control was made here: a teacher that only smooths the targets, such as the "
    "unigram, can gain out of domain too, so a gain alone does not show that the teacher taught anything."
)
_ENOUGH_SEEDS = 5
_FEW = 2


def headline(findings: Findings) -> list[str]:
    """Answer to: does this teacher help this student? One paragraph per student."""
    students = list(dict.fromkeys(pair.student.name for pair in findings.pairs))
    answers = []
    for student in students:
        pairs = [pair for pair in findings.pairs if pair.student.name == student]
        if len(students) == 1 or any(pair.best is not None for pair in pairs):
            answers.append(_answer(pairs, "" if len(students) == 1 else f"{student}: "))
    return answers


def tally(outcomes: Sequence[Outcome]) -> str:
    """How the announced claims came out; empty if none was announced."""
    announced = [outcome for outcome in outcomes if outcome.announced]
    if not announced:
        return ""
    parts = []
    for answer in ("supported", "contradicted", "undecided"):
        numbers = [str(outcome.number) for outcome in announced if outcome.answer == answer]
        parts.append(f"{len(numbers)} {answer}{f' ({join(numbers)})' if numbers else ''}")
    noun = "claim" if len(announced) == 1 else "claims"
    return f"Of {len(announced)} announced {noun}: {', '.join(parts)}."


def _answer(pairs: Sequence[PairFinding], name: str) -> str:
    best = [pair.best for pair in pairs if pair.best is not None and not pair.best.control]
    if not best:
        return f"{name}No real teacher has a finished student yet; only controls can be judged."
    helping = [v for v in best if effect(v.out_of_domain) == "helps"]
    inside = [v for v in best if effect(v.in_domain) == "helps"]
    if helping and all(_matching(pairs, v) for v in helping):
        lead = "Out of domain yes, but no more than smoothing does"
    elif helping:
        lead = "Yes, out of domain" if len(helping) == len(best) else "Some do, out of domain"
    elif inside:
        lead = "In domain only"
    else:
        lead = "No clear gain" if any(effect(v.out_of_domain) != "hurts" for v in best) else "No"
    answer = [f"{name}{lead}: {_summary(best, len(helping), len(inside))}."]
    if helping:
        answer += [*control_sentences(pairs), *_fitted_sentence(helping)]
    if max(v.n_seeds for v in best) == 1:
        answer.append("This is one seed, so training noise is not in the intervals.")
    return " ".join(answer)


def _summary(best: Sequence[Verdict], n_outside: int, n_inside: int) -> str:
    """Every teacher's gains; with many teachers, how many help and the gains of the best."""
    gains = [
        f"{v.teacher} ({v.arm}) gains {plus_minus(v.out_of_domain)} out of domain, "
        f"{plus_minus(v.in_domain)} in domain"
        for v in best
    ]
    if len(best) <= _FEW:
        return "; ".join(gains)
    top = max(range(len(best)), key=lambda i: best[i].out_of_domain.mean)
    return (
        f"of {len(best)} teachers, {n_outside} help out of domain and {n_inside} in domain; "
        f"best out of domain: {gains[top]}"
    )


def _fitted_sentence(helping: Sequence[Verdict]) -> list[str]:
    """What is left of the out-of-domain gains when calibration is fitted."""
    fitted = [(v, v.fitted) for v in helping if v.fitted is not None]
    if not fitted:
        return []
    kept = sum(effect(estimate) == "helps" for _, estimate in fitted)
    if len(fitted) <= _FEW:
        left = join([f"{v.teacher} keeps {plus_minus(estimate)}" for v, estimate in fitted])
        return [f"With calibration fitted, {left} out of domain."]
    return [f"With calibration fitted, {kept} of these {len(fitted)} still help out of domain."]


def control_sentences(pairs: Sequence[PairFinding]) -> list[str]:
    """What each control says about the real teachers' out-of-domain gains, of one student."""
    real = [pair.best for pair in pairs if pair.best is not None and not pair.best.control]
    gaining = [v for v in real if v.out_of_domain.mean > 0]
    return [_control_sentence(control, gaining) for control in _controls(pairs) if gaining]


def _controls(pairs: Sequence[PairFinding]) -> list[Verdict]:
    return [pair.best for pair in pairs if pair.best is not None and pair.best.control]


def _matching(pairs: Sequence[PairFinding], real: Verdict) -> list[Verdict]:
    """Controls whose out-of-domain gain (point estimate) is as large as that of a real teacher."""
    return [c for c in _controls(pairs) if c.out_of_domain.mean >= real.out_of_domain.mean]


def _control_sentence(control: Verdict, gaining: Sequence[Verdict]) -> str:
    matched = [v for v in gaining if control.out_of_domain.mean >= v.out_of_domain.mean]
    size = plus_minus(control.out_of_domain)
    gain = f"The {control.teacher} control, which knows nothing of the context, gains {size}"
    if not matched:
        return f"{gain} out of domain, less than every real teacher: smoothing alone does not explain theirs."
    few = len(matched) <= _FEW
    names = join([str(v.teacher) for v in matched]) if few else f"{len(matched)} of {len(gaining)} teachers"
    theirs = "its gain" if len(matched) == 1 else "their gains"
    return (
        f"{gain} out of domain, as much as or more than {names}: "
        f"smoothing alone is enough to explain {theirs} there."
    )


def notes(results: Results, findings: Findings) -> list[str]:
    """What the numbers can and cannot show, each as one short paragraph."""
    n = len(findings.verdicts) * 2
    plan = results.plan
    sizes = join([f"{count(s.parameters)} parameters on {count(s.tokens)} tokens" for s in plan.students])
    subject = "The student has" if len(plan.students) == 1 else "The students have"
    controls = [sentence for group in _by_student(findings) for sentence in control_sentences(group)]
    return [
        _seed_note(findings),
        *(controls or [_NO_CONTROL]),
        f"{subject} {sizes}. Nothing here says what larger models, longer runs or other text would show.",
        _fitted_note(findings),
        (
            f"The tables of verdicts hold {n} raw intervals at 95%, uncorrected: with no effect anywhere, "
            f"about {n * 0.05:.1f} of them would still exclude zero. Only the claims are corrected for their "
            "number."
        ),
        (
            "In the tables, alpha is chosen and reported on different documents but on the same trained "
            "models, so the best row is still a little flattered. The tests of claims choose it for each "
            "seed by the other seeds."
        ),
        *_cost_note(results),
        *plan.notes,
    ]


def _by_student(findings: Findings) -> list[list[PairFinding]]:
    names = dict.fromkeys(pair.student.name for pair in findings.pairs)
    return [[pair for pair in findings.pairs if pair.student.name == name] for name in names]


def _fitted_note(findings: Findings) -> str:
    if any(v.fitted is not None for v in findings.verdicts):
        return (
            "Part of a raw gain out of domain can be calibration: a less confident model loses less where it "
            "is wrong. Fitted gains give every model, the untaught one too, the temperature and the mixture "
            "with the unigram that suit it best on the validation split of each text; what vanishes there "
            "was smoothing, what stays is knowledge."
        )
    return (
        "Scores are raw. Part of an out-of-domain gain can be calibration: a less confident model loses "
        "less where it is wrong. Scores after fitting a temperature, which these runs lack, would tell."
    )


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
            "Gains are at equal tokens, not equal compute. Per token, a student with a teacher costs "
            f"{join(factors)} the FLOPs of the student alone, the training of the teacher not counted."
        )
    ]
