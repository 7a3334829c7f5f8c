"""How often each test of a claim decides something where there is nothing: type-one errors by simulation.

python benchmarks/studies/null_claims.py [--studies 1000] [--seeds 5 10 20]

A study with every arm that a claim needs is drafted from null_claims.yaml, its scores are noise, and
`judge_claims` judges it as it judges a real one. Nothing has an effect. A run deviates by .6% as a whole
and by .5% on each text by itself; 30% of that variance is shared by all runs of a seed (the baseline among
them, which is paired with all arms); validation and test scores of a run differ little. Alphas, schedules and
teachers are chosen by the product. One pair and the controls lack two seeds, one teacher is at the border of
two relations. Below the table: what was done before, and why it is not.

Tests of a margin are wrong where the truth is at the margin: a second study has it there. A rate is over all
studies; a test that a study has no runs for (no teacher of a relation, by the luck of its baselines) decides
nothing there. Parts that are shown beside a claim are in the table too.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import yaml
from scipy import stats

from tutelage.analysis.claims.evidence import has_setting
from tutelage.analysis.claims.judge import LEVEL, gains_by_fit, judge_claims
from tutelage.analysis.claims.objective_tests import UNSCALED
from tutelage.analysis.gains import measure
from tutelage.analysis.verdicts import judge, relation
from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig
from tutelage.evals.token_quantities import summarise
from tutelage.study.expand import expand
from tutelage.study.plan import draft_of
from tutelage.study.results import Results
from tutelage.study.score_tables import DOCUMENT_COLUMNS
from tutelage.study.token_tables import TokenComparison
from tutelage.types import COPYING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tutelage.analysis.claims.judge import ClaimResult
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.plan import Plan

    Array = NDArray[np.float64]

FIRST_SEED = 43
ARMS = 6
TEXTS = ("scripture", "drama", "medicine", "licences")
IN_DOMAIN = "speeches"
BITS = 1.65
LEVELS = {"weak": 1.06, "border": 1.01, "same": 1.002, "young": 1.15, "strong": 0.97, "strongest": 0.94}
"""Bits per byte of each teacher in domain, as a multiple of the untaught student's."""
OF_RUN, OF_TEXT, OF_SPLIT, OF_FIT = 0.006, 0.005, 0.001, 0.002
"""Standard deviations, relative, of a run, a run on a text, of a split and of a fit."""
SHARED = 0.3
"""Part of the variance that runs of one seed share."""
ERRORS, OF_ERRORS = 0.02, 0.3
"""Calibration error, and standard deviation of its logarithm."""
MARGIN = 0.5
"""Percent: MARGIN of `tutelage.analysis.claims.evidence`, written down again."""
TOKENS = 300
TOKEN_STUDIES = 4
"""One study of so many has token comparisons, which take most of the time."""
STUDENT = "nano-50k 1.25M"
MOVED = (
    ("temperature", 0.5, 2),
    ("mixing", *UNSCALED),
    ("alpha", "linear", "cosine"),
    ("gate", "teacher_better"),
)
"""Settings that tests of a margin out of domain look at."""
OF_TOKENS = " 8"
OF_MARGINS = {4, 9, 10, 11, 14, 15, 23}
"""Claims that are true, or false, where nothing has an effect: their tests of a margin say so."""


def study_file(seeds: Sequence[int]) -> StudyConfig:
    """A study with everything that a claim needs: null_claims.yaml with these seeds."""
    data = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    own = {f"own-{seed}": {"shape": "nano-20k", "tokens": "1.25M", "seed": seed} for seed in seeds}
    data["seeds"] = [*seeds]
    data["teachers"] |= own
    for group in ("fewer", "controls"):
        data["students"][group]["seeds"] = [*seeds][:-2]
    data["students"]["own"]["grid"]["cross"][0]["zip"] = {"teacher": [*own], "seed": [*seeds]}
    return validate(StudyConfig, data, "null_claims.yaml")


