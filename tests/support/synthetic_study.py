"""Write a study directory without training: files as of a real study, with effects known in advance."""

import atexit
import json
import math
import shutil
import tempfile
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import polars as pl

from tutelage.study.axis_settings import words
from tutelage.study.plan import Plan, save_plan
from tutelage.types import SCORING_VERSION, Score

DOMAINS = {"speeches": 1.65, "fables": 3.2, "recipes": 3.6}
"""Bits per byte of untaught students by text; the first text is the training distribution."""
OFFSETS = {43: 0.0, 44: 0.1, 45: -0.1}
"""Added to every student's gain, in percentage points: the noise of the training seed, mean 0."""
GAINS = {
    ("weak", 0.2): (-0.6, 1.2),
    ("weak", 0.4): (-1.2, 2.8),
    ("strong", 0.2): (1.0, 0.9),
    ("strong", 0.4): (2.2, 1.6),
    ("unigram", 0.2): (-2.5, 2.9),
}
"""(teacher, alpha or arm): gain in percent in domain, and out of domain (fables; recipes 1 more)."""
KNOWLEDGE = {"unigram": 0.0}
"""Part of the out-of-domain gain that is left when calibration is fitted; 0.5 for whom it does not name."""
TEACHERS = {"weak": (1.75, 130_000, TOKENS := 2_000_000), "strong": (1.60, 1_300_000, 4_000_000)}
"""Trained teachers: bits per byte in domain, parameters, tokens."""
ARMS = {
    "linear start 0.8 end 0.0": {"alpha": {"policy": "linear", "start": 0.8, "end": 0.0}},
    "salt value 0.8 until 0.3": {"alpha": {"policy": "salt", "value": 0.8, "until": 0.3}},
    "gap_driven floor 0.1": {"alpha": {"policy": "gap_driven", "floor": 0.1}},
    "alpha 0.4, teacher_better": {"alpha": 0.4, "gate": {"kind": "teacher_better"}},
    "alpha 1, temperature 4": {"alpha": 1.0, "temperature": 4},
    "alpha 1, tail renormalise, top_k k 5": {
        "alpha": 1.0,
        "tail": "renormalise",
        "truncation": {"kind": "top_k", "k": 5},
    },
}
"""Settings of the arms that GAINS names by their words."""
STUDENT = "tiny 2M"
DOCUMENTS = 20
PARAMETERS = 380_000
VERSION = f"{SCORING_VERSION}-1"


def write_study(path, seeds=(43, 44, 45), title="Does a teacher help?", **more):
    """Write the study and return `path`.

    Args:
        path: where.
        seeds: of every student.
        title: heading.
        more: `gains` instead of GAINS, whose keys may begin with the name of a student; `description` of
            every teacher; `claims`; `teachers` instead of TEACHERS; `sizes`: (parameters,
            tokens) by student; `offsets`: instead of OFFSETS, by seed; `noise`: standard deviation of a
            further offset of each run; `domains` instead of DOMAINS; `documents` of each text and split;
            `points` of each learning curve; `corpus`, name of the training text.
    """
    if more:
        return _written(path, seeds, title, **more)
    return shutil.copytree(_template(tuple(seeds), title), path, dirs_exist_ok=True)


