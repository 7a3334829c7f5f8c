"""Arms against every constant alpha of the same pair: in how many pairs one beats an arm on both sides.

    tutelage study run tournament && python benchmarks/studies/tournament.py tutelage-tournament

Gains are means over replicates on the test split, in percent of the bits per byte of the untaught student,
with half the paired 95% t interval. A constant beats an arm where its mean gain is larger in domain and out
of domain, both raw or both with calibration fitted (a temperature and a unigram share). Regret is what the
best constant of that side has more; a sweep that chose it would have paid for all of them. With `--constants`
each constant is judged as an arm too, against the others: the use of one number for all pairs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tutelage.analysis.gains import measure
from tutelage.analysis.stats import half_width
from tutelage.study.results import load_results

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tutelage.study.results import Results

SIDES = {"raw": ("raw", "in_domain"), "out": ("raw", "out_of_domain")}
"""Columns of the table and what they hold: fit and role."""
SIDES |= {"fitted": ("unigram", "in_domain"), "out fitted": ("unigram", "out_of_domain")}
ENOUGH = 0.8
"""Share of the pairs in which no constant may beat the default."""
HAS_CONSTANTS = pl.col("constant").any().over("student", "teacher")
BOTH = (("raw", "out"), ("fitted", "out fitted"))


def gains_of(results: Results) -> pl.DataFrame:
    """One row per pair, arm and seed: student, teacher, arm, constant, seed and the gains of `SIDES`.

    Pairs without constants are left out.
    """
    gains = measure(results)
    cells = gains.cells.filter(~pl.col("control") & pl.col("stage").is_null())
    sides = gains.sides.filter(split="test").join(cells, on="cell")
    parts = [
        sides.filter(fit=fit, role=role).select(
            "student", "teacher", "arm", "constant", "seed", gain=pl.col("gain")
        )
        for fit, role in SIDES.values()
    ]
    keys = ["student", "teacher", "arm", "constant", "seed"]
    table = parts[0].rename({"gain": "raw"})
    for name, part in zip(list(SIDES)[1:], parts[1:], strict=True):
        table = table.join(part.rename({"gain": name}), on=keys)
    return table.filter(HAS_CONSTANTS)


def beaten_by(arm: pl.DataFrame, constant: pl.DataFrame) -> bool:
    """Whether a constant's mean gain is the larger on both sides, raw or fitted, over their common seeds."""
    common = arm.join(constant, on="seed", suffix=" of constant")
    ahead = {side: (common[f"{side} of constant"] - common[side]).mean() for side in SIDES}
    return any(ahead[inside] > 0 and ahead[outside] > 0 for inside, outside in BOTH)  # type: ignore[operator]


def shown(values: pl.Series) -> str:
    """Mean and half the interval."""
    half = half_width(np.array([len(values)]), np.array([values.std()], dtype=float))[0]
    return f"{values.mean():+.2f} ± {half:.2f}"


def judged(table: pl.DataFrame, *, constants: bool) -> pl.DataFrame:
    """One row per pair and arm."""
    rows = []
    for (student, teacher), pair in table.group_by("student", "teacher", maintain_order=True):
        fixed = dict(pair.filter("constant").group_by("arm", maintain_order=True))
        best = {side: max(one[side].mean() for one in fixed.values()) for side in SIDES}  # type: ignore[type-var]
        for (name, constant), arm in pair.group_by("arm", "constant", maintain_order=True):
            if constant and not constants:
                continue
            others = {key[0]: one for key, one in fixed.items() if key[0] != name}
            rows.append(
                {"student": student, "teacher": teacher, "arm": name, "constant": constant, "n": len(arm)}
                | {side: shown(arm[side]) for side in SIDES}
                | {f"regret {side}": round(best[side] - arm[side].mean(), 2) for side in SIDES}  # type: ignore[operator]
                | {"beaten by": ", ".join(n for n, one in others.items() if beaten_by(arm, one)) or "-"}
            )
    return pl.DataFrame(rows)


def summed(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per arm of `judged`: in how many pairs no constant beats it, and its mean regrets in points."""
    unbeaten = (pl.col("beaten by") == "-").sum().alias("unbeaten in")
    regrets = [f"regret {side}" for side in SIDES]
    means = [pl.col(name).mean().round(2).alias(name) for name in regrets]
    worst = [pl.col(name).max().alias(f"worst {name.removeprefix('regret ')}") for name in regrets]
    return rows.group_by("arm", maintain_order=True).agg(pl.len().alias("pairs"), unbeaten, *means, *worst)


def steadiness(table: pl.DataFrame, draws: int = 2000) -> pl.DataFrame:
    """In how many draws of the replicates, with replacement, a policy is unbeaten in `ENOUGH` of the pairs.

    The same replicates are drawn in all pairs, since these share their untaught students. Arms that lack
    some are left out.
    """
    n = table["seed"].n_unique()
    table = table.filter(pl.len().over("student", "teacher", "arm", "constant") == n).filter(HAS_CONSTANTS)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws) / n
    unbeaten: dict[str, NDArray[np.int64]] = {}
    pairs = table.sort("seed").partition_by("student", "teacher", maintain_order=True)
    for pair in pairs:
        arms = pair.partition_by("arm", "constant", as_dict=True, maintain_order=True)
        means = {key: drawn @ one.select(*SIDES).to_numpy() for key, one in arms.items()}
        constants = [mean for (_, constant), mean in means.items() if constant]
        for (name, constant), own in means.items():
            if not constant:
                ahead = np.array([mean > own for mean in constants])
                beaten = (ahead[..., 0] & ahead[..., 1]) | (ahead[..., 2] & ahead[..., 3])
                unbeaten[name] = unbeaten.get(name, 0) + ~beaten.any(axis=0)
    shares = [
        {"arm": name, f"unbeaten in {ENOUGH:.0%} of pairs": f"{np.mean(count >= ENOUGH * len(pairs)):.1%}"}
        for name, count in unbeaten.items()
    ]
    return pl.DataFrame(shares)


def markdown(table: pl.DataFrame) -> str:
    """A table as Markdown, whole."""
    with pl.Config(
        tbl_formatting="ASCII_MARKDOWN", tbl_rows=-1, tbl_cols=-1, tbl_width_chars=10_000,
        fmt_str_lengths=500, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True,
    ):  # fmt: skip
        return re.sub(r" {2,}", " ", re.sub(r"-{4,}", "---", str(table)))


def main() -> None:
    """Print pairs, then arms, then how steady that is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--constants", action="store_true")
    arguments = parser.parse_args()
    table = gains_of(load_results(arguments.study))
    rows = judged(table, constants=arguments.constants)
    print(markdown(rows), markdown(summed(rows)), markdown(steadiness(table)), sep="\n\n")


if __name__ == "__main__":
    main()
