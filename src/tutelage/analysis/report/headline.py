"""Word the headline answer of a study, and the limits of its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from tutelage.analysis.claims.judge import LEVEL
from tutelage.analysis.stats import exceeds, holm
from tutelage.analysis.tables import overhead
from tutelage.analysis.words import (
    NO_DIFFERENCE,
    ONE_SEED,
    beside,
    effect,
    join,
    plus_minus,
    score_warnings,
)
from tutelage.files import short
from tutelage.types import CHANGED_TEXT, FIRST_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tutelage.analysis.claims.judge import ClaimResult
    from tutelage.analysis.gains import Side
    from tutelage.analysis.stats import Estimate
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.results import Results

_SIDES: tuple[Side, Side] = ("in_domain", "out_of_domain")


def supported(findings: Findings, student: str) -> dict[tuple[int, Side], str]:
    """Effects of real teachers on one student: "helps" or "hurts", by cell and side; the rest is missing.

    The family is every arm that could have become a teacher's best one, on both sides, raw: so the choice
    of the best costs nothing. Each is a two-sided paired t test over seeds, and Holm's correction over all
    of them keeps the chance of one false word at 5%. One seed is in no family.
    """
    cells = {v.cell for v in findings.verdicts if v.student == student and v.stage is None and v.judged}
    taught = {v.cell for v in findings.verdicts if v.teacher is not None and not v.control}
    constant = {v.cell for v in findings.verdicts if v.constant}
    teachers = {v.cell: v.teacher for v in findings.verdicts}
    with_constants = {teachers[cell] for cell in cells & taught & constant}
    family = {c for c in cells & taught if c in constant or teachers[c] not in with_constants}
    rows = findings.gains.sides.filter(pl.col("cell").is_in([*family]), split="test", fit="raw")
    keys: list[tuple[int, Side]] = []
    evidence = []
    for cell in sorted(family):
        for side in _SIDES:
            gains = rows.filter(cell=cell, role=side)["gain"].to_list()
            if len(gains) > 1:
                keys.append((cell, side))
                evidence.append(exceeds(gains))
    adjusted = holm([one.p for one in evidence])
    return {
        key: "helps" if one.support < one.contradict else "hurts"
        for key, one, p in zip(keys, evidence, adjusted, strict=True)
        if p <= LEVEL
    }


_NO_CONTROL = (
    "No comparison with a control was made here: a teacher that only smooths the targets, such as the "
    "unigram, can gain out of domain too, so a gain alone does not show that the teacher taught anything."
)
_NO_REAL = "No real teacher has a finished student yet; only controls can be judged."
_NO_CHOICE = (
    "Not judged: an arm is chosen by validation text out of domain, and no such text is scored; add a domain "
    "of other text. The table has the gains of every arm."
)
_ONLY_AFTER = (
    "Not judged: no student of a real teacher is finished together with the same student untaught, before "
    "post-training. The table has the gains after it."
)
_ENOUGH_SEEDS = 5
_FEW = 2
_NAMED = 5


def headline(findings: Findings, claims: Sequence[ClaimResult]) -> list[str]:
    """Answer to: does this teacher help this student? One paragraph per student.

    It counts only what survives a correction for everything it looks at. Where the study announced claims,
    they are that family, whose answers stand in a table, and the paragraphs only show numbers.
    """
    students = list(dict.fromkeys(pair.student.name for pair in findings.pairs))
    announced = any(claim.announced for claim in claims)
    answers = []
    for student in students:
        pairs = [pair for pair in findings.pairs if pair.student.name == student]
        if len(students) == 1 or any(pair.best is not None for pair in pairs):
            name = "" if len(students) == 1 else f"{student}: "
            if not _best(pairs):
                answers.append(name + _why_no_best(findings, student))
            elif announced:
                answers.append(_shown(pairs, name))
            else:
                answers.append(_answer(findings, pairs, student, name))
    return answers


def _why_no_best(findings: Findings, student: str) -> str:
    real = [v for v in findings.verdicts if v.student == student and v.teacher and not v.control]
    if not real:
        return _NO_REAL
    return _NO_CHOICE if any(v.stage is None for v in real) else _ONLY_AFTER


def tally(claims: Sequence[ClaimResult]) -> str:
    """How the announced claims came out; empty if none was announced."""
    announced = [claim for claim in claims if claim.announced]
    if not announced:
        return ""
    parts = []
    for answer in ("supported", "contradicted", "undecided"):
        numbers = [str(outcome.number) for outcome in announced if outcome.answer == answer]
        parts.append(f"{len(numbers)} {answer}{f' ({join(numbers)})' if numbers else ''}")
    noun = "claim" if len(announced) == 1 else "claims"
    return f"Of {len(announced)} announced {noun}: {', '.join(parts)}."


def _best(pairs: Sequence[PairFinding]) -> list[Verdict]:
    return [pair.best for pair in pairs if pair.best is not None and not pair.best.control]


def _shown(pairs: Sequence[PairFinding], name: str) -> str:
    """Numbers of one student, without a word on whether they are more than noise."""
    best = [v for v in _best(pairs) if v.judged] or _best(pairs)
    return f"{name or 'Gains: '}{_numbers(best)}."


def _answer(findings: Findings, pairs: Sequence[PairFinding], student: str, name: str) -> str:
    best, effects = _best(pairs), supported(findings, student)
    judged = [v for v in best if v.judged]
    if not judged:
        return f"{name}Not judged: {_numbers(best)}. {ONE_SEED}"
    outside = {v.cell: effects.get((v.cell, "out_of_domain")) for v in judged}
    helping = [v for v in judged if outside[v.cell] == "helps"]
    inside = [v for v in judged if effects.get((v.cell, "in_domain")) == "helps"]
    controls = _controls(pairs)
    if helping and all(any(_as_much(c, v) for c in controls) for v in helping):
        lead = "Out of domain yes, but no more than smoothing does"
    elif helping and all(any(_explains(findings, c, v) for c in controls) for v in helping):
        lead = "Out of domain yes, but not clearly more than smoothing does"
    elif helping:
        lead = "Yes, out of domain" if len(helping) == len(best) else "Some do, out of domain"
    elif inside:
        lead = "In domain only"
    else:
        lead = "No clear gain" if any(word != "hurts" for word in outside.values()) else "No"
    answer = [f"{name}{lead}: {_summary(judged, len(helping), len(inside))}."]
    if helping:
        answer += [*control_sentences(findings, pairs), *_fitted_sentence(helping)]
    if len(judged) < len(best):
        answer.append(f"{len(best) - len(judged)} more with one seed are shown, not judged.")
    return " ".join(answer)


def _numbers(best: Sequence[Verdict]) -> str:
    """Every teacher's gains; of many teachers those of the best."""
    gains = [
        f"{v.teacher} ({beside(v)}, {v.arm}) gains {plus_minus(v.out_of_domain)} out of domain, "
        f"{plus_minus(v.in_domain)} in domain"
        for v in best
    ]
    if len(best) <= _FEW:
        return "; ".join(gains)
    top = max(range(len(best)), key=lambda i: best[i].out_of_domain.mean)
    return f"best of {len(best)} teachers out of domain: {gains[top]}"


