"""Load, judge and report a study of 10,000 runs with 50 scores each: seconds and memory.

    python benchmarks/study.py [--runs 10000] [--keep DIRECTORY]

The results are generated: their numbers mean nothing, their files are those of a real study.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tutelage.study.axis_settings import words
from tutelage.study.plan import Plan, save_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

DOMAINS = {"news": 1.7, "law": 3.1, "drama": 3.4, "medicine": 3.0, "code": 4.9}
SHAPES = {"xs": 20_000, "s": 50_000, "m": 150_000, "l": 350_000}
STUDENT_TOKENS = (1_250_000, 400_000, 4_000_000)
TEACHER_TOKENS = (250_000, 1_250_000, 3_750_000, 12_500_000)
ALPHAS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
POLICIES = (
    {"policy": "linear", "start": 0.8, "end": 0.0},
    {"policy": "salt", "value": 0.8, "until": 0.3},
    {"policy": "gap_driven", "floor": 0.1},
)
SEEDS = (43, 44, 45, 46, 47)
DOCUMENTS = 16
LOG_ROWS = 25
FITTED = ("temperature", "unigram")
Row = dict[str, object]
MEASURED = """
import resource, sys, time
from pathlib import Path
from tutelage.analysis.report.html import build_report
path = build_report(Path(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss, path.stat().st_size)
"""


def main() -> None:
    """Write the study, report it in a process of its own, print what that took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="where to leave the study")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch) / "study"
        plan = write_study(directory, options.runs)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(directory)], capture_output=True, text=True, check=True
        )
        elapsed = time.perf_counter() - started
    cpu, memory, size = done.stdout.split()
    scores = len(DOMAINS) * 10
    print(f"{len(plan.runs):,} runs x {scores} scores, {len(plan.students)} students, "
          f"{len(plan.teachers)} teachers: load, judge and report")  # fmt: skip
    print(f"{elapsed:.1f} s of wall clock, {float(cpu):.1f} s of CPU, "
          f"{int(memory) / 2**20:.2f} GiB high-water mark, page {int(size) / 2**20:.1f} MiB")  # fmt: skip


