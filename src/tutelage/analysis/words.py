"""Word numbers, arms, verdicts and warnings, for page, terminal and figures alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.analysis.stats import DIGITS
from tutelage.types import CHANGED_TEXT, FIRST_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tutelage.analysis.stats import Estimate, TextSpread
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.study.token_tables import TokenComparison

GAIN_CAPTION = (
    "Gain: percent fewer bits per byte than the same student without a teacher, same seed and data; "
    "positive is better. Test split, 95% intervals over seeds."
)
NO_TEACHER = "no teacher"
NOT_JUDGED = "not judged"
NO_DIFFERENCE = "no clear difference"
ONE_SEED = (
    "One seed is shown, not judged: another seed of the same runs can differ by more than these gains, and "
    "one run cannot say by how much. Three seeds or more give an interval."
)
_TEACHERS = {1: ", one teacher", 2: ", a teacher each"}
_LEVELS = {"weak-to-strong": "weaker", "same-level": "same-level", "strong-to-weak": "stronger"}
_FEW_ROWS = 24
WORSE_BY = 0.2
"""Nats per token by which first windows may be worse than the others without a warning."""

_MOST_MODELS = 4


def signed(percent: float, digits: int = 1) -> str:
    """`+1.1%`; never `-0.0%`."""
    return f"{round(percent, digits) + 0.0:+.{digits}f}%"


def is_judged(estimate: Estimate) -> bool:
    """Whether there is spread behind it; one seed has none, and no interval."""
    return estimate.n > 1


def span(estimate: Estimate) -> str:
    """`+0.82 to +1.38`, in percent: two digits, so that the side of zero an end is on shows."""
    if not is_judged(estimate):
        return "one seed"
    return f"{signed(estimate.low, 2)[:-1]} to {signed(estimate.high, 2)[:-1]}"


def plus_minus(estimate: Estimate) -> str:
    """`+1.1% ± 0.3`, with half the width of the interval; `+1.1%` of one seed."""
    if not is_judged(estimate):
        return signed(estimate.mean)
    return f"{signed(estimate.mean)} ± {(estimate.high - estimate.low) / 2:.1f}"


def effect(estimate: Estimate) -> str:
    """`helps` or `hurts` if the whole interval is on that side of zero, else `no clear difference`.

    One seed has no interval, so it is `not judged`, whatever the number.
    """
    if not is_judged(estimate):
        return NOT_JUDGED
    if round(estimate.low, DIGITS) > 0:
        return "helps"
    return "hurts" if round(estimate.high, DIGITS) < 0 else NO_DIFFERENCE


def interval_name(verdict: Verdict) -> str:
    """Which interval a row carries, and over what."""
    if not verdict.judged:
        return "none, 1 seed"
    return f"t, {verdict.n_seeds} seeds{_TEACHERS.get(min(verdict.n_teachers, 2), '')}"


def without_one(spread: TextSpread) -> str:
    """How far the mean over texts moves when one of them is left out: `+1.2% to +2.0%`."""
    return f"{signed(spread.least)} to {signed(spread.most)}"


def verdict(verdict: Verdict) -> str:
    """`helps out of domain, hurts in domain`."""
    outside, inside = effect(verdict.out_of_domain), effect(verdict.in_domain)
    if not verdict.judged:
        return "one seed: not judged"
    if outside == inside:
        return outside if outside == NO_DIFFERENCE else f"{outside} in and out of domain"
    return f"{outside} out of domain, {inside} in domain"


def level(v: Verdict | PairFinding) -> str:
    """`weaker`, `same-level`, `stronger`: the teacher beside its student, as measured; of others, what it is.

    A teacher's name is what the study file calls it and says nothing of that.
    """
    return "not measured" if v.relation is None else _LEVELS[v.relation]


def taught_by(v: Verdict) -> str:
    """`strong (stronger teacher)`, in brackets what was measured; `unigram control`; `no teacher`."""
    if v.teacher is None:
        return NO_TEACHER
    return f"{v.teacher} control" if v.control else f"{v.teacher} ({beside(v)})"


def beside(v: Verdict) -> str:
    """`stronger teacher`, as measured; `teacher not measured`."""
    return "teacher not measured" if v.relation is None else f"{level(v)} teacher"


def arm(v: Verdict) -> str:
    """What is done with the teacher, for a column of its own: the number where it is a constant alpha."""
    text = f"{v.alpha:g}" if v.constant else v.arm
    return text if v.stage is None else f"{text}, then {v.stage}"


def sentence(v: Verdict) -> str:
    """One row of the verdict table as a sentence."""
    return (
        f"{taught_by(v)}, {v.arm}: "
        f"in-domain {plus_minus(v.in_domain)}, out-of-domain {plus_minus(v.out_of_domain)}: {verdict(v)}"
    )


def in_words(verdicts: Sequence[Verdict]) -> str:
    """Each verdict as a sentence; of many, how many help."""
    if len(verdicts) <= _FEW_ROWS:
        return "; ".join(sentence(v) for v in verdicts) + "."
    judged = [v for v in verdicts if v.judged]
    helping = sum(effect(v.out_of_domain) == "helps" for v in judged)
    inside = sum(effect(v.in_domain) == "helps" for v in judged)
    alone = len(verdicts) - len(judged)
    counted = f"Of {len(judged)} arms {helping} help out of domain and {inside} in domain" if judged else ""
    rest = f"{alone} with one seed are not judged" if alone else ""
    return f"{'; '.join(part for part in (counted, rest) if part)}; the table lists them."


def seeds(verdicts: Sequence[Verdict]) -> str:
    """`n = 3 seeds`."""
    counts = sorted({v.n_seeds for v in verdicts})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"n = {number} {'seed' if counts[-1] == 1 else 'seeds'}"


def listed_seeds(numbers: Collection[int]) -> str:
    """`seed 43`, `seeds 43 and 44`."""
    return f"seed{'s' * (len(numbers) > 1)} {join([str(number) for number in sorted(numbers)])}"


def intervals(verdicts: Sequence[Verdict]) -> str:
    """How many seeds there are, and over what the intervals run."""
    names = {True: "paired t over seeds", False: "none where there is one seed"}
    kinds = {v.judged for v in verdicts}
    return f"{seeds(verdicts)}; " + ", ".join(name for kind, name in names.items() if kind in kinds)


def grey_note(verdicts: Sequence[Verdict]) -> str:
    """What a caption adds where a figure shows single seeds."""
    return "" if all(v.judged for v in verdicts) else " Grey: one seed, shown and not judged."


def join(parts: Sequence[str]) -> str:
    """`a, b and c`; nothing of nothing."""
    if not parts:
        return ""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def score_warnings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One sentence for every text whose scores are not what they seem, with the models that it holds for.

    First windows of documents that are much worse than the others: a window at the beginning is as long as
    any other, so the model was trained with something else in front of documents than it is scored with.
    Such losses differ widely between training seeds and hide what is compared. And a tokenizer that changes
    the text, so that part of it is never predicted.

    Args:
        rows: scores, with run, domain, split, metric and value; those of test splits count.
    """
    worse: dict[str, dict[str, float]] = {}
    changed: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["metric"], row["split"]) == (FIRST_WINDOWS, "test") and row["value"] > WORSE_BY:
            worse.setdefault(row["domain"], {})[row["run"]] = row["value"]
        elif (row["metric"], row["split"]) == (CHANGED_TEXT, "test"):
            changed.setdefault(row["domain"], {})[row["run"]] = row["value"]
    return [
        *(
            f"{domain}: first windows of documents are worse than the others by more than {WORSE_BY:g} nats "
            f"per token for {_most(models, '.2f')}: does what begins a document here begin one in their "
            "training? (Too little training, or a text with a hard beginning, shows the same.)"
            for domain, models in worse.items()
        ),
        *(
            f"{domain}: part of the text is never predicted, because the tokenizer changes it (share of "
            f"documents: {_most(models, '.1%')}): these bits per byte compare only with those of the same "
            "tokenizer"
            for domain, models in changed.items()
        ),
    ]


