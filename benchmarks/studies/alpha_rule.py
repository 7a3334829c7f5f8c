"""Fit the rule of `alpha: auto`, clip(level + slope r), on the mini study and on the paper's best alphas.

r is how much better the teacher is: the untaught student's final cross-entropy over the teacher's on the
same tokens, less 1. In the study both are measured on the last 15% of the training tokens, each read once, so
they are losses on new text. The paper's best alphas (arXiv 2605.23857, Llama students of 1.7B on 50B tokens)
are second hand, and r there is of the supervised law of arXiv 2502.08606.

    mkdir mini && tar xJf docs/results/mini/results.tar.xz -C mini
    python benchmarks/studies/alpha_rule.py mini
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.optimize import brute, least_squares

from tutelage.planner.laws import PUBLISHED

LAST = 0.15
FLOOR, CAP = 0.1, 1.0
FEWEST = 4
"""Constants of alpha that a pair needs, so that those between them can be interpolated."""

OWN = (1.14e9, 50e9)
PAPER = (
    *(
        (0.428e9, 50e9, 0.2),
        (1.14e9, 50e9, 0.2),
        (2.99e9, 50e9, 0.6),
        (6.98e9, 50e9, 0.8),
        (6.98e9, 10e9, 0.4),
    ),
    *((6.98e9, 30e9, 0.6), (6.98e9, 80e9, 1.0), (6.98e9, 100e9, 1.0), (6.98e9, 300e9, 0.8)),
)
"""Parameters without embeddings and tokens of a teacher, and the best alpha of the student of 1.7B, `OWN`."""


class Pair(NamedTuple):
    """A student and a teacher with the mean gain in domain at each constant alpha, in percent of the loss."""

    name: str
    better: float
    alphas: list[float]
    gains: list[float]

    def gain(self, alpha: float) -> float:
        """Gain at an alpha between those tried; below the smallest it falls to 0 at alpha 0."""
        return float(np.interp(alpha, [0.0, *self.alphas], [0.0, *self.gains]))

    @property
    def best(self) -> float:
        """The best constant."""
        return self.alphas[int(np.argmax(self.gains))]


def end_of(run: Path) -> tuple[float, float]:
    """Cross-entropy of student and teacher over the end of a run."""
    rows = pl.read_ndjson(run / "metrics.jsonl")
    last = rows.filter(pl.col("tokens") > (1 - LAST) * pl.col("tokens").max())
    return tuple(float(last[column].mean()) for column in ("ce", "teacher_ce"))  # type: ignore[return-value, arg-type]


def pairs_of(study: Path) -> list[Pair]:
    """The pairs of a study with enough constants, from the seeds that have an untaught student."""
    plan = json.loads((study / "plan.json").read_text(encoding="utf-8"))
    rows = []
    for cell in plan["runs"]:
        constant = cell["alpha"] is not None and cell["arm"] == f"alpha {cell['alpha']:g}"
        if constant and cell["kind"] == "student" and cell["stage"] is None:
            alone, _ = end_of(study / "runs" / cell["baseline"])
            taught, teacher = end_of(study / "runs" / cell["run"])
            rows.append(
                {name: cell[name] for name in ("student", "teacher", "alpha")}
                | {"gain": 100 * (1 - taught / alone), "better": alone / teacher - 1}
            )
    controls = {teacher["name"] for teacher in plan["teachers"] if teacher["control"]}
    means = (
        pl.DataFrame(rows).group_by("student", "teacher", "alpha").mean().sort("student", "teacher", "alpha")
    )
    return [
        Pair(f"{student}, {teacher}", one["better"].mean(), one["alpha"].to_list(), one["gain"].to_list())
        for (student, teacher), one in means.group_by("student", "teacher", maintain_order=True)
        if len(one) >= FEWEST and teacher not in controls
    ]


def rule(coefficients: np.ndarray, better: float) -> float:
    """Alpha of the rule."""
    level, slope = coefficients
    return float(np.clip(level + slope * better, FLOOR, CAP))


def fit(pairs: list[Pair]) -> np.ndarray:
    """Level and slope of the least mean loss against each pair's best constant."""

    def regret(coefficients: np.ndarray) -> float:
        return float(
            np.mean([max(pair.gains) - pair.gain(rule(coefficients, pair.better)) for pair in pairs])
        )

    return np.asarray(brute(regret, (slice(0.1, 0.9, 0.02), slice(0.0, 12.0, 0.25)), finish=None))


def main() -> None:
    """Print the fits and what each rule loses."""
    points = [(PUBLISHED.loss(*OWN) / PUBLISHED.loss(n, d) - 1, alpha) for n, d, alpha in PAPER]
    better, best = np.array(points).T
    off = lambda x: np.clip(x[0] + x[1] * better, FLOOR, CAP) - best  # noqa: E731
    papers = least_squares(off, [0.4, 5.0])
    print("the paper's best alphas: level {:.2f}, slope {:.1f}".format(*papers.x), end=", ")
    print(f"root mean square {np.sqrt(np.mean(papers.fun**2)):.2f} over {len(points)} teachers")

    pairs = pairs_of(Path(sys.argv[1]))
    print("the study's gains: level {:.2f}, slope {:.2f}".format(*fit(pairs)))
    rules = {"0.40 + 5.0 r": np.array([0.4, 5.0]), "0.5": np.array([0.5, 0.0]), "0.2": np.array([0.2, 0.0])}
    for pair in pairs:
        others = fit([other for other in pairs if other is not pair])
        chosen = {name: rule(x, pair.better) for name, x in (rules | {"left out": others}).items()}
        losses = ", ".join(
            f"{name} -> {a:.2f} loses {max(pair.gains) - pair.gain(a):.2f}" for name, a in chosen.items()
        )
        print(f"{pair.name}: r {pair.better:+.3f}, best {pair.best:g} ({max(pair.gains):+.2f}%); {losses}")


if __name__ == "__main__":
    main()