def write_study(directory: Path, runs: int) -> Plan:
    """A study of `runs` finished runs."""
    students = [(f"{shape} {tokens // 1000}K", shape, tokens) for shape, tokens in
                itertools.product(SHAPES, STUDENT_TOKENS)]  # fmt: skip
    trained = [(f"{shape}@{tokens // 1000}K", shape, tokens) for shape, tokens in
               itertools.product(SHAPES, TEACHER_TOKENS)]  # fmt: skip
    rows = list(itertools.islice(_rows(students, trained), runs))
    controls = [{"name": name, "control": True, "description": "control"} for name in ("unigram", "uniform")]
    teachers = [
        {"name": name, "control": False, "description": "generated", "shape": shape, "tokens": tokens,
         "parameters": SHAPES[shape], "run": f"teacher-{name.replace('@', '_')}"}
        for name, shape, tokens in trained
    ]  # fmt: skip
    plan = Plan.model_validate(
        {
            "schema": 3,
            "name": "generated",
            "title": "A generated study",
            "seeds": SEEDS,
            "students": [
                {"name": name, "shape": shape, "tokens": tokens, "parameters": SHAPES[shape]}
                for name, shape, tokens in students
            ],
            "teachers": teachers + controls,
            "domains": [
                {"name": name, "role": "out_of_domain" if i else "in_domain"}
                for i, name in enumerate(DOMAINS)
            ],
            "in_domain": "news",
            "runs": rows,
            "claims": [*range(1, 24)],
        },
        strict=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_plan(directory, plan)
    for row in rows:
        _write_run(directory / "runs" / str(row["run"]), row)
    return plan


def _rows(students: list[tuple[str, str, int]], trained: list[tuple[str, str, int]]) -> Iterator[Row]:
    for name, shape, tokens in trained:
        yield _row("teacher", None, name, None, 42, SHAPES[shape], tokens)
    arms = [{"alpha": alpha} for alpha in (*ALPHAS, *POLICIES)]
    names = [name for name, _, _ in trained] + ["unigram", "uniform"]
    for student, shape, tokens in students:
        for seed in SEEDS:
            yield _row("baseline", student, None, None, seed, SHAPES[shape], tokens)
        for teacher, arm, seed in itertools.product(names, arms, SEEDS):
            yield _row("student", student, teacher, arm, seed, SHAPES[shape], tokens)
        for teacher, seed in itertools.product(names[:-2], SEEDS):
            yield _row("student", student, None, {"compute_of": teacher}, seed, SHAPES[shape], tokens)


def _row(kind: str, student: str | None, teacher: str | None, arm: Row | None, seed: int,
          parameters: int, tokens: int) -> Row:  # fmt: skip
    parts = [kind, student, teacher, arm and words(arm), None if kind == "teacher" else seed]
    base = f"baseline-{student}-{seed}".replace(" ", "-") if kind == "student" else None
    return {
        "run": "-".join(str(part) for part in parts if part is not None).replace(" ", "-").replace("@", "_"),
        "kind": kind,
        "group": "teachers" if kind == "teacher" else "generated",
        "student": student,
        "teacher": teacher,
        "arm_settings": arm,
        "seed": seed,
        "tokens": tokens,
        "parameters": parameters,
        "flops": 6.0 * parameters * tokens,
        "baseline": base,
    }


def _write_run(path: Path, row: Row) -> None:
    path.mkdir(parents=True, exist_ok=True)
    flops, tokens = float(str(row["flops"])), int(str(row["tokens"]))
    costs = {"tokens": tokens, "seconds": 20.0, "tokens_per_second": 5e4, "parameters": row["parameters"],
             "train_flops": flops, "teacher_flops": 0.3 * flops if row["teacher"] else 0.0}  # fmt: skip
    (path / "state.json").write_text(json.dumps({"status": "done", "step": 100, "steps": 100} | costs))
    facts = {"time": "2026-01-02T03:04:05Z", "command": "tutelage study run", "commit": "0123abc",
             "versions": {"python": "3.12"}, "device": "cpu"}  # fmt: skip
    (path / "provenance.json").write_text(json.dumps(facts))
    points = [
        {"step": i, "tokens": i * tokens // LOG_ROWS, "ce": 2 + 3 * math.exp(-i / 5)}
        for i in range(1, LOG_ROWS + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    _write_evaluation(path, row)


@cache
def _texts() -> pl.DataFrame:
    """The documents, the same for every run, with the loss of a middling one."""
    frames = []
    for place, (domain, bits) in enumerate(DOMAINS.items()):
        for split in ("validation", "test"):
            rng = np.random.default_rng([place, len(split)])
            size = rng.integers(500, 3000, DOCUMENTS)
            nll = size * bits * math.log(2) * rng.normal(1, 0.1, DOCUMENTS)
            columns = {"domain": domain, "split": split, "document": np.arange(DOCUMENTS)}
            frames.append(pl.DataFrame(columns | {"bytes": size, "nll": nll}))
    return pl.concat(frames)


def _write_evaluation(path: Path, row: Row) -> None:
    rng = np.random.default_rng([*path.name.encode()])
    texts = _texts()
    noise = _factor(row) * rng.normal(1, 0.004) * rng.normal(1, 0.003, texts.height)
    better = pl.when(pl.col("split") == "test").then(pl.col("nll") * 0.97)
    documents = texts.with_columns(nll=pl.col("nll") * noise).with_columns(
        **{f"nll_{name}": better for name in FITTED}
    )
    documents.write_parquet(path / "documents.parquet")
    sums = documents.group_by("domain", "split", maintain_order=True).agg(pl.col("nll", "bytes").sum())
    lines = []
    for domain, split, nll, size in sums.iter_rows():
        bits = nll / math.log(2) / size
        metrics = {"bits_per_byte": bits, "perplexity": 2**bits}
        if split == "test":
            metrics |= {f"bits_per_byte_{name}": bits * 0.97 for name in FITTED}
            metrics |= {"ece": 0.03, "ece_adaptive": 0.03, "brier": 0.8, "overlap_documents": 0.0}
        role = "in_domain" if domain == next(iter(DOMAINS)) else "out_of_domain"
        common = {"run": path.name, "step": 100, "tokens": 1, "domain": domain, "role": role, "split": split,
                  "stderr": 0.01, "n": DOCUMENTS, "higher_is_better": False, "version": "v1"}  # fmt: skip
        lines += [json.dumps(common | {"metric": m, "value": value}) for m, value in metrics.items()]
    (path / "scores.jsonl").write_text("\n".join(lines) + "\n")


def _factor(row: Row) -> float:
    """Bits of a run as a multiple: size and tokens help, teachers a little."""
    size = math.log(float(str(row["parameters"])) * float(str(row["tokens"])))
    alpha = (row["arm_settings"] or {}).get("alpha")
    helped = 0.04 * alpha * (1 - alpha) if isinstance(alpha, float) else 0.0
    return 1.5 - 0.02 * size - helped


if __name__ == "__main__":
    main()
