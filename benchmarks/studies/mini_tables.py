"""Numbers of docs/results.md that no table of the mini study's report has, from its `tables/scores.csv`.

tutelage report mini && python benchmarks/studies/mini_tables.py mini
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

STUDENT = "nano-50k 1.25M"
FIRST_SEEDS = 45  # 46 and 47 exist for some groups only


def learning_rates(scores: pl.DataFrame) -> pl.DataFrame:
    """Bits per byte at alpha 0.6 and without a teacher, by learning rate; out of domain the mean of texts."""
    student = pl.col("student")
    chosen = scores.filter(
        student.str.starts_with(STUDENT) & ~student.str.contains("settings"),
        pl.col("arm").is_null() | (pl.col("arm") == "alpha 0.6"),
        pl.col("seed") <= FIRST_SEEDS,
        metric="bits_per_byte",
    )
    keys = ["student", "teacher", pl.col("domain").eq("speeches").alias("in_domain")]
    return chosen.group_by(keys).agg(pl.col("value").mean().round(3)).sort("student", "teacher", "in_domain")


def without_drama(scores: pl.DataFrame) -> pl.DataFrame:
    """Gain from the teacher of Shakespeare on the other foreign texts, in percent, raw and fitted."""
    scores = scores.filter(student=STUDENT).filter(pl.col("metric").str.starts_with("bits_per_byte"))
    pairs = scores.filter(teacher="drama").join(
        scores.filter(kind="baseline"), on=["seed", "domain", "metric"]
    )
    gain = (100 * (1 - pl.col("value") / pl.col("value_right"))).mean().round(2).alias("gain")
    others = pairs.filter(~pl.col("domain").is_in(["speeches", "drama"]))
    return others.group_by("metric", "arm").agg(gain).sort("metric", "arm")


def main() -> None:
    """Print them."""
    scores = pl.read_csv(Path(sys.argv[1]) / "tables" / "scores.csv").filter(pl.col("stage").is_null())
    single = scores.filter(domain="speeches", metric="bits_per_byte", student=STUDENT, kind="baseline")
    with pl.Config(tbl_rows=100, fmt_str_lengths=80):
        print(learning_rates(scores), without_drama(scores), single.select("seed", "value"), sep="\n")
        print(scores.filter(metric="accuracy").select("run", "value"))


if __name__ == "__main__":
    main()
