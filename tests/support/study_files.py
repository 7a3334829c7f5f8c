"""A study file to build on, for tests that look at what it expands to."""

from __future__ import annotations

from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig

BASE = {
    "name": "test",
    "title": "A test",
    "corpus": {"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}]},
    "domains": {"scripture": {"source": {"kind": "corpus", "name": "kjv"}}},
    "teachers": {
        "{shape}@{tokens}": {
            "grid": {"product": {"shape": ["nano-20k", "nano-50k"], "tokens": ["1M", "2M"]}}
        },
        "unigram": {"control": "unigram"},
    },
    "students": {},
    "seeds": [43, 44],
}


def study(**changes):
    return validate(StudyConfig, BASE | changes, "test")


def group(grid, **more):
    return {"main": {"shape": "nano-50k", "tokens": "1M", "grid": grid} | more}