@dataclass(frozen=True)
class World:
    """The runs of a study as columns, and what is true of them.

    Attributes:
        plan: of the study.
        runs: `Results.runs`, all done.
        groups: number of the seed and student setting of each run, which share noise.
        inside, outside: true change of each run's bits per byte, as a factor, in and out of domain.
        errors: true calibration error.
    """

    plan: Plan
    runs: pl.DataFrame
    groups: NDArray[np.int64]
    inside: Array
    outside: Array
    errors: Array


def world(seeds: Sequence[int], *, at_margins: bool) -> World:
    """A study in which nothing has an effect, or in which what a margin speaks of is at the margin."""
    plan = draft_of(expand(study_file(seeds)))
    columns = ("run", "kind", "group", "student", "teacher", "arm", "alpha", "constant", "seed", "baseline",
               "stage", "twin")  # fmt: skip
    rows = pl.DataFrame(
        [attrgetter(*columns)(run) for run in plan.runs], columns, orient="row", infer_schema_length=None
    )
    run_of = {teacher.name: teacher.run for teacher in plan.teachers}
    learned = pl.col("teacher").replace_strict(run_of, return_dtype=pl.String)
    taught = pl.when(pl.col("kind") != "teacher").then(learned)
    runs = rows.with_columns(status=pl.lit("done"), teacher_run=taught)
    places = {
        key: i for i, key in enumerate(runs.select("student", "seed").unique(maintain_order=True).rows())
    }
    worse = 1 + MARGIN / 100
    inside, outside, errors = (np.full(len(plan.runs), value) for value in (1.0, 1.0, ERRORS))
    for i, run in enumerate(plan.runs):
        if run.kind == "teacher":
            inside[i] = LEVELS.get(run.teacher or "", 1.0)
        elif at_margins:
            shape = (run.student or "").split()[0]
            same = (shape, run.teacher) in {("nano-50k", "same"), ("nano-150k", "strong")}
            inside[i] = worse if same or run.teacher == "sampled" else 1.0
            outside[i] = worse if any(has_setting(run.arm_settings or {}, *one) for one in MOVED) else 1.0
            errors[i] = ERRORS * (2.0 if run.alpha == 1 else 1.0)
    groups = np.array([places[row] for row in runs.select("student", "seed").iter_rows()])
    return World(plan, runs, groups, inside, outside, errors)


def deviations(rng: np.random.Generator, groups: NDArray[np.int64]) -> Array:
    """One standard normal number per run, correlated within a group."""
    shared = rng.normal(size=int(groups.max()) + 1)[groups]
    return math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * rng.normal(size=len(groups))


def draw(w: World, rng: np.random.Generator, comparisons: tuple[TokenComparison, ...] = ()) -> Results:
    """The study's results with fresh noise."""
    n = len(w.groups)
    of_run = OF_RUN * deviations(rng, w.groups)
    frames = []

    def add(domain: str, metric: str, split: str, values: Array) -> None:
        frames.append(
            w.runs.select("run").with_columns(
                domain=pl.lit(domain), split=pl.lit(split), metric=pl.lit(metric), value=pl.Series(values),
                version=pl.lit("drawn"),
            )
        )  # fmt: skip

    documents = []
    for text in (IN_DOMAIN, *TEXTS):
        truth = BITS * (w.inside if text == IN_DOMAIN else 2 * w.outside)
        common = of_run + OF_TEXT * deviations(rng, w.groups)
        raw = truth * (1 + common + OF_SPLIT * rng.normal(size=n))
        add(text, "bits_per_byte", "test", raw)
        add(text, "bits_per_byte", "validation", truth * (1 + common + OF_SPLIT * rng.normal(size=n)))
        add(text, "bits_per_byte_unigram", "test", truth * (1 + 0.7 * common + OF_FIT * rng.normal(size=n)))
        documents.append(
            w.runs.select("run").with_columns(
                domain=pl.lit(text), split=pl.lit("test"), document=0, bytes=1000, nll=pl.Series(raw)
            )
        )  # fmt: skip
    add(IN_DOMAIN, "ece", "test", w.errors * np.exp(OF_ERRORS * deviations(rng, w.groups)))
    add(COPYING, "accuracy", "test", 0.3 + 0.02 * deviations(rng, w.groups))
    return Results(
        plan=w.plan,
        runs=w.runs,
        scores=pl.concat(frames),
        documents=pl.concat([pl.DataFrame(schema=DOCUMENT_COLUMNS), *documents], how="diagonal_relaxed"),
        curves=pl.DataFrame(),
        provenance={},
        token_comparisons=comparisons,
        problems=(),
    )


