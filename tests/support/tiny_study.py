"""A study small enough to run in a test: real text, seconds per run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig
from tutelage.progress import NullProgress
from tutelage.study.engines.local import LocalEngine
from tutelage.study.expand import expand
from tutelage.study.run_study import run_study

if TYPE_CHECKING:
    from pathlib import Path

TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "A tiny study",
    "corpus": {
        "name": "sotu",
        "sources": [{"kind": "corpus", "name": "sotu"}],
        "tokenizer": {"vocab_size": 300},
        "validation": 0.2,
        "test": 0.2,
        "max_bytes": 400_000,
    },
    "domains": {"scripture": {"source": {"kind": "corpus", "name": "kjv"}, "max_bytes": 100_000}},
    "teachers": {"weak": {"shape": "nano-20k", "tokens": "4K"}},
    "students": {
        "main": {
            "shape": "nano-50k",
            "tokens": "4K",
            "grid": {"product": {"teacher": ["weak"], "alpha": [0.4]}},
        }
    },
    "seeds": [43],
    "run": {
        "data": {"sequence_length": 32},
        "global_batch_tokens": 256,
        "checkpoint": {"every": "1K", "keep": 1},
        "eval": {"max_documents": 2, "max_tokens": 64},
        "runtime": {"device": "cpu", "threads": 1, "log_every": 1},
    },
}


def tiny_study(**changes: Any) -> StudyConfig:
    return validate(StudyConfig, TINY | changes, "tiny")


def run_tiny(study: StudyConfig, directory: Path, workers: int = 1) -> None:
    run_study(expand(study), directory, LocalEngine(workers, []), NullProgress())
