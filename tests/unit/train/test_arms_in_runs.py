"""Routing, late teachers and means of teachers in real runs: when a teacher runs, its cost, resume."""

from __future__ import annotations

import json
import subprocess
import sys

import killed_ranks
import pytest
import torch
import yaml
from training import StopAt, assert_same_weights, losses, opened, weights

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.errors import Stopped, UserError
from tutelage.models.devices import Hardware
from tutelage.names import settings
from tutelage.progress import NullProgress
from tutelage.run import run, run_cohort
from tutelage.run_directory import RunDirectory
from tutelage.run_plan import plan_run
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.reader import Cache
from tutelage.teachers.live import OnlineTeacher

STEPS = 10
LATE = {"policy": "two_phase", "first": 0.0, "second": 1.0, "switch": 0.7}  # 3 of 10 steps
ROUTED = {"alpha": 1.0, "mixing": "routed", "divergence": "reverse_kl"}


@pytest.fixture(scope="module")
def data(store, tmp_path_factory):
    """A small text, which caches are written for in a moment."""
    config = StoreConfig(
        name="few",
        sources=({"kind": "corpus", "name": "sotu"},),
        tokenizer=TokenizerConfig(path=store),
        validation=0.2,
        test=0.2,
        max_bytes=60_000,
    )
    return {"store": str(build_store(config, tmp_path_factory.mktemp("stores"))), "sequence_length": 32}


@pytest.fixture(scope="module")
def teachers(tiny_config, data, tmp_path_factory):
    """Two teachers of unlike sizes, in one output directory."""
    place = tmp_path_factory.mktemp("arms") / "runs"
    shapes = {"small": "nano-20k", "large": "nano-50k"}
    return [
        run(tiny_config(place, name=name, seed=7, model={"shape": shape}, tokens=4 * 256, data=data))
        for name, shape in shapes.items()
    ]


@pytest.fixture
def student(tiny_config, data, teachers):
    def make(name="student", **changes):
        settings = {"name": name, "tokens": STEPS * 256, "data": data} | changes
        return tiny_config(teachers[0].path.parent, **settings)

    return make


@pytest.fixture
def mean(teachers):
    return {"kind": "mean", "of": [{"kind": "run", "run": one.id} for one in teachers]}


@pytest.fixture
def asked(monkeypatch):
    """The batches that live teachers are run on and those that caches are read at."""
    found = {"live": [], "cache": []}
    targets, read = OnlineTeacher.targets, Cache.read

    def run_on(self, batch):
        found["live"].append(batch.starts)
        return targets(self, batch)

    def read_at(self, starts, length):
        found["cache"].append(tuple(starts))
        return read(self, starts, length)

    monkeypatch.setattr(OnlineTeacher, "targets", run_on)
    monkeypatch.setattr(Cache, "read", read_at)
    return found


def cached(teacher, student, **settings):
    """A cache of a teacher's targets."""
    config = student()
    teach = {"store": str(config.data.store), "teacher": teacher, "context_length": 32, "batch_tokens": 512}
    teach |= {"runs": str(config.output), "output": str(config.output.parent / "caches")} | settings
    return write_cache(validate(TeachConfig, teach, "test"))


@pytest.mark.parametrize("kind", ["live", "cache"])
def test_a_late_teacher_is_run_read_and_billed_in_its_part_alone(kind, teachers, student, asked):
    teacher = {"kind": "run", "run": teachers[1].id}
    if kind == "cache":
        path = cached(teacher, student, format={"kind": "topk", "k": 4})
        teacher = {"kind": "cache", "path": str(path)}
        asked["live"].clear()
    config = student(f"late-{kind}", teacher=teacher, objective={"alpha": LATE})
    directory = run(config)
    loader = opened(config).loader
    windows = [tuple((loader.windows(step) * 32).tolist()) for step in (7, 8, 9)]
    assert asked[kind] == windows
    assert asked["cache" if kind == "live" else "live"] == []
    log = losses(directory)
    assert [row["teacher_ce"] > 0 for row in log] == [False] * 7 + [True] * 3
    assert [row["alpha"] for row in log] == [0.0] * 7 + [1.0] * 3
    plan = plan_run(config, Hardware.named("h100", 1))
    spent = directory.state()["teacher_flops"]
    assert plan.flops[1] * plan.tokens == pytest.approx(spent)
    assert (spent > 0) == (kind == "live")
    counters = max((directory.path / "checkpoints").glob("step-*")) / "counters.json"
    assert json.loads(counters.read_text())["teacher_tokens"] == 3 * 256


