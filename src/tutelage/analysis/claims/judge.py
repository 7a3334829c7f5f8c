"""Every claim judged: supported, contradicted or undecided, with Holm's correction over those announced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.analysis.claims.evidence import View, mean_of
from tutelage.analysis.claims.registry import CLAIMS, missing_for
from tutelage.analysis.stats import POWER, Estimate, Evidence, all_of, holm, t_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.analysis.claims.evidence import Claim, Part
    from tutelage.analysis.gains import Fit
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Results

Answer = Literal["supported", "contradicted", "undecided"]

LEVEL = 0.05
"""Family-wise over the announced claims; of each other claim by itself."""
_TWO = 2
"""Numbers that a spread needs."""
_NAMED = 3


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
        announced: whether the study file lists it, and it can be.
        primary: the gains that decide it.
        answer: of the primary gains.
        tested: its parts with the primary gains; those `beside` have no say in the answer.
        p: two-sided p value of the whole claim; None if it could not be tested.
        adjusted: after Holm's correction over the announced claims; of another claim, p.
        other: its parts with the other gains, each by itself: shown, in no family, and no answer; empty
            without such scores.
        open: why it is undecided and what would decide it; empty if it is decided.
        remark: more to know.
    """

    number: int
    text: str
    announced: bool
    primary: Fit
    answer: Answer
    tested: tuple[Tested, ...]
    p: float | None
    adjusted: float | None
    other: tuple[Tested, ...]
    open: str
    remark: str


def judge_claims(results: Results, findings: Findings) -> tuple[Outcome, ...]:
    """Test every claim in CLAIMS on what is finished.

    Parts with numbers of fewer than two seeds cannot be tested: with a seed there is no spread. A claim is
    supported if all its parts are, contradicted if one is; with a part missing it can only be contradicted.
    """
    views: dict[Fit, View] = {"raw": View(results, findings)}
    if any(verdict.fitted is not None for verdict in findings.verdicts):
        views["unigram"] = View(results, findings, "unigram")
    tests = {
        (number, fit): tuple(_one(part) for part in claim.parts(view))
        for fit, view in views.items()
        for number, claim in CLAIMS.items()
    }
    primary = {number: tests.get((number, claim.primary), ()) for number, claim in CLAIMS.items()}
    announced = {number for number in results.plan.claims if CLAIMS[number].in_family}
    answers = _answers(primary, announced)
    level = LEVEL / max(1, len(announced))
    return tuple(
        Outcome(
            number=number,
            text=claim.text,
            announced=number in announced,
            primary=claim.primary,
            answer=answers[number][0],
            tested=primary[number],
            p=answers[number][1],
            adjusted=answers[number][2],
            other=tests.get((number, "raw" if claim.primary == "unigram" else "unigram"), ()),
            open=_open(results, number, primary[number], level if number in announced else LEVEL)
            if answers[number][0] == "undecided"
            else "",
            remark=_remark(claim, views, primary[number]),
        )
        for number, claim in CLAIMS.items()
    )


def _one(part: Part) -> Tested:
    if len(part.values) < _TWO:
        return Tested(part, None, "undecided")
    evidence = part.evidence()
    return Tested(part, t_interval([*part.values.values()]), _answer(evidence, evidence.p))


def _answer(evidence: Evidence, p: float) -> Answer:
    if p > LEVEL:
        return "undecided"
    return "supported" if evidence.support < evidence.contradict else "contradicted"


def _deciding(tested: Sequence[Tested]) -> list[Tested]:
    return [one for one in tested if not one.part.beside]


def _whole(tested: Sequence[Tested]) -> Evidence | None:
    """Evidence of all deciding parts together; without one of them, nothing can support the claim."""
    parts = _deciding(tested)
    usable = [one.part.evidence() for one in parts if one.effect is not None]
    if not usable:
        return None
    evidence = all_of(usable)
    return evidence if len(usable) == len(parts) else Evidence(1.0, evidence.contradict)


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


def _open(results: Results, number: int, tested: Sequence[Tested], level: float) -> str:
    """What keeps a claim open."""
    lacking = missing_for(results.plan, number)
    if lacking is not None:
        return lacking
    if not tested:
        return "no scores with calibration fitted, which decide it"
    parts = _deciding(tested)
    empty = [one.part.label for one in parts if not one.part.members]
    if empty:
        return f"no finished runs that give: {'; '.join(empty)}"
    short = [one.part for one in parts if one.effect is None]
    return _short(short[0]) if short else _power(parts, level)


def _short(part: Part) -> str:
    """Why a part with members has no two seeds that all of them have."""
    few = {name: sorted(seeds) for name, seeds in part.members.items() if len(seeds) < _TWO}
    if len(few) == len(part.members) and len(mean_of(part.members.values())) == 1:
        return "one tested seed: more seeds would give it an interval"
    lacking = few or {name: sorted(seeds) for name, seeds in part.members.items()}
    shown = [
        f"{name} has {'seeds ' + ', '.join(map(str, seeds)) if seeds else 'none'}"
        for name, seeds in [*lacking.items()][:_NAMED]
    ]
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return (
        f"no two tested seeds that all {len(part.members)} members of the mean have "
        f"({'; '.join(shown)}{more}): {part.label}"
    )


def _power(parts: Sequence[Tested], level: float) -> str:
    """How many seeds would decide it, and which way."""
    against = [one.part for one in parts if one.part.direction() == "contradict"]
    if against:  # one part is enough to contradict, all are needed to support
        counts = [(part, part.seeds_needed(level / len(parts))) for part in against]
        known = [count for _, count in counts if count is not None]
        number, way = (min(known) if known else None), "contradict"
    else:
        each = POWER ** (1 / len(parts))  # all together have the power, if they do not depend on each other
        counts = [(one.part, one.part.seeds_needed(level, each)) for one in parts]
        known = [count for _, count in counts if count is not None]
        number, way = (max(known) if len(known) == len(counts) else None), "support"
    if number is None:
        unlikely = [part.label for part, count in counts if count is None]
        return f"more seeds would hardly {way} it: no clear effect at this spread ({'; '.join(unlikely)})"
    return f"about {number} tested seeds would {way} it (80% power, mean and spread as they are)"


def _remark(claim: Claim, views: Mapping[Fit, View], tested: Sequence[Tested]) -> str:
    return claim.remark(views[claim.primary]) if any(one.part.values for one in tested) else ""
