"""Students that train together: the same bits as alone, and one teacher forward for all."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import load_file
from training import Notes, StopAt, assert_same_weights, losses, rows

from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import Stopped, UserError
from tutelage.run import run, run_cohort
from tutelage.run_directory import RunDirectory
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.reader import Cache
from tutelage.teachers.live import OnlineTeacher


@pytest.fixture
def teacher(make_config):
    return run(make_config(name="teacher", seed=7))


@pytest.fixture
def members(make_config, teacher):
    """Students that differ in everything that may differ: teacher weight, temperature, seed, size, budget."""
    taught = {"kind": "run", "run": teacher.id}

    def make(**changes):
        return [
            make_config(name="alone", **changes),
            make_config(name="weak", teacher=taught, objective={"alpha": 0.3}, **changes),
            make_config(name="hot", teacher=taught, objective={"alpha": 1.0, "temperature": 2.0}, **changes),
            make_config(name="seed", seed=5, teacher=taught, objective={"alpha": 0.3}, **changes),
            make_config(
                **{"name": "large", "teacher": taught, "objective": {"alpha": {"policy": "gap_driven"}}}
                | {"model": {"shape": "nano-150k"}, "tokens": 7 * 256}
                | changes
            ),
        ]

    return make


def test_each_student_is_the_one_it_would_be_alone(members, tmp_path, teacher):
    link = tmp_path / "solo" / teacher.id
    link.parent.mkdir()
    link.symlink_to(teacher.path)
    together = run_cohort(members())
    alone = [run(config) for config in members(output=str(tmp_path / "solo"))]
    for a, b in zip(together, alone, strict=True):
        assert a.id == b.id
        assert losses(a) == losses(b)
        assert_same_weights(a, b)
        assert a.state()["teacher_flops"] == b.state()["teacher_flops"]
        assert (a.state()["cohort"], b.state()["cohort"]) == (5, 1)


def test_the_teacher_is_asked_once_per_batch(members, monkeypatch):
    asked = []
    targets = OnlineTeacher.targets
    monkeypatch.setattr(
        OnlineTeacher,
        "targets",
        lambda self, batch: (asked.append(batch.starts), targets(self, batch))[1],
    )
    run_cohort(members(micro_batch_tokens=128))
    assert len(asked) == 12 * 2
    assert len(set(asked)) == len(asked)


def test_a_cohort_reads_its_cache_once_per_batch_and_each_is_as_alone(
    make_config, store, teacher, tmp_path, monkeypatch
):
    teach = {
        "store": str(store),
        "teacher": {"kind": "run", "run": teacher.id},
        "context_length": 32,
        "device": "cpu",
        "runs": str(teacher.path.parent),
        "output": str(tmp_path / "caches"),
    }
    taught = {"kind": "cache", "path": str(write_cache(validate(TeachConfig, teach, "test")))}

    def students(output):
        return [
            make_config(
                name=f"alpha{alpha}", seed=seed, teacher=taught, objective={"alpha": alpha}, output=output
            )
            for seed, alpha in enumerate((0.2, 0.6, 1.0))
        ]

    alone = [run(config) for config in students(str(tmp_path / "solo"))]
    asked = []
    read = Cache.read
    monkeypatch.setattr(
        Cache, "read", lambda self, starts, length: (asked.append(starts), read(self, starts, length))[1]
    )
    together = run_cohort(students(str(tmp_path / "together")))
    assert len(asked) == len(set(asked)) == 12
    for a, b in zip(together, alone, strict=True):
        assert a.id == b.id
        assert losses(a) == losses(b)
        assert_same_weights(a, b)


def test_a_stopped_cohort_goes_on_bitwise_even_from_uneven_checkpoints(members, tmp_path, teacher):
    link = tmp_path / "again" / teacher.id
    link.parent.mkdir()
    link.symlink_to(teacher.path)
    whole = run_cohort(members())
    configs = members(output=str(tmp_path / "again"))
    with pytest.raises(Stopped):
        run(configs[1], StopAt(9))  # one student is further on than the others
    for stop in (3, 6):
        with pytest.raises(Stopped):
            run_cohort(configs, StopAt(stop))
    with pytest.raises(Stopped):
        run_cohort(configs, StopAt(10))
    notes = Notes()
    resumed = run_cohort(configs, notes)  # the large one has had its 7 steps, and nobody waits for it
    assert "resuming after step 10 of 12" in notes.notes
    for a, b in zip(resumed, whole, strict=True):
        assert losses(a) == losses(b)
        assert_same_weights(a, b)


def test_a_student_that_waits_for_the_others_is_not_timed(members, monkeypatch):
    """The clock of one whose checkpoint was further along ran while the others caught up."""
    configs, clock, real = members()[:2], [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + clock[0])

    class Slow(StopAt):
        def advance(self, stage, step):
            clock[0] += 100.0
            super().advance(stage, step)

    for some, stop in ((configs[:1], 8), (configs, 2)):
        with pytest.raises(Stopped):
            run_cohort(some, Slow(stop))
    ahead, behind = run_cohort(configs, Slow(None))
    for directory in (ahead, behind):
        assert 1200 <= directory.state()["seconds"] < 1300
        assert all(row["tokens_per_second"] == pytest.approx(2.56, rel=0.1) for row in rows(directory))


def test_a_student_that_breaks_is_left_out_and_the_others_finish(make_config):
    configs = [make_config(name="good"), make_config(name="broken", optim={"lr": 1e30, "clip": 1e30})]
    with pytest.raises(UserError, match=r"broken-.*loss is"):
        run_cohort(configs)
    [good] = [RunDirectory(path.parent) for path in configs[0].output.glob("good-*/state.json")]
    assert good.state()["status"] == "done"
    assert all(torch.isfinite(w).all() for w in load_file(good.model / "model.safetensors").values())
    states = [json.loads(path.read_text()) for path in good.path.parent.glob("broken-*/state.json")]
    assert [state["status"] for state in states] == ["failed"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": {"store": "STORE", "sequence_length": 32, "seed": 1}}, "data"),
        ({"global_batch_tokens": 512}, "global_batch_tokens"),
        ({"micro_batch_tokens": 64}, "micro_batch_tokens"),
        ({"teacher": {"kind": "uniform"}, "objective": {"alpha": 0.1}}, "teacher"),
    ],
)
def test_runs_that_cannot_share_are_refused_by_field(make_config, store, changes, field):
    changes = json.loads(json.dumps(changes).replace("STORE", str(store)))
    taught = {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.1}}
    with pytest.raises(UserError, match=field):
        run_cohort([make_config(**taught), make_config(name="other", **(taught | changes))])


UNSERVED = [
    ({"divergence": "reverse_kl"}, "objective.divergence = reverse_kl"),
    ({"divergence": "hard_labels"}, "objective.divergence = hard_labels"),
    ({"temperature": 2.0}, "objective.temperature = 2"),
    ({"truncation": {"kind": "top_k", "k": 3}}, "objective.truncation"),
]


@pytest.fixture(scope="module")
def cache(store, tmp_path_factory):
    """Targets that serve one objective only."""
    config = {"store": str(store), "teacher": {"kind": "unigram"}, "context_length": 32, "device": "cpu"}
    kept = {"format": {"ids": 4}, "output": str(tmp_path_factory.mktemp("caches"))}
    return write_cache(validate(TeachConfig, config | kept, "test"))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("asked", "message"), UNSERVED, ids=[message for _, message in UNSERVED])
def test_each_run_of_a_cohort_is_checked_against_the_cache(
    make_config, cache, tmp_path, place, asked, message
):
    taught = {"teacher": {"kind": "cache", "path": str(cache)}, "objective": {"alpha": 0.4}}
    runs = [make_config(name=f"run-{number}", **taught) for number in range(3)]
    runs[place] = make_config(name="unserved", **(taught | {"objective": {"alpha": 0.4} | asked}))
    with pytest.raises(UserError, match=message):
        run(runs[place])
    with pytest.raises(UserError, match=message):
        run_cohort(runs)
    assert not list(tmp_path.glob("runs/*/state.json"))  # before anything began


def test_the_same_run_twice_is_trained_once(make_config):
    first, second = run_cohort([make_config(), make_config()])
    assert first.path == second.path