def test_a_mean_is_of_probabilities_live_and_cached_and_costs_each_teacher(teachers, student, mean):
    config = student("mean", teacher=mean, objective={"alpha": 0.5})
    directory = run(config)
    batch = opened(config).loader.batch(0)
    singles = [opened(student(teacher=one, objective={"alpha": 0.5})).teacher for one in mean["of"]]
    logits = [(x.hidden_NE.double() @ x.head_VE.double().T) for x in (one.targets(batch) for one in singles)]
    p = torch.stack([one.softmax(-1) for one in logits]).mean(0)
    gold = p.gather(1, batch.labels_BT.flatten().unsqueeze(1)).log()
    assert losses(directory)[0]["teacher_ce"] == pytest.approx(-gold.mean().item(), rel=1e-5)
    flops = sum(one.forward_flops for one in singles)
    assert directory.state()["teacher_flops"] == pytest.approx(flops * STEPS * 256)
    assert plan_run(config, Hardware.named("h100", 1)).flops[1] == pytest.approx(flops)
    card = (directory.model / "README.md").read_text(encoding="utf-8")
    assert f"mean of run {teachers[0].id}, run {teachers[1].id}" in card
    assert settings(directory.path)["teacher.of.1.run"] == teachers[1].id

    top = student(
        "top", teacher=mean | {"cache": {"format": {"kind": "topk", "k": 9}}}, objective={"alpha": 1.0}
    )
    stored = opened(top).teacher.targets(batch)
    values, ids = p.topk(9)
    assert torch.equal(stored.ids_NK.sort(-1).values, ids.sort(-1).values)
    torch.testing.assert_close(stored.probs_NK.sum(-1).double(), values.sum(-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stored.gold_logp_N.double(), gold.squeeze(1), rtol=0, atol=2**-11)
    drawn = [
        SampledMean.of(
            cached(mean, student, seed=seed, format={"kind": "sample_min_variance", "ids": 20}), batch
        )
        for seed in range(2)
    ]
    found = torch.stack(drawn).mean(0)  # unbiased: over tokens and draws, each id gets the mass it has
    torch.testing.assert_close(found.mean(0), p.mean(0), rtol=0, atol=0.006)
    assert run(top).state()["teacher_flops"] == 0


class SampledMean:
    """The distributions that a cache of samples has drawn, as dense rows."""

    @staticmethod
    def of(path, batch):
        from tutelage.teachers.cache.reader import open_cache

        rows = open_cache(path).read(batch.starts, batch.tokens_BT.shape[1])
        dense = torch.zeros(len(rows.ids_NK), 300, dtype=torch.float64)
        return dense.scatter_add(1, rows.ids_NK, rows.probs_NK.double())


class Crash(NullProgress):
    """Fails after some step, as a kill would, so that the run has its last checkpoint alone."""

    def advance(self, _stage, step):
        if step == 6:
            raise RuntimeError("killed")


def arms(mean):
    certain, random = ({"kind": kind, "keep": 0.3} for kind in ("teacher_certainty", "random"))
    return {
        "certainty": {"teacher": mean, "objective": ROUTED | {"gate": certain}},
        "random": {"teacher": mean["of"][0], "objective": ROUTED | {"gate": random}},
        "ahead": {"teacher": mean, "objective": ROUTED | {"gate": {"kind": "teacher_ahead", "keep": 0.3}}},
        "late": {"teacher": mean, "objective": ROUTED | {"gate": certain, "alpha": LATE | {"switch": 0.3}}},
    }


@pytest.mark.slow
def test_resumed_after_a_stop_and_a_kill_in_a_cohort_and_in_micro_batches(teachers, student, mean, tmp_path):
    """All four at once, over a fresh output directory that has the teachers."""
    elsewhere = tmp_path / "runs"
    elsewhere.mkdir()
    for one in teachers:
        (elsewhere / one.id).symlink_to(one.path)
    settings = arms(mean)
    whole = {name: run(student(name, **changes)) for name, changes in settings.items()}
    for name, changes in settings.items():
        config = student(name, **changes, output=str(elsewhere))
        with pytest.raises(Stopped):
            run(config, StopAt(2))
        with pytest.raises(RuntimeError, match="killed"):
            run(config, Crash())
        again = run(config)
        assert again.id == whole[name].id
        assert losses(again) == losses(whole[name])
        assert_same_weights(again, whole[name])
        passed = [row["alpha"] for row in losses(again)][4:]
        assert 0.1 < sum(passed) / len(passed) < 0.6  # about the 30% that were asked for

    company = [student(f"{name}-together", **settings[name]) for name in ("certainty", "ahead", "late")]
    for name, together in zip(("certainty", "ahead", "late"), run_cohort(company), strict=True):
        assert losses(together) == losses(whole[name])
        assert_same_weights(together, whole[name])

    for name in ("certainty", "random"):
        parts = run(student(f"{name}-parts", **settings[name], micro_batch_tokens=64))
        for a, b in zip(losses(parts), losses(whole[name]), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3 if name == "certainty" else 1e-5)
            assert a["alpha"] == pytest.approx(b["alpha"], abs=0.005 if name == "certainty" else 1e-6)


@pytest.mark.slow
def test_two_and_four_ranks_and_kills_among_them(teachers, student, mean, tmp_path):
    """Routing by a mean: on 2 ranks, there with kills, and begun on two, continued on one, ended on four."""
    objective = arms(mean)["late"]["objective"]
    changes = {"tokens": 24 * 256, "checkpoint": {"every": 2 * 256}}
    config = student("ranks", teacher=mean, objective=objective, **changes)
    alone = run(config)
    places = [tmp_path / place for place in ("whole", "killed", "relay")]
    for place in places:
        place.mkdir()
        for one in teachers:
            (place / one.id).symlink_to(one.path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, killed_ranks.__file__, str(file), *map(str, places), "1", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, killed, relay = (RunDirectory(place / alone.id) for place in places)
    assert losses(whole) == losses(killed)
    assert_same_weights(whole, killed)
    theirs = weights(alone)
    for other in (whole, relay):
        for name, tensor in weights(other).items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-3)
        for a, b in zip(losses(other), losses(alone), strict=True):
            assert a["gate_threshold"] == pytest.approx(b["gate_threshold"], abs=0.01)
            assert a["alpha"] == pytest.approx(b["alpha"], abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"mixing": "routed", "alpha": 1.0}}, "mixing = routed divides each loss by"),
        (
            {"objective": ROUTED | {"gate": {"kind": "teacher_better"}}},
            "teacher_better passes no set fraction",
        ),
        (
            {"objective": ROUTED | {"gate": {"kind": "random"}, "alpha": 0.4}},
            "gives a token either loss whole",
        ),
        ({"objective": ROUTED | {"gate": {"kind": "random"}, "alpha": LATE | {"second": 0.5}}}, "loss whole"),
        (
            {"objective": ROUTED | {"gate": {"kind": "random"}, "alpha": {"policy": "gap_driven"}}},
            "loss whole",
        ),
        (
            {"teacher": {"kind": "unigram"}, "objective": ROUTED | {"gate": {"kind": "teacher_certainty"}}},
            "equally uncertain about all",
        ),
        ({"teacher": {"kind": "mean", "of": [{"kind": "uniform"}]}}, "teacher.of"),
        (
            {
                "teacher": {
                    "kind": "mean",
                    "of": [{"kind": "uniform"}] * 2,
                    "cache": {"format": {"kind": "hidden"}},
                }
            },
            "a mean of teachers has no hidden states",
        ),
        (
            {
                "teacher": {
                    "kind": "mean",
                    "of": [{"kind": "uniform"}, {"kind": "run", "run": "x", "cache": {}}],
                }
            },
            r"of\[1\].cache: what is cached is the mean",
        ),
        (
            {
                "teacher": {
                    "kind": "mean",
                    "of": [{"kind": "run", "run": "x", "dtype": "bfloat16"}, {"kind": "uniform"}],
                    "cache": {},
                }
            },
            r"of\[0\].dtype = bfloat16: a mean is cached in what the student computes in",
        ),
        (
            {
                "teacher": {"kind": "mean", "of": [{"kind": "uniform"}, {"kind": "unigram"}]}
                | {"cache": {"temperature": 2.0, "format": {"kind": "topk", "k": 4}}},
                "objective": {"alpha": 1.0, "temperature": 2.0, "gate": {"kind": "teacher_confidence"}},
            },
            "needs the teacher at temperature 1",
        ),
    ],
)
def test_what_cannot_be_is_named_before_anything_runs(changes, message, make_config):
    with pytest.raises(UserError, match=message):
        make_config(**{"teacher": {"kind": "uniform"}, "objective": {"alpha": 0.5}} | changes)


def test_a_mean_names_parts_that_do_not_fit_and_takes_stored_states(student, mean):
    stored = cached(mean["of"][0], student, format={"kind": "topk", "k": 4}, name="top4")
    parts = {"kind": "mean", "of": [mean["of"][1], {"kind": "cache", "path": str(stored)}]}
    with pytest.raises(UserError, match=r"teacher.of\[1\]: holds topk targets, parts of distributions"):
        run(student("parts", teacher=parts, objective={"alpha": 0.5}))
    with pytest.raises(UserError, match=r"teacher.of\[1\].run"):
        run(student("lost", teacher=mean | {"of": [mean["of"][0], {"kind": "run", "run": "nobody"}]},
                    objective={"alpha": 0.5}))  # fmt: skip
    states = cached(mean["of"][0], student, format={"kind": "hidden", "dtype": "float32"}, name="states")
    whole = {"kind": "mean", "of": [{"kind": "cache", "path": str(states)}, mean["of"][1]]}
    first = run(student("hidden", teacher=whole, objective={"alpha": 0.5}))
    live = run(student("live", teacher=mean, objective={"alpha": 0.5}))
    assert losses(first)[-1]["loss"] == pytest.approx(losses(live)[-1]["loss"], rel=1e-5)
