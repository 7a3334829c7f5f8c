"""Writes a synthetic study directory: the real files, with effects that are known in advance."""

import json
import math
from dataclasses import asdict

import numpy as np
import polars as pl

from tutelage.study.planfile import Plan, save_plan
from tutelage.types import Score

DOMAINS = {"speeches": "in_domain", "fables": "out_of_domain", "recipes": "out_of_domain"}
BASE_BITS = {"speeches": 1.65, "fables": 3.2, "recipes": 3.6}
OFFSETS = {43: 0.0, 44: 0.1, 45: -0.1}
"""Added to every student's gain, in percentage points: the noise of the training seed, mean 0."""
GAINS = {
    ("weak", 0.2): (-0.6, 1.2),
    ("weak", 0.4): (-1.2, 2.8),
    ("strong", 0.2): (1.0, 0.9),
    ("strong", 0.4): (2.2, 1.6),
    ("unigram", 0.2): (-2.5, 2.9),
}
"""(teacher, alpha): gain in percent in domain, and out of domain (fables; recipes get 1 point more)."""
TEACHER_BITS = {"weak": 1.75, "strong": 1.60}
DOCUMENTS = 20
TOKENS = 2_000_000


def write_study(path, seeds=(43, 44, 45), title="Does a teacher help?", gains=None, description="a teacher"):
    """Write the study and return `path`. `gains` replaces GAINS."""
    gains = GAINS if gains is None else gains
    teachers = list(dict.fromkeys(teacher for teacher, _ in gains))
    runs = [cell("teacher", t, None, 42) for t in teachers if t in TEACHER_BITS]
    runs += [cell("baseline", None, None, seed) for seed in seeds]
    runs += [cell("student", t, alpha, seed) for (t, alpha) in gains for seed in seeds]
    plan = {
        "schema": 1,
        "name": "demo",
        "title": title,
        "seeds": list(seeds),
        "runs_directory": "runs",
        "student": {"rung": "tiny", "tokens": TOKENS, "parameters": 380_000},
        "teachers": [{"name": t, "control": t == "unigram", "description": description} for t in teachers],
        "domains": [{"name": name, "role": role} for name, role in DOMAINS.items()],
        "in_domain": "speeches",
        "runs": runs,
        "notes": ["The text is old & short."],
    }
    path.mkdir(parents=True, exist_ok=True)
    save_plan(path, Plan.model_validate_json(json.dumps(plan)))
    for row in runs:
        write_run(path / "runs" / row["run"], row, gains)
    return path


def cell(kind, teacher, alpha, seed):
    """One row of the plan's `runs`."""
    name = "-".join(str(part) for part in (kind, teacher, alpha, seed) if part is not None)
    return {"run": name, "kind": kind, "teacher": teacher, "alpha": alpha, "seed": seed}


def bits_per_byte(row, domain, split, gains):
    """The score that the run is to have: validation is a hundredth above test for everyone."""
    bits = BASE_BITS[domain] * (1.01 if split == "validation" else 1.0)
    if row["kind"] == "teacher":
        return bits * TEACHER_BITS[row["teacher"]] / BASE_BITS["speeches"]
    bits *= 1 + (row["seed"] - 43) / 1000
    if row["kind"] == "baseline":
        return bits
    inside, outside = gains[(row["teacher"], row["alpha"])]
    gain = {"speeches": inside, "fables": outside, "recipes": outside + 1}[domain]
    return bits * (1 - (gain + OFFSETS[row["seed"]]) / 100)


def write_run(path, row, gains):
    """All files of one finished run."""
    path.mkdir(parents=True)
    student_flops = 6 * 380_000 * TOKENS
    state = {
        "status": "done",
        "step": 1953,
        "steps": 1953,
        "tokens": TOKENS,
        "seconds": 100.0,
        "tokens_per_second": TOKENS / 100,
        "parameters": 380_000,
        "train_flops": float(student_flops),
        "teacher_flops": 0.25 * student_flops if row["kind"] == "student" else 0.0,
        "error": None,
    }
    (path / "state.json").write_text(json.dumps(state))
    provenance = {
        "time": "2026-01-02T03:04:05Z",
        "command": "tutelage demo",
        "commit": "0123abc",
        "dirty": True,
        "versions": {"python": "3.12", "torch": "2.13.0"},
        "device": "cpu",
        "threads": 2,
    }
    (path / "provenance.json").write_text(json.dumps(provenance))
    (path / "config.yaml").write_text("name: run\n")
    write_metrics(path)
    write_evaluation(path, row, gains)


def write_metrics(path):
    rng = np.random.default_rng(len(path.name))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 200):
            tokens = step * TOKENS // 200
            ce = 2.0 + 3.0 * math.exp(-6 * step / 200) + 0.05 * rng.standard_normal()
            row = {"step": step, "tokens": tokens, "loss": ce, "ce": ce, "kd": 0.0, "teacher_ce": 0.0}
            row |= {"alpha": 0.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 2e4, "seconds": 1.0}
            file.write(json.dumps(row) + "\n")


def write_evaluation(path, row, gains):
    """Documents of random sizes whose losses sum to exactly the wanted score, and the scores."""
    frames, scores = [], []
    for domain, role in DOMAINS.items():
        for split in ("validation", "test"):
            rng = np.random.default_rng(len(domain) * 10 + len(split))  # the same documents in every run
            size = rng.integers(500, 3000, DOCUMENTS)
            noise = np.random.default_rng(sum(path.name.encode())).normal(1, 0.01, DOCUMENTS)
            shape = size * rng.uniform(0.8, 1.2, DOCUMENTS) * noise
            bits = bits_per_byte(row, domain, split, gains)
            nll = shape / shape.sum() * bits * math.log(2) * size.sum()
            frame = {"domain": domain, "split": split, "document": np.arange(DOCUMENTS), "bytes": size}
            frames.append(pl.DataFrame(frame | {"tokens": size // 2, "nll": nll}))
            for metric, value in (("bits_per_byte", bits), ("perplexity", 2 ** (2 * bits))):
                score = Score(
                    run=path.name, step=1953, tokens=TOKENS, domain=domain, role=role, split=split,
                    metric=metric, value=float(value), stderr=0.01, n=DOCUMENTS, higher_is_better=False,
                    version="v1",
                )  # fmt: skip
                scores.append(json.dumps(asdict(score)) + "\n")
    pl.concat(frames).write_parquet(path / "documents.parquet")
    (path / "scores.jsonl").write_text("".join(scores))