def _summary(best: Sequence[Verdict], n_outside: int, n_inside: int) -> str:
    """The numbers; with many teachers also how many help."""
    if len(best) <= _FEW:
        return _numbers(best)
    return (
        f"{n_outside} of {len(best)} teachers help out of domain and {n_inside} in domain, corrected for all "
        f"their alphas; {_numbers(best)}"
    )


def _fitted_sentence(helping: Sequence[Verdict]) -> list[str]:
    """What is left of the out-of-domain gains when calibration is fitted."""
    fitted = [(v, v.fitted) for v in helping if v.fitted is not None]
    if not fitted:
        return []
    kept = sum(effect(estimate) == "helps" for _, estimate in fitted)
    if len(fitted) <= _FEW:
        left = join([_left(v, estimate) for v, estimate in fitted])
        return [f"With calibration fitted, {left} out of domain."]
    return [f"With calibration fitted, {kept} of these {len(fitted)} intervals are still above zero there."]


def _left(verdict: Verdict, fitted: Estimate) -> str:
    """What is left of one teacher's gain; an interval that holds zero keeps nothing."""
    size = plus_minus(fitted)
    if effect(fitted) == "helps":
        return f"{verdict.teacher} keeps {size}"
    return f"{verdict.teacher} has no clear gain left ({size})"


