"""Teachers of a study whose targets are computed once for all students."""

from __future__ import annotations

import pytest
from tiny_study import run_tiny, tiny_study

from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.errors import UserError
from tutelage.run_directory import RunDirectory
from tutelage.study.expand import expand
from tutelage.study.nodes import Stores, bind
from tutelage.study.plan import load_plan
from tutelage.teachers.cache.reader import verify_cache

TEACHER = {
    "shape": "nano-20k",
    "tokens": "4K",
    "cache": {"format": {"kind": "sample_min_variance", "ids": 8}},
}
GROUP = {"shape": "nano-50k", "tokens": "4K"}


@pytest.mark.slow
def test_students_of_a_study_share_their_teachers_cache(tmp_path):
    splits = {"max_bytes": 200_000, "validation": 0.3, "test": 0.3}
    corpus = tiny_study().corpus.model_dump(mode="json") | splits
    group = GROUP | {"grid": {"product": {"teacher": ["weak"], "alpha": [0.2, 0.6]}}}
    study = tiny_study(corpus=corpus, teachers={"weak": TEACHER}, students={"main": group})
    run_tiny(study, tmp_path, workers=2)
    (cache,) = (tmp_path / "caches").iterdir()
    verify_cache(cache)
    taught = [one for one in load_plan(tmp_path).runs if one.kind == "student"]
    assert len(taught) == 2
    for one in taught:
        directory = RunDirectory(tmp_path / "runs" / one.run)
        assert directory.is_done()
        assert load(RunConfig, directory.path / "config.yaml").teacher.cache.format.ids == 8
        assert directory.state()["teacher_flops"] == 0.0  # paid once, by the cache


def test_a_cell_that_its_teachers_cache_cannot_serve_is_named(store, other_store, tmp_path):
    group = GROUP | {"grid": {"product": {"teacher": ["weak"], "alpha": [0.2], "temperature": [2.0]}}}
    study = tiny_study(teachers={"weak": TEACHER}, students={"main": group})
    stores = Stores(store, {"scripture": other_store}, {}, {})
    with pytest.raises(UserError, match=r"student-nano-50k.*temperature = 2: teacher\.cache holds"):
        bind(expand(study), stores, tmp_path, 300)