def _most(models: Mapping[str, float], form: str) -> str:
    """Some models with their values, the largest first, and how many more there are."""
    ordered = sorted(models.items(), key=lambda item: -item[1])
    named = ", ".join(f"{run} ({value:{form}})" for run, value in ordered[:_MOST_MODELS])
    return f"{named} and {len(ordered) - _MOST_MODELS} more" if len(ordered) > _MOST_MODELS else named


CHANCE = (
    "Sorting tokens by the baseline also sorts by its luck: tokens on which it was unlucky improve with any "
    "other model, an untaught one too. Sort them by a third model (--sorter)."
)
"""What to keep in mind where the baseline makes the cells: regression to the mean."""
SORTED = "Tokens are sorted by a third model, not by the baseline, whose luck would sort them too."


def sorting(found: TokenComparison) -> str:
    """By whom tokens are sorted, and what that means."""
    return CHANCE if found.sorter is None else SORTED


def untaught(found: TokenComparison) -> str:
    """`baseline`, or `sorter` if there is one: who stands for an untaught model in the cells."""
    return "baseline" if found.sorter is None else "sorter"


def group_plus_minus(cell: dict[str, Any]) -> str:
    """`+0.123 ± 0.045`, or the mean alone where there is no interval."""
    if cell["high95"] is None:
        return f"{cell['mean']:+.3f}"
    return f"{cell['mean']:+.3f} ± {cell['high95'] - cell['mean']:.3f}"
