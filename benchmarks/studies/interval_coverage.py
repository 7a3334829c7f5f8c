"""How often a study's 95% intervals hold the truth, by simulation of known sources of noise.

    python benchmarks/studies/interval_coverage.py

Each simulated study is made of scores: untaught runs, students and teachers with training noise of known
size, texts with effects of their own. `measure` and `text_spreads`, which judge real studies, judge these.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import polars as pl

from tutelage.analysis.gains import Gains, measure, text_spreads
from tutelage.study.plan import Plan, PlanDomain, PlanStudent, PlanTeacher
from tutelage.study.results import Results

GAIN = 2.0
"""The true gain out of domain, in percent, mean over texts."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations in percent of the bits per byte.

    Attributes:
        student: of a taught run.
        baseline: of an untaught run.
        teacher: of what its teacher's training does to a student.
        text: of a text's own gain.
        both: of a text and a seed together.
    """

    student: float = 0.5
    baseline: float = 0.5
    teacher: float = 0.6
    text: float = 0.0
    both: float = 0.1


def simulate(
    studies: int, seeds: int, texts: int, noise: Noise, rng: np.random.Generator, *, own: bool, baselines: int
) -> Gains:
    """Gains of `studies` independent studies, each a student setting of its own.

    Args:
        studies: how many.
        seeds: of each.
        texts: out of domain, of each.
        noise: sizes of the sources.
        rng: where it comes from.
        own: whether each seed has a teacher of its own; else all seeds of a study share one.
        baselines: untaught runs per seed.
    """
    outside = [f"text-{i}" for i in range(texts)]
    runs, scores = [], []
    text_GT = rng.normal(0, noise.text, (studies, texts))
    teacher_GS = rng.normal(0, noise.teacher, (studies, seeds if own else 1)).repeat(1 if own else seeds, 1)

    def add(name: str, run: dict[str, object], percent_T: np.ndarray) -> None:
        runs.append({"run": name, "stage": None, "status": "done", **run})
        values = 3 * (1 - (percent_T + rng.normal(0, noise.both, texts)) / 100)
        scores.extend(
            (name, text, "test", "bits_per_byte", value) for text, value in zip(outside, values, strict=True)
        )

    for g in range(studies):
        for s in range(seeds):
            place = {"student": f"s{g}", "seed": s}
            for twin in range(baselines):
                blank = dict.fromkeys(("teacher", "arm", "alpha", "constant", "baseline", "teacher_run"))
                add(f"b{g}-{s}-{twin}", {"kind": "baseline", "twin": twin, **place, **blank},
                    rng.normal(0, noise.baseline) + np.zeros(texts))  # fmt: skip
            taught = {"kind": "student", "teacher": "t", "arm": "alpha 0.4", "alpha": 0.4, "twin": 0}
            taught |= {"constant": True, "baseline": f"b{g}-{s}-0"}
            taught |= {"teacher_run": f"t{g}-{s if own else 0}"}
            gain_T = GAIN + text_GT[g] + teacher_GS[g, s] + rng.normal(0, noise.student)
            add(f"k{g}-{s}", place | taught, gain_T)
    return measure(_results(studies, seeds, outside, runs, scores))


def _results(studies: int, seeds: int, outside: list[str], runs: list, scores: list) -> Results:
    domains = (
        PlanDomain(name="own", role="in_domain"),
        *(PlanDomain(name=t, role="out_of_domain") for t in outside),
    )
    plan = Plan(
        name="simulated",
        title="simulated",
        seeds=tuple(range(seeds)),
        students=tuple(PlanStudent(name=f"s{g}", shape="r", tokens=1, parameters=1) for g in range(studies)),
        teachers=(PlanTeacher(name="t", control=False, description=""),),
        domains=domains,
        in_domain="own",
        runs=(),
    )  # fmt: skip
    types: dict = dict.fromkeys(("stage", "teacher", "arm", "baseline", "teacher_run"), pl.String)
    types |= {"alpha": pl.Float64, "constant": pl.Boolean}
    return Results(
        plan=plan,
        runs=pl.DataFrame(
            runs,
            schema_overrides=types,
            infer_schema_length=None,
        ),
        scores=pl.DataFrame(scores, ["run", "domain", "split", "metric", "value"], orient="row"),
        documents=pl.DataFrame(),
        curves=pl.DataFrame(),
        provenance={},
        token_comparisons=(),
        problems=(),
    )


def coverage(gains: Gains) -> tuple[float, float, float]:
    """How many seed intervals hold the truth, how many with texts as a sample, and a gain's mean variance."""
    found = gains.estimates.filter(role="out_of_domain", split="test", fit="raw")
    held = found.select(((pl.col("low") <= GAIN) & (pl.col("high") >= GAIN)).mean()).item()
    spreads = [spread["raw"] for spread in text_spreads(gains).values()]
    texts = float(np.mean([spread.low <= GAIN <= spread.high for spread in spreads]))
    sides = gains.sides.filter(role="out_of_domain", split="test", fit="raw")
    variance = sides.group_by("cell").agg(pl.col("gain").var())["gain"].mean()
    return held, texts, float(variance)


def main() -> None:
    """Print coverage by design and number of seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    studies = parser.parse_args().studies
    rng = np.random.default_rng(0)
    print(f"{studies} studies a row; sd of student .5, untaught .5, teacher .6, text and seed .1, 7 texts")
    print("seeds  teachers      untaught  sd of texts  holds: over seeds  texts too  variance of a gain")
    for sd in (0.0, 1.5):
        for own in (True, False):
            for baselines in (1, 2):
                for seeds in (3, 5, 10):
                    noise = Noise(text=sd)
                    made = simulate(studies, seeds, 7, noise, rng, own=own, baselines=baselines)
                    held, texts, variance = coverage(made)
                    who = "one each" if own else "one for all"
                    print(
                        f"{seeds:5}  {who:12}  {baselines:8}  {sd:11}  {held:17.1%}  {texts:9.1%}  "
                        f"{variance:.3f}"
                    )


if __name__ == "__main__":
    main()