def tokens_of(rng: np.random.Generator) -> pl.DataFrame:
    """Tokens that three untaught models and a teacher read: as hard for all, and each with its own luck."""
    hard = rng.normal(0.5, 0.6, TOKENS)
    columns: dict[str, object] = {
        "document": np.repeat(np.arange(10), TOKENS // 10),
        "position": np.tile(np.arange(TOKENS // 10), 10),
    }
    for role in ("student", "teacher", "baseline", "sorter"):
        luck = rng.normal(0, 0.3, TOKENS)
        loss = np.exp(hard + luck)
        columns[f"entropy.{role}"] = np.exp(hard + 0.5 * luck)
        columns[f"gold_logp.{role}"] = -loss
        columns[f"gold_rank.{role}"] = np.where(loss < 1, 1, 2)
    return pl.DataFrame(columns)


def read_tokens(w: World, rng: np.random.Generator) -> tuple[TokenComparison, ...]:
    """A token comparison of one taught student per seed, its tokens sorted by another seed's baseline."""
    baselines = {
        run.seed: run.run for run in w.plan.runs if run.kind == "baseline" and run.student == STUDENT
    }
    seeds = sorted(baselines)
    taught = {
        run.seed: run
        for run in w.plan.runs
        if (run.student, run.teacher, run.arm_settings, run.stage) == (STUDENT, "weak", {"alpha": 0.4}, None)
    }
    return tuple(
        TokenComparison(
            student=taught[seed].run,
            teacher="weak",
            baseline=baselines[seed],
            sorter=baselines[other],
            text=IN_DOMAIN,
            documents=10,
            tokens=TOKENS,
            context=TOKENS // 10,
            groups=summarise(tokens_of(rng), TOKENS // 10),
        )
        for seed, other in zip(seeds, seeds[1:] + seeds[:1], strict=True)
    )


def judged(w: World, results: Results, first: Findings) -> tuple[ClaimResult, ...]:
    """`judge_claims` on fresh gains and relations; what claims do not read is left as in `first`."""
    bits = results.scores.filter(split="validation", metric="bits_per_byte", domain=IN_DOMAIN)
    means = w.runs.join(bits, on="run").group_by("kind", "student", "teacher").agg(pl.col("value").mean())
    known = {
        (kind, s or t): value for kind, s, t, value in means.iter_rows() if kind in {"teacher", "baseline"}
    }
    pairs = []
    for pair in first.pairs:
        own, alone = known.get(("teacher", pair.teacher.name)), known["baseline", pair.student.name]
        measured = None if own is None else relation(own, alone)
        pairs.append(replace(pair, bits_per_byte=own, student_bits=alone, relation=measured))
    findings = replace(first, gains=measure(results), pairs=tuple(pairs))
    return judge_claims(gains_by_fit(results, findings))


def by_other_seeds(n: int, studies: int) -> float:
    """Type-one error if each seed takes what is best for the other seeds, of six independent arms."""
    rng = np.random.default_rng(n)
    gains = rng.normal(size=(studies, n, ARMS))
    valid = gains + 0.1 * rng.normal(size=gains.shape)
    chosen = (valid.sum(1, keepdims=True) - valid).argmax(2)[..., None]
    p_values = stats.ttest_1samp(np.take_along_axis(gains, chosen, 2)[..., 0], 0, axis=1).pvalue
    return float(np.mean(p_values < LEVEL))


def by_the_baseline(n: int, studies: int) -> float:
    """Type-one error of claim 8 if tokens are sorted by the baseline's entropy."""
    rng = np.random.default_rng(n)
    wrong = []
    for _ in range(studies):
        found = []
        for _ in range(n):
            cells = summarise(tokens_of(rng).select(pl.exclude("^.*sorter$")), TOKENS // 10)
            found += cells.filter(grouping="entropy contrast", quantity="gain", of="student")[
                "mean"
            ].to_list()
        wrong.append(stats.ttest_1samp(found, 0).pvalue < LEVEL)
    return float(np.mean(wrong))


Tally = dict[str, list[bool]]
"""Whether a test decided something, in each study, by its name."""


def simulate(seeds: Sequence[int], studies: int, *, at_margins: bool) -> Tally:
    """Judge many studies."""
    rng = np.random.default_rng([len(seeds), at_margins])
    w = world(seeds, at_margins=at_margins)
    first = judge(draw(w, rng))
    tally: Tally = {}
    for study in range(studies):
        with_tokens = not at_margins and study % TOKEN_STUDIES == 0
        outcomes = judged(w, draw(w, rng, read_tokens(w, rng) if with_tokens else ()), first)
        for name, decided in _decisions(outcomes, at_margins=at_margins):
            tally.setdefault(name, [] if name.startswith(OF_TOKENS) else [False] * study).append(decided)
        absent = [name for name, found in tally.items() if len(found) == study]
        for name in absent:
            tally[name] += [] if name.startswith(OF_TOKENS) else [False]
    return tally


def _decisions(outcomes: Sequence[ClaimResult], *, at_margins: bool) -> Iterator[tuple[str, bool]]:
    """(test, whether it decided something that is not so)."""
    for outcome in outcomes:
        parts = [one for one in outcome.tests if not one.test.beside]
        for one in outcome.tests:
            margin = one.test.statement in {"within", "not below"} or "top-k, less one" in one.test.label
            if margin == at_margins and one.effect is not None:
                label = one.test.label.split(", without ")[0]
                lowest = one.test.beside and ", without " in one.test.label
                name = f"{outcome.number:>2} | {label}{', without the text that adds most' if lowest else ''}"
                wrong = "supported" if margin or lowest else ("supported", "contradicted")
                yield f"{name} | {outcome.primary}", one.holds in wrong
        if not at_margins and outcome.number not in OF_MARGINS and outcome.p is not None and len(parts) > 1:
            yield f"{outcome.number:>2} | the claim as a whole | {outcome.primary}", outcome.p <= LEVEL
    if not at_margins:
        family = [one for one in outcomes if one.announced and one.number not in OF_MARGINS]
        yield "all | any claim of the family, Holm | ", any(one.answer != "undecided" for one in family)


def main() -> None:
    """Print a table of rates with their Monte Carlo errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 10, 20])
    asked = parser.parse_args()
    columns = {}
    for n in asked.seeds:
        seeds = range(FIRST_SEED, FIRST_SEED + n)
        columns[n] = simulate(seeds, asked.studies, at_margins=False)
        columns[n] |= simulate(seeds, asked.studies, at_margins=True)
    print(table(columns))
    for n in asked.seeds:
        other, sorted_by_luck = by_other_seeds(n, 10 * asked.studies), by_the_baseline(n, 20)
        text = (
            f"{n} seeds: an arm chosen for each seed by the others {other:.1%}, tokens sorted by the baseline"
        )
        print(f"{text} {sorted_by_luck:.0%}")


def table(columns: dict[int, Tally]) -> str:
    """Rates in percent, with their standard errors, as Markdown."""
    names = sorted({name for tally in columns.values() for name in tally}, key=lambda name: (name[:3], name))
    lines = [
        f"| claim | test | gains | {' | '.join(f'{n} seeds' for n in columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name in names:
        cells = [rate(tally[name]) if name in tally else "" for tally in columns.values()]
        lines.append(f"| {name.strip()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate(decided: Sequence[bool]) -> str:
    """`4.9 ± 0.7`."""
    share = float(np.mean(decided))
    return f"{100 * share:.1f} ± {100 * math.sqrt(max(share, LEVEL) * (1 - share) / len(decided)):.1f}"


if __name__ == "__main__":
    main()
