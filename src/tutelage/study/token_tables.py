"""Read the token comparisons that `tutelage eval tokens` wrote."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from polars.exceptions import PolarsError
from scipy import special

from tutelage.checksums import refuse_damage
from tutelage.errors import UserError, unknown
from tutelage.files import read_bytes
from tutelage.records import read_object

if TYPE_CHECKING:
    from pathlib import Path

    from tutelage.study.plan import Plan


@dataclass(frozen=True, eq=False)
class TokenComparison:
    """A finished token comparison.

    Attributes:
        student: id of the model trained with the teacher.
        teacher: id of its teacher.
        baseline: id of the model trained without.
        sorter: id of the third model that tokens are sorted by; None: they are sorted by the baseline.
        text: name and split of what was read.
        documents: number of documents read.
        tokens: number of tokens read.
        context: length of the windows in tokens.
        groups: summary.parquet with the ends `low95` and `high95` of 95% intervals (Student's t over
            documents; null for one document).
    """

    student: str
    teacher: str
    baseline: str
    sorter: str | None
    text: str
    documents: int
    tokens: int
    context: int
    groups: pl.DataFrame

    def of(self, quantity: str, of: str, *groupings: str) -> pl.DataFrame:
        """The token groups of one quantity in one or more groupings, in their order."""
        chosen = (pl.col("quantity") == quantity) & (pl.col("of") == of)
        return self.groups.filter(chosen & pl.col("grouping").is_in(groupings))


@dataclass(frozen=True, slots=True)
class ComparedRuns:
    """The runs of a token comparison, by their ids.

    Attributes:
        student: taught.
        teacher: its teacher.
        baseline: the untaught student of its seed.
        sorter: the untaught student of the next seed; of the last seed, that of the first.
    """

    student: str
    teacher: str
    baseline: str
    sorter: str


def runs_to_compare(plan: Plan, teacher: str, alpha: float | None) -> list[ComparedRuns]:
    """The comparisons of one teacher's students in every seed, which a claim about tokens needs.

    Args:
        plan: of the study. Of several student settings the first that was taught so counts.
        teacher: its name.
        alpha: constant alpha of the students; None: the teacher's `tested_alpha`.

    Raises:
        UserError: there are no such runs, or only of one seed.
    """
    known = {entry.name: entry for entry in plan.teachers}
    if teacher not in known:
        raise unknown(f"study {plan.name}: teacher", teacher, known)
    alpha = known[teacher].tested_alpha if alpha is None else alpha
    if alpha is None:
        raise UserError(
            f"study {plan.name}: teacher {teacher} has no tested_alpha; say which, like {teacher}=0.4"
        )
    taught = [
        run
        for run in plan.runs
        if (run.kind, run.teacher) == ("student", teacher) and run.constant and run.alpha == alpha
    ]
    own = [run for run in taught if run.student == taught[0].student]
    untaught = {
        run.seed: run.run
        for run in plan.runs
        if own and (run.kind, run.student, run.twin) == ("baseline", own[0].student, 0)
    }
    if len(untaught) < 2:  # noqa: PLR2004 - a sorter is of another seed
        raise UserError(
            f"study {plan.name}: no students of {teacher} at alpha {alpha:g} in two seeds or more to compare"
        )
    seeds = sorted(untaught)
    after = dict(zip(seeds, seeds[1:] + seeds[:1], strict=True))
    return [
        ComparedRuns(run.run, of, str(run.baseline), untaught[after[run.seed]])
        for run in own
        if (of := run.teacher_run or known[teacher].run) is not None
    ]


def read_token_comparison(directory: Path) -> TokenComparison:
    """Read the result files in `directory`.

    Raises:
        UserError: a file is missing or is not what the evaluation writes.
    """
    refuse_damage(directory)
    try:
        facts = _facts(directory / "comparison.json")
        groups = pl.read_parquet(read_bytes(directory / "summary.parquet"))
        return TokenComparison(
            student=facts["student"],
            teacher=facts["teacher"],
            baseline=facts["baseline"],
            sorter=facts.get("sorter"),
            text=f"{facts['text']}, {facts['split']} split",
            documents=facts["documents"],
            tokens=facts["tokens"],
            context=facts["context"],
            groups=_with_intervals(groups),
        )
    except (UserError, OSError, ValueError, KeyError, TypeError, PolarsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory}: no finished token comparison ({type(error).__name__}: {reason}); delete it "
            "and evaluate again"
        ) from None


def _facts(path: Path) -> dict[str, Any]:
    facts = read_object(path)
    if not all(one.isprintable() for one in facts.values() if isinstance(one, str)):
        raise ValueError("a name holds characters that cannot be shown")  # of a terminal, or in no figure
    return facts


def _with_intervals(groups: pl.DataFrame) -> pl.DataFrame:
    """Student's t with one degree of freedom less than documents."""
    factor = pl.Series(special.stdtrit(groups["documents"].to_numpy() - 1, 0.975))
    half = pl.col("stderr") * factor
    return groups.with_columns(low95=pl.col("mean") - half, high95=pl.col("mean") + half)


def read_token_comparisons(directory: Path) -> tuple[tuple[TokenComparison, ...], list[str]]:
    """The token comparisons of `tutelage eval tokens --output DIRECTORY`, and one line per unusable one."""
    found: list[TokenComparison] = []
    problems: list[str] = []
    if (directory / "mechanism").is_dir():
        problems.append(
            f"{directory / 'mechanism'}: token comparisons by an older version, which are not read; make "
            f"them anew with `tutelage eval tokens --output {shlex.quote(str(directory))}` and delete that "
            "directory"
        )
    for path in sorted(directory.glob("token-comparisons/*/*/comparison.json")):
        try:
            found.append(read_token_comparison(path.parent))
        except UserError as error:
            problems.append(str(error))
    return tuple(found), problems