def control_sentences(findings: Findings, pairs: Sequence[PairFinding]) -> list[str]:
    """What each control says about the real teachers' out-of-domain gains, of one student.

    Of one seed nothing: neither its control's gain nor its teachers' is told from noise.
    """
    gaining = [v for v in _best(pairs) if v.judged and v.out_of_domain.mean > 0]
    return [_control_sentence(findings, control, gaining) for control in _controls(pairs) if gaining]


def _controls(pairs: Sequence[PairFinding]) -> list[Verdict]:
    best = [pair.best for pair in pairs if pair.best is not None]
    return [v for v in best if v.control and v.judged]


def _as_much(control: Verdict, real: Verdict) -> bool:
    """Whether the control's out-of-domain gain (point estimate) is as large as that of a real teacher."""
    return control.out_of_domain.mean >= real.out_of_domain.mean


def _explains(findings: Findings, control: Verdict, real: Verdict) -> bool:
    """Whether the real teacher's out-of-domain gain is not clearly more than the control's.

    By a paired t test over the seeds that both have: a larger mean alone is a coin's toss.
    """
    rows = findings.gains.sides.filter(split="test", fit="raw", role="out_of_domain")
    mine, theirs = (rows.filter(cell=v.cell).select("seed", "gain") for v in (real, control))
    both = mine.join(theirs, on="seed")
    more = both["gain"] - both["gain_right"]
    return len(more) <= 1 or exceeds(more.to_numpy()).support > LEVEL / 2


def _control_sentence(findings: Findings, control: Verdict, gaining: Sequence[Verdict]) -> str:
    matched = [v for v in gaining if _explains(findings, control, v)]
    size = plus_minus(control.out_of_domain)
    gain = f"The {control.teacher} control, which knows nothing of the context, gains {size} out of domain"
    if not matched:
        return f"{gain}, clearly less than every real teacher: smoothing alone does not explain theirs."
    few = len(matched) <= _FEW
    names = join([str(v.teacher) for v in matched]) if few else f"{len(matched)} of {len(gaining)} teachers"
    theirs = "its gain" if len(matched) == 1 else "their gains"
    if all(_as_much(control, v) for v in matched):
        return (
            f"{gain}, as much as or more than {names}: smoothing alone is enough to explain {theirs} there."
        )
    return f"{gain}, not clearly less than {names}: smoothing alone may explain {theirs} there."


def notes(results: Results, findings: Findings) -> list[str]:
    """What the numbers can and cannot show, each as one short paragraph."""
    n = sum(v.judged for v in findings.verdicts) * 2
    plan = results.plan
    sizes = join([f"{short(s.parameters)} parameters on {short(s.tokens)} tokens" for s in plan.students])
    subject = "The student has" if len(plan.students) == 1 else "The students have"
    controls = [
        sentence for group in _by_student(findings) for sentence in control_sentences(findings, group)
    ]
    unbeaten = not any(v.control and v.teacher for v in findings.verdicts)
    return [
        *(f"Warning: {warning}" for warning in warnings_of_scores(results)),
        _seed_note(findings),
        *_contents_note(results, findings),
        *_text_note(findings),
        *(controls or [_NO_CONTROL] * unbeaten),
        f"{subject} {sizes}. Nothing here says what larger models, longer runs or other text would show.",
        _fitted_note(findings),
        *_many_note(n),
        (
            "In the tables, alpha is chosen and reported on different documents but on the same trained "
            "models, so the best row is still a little flattered. The tests of claims take it from the study "
            "file, or choose it on seeds that they do not test."
        ),
        *_cost_note(results),
        *plan.notes,
        *results.warnings,
    ]


