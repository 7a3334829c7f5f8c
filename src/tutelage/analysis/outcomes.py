"""Every claim judged: supported, contradicted or undecided, with Holm's correction over those announced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.analysis.claims import CLAIMS, missing_for
from tutelage.analysis.stats import Estimate, Evidence, all_of, holm, t_interval
from tutelage.analysis.view import View

if TYPE_CHECKING:
    from tutelage.analysis.parts import Claim, Part
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Results

Answer = Literal["supported", "contradicted", "undecided"]

LEVEL = 0.05
"""Family-wise over the announced claims; of each other claim by itself."""


@dataclass(frozen=True, slots=True)
class Tested:
    """One part of a claim with what came out.

    Attributes:
        part: the numbers and the statement.
        effect: their mean and 95% t interval over seeds; None with less than two seeds.
        holds: answer for this part by itself, uncorrected.
    """

    part: Part
    effect: Estimate | None
    holds: Answer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a study says of one claim.

    Attributes:
        number: in CLAIMS.
        text: the claim.
        announced: whether the study file lists it.
        answer: of raw gains.
        tested: its parts.
        p: two-sided p value of the whole claim; None if it could not be tested.
        adjusted: after Holm's correction over the announced claims; of another claim, p.
        fitted: answer with temperature and unigram mixture fitted, corrected likewise; None without such
            scores.
        fitted_tested: its parts with the fitted gains.
        open: why it is undecided and what would decide it; empty if it is decided.
        remark: more to know.
    """

    number: int
    text: str
    announced: bool
    answer: Answer
    tested: tuple[Tested, ...]
    p: float | None
    adjusted: float | None
    fitted: Answer | None
    fitted_tested: tuple[Tested, ...]
    open: str
    remark: str


def judge_claims(results: Results, findings: Findings) -> tuple[Outcome, ...]:
    """Test every claim in CLAIMS on what is finished.

    Parts with numbers of fewer than two seeds cannot be tested: with a seed there is no spread. A claim is
    supported if all its parts are, contradicted if one is; with a part missing it can only be contradicted.
    """
    raw, fitted = View(results, findings), View(results, findings, "unigram")
    tests = {number: _test(claim.parts(raw)) for number, claim in CLAIMS.items()}
    again: dict[int, tuple[Tested, ...]] = {}
    if any(verdict.fitted is not None for verdict in findings.verdicts):
        again = {number: _test(claim.parts(fitted)) for number, claim in CLAIMS.items()}
    announced = set(results.plan.claims)
    answers, fitted_answers = _answers(tests, announced), _answers(again, announced)
    level = LEVEL / max(1, len(announced))
    return tuple(
        Outcome(
            number=number,
            text=claim.text,
            announced=number in announced,
            answer=answers[number][0],
            tested=tests[number],
            p=answers[number][1],
            adjusted=answers[number][2],
            fitted=fitted_answers[number][0] if number in again else None,
            fitted_tested=again.get(number, ()),
            open=_open(results, number, tests[number], level if number in announced else LEVEL)
            if answers[number][0] == "undecided"
            else "",
            remark=_remark(claim, raw, tests[number]),
        )
        for number, claim in CLAIMS.items()
    )


def _test(parts: list[Part]) -> tuple[Tested, ...]:
    return tuple(_one(part) for part in parts)


def _one(part: Part) -> Tested:
    if len(part.values) < 2:  # noqa: PLR2004 - one value has no spread
        return Tested(part, None, "undecided")
    evidence = part.evidence()
    return Tested(part, t_interval([*part.values.values()]), _answer(evidence, evidence.p))


def _answer(evidence: Evidence, p: float) -> Answer:
    if p > LEVEL:
        return "undecided"
    return "supported" if evidence.support < evidence.contradict else "contradicted"


def _whole(tested: tuple[Tested, ...]) -> Evidence | None:
    """Evidence of all parts together; without one of them, nothing can support the claim."""
    usable = [one.part.evidence() for one in tested if one.effect is not None]
    if not usable:
        return None
    evidence = all_of(usable)
    return evidence if len(usable) == len(tested) else Evidence(1.0, evidence.contradict)


def _answers(
    tests: dict[int, tuple[Tested, ...]], announced: set[int]
) -> dict[int, tuple[Answer, float | None, float | None]]:
    """(answer, p, adjusted p) by claim. An announced claim that cannot be tested stays in the family."""
    evidence = {number: _whole(tested) for number, tested in tests.items()}
    p_values = {number: 1.0 if found is None else found.p for number, found in evidence.items()}
    family = [number for number in tests if number in announced]
    adjusted = p_values | dict(zip(family, holm([p_values[number] for number in family]), strict=True))
    answers: dict[int, tuple[Answer, float | None, float | None]] = {}
    for number, found in evidence.items():
        if found is None:
            answers[number] = ("undecided", None, None)
        else:
            answers[number] = (_answer(found, adjusted[number]), p_values[number], adjusted[number])
    return answers


def _open(results: Results, number: int, tested: tuple[Tested, ...], level: float) -> str:
    """What keeps a claim open."""
    lacking = missing_for(results.plan, number)
    if lacking is not None:
        return lacking
    empty = [one.part.label for one in tested if not one.part.values]
    if empty:
        return f"no finished runs that give: {'; '.join(empty)}"
    if any(one.effect is None for one in tested):
        return "one seed: more seeds would give it an interval"
    counts = [(one, one.part.seeds_needed(level)) for one in tested if one.part.evidence().p > level]
    unlikely = [one.part.label for one, count in counts if count is None]
    if unlikely:
        return f"more seeds would hardly decide it: no clear effect at this spread ({'; '.join(unlikely)})"
    known = [count for _, count in counts if count is not None]
    if not known:
        return "its parts are settled one by one but not together; one or two more seeds"
    return f"about {max(known)} seeds, if mean and spread stay as they are"


def _remark(claim: Claim, view: View, tested: tuple[Tested, ...]) -> str:
    return claim.remark(view) if any(one.part.values for one in tested) else ""