@cache
def _template(seeds, title):
    """A study that many tests begin with, written once."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    return _written(Path(directory), seeds, title)


def _written(path, seeds, title, *, gains=None, description="a teacher", **more):
    domains = more.get("domains", DOMAINS)
    wanted = {(STUDENT, *k) if len(k) == 2 else k: v for k, v in (GAINS if gains is None else gains).items()}
    trained = more.get("teachers", TEACHERS)
    sizes = {STUDENT: (PARAMETERS, TOKENS)} | more.get("sizes", {})
    names = list(dict.fromkeys(teacher for _, teacher, _ in wanted if teacher is not None))
    students = list(dict.fromkeys(student for student, _, _ in wanted))
    rows = [run_row("teacher", None, t, None, 42, trained[t][1:]) for t in names if t in trained]
    rows += [run_row("baseline", s, None, None, seed, sizes[s]) for s in students for seed in seeds]
    rows += [run_row("student", *key, seed, sizes[key[0]]) for key in wanted for seed in seeds]
    plan = {
        "schema": 3,
        "name": "demo",
        "title": title,
        "seeds": list(seeds),
        "students": [
            {"name": s, "shape": s.split()[0], "tokens": sizes[s][1], "parameters": sizes[s][0]}
            for s in students
        ],
        "teachers": [plan_teacher(t, trained, description) for t in names],
        "domains": [{"name": name, "role": role_of(name, domains)} for name in domains],
        "in_domain": next(iter(domains)),
        "corpus": more.get("corpus"),
        "runs": rows,
        "claims": list(more.get("claims", ())),
        "notes": ["The text is old & short."],
    }
    path.mkdir(parents=True, exist_ok=True)
    save_plan(path, Plan.model_validate_json(json.dumps(plan)))
    for row in rows:
        own = trained[row["teacher"]][0] if row["kind"] == "teacher" else None
        gain = wanted.get((row["student"], row["teacher"], short(row["arm_settings"])))
        own_noise = np.random.default_rng([*row["run"].encode()]).normal(0, more.get("noise", 0.0))
        noise = more.get("offsets", OFFSETS).get(row["seed"], 0.0) + own_noise
        bits = partial(bits_per_byte, row, own, gain, noise, domains)
        run = path / "runs" / row["run"]
        write_run(run, row, domains, more.get("points", 199))
        write_evaluation(run, row["teacher"], domains, bits, more.get("documents", DOCUMENTS))
    return path


def write_planned(path, plan, truth, domains, documents=8, points=25):
    """Write finished runs of a plan, each with a score of its own, and return `path`.

    Args:
        path: where.
        plan: of any study; its runs need no ids.
        truth: of a run and a side ("in", "out" or "fitted"), its bits per byte as a multiple of an untaught
            student's.
        domains: bits per byte of an untaught student by text; the first is the training distribution.
        documents: of each text and split.
        points: of each learning curve.
    """
    path.mkdir(parents=True)
    runs = [run.model_copy(update={"evaluation": "e1"}) for run in plan.runs]
    save_plan(path, plan.model_copy(update={"runs": tuple(runs)}))
    inside = next(iter(domains))
    for run in runs:
        sides = {side: truth(run, side) for side in ("in", "out", "fitted")}

        def bits(domain, split, fit, sides=sides):
            side = "in" if domain == inside else "out" if fit == "raw" else "fitted"
            return domains[domain] * sides[side] * (1.01 if split == "validation" else 1.0)

        row = run.model_dump()
        write_run(path / "runs" / run.run, row, domains, points)
        write_evaluation(path / "runs" / run.run, run.teacher, domains, bits, documents)
    return path


def plan_teacher(name, trained, description):
    fields = {"name": name, "control": name in ("unigram", "uniform"), "description": description}
    if name not in trained:
        return fields
    _, parameters, tokens = trained[name]
    more = {"shape": "tiny", "tokens": tokens, "parameters": parameters, "run": f"teacher-{name}-42"}
    return fields | more


def short(settings):
    """The arm as it is written in GAINS."""
    if settings is None:
        return None
    text = words(settings)
    return text if text in ARMS or "compute_of" in settings else settings["alpha"]


def long(arm):
    """The settings of an arm that is written as in GAINS."""
    if arm is None or isinstance(arm, float):
        return None if arm is None else {"alpha": arm}
    of = arm.removeprefix("compute of ")
    settings = ARMS[arm] if of == arm else {"compute_of": of}
    assert words(settings) == arm
    return settings


def run_row(kind, student, teacher, arm, seed, size):
    """One row of the plan's `runs`."""
    special = None if student in (None, STUDENT) else student.replace(" ", "-")
    word = None if arm is None else str(arm).replace(" ", "-").replace(",", "")
    return {
        "run": "-".join(str(part) for part in (kind, special, teacher, word, seed) if part is not None),
        "kind": kind,
        "group": "teachers" if kind == "teacher" else "main",
        "student": student,
        "teacher": teacher,
        "arm_settings": long(arm),
        "seed": seed,
        "tokens": size[1],
        "parameters": size[0],
        "flops": 6.0 * size[0] * size[1],
        "evaluation": "e1",
        "baseline": "-".join(str(p) for p in ("baseline", special, seed) if p is not None)
        if kind == "student"
        else None,
    }


