"""Judge a study once: its gains, verdicts and claims in one object that is printed, drawn and tabled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.analysis.accuracy import measure_accuracy
from tutelage.analysis.claims.evidence import GainsBySeed, mean_of
from tutelage.analysis.claims.registry import CLAIMS, missing_of
from tutelage.analysis.stats import POWER, Estimate, Evidence, all_of, holm, t_interval
from tutelage.analysis.verdicts import judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.analysis.accuracy import Accuracies
    from tutelage.analysis.claims.evidence import Test
    from tutelage.analysis.gains import Fit
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Results

Answer = Literal["supported", "contradicted", "undecided"]

LEVEL = 0.05
"""Family-wise over the announced claims; of each other claim by itself."""
_TWO = 2
"""Numbers that a spread needs."""
_NAMED = 3
_OTHER: dict[Fit, Fit] = {"raw": "unigram", "unigram": "raw"}


@dataclass(frozen=True, slots=True)
class TestResult:
    """The outcome of one test.

    Attributes:
        test: the numbers and the statement.
        effect: their mean and 95% t interval over seeds; None with less than two seeds.
        holds: answer of this test by itself, uncorrected.
    """

    test: Test
    effect: Estimate | None
    holds: Answer


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """What a study says of one claim.

    Attributes:
        number: in CLAIMS.
        text: the claim.
        announced: whether the study file lists it, and it can be announced.
        primary: the gains that decide it.
        answer: by the primary gains.
        tests: its tests with the primary gains; those `beside` have no say in the answer.
        p: two-sided p value of the whole claim; None if it could not be tested.
        adjusted: after Holm's correction over the announced claims; of another claim, p.
        other_fit: the gains beside the primary ones.
        other: its tests with those gains, each by itself: shown, in no family, and no answer; empty without
            such scores.
        open: why it is undecided and what would decide it; empty if it is decided.
        remark: more to know.
    """

    number: int
    text: str
    announced: bool
    primary: Fit
    answer: Answer
    tests: tuple[TestResult, ...]
    p: float | None
    adjusted: float | None
    other_fit: Fit
    other: tuple[TestResult, ...]
    open: str
    remark: str


@dataclass(frozen=True, eq=False)
class JudgedStudy:
    """A study's results with everything that is concluded from them.

    Attributes:
        results: what was measured.
        findings: gains and verdicts.
        by_fit: the gains by seed, raw and, where scored, with calibration fitted.
        claims: every claim in CLAIMS.
        accuracies: on downstream tasks, which no claim is about.
    """

    results: Results
    findings: Findings
    by_fit: Mapping[Fit, GainsBySeed]
    claims: tuple[ClaimResult, ...]
    accuracies: Accuracies

    @property
    def announced(self) -> tuple[ClaimResult, ...]:
        """The claims that the study announced."""
        return tuple(claim for claim in self.claims if claim.announced)


def judge_study(results: Results) -> JudgedStudy:
    """Judge what is finished.

    Raises:
        UserError: as `verdicts.judge`.
    """
    findings = judge(results)
    by_fit = gains_by_fit(results, findings)
    accuracies = measure_accuracy(results, findings.gains)
    return JudgedStudy(results, findings, by_fit, judge_claims(by_fit), accuracies)


def gains_by_fit(results: Results, findings: Findings) -> dict[Fit, GainsBySeed]:
    """The gains by seed that claims are tested on: raw and, where scored, with calibration fitted."""
    fits: list[Fit] = ["raw"]
    if any(verdict.fitted is not None for verdict in findings.verdicts):
        fits.append("unigram")
    return {fit: GainsBySeed(results, findings, fit) for fit in fits}


def judge_claims(by_fit: Mapping[Fit, GainsBySeed]) -> tuple[ClaimResult, ...]:
    """Test every claim in CLAIMS.

    Tests with numbers of fewer than two seeds say nothing: with one seed there is no spread. A claim is
    supported if all its tests are, contradicted if one is; with a test missing it can only be contradicted.
    """
    plan = by_fit["raw"].plan
    lacking = missing_of(plan)
    results = {
        (number, fit): tuple(_result(test) for test in claim.tests(by_seed))
        for fit, by_seed in by_fit.items()
        for number, claim in CLAIMS.items()
    }
    primary = {number: results.get((number, claim.primary), ()) for number, claim in CLAIMS.items()}
    announced = {number for number in plan.claims if CLAIMS[number].in_family}
    answers = _answers(primary, announced)
    found = []
    for number, claim in CLAIMS.items():
        answer, p, adjusted = answers[number]
        tests = primary[number]
        level = LEVEL / max(1, len(announced)) if number in announced else LEVEL
        open_ = lacking.get(number) or _open(tests, level) if answer == "undecided" else ""
        shown = any(one.test.values for one in tests)
        found.append(
            ClaimResult(
                number=number,
                text=claim.text,
                announced=number in announced,
                primary=claim.primary,
                answer=answer,
                tests=tests,
                p=p,
                adjusted=adjusted,
                other_fit=_OTHER[claim.primary],
                other=results.get((number, _OTHER[claim.primary]), ()),
                open=open_,
                remark=claim.remark(by_fit[claim.primary]) if shown else "",
            )
        )
    return tuple(found)


def _result(test: Test) -> TestResult:
    values = [*test.values.values()]
    if len(values) < _TWO:
        return TestResult(test, None, "undecided")
    evidence = test.evidence()
    return TestResult(test, t_interval(values), _answer(evidence, evidence.p))


def _answer(evidence: Evidence, p: float) -> Answer:
    if p > LEVEL:
        return "undecided"
    return "supported" if evidence.support < evidence.contradict else "contradicted"


def _deciding(results: Sequence[TestResult]) -> list[TestResult]:
    return [one for one in results if not one.test.beside]


def _whole(results: Sequence[TestResult]) -> Evidence | None:
    """Evidence of all deciding tests together; without one of them, nothing can support the claim."""
    deciding = _deciding(results)
    usable = [one.test.evidence() for one in deciding if one.effect is not None]
    if not usable:
        return None
    evidence = all_of(usable)
    return evidence if len(usable) == len(deciding) else Evidence(1.0, evidence.contradict)


def _answers(
    results: Mapping[int, Sequence[TestResult]], announced: set[int]
) -> dict[int, tuple[Answer, float | None, float | None]]:
    """(answer, p, adjusted p) by claim. An announced claim that cannot be tested stays in the family."""
    evidence = {number: _whole(tests) for number, tests in results.items()}
    p_values = {number: 1.0 if found is None else found.p for number, found in evidence.items()}
    family = [number for number in results if number in announced]
    adjusted = p_values | dict(zip(family, holm([p_values[number] for number in family]), strict=True))
    answers: dict[int, tuple[Answer, float | None, float | None]] = {}
    for number, found in evidence.items():
        if found is None:
            answers[number] = ("undecided", None, None)
        else:
            answers[number] = (_answer(found, adjusted[number]), p_values[number], adjusted[number])
    return answers


def _open(results: Sequence[TestResult], level: float) -> str:
    """Why a claim that has runs is undecided."""
    if not results:
        return "no scores with calibration fitted, which decide it"
    deciding = _deciding(results)
    empty = [one.test.label for one in deciding if not one.test.members]
    if empty:
        return f"no finished runs that give: {'; '.join(empty)}"
    short = [one.test for one in deciding if one.effect is None]
    return _too_few_seeds(short[0]) if short else _seeds_to_decide([one.test for one in deciding], level)


def _too_few_seeds(test: Test) -> str:
    """Why a test with members has no two seeds that all of them have."""
    few = {name: sorted(seeds) for name, seeds in test.members.items() if len(seeds) < _TWO}
    if len(few) == len(test.members) and len(mean_of(test.members.values())) == 1:
        return "one tested seed: more seeds would give it an interval"
    lacking = few or {name: sorted(seeds) for name, seeds in test.members.items()}
    shown = [
        f"{name} has {'seeds ' + ', '.join(map(str, seeds)) if seeds else 'none'}"
        for name, seeds in [*lacking.items()][:_NAMED]
    ]
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return (
        f"no two tested seeds that all {len(test.members)} members of the mean have "
        f"({'; '.join(shown)}{more}): {test.label}"
    )


def _seeds_to_decide(tests: Sequence[Test], level: float) -> str:
    """How many seeds would decide a claim, and which way."""
    against = [test for test in tests if test.direction() == "contradict"]
    if against:  # one test is enough to contradict, all are needed to support
        counts = [(test, test.seeds_needed(level / len(tests))) for test in against]
        known = [count for _, count in counts if count is not None]
        number, way = (min(known) if known else None), "contradict"
    else:
        each = POWER ** (1 / len(tests))  # all together have the power, if they do not depend on each other
        counts = [(test, test.seeds_needed(level, each)) for test in tests]
        known = [count for _, count in counts if count is not None]
        number, way = (max(known) if len(known) == len(counts) else None), "support"
    if number is None:
        unlikely = [test.label for test, count in counts if count is None]
        return f"more seeds would hardly {way} it: no clear effect at this spread ({'; '.join(unlikely)})"
    return f"about {number} tested seeds would {way} it (80% power, mean and spread as they are)"
