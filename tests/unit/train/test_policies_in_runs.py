"""Adaptive policies and gates inside real runs: resume, accounting, what is logged."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from training import StopAt, assert_same_weights, losses

from tutelage.errors import Stopped
from tutelage.run import run

TEACHER = {"kind": "unigram"}
OBJECTIVES = {
    "gap_driven": {"alpha": {"policy": "gap_driven", "window": 3, "scale": 2.0}},
    "auto": {"alpha": "auto"},
    "prequential": {"alpha": {"policy": "prequential", "period": 4, "probe": 2}},
    "student_entropy": {"alpha": 0.5, "gate": {"kind": "student_entropy"}},
    "teacher_better": {"alpha": {"policy": "gap_driven"}, "gate": {"kind": "teacher_better"}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stopped_and_resumed_is_bitwise_uninterrupted(name, make_config, tmp_path):
    whole = run(make_config(teacher=TEACHER, objective=OBJECTIVES[name]))
    config = make_config(teacher=TEACHER, objective=OBJECTIVES[name], output=str(tmp_path / "again"))
    for stop in (1, 2, 6):
        with pytest.raises(Stopped):
            run(config, StopAt(stop))
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)
    assert resumed.state()["teacher_flops"] == whole.state()["teacher_flops"]


def test_gap_driven_logs_what_it_hears_and_follows_it(make_config):
    log = losses(run(make_config(teacher=TEACHER, objective=OBJECTIVES["gap_driven"])))
    for before, after in pairwise(log):
        gap = (before["policy_ce"] - before["policy_teacher_ce"]) / 2.0
        expected = min(0.9, max(0.1, gap)) if before["policy_seen"] else 0.9
        assert after["alpha"] == pytest.approx(expected, abs=1e-6)
    assert len({row["alpha"] for row in log}) > 3  # it does move


def test_prequential_probes_learn_from_labels_alone_and_only_scores_run_the_teacher(make_config):
    directory = run(make_config(teacher=TEACHER, objective=OBJECTIVES["prequential"]))
    log = losses(directory)
    for row in log:
        step = (row["step"] - 1) % 4
        assert (row["alpha"] == 0) == (step < 2)
        assert (row["teacher_ce"] == 0) == (step == 0)
        if step < 2:
            assert row["loss"] == pytest.approx(row["ce"])
    assert "policy_log_odds" in log[-1]
    checkpoint = max((directory.path / "checkpoints").glob("step-*"))
    assert json.loads((checkpoint / "counters.json").read_text())["teacher_tokens"] == 9 * 256


def test_salt_drops_the_teacher_and_its_cost(make_config):
    directory = run(
        make_config(teacher=TEACHER, objective={"alpha": {"policy": "salt", "value": 0.6, "until": 0.5}})
    )
    assert [row["alpha"] > 0 for row in losses(directory)] == [True] * 6 + [False] * 6
    assert all(row["teacher_ce"] == 0 for row in losses(directory)[6:])
    checkpoint = max((directory.path / "checkpoints").glob("step-*"))
    assert json.loads((checkpoint / "counters.json").read_text())["teacher_tokens"] == 6 * 256


def test_a_teacher_that_is_dropped_is_no_spike_of_the_loss(make_config):
    salt = {"policy": "salt", "value": 1.0, "until": 0.8}
    directory = run(make_config(teacher=TEACHER, objective={"alpha": salt}))
    taught, alone = losses(directory)[8:10]
    assert alone["loss"] > 2 * taught["loss"]
    assert alone["ce"] < 1.05 * taught["ce"]
    assert directory.state()["warnings"] == []


def test_a_gate_scales_the_logged_alpha(make_config):
    log = losses(run(make_config(teacher=TEACHER, objective=OBJECTIVES["student_entropy"])))
    assert all(0 <= row["alpha"] <= 0.5 for row in log)
    assert sum(row["alpha"] for row in log) / len(log) < 0.4
    assert log[-1]["gate_threshold"] != log[0]["gate_threshold"]


def test_micro_batches_do_not_change_a_gated_run(make_config, tmp_path):
    whole = run(make_config(teacher=TEACHER, objective=OBJECTIVES["student_entropy"]))
    parts = run(
        make_config(
            teacher=TEACHER,
            objective=OBJECTIVES["student_entropy"],
            micro_batch_tokens=64,
            output=str(tmp_path / "micro"),
        )
    )
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["gate_threshold"] == pytest.approx(b["gate_threshold"], abs=0.01)
