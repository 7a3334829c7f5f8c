"""The files of a token comparison, written with made-up numbers."""

from __future__ import annotations

import json

import polars as pl

FACTS = {
    "student": "kid-1",
    "teacher": "miss-2",
    "baseline": "alone-3",
    "text": "speeches",
    "split": "test",
    "documents": 5,
    "tokens": 1000,
    "context": 40,
}


LABELS = {
    "all": ["all tokens"],
    "entropy": [f"{i}.00 to {i + 1}.00" for i in range(5)],
    "entropy contrast": ["4.00 to 5.00 minus 0.00 to 1.00"],
    "position": [f"{5 * i}%" for i in range(20)],
    "right": ["teacher only", "baseline only", "both", "neither"],
    "right contrast": ["teacher only minus baseline only"],
    "closer": ["teacher closer", "not closer"],
    "closer contrast": ["teacher closer minus not closer"],
}


ROLES = ("student", "teacher", "baseline")


PAIRS = ("student.teacher", "student.baseline", "teacher.baseline")


QUANTITIES = {
    **dict.fromkeys(["entropy", "max_prob", "gold_logp", "gold_rank"], ROLES),
    **dict.fromkeys(["above_uniform", "top10_mass", "top50_mass"], ROLES),
    **dict.fromkeys(["js", "top1_agreement", "top5_overlap", "top10_spearman", "shared_mass"], PAIRS),
    "kl": (*PAIRS, "teacher.student", "baseline.student", "baseline.teacher"),
    "gain": ("student", "teacher"),
}


def write(directory, stderr=0.01, documents=5):
    rows = [
        {
            "grouping": grouping,
            "bin": bin_,
            "label": label,
            "low": 2.0 * bin_ if grouping == "position" else None,
            "high": 2.0 * bin_ + 2 if grouping == "position" else None,
            "quantity": quantity,
            "of": of,
            "mean": (-1) ** bin_ * (0.1 + bin_ + len(of) / 100),
            "stderr": stderr,
            "n": 1000 // len(labels),
            "documents": documents,
        }
        for grouping, labels in LABELS.items()
        for bin_, label in enumerate(labels)
        for quantity, everybody in QUANTITIES.items()
        for of in everybody
    ]
    schema = {"stderr": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    pl.DataFrame(rows, schema_overrides=schema).write_parquet(directory / "summary.parquet")
    (directory / "comparison.json").write_text(json.dumps(FACTS))
    return directory