def role_of(domain, domains):
    return "in_domain" if domain == next(iter(domains)) else "out_of_domain"


def bits_per_byte(row, own, gain, noise, domains, domain, split, fit):
    """The score that the run is to have: validation is a hundredth above test for everyone."""
    inside, *outside = domains
    bits = domains[domain] * (1.01 if split == "validation" else 1.0) * (1.0 if fit == "raw" else 0.98)
    if own is not None:
        return bits * own / domains[inside]
    bits *= 1 + (row["seed"] - 43) / 1000
    if gain is None:
        return bits
    part = 1.0 if fit == "raw" else KNOWLEDGE.get(row["teacher"], 0.5)
    percent = gain[0] if domain == inside else (gain[1] + outside.index(domain)) * part
    return bits * (1 - (percent + noise) / 100)


def write_run(path, row, domains, points):
    """State, provenance and learning curve of a finished run."""
    path.mkdir(parents=True)
    flops = row["flops"]
    state = {
        "status": "done",
        "step": 1953,
        "steps": 1953,
        "tokens": row["tokens"],
        "seconds": 100.0,
        "tokens_per_second": row["tokens"] / 100,
        "parameters": row["parameters"],
        "evaluations": {"e1": dict.fromkeys(domains, VERSION)},
        "train_flops": flops,
        "teacher_flops": 0.25 * flops if row["kind"] == "student" and row["teacher"] else 0.0,
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
    rng = np.random.default_rng(len(path.name))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, points + 1):
            tokens = step * TOKENS // (points + 1)
            ce = 2.0 + 3.0 * math.exp(-6 * step / (points + 1)) + 0.05 * rng.standard_normal()
            row = {"step": step, "tokens": tokens, "loss": ce, "ce": ce, "kd": 0.0, "teacher_ce": 0.0}
            row |= {"alpha": 0.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 2e4, "seconds": 1.0}
            file.write(json.dumps(row) + "\n")


@cache
def documents_of(domain, split, documents):
    """Sizes of the documents, the same in every run, and how hard each is."""
    rng = np.random.default_rng(len(domain) * 10 + len(split))
    size = rng.integers(500, 3000, documents)
    return size, size * rng.uniform(0.8, 1.2, documents)


def write_evaluation(path, teacher, domains, bits_of, documents):
    """Documents of random sizes whose losses sum to exactly the wanted score, and the scores."""
    frames, scores = [], []
    bumps = np.random.default_rng(sum(path.name.encode())).normal(1, 0.01, documents)
    for domain in domains:
        for split in ("validation", "test"):
            size, hard = documents_of(domain, split, documents)
            shape = hard * bumps
            frame = {"domain": [domain] * documents, "split": [split] * documents}
            frame |= {"document": np.arange(documents), "bytes": size}
            metrics = {}
            for fit in ("raw", "temperature", "unigram", "temperature_in_domain"):
                suffix = "" if fit == "raw" else f"_{fit}"
                bits = bits_of(domain, split, fit)
                fitted = fit != "raw" and split == "validation"
                losses = shape / shape.sum() * bits * math.log(2) * size.sum()
                frame[f"nll{suffix}"] = np.full(documents, np.nan) if fitted else losses
                metrics |= {} if fitted else {f"bits_per_byte{suffix}": bits}
            metrics["perplexity"] = 2 ** (2 * metrics["bits_per_byte"])
            if split == "test":
                metrics["ece"] = 0.02 if teacher is None else 0.03
            frames.append(pl.DataFrame(frame | {"tokens": size // 2, "version": VERSION}).fill_nan(None))
            for metric, value in metrics.items():
                score = Score(
                    run=path.name, step=1953, tokens=TOKENS, domain=domain, role=role_of(domain, domains),
                    split=split, metric=metric, value=float(value), stderr=0.01, n=documents,
                    higher_is_better=False, version=VERSION,
                )  # fmt: skip
                scores.append(json.dumps(asdict(score)) + "\n")
    pl.concat(frames).write_parquet(path / "documents.parquet")
    (path / "scores.jsonl").write_text("".join(scores))
