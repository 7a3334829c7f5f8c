"""Rewrite the archive of the first mini study as result files of today's format, for the planner alone.

Its scores are by the old scoring (docs/results.md): right beside one another, wrong beside any of today. So
what is written says so in its title, and is for `tutelage plan backtest` and nothing else. Only teachers,
untaught students and constant alphas are taken.

    python benchmarks/studies/mini_as_now.py docs/results/mini/results.tar.xz mini-old-scoring
    tutelage plan backtest mini-old-scoring
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import polars as pl

from tutelage.records import write_sealed
from tutelage.types import SCORING_VERSION

NOT_NOW = {"mechanism", "runs_directory", "rung", "arm", "alpha"}


def rewrite(archive: Path, study: Path) -> None:
    """Unpack and rewrite the study."""
    with tarfile.open(archive) as file:
        some = [member for member in file.getmembers() if "mechanism" not in member.name]
        file.extractall(study, some, filter="data")
    plan = json.loads((study / "plan.json").read_text())
    runs = [run for run in plan["runs"] if run["kind"] in {"teacher", "baseline"} or is_constant(run)]
    students = {run["student"] for run in runs}
    names = {run["teacher"] for run in runs}
    plan |= {
        "schema": 3,
        "title": f"{plan['title']} (old scoring)",
        "students": [now(one) for one in plan["students"] if one["name"] in students],
        "teachers": [now(one) for one in plan["teachers"] if one["name"] in names],
        "runs": [now(run) | arm(run) | {"evaluation": "old"} for run in runs],
        "claims": [],
    }
    write_sealed(study / "plan.json", {key: value for key, value in plan.items() if key not in NOT_NOW})
    for run in runs:
        restate(study / "runs" / run["run"])


def is_constant(run: dict) -> bool:
    """Whether a run is a student whose alpha is all there is to its arm."""
    constant = run["alpha"] is not None and run["arm"] == f"alpha {run['alpha']:g}"
    return run["kind"] == "student" and run["teacher"] is not None and constant


def now(record: dict) -> dict:
    """A record of the plan with today's fields."""
    shape = {"shape": record["rung"]} if "rung" in record else {}
    return {key: value for key, value in record.items() if key not in NOT_NOW} | shape


def arm(run: dict) -> dict:
    """The settings of a student's arm."""
    return {"arm_settings": {"alpha": run["alpha"]} if run["kind"] == "student" else None}


def restate(run: Path) -> None:
    """Give a run's scores today's version number, and its state the versions that the plan means."""
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    rows = [row | {"version": f"{SCORING_VERSION}-{row['version']}"} for row in rows]
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = json.loads((run / "state.json").read_text())
    versions = {row["domain"]: row["version"] for row in rows}
    path = run / "documents.parquet"
    documents = pl.read_parquet(path).with_columns(version=pl.col("domain").replace_strict(versions))
    documents.write_parquet(path)
    write_sealed(run / "state.json", state | {"evaluations": {"old": versions}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("study", type=Path)
    arguments = parser.parse_args()
    rewrite(arguments.archive, arguments.study)