def warnings_of_scores(results: Results) -> list[str]:
    """Sentences on scores that are not what they seem, as `words.score_warnings` gives them."""
    some = results.scores.filter(pl.col("metric").is_in([FIRST_WINDOWS, CHANGED_TEXT]))
    return score_warnings(some.iter_rows(named=True))


def _many_note(n: int) -> list[str]:
    if not n:
        return []
    return [
        (
            f"The tables of verdicts hold {n} raw intervals at 95%, uncorrected: with no effect anywhere, "
            f"about {n * 0.05:.1f} of them would still exclude zero. The claims are corrected for their "
            "number, and so is the headline: for every alpha of every real teacher, in and out of domain "
            "(Holm)."
        )
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
        return f"{ONE_SEED} Evaluation noise, which is shown, is only that of the choice of documents."
    mixed = " Rows with one seed are shown, not judged." if fewest == 1 else ""
    weight = (
        "" if fewest >= _ENOUGH_SEEDS else " Fewer than five seeds screen ideas; they do not settle them."
    )
    return (
        f"The seed is the replicate: intervals are paired t intervals over up to {most} seeds; student and "
        f"no-teacher run share seed, data order and scored documents.{mixed}{weight}"
    )


def _contents_note(results: Results, findings: Findings) -> list[str]:
    """What the intervals over seeds contain, and what they do not."""
    judged = [v for v in findings.verdicts if v.judged]
    if not judged:
        return []
    each, once = _named(v for v in judged if v.n_teachers > 1), _named(v for v in judged if v.n_teachers == 1)
    said = (
        "The intervals over seeds contain what other initial weights and another data order of the student "
    )
    said += "would change"
    if each:
        said += f", and what training its teacher again would ({each}: one for each seed)"
    said += "."
    if once:
        said += (
            f" They do not contain training a teacher again ({once}: trained once for all seeds): another "
            "run of the same recipe can give other gains."
        )
    twins = 1 + int(results.runs["twin"].to_numpy().max())
    if twins > 1:
        said += f" Each gain is against the mean of {twins} untaught runs of its seed, on the same batches."
    return [said]


def _named(verdicts: Iterable[Verdict]) -> str:
    """The teachers by name; of many, their number."""
    names = [*dict.fromkeys(str(v.teacher) for v in verdicts)]
    return join(names) if len(names) <= _NAMED else f"{len(names)} teachers"


def _text_note(findings: Findings) -> list[str]:
    """Whether a gain out of domain hangs on one text."""
    best = [pair.best for pair in findings.pairs if pair.best is not None and not pair.best.control]
    clear = [
        v.texts["raw"]
        for v in best
        if v.judged and "raw" in v.texts and effect(v.out_of_domain) != NO_DIFFERENCE
    ]
    if not clear:
        return []
    still = sum(spread.low > 0 or spread.high < 0 for spread in clear)
    steady = sum(spread.least * spread.most > 0 for spread in clear)
    return [
        (
            f"Intervals over seeds take the {clear[0].n} texts out of domain as given. Gains at best alphas "
            f"that are clear over seeds: {len(clear)}; clear with the texts as a sample too: {still}; of the "
            f"same sign whichever text is left out: {steady}. The table of every teacher and alpha has both."
        )
    ]


def _cost_note(results: Results) -> list[str]:
    factors = [f"{factor:.2f} times ({name})" for name, factor in overhead(results).items()]
    if not factors:
        return []
    mean = " (mean over students)" if len(results.plan.students) > 1 else ""
    cached = [teacher.name for teacher in results.plan.teachers if teacher.targets]
    made = f"; nor are the forward passes that made the cached targets of {join(cached)}" if cached else ""
    return [
        (
            "Gains are at equal tokens, not equal compute. Per token, a student with a teacher costs "
            f"{join(factors)} the FLOPs of the student alone{mean}, the training of the teacher not "
            f"counted{made}."
        )
    ]
