"""One step that is not finite costs its update and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from poison import poisoned, trained_plainly
from told_progress import Told
from training import StopAt, assert_same_weights, losses, opened, rows, weights

from tutelage.errors import Stopped, UserError
from tutelage.run import run, run_cohort
from tutelage.run_directory import RunDirectory, run_id
from tutelage.teachers.live import OnlineTeacher
from tutelage.train.guard import Guard
from tutelage.train.optim import adamw, update

NAN, INF, ONE = math.nan, math.inf, torch.ones(())


def directory_of(config):
    return RunDirectory(config.output / run_id(config))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("steps", [(1,), (7,), (4, 5, 9)])
def test_the_other_steps_are_those_of_plain_torch_without_that_update(make_config, what, steps):
    config = make_config()
    with poisoned(*steps, what=what):
        directory = run(config)
    expected = trained_plainly(opened(config), skipped=steps)
    found = weights(directory)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
    other = trained_plainly(opened(config))
    assert max((found[name] - other[name]).abs().max() for name in other) > 1e-3
    last = rows(directory)[-1]
    assert last["skipped_steps"] == len(steps)
    logged = [row["step"] for row in rows(directory)]
    assert logged == [step for step in range(1, 13) if step not in steps]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows(directory))


@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_neither_weights_nor_moments_nor_the_step_change(make_config, bad):
    student = opened(make_config())
    guard = Guard(torch.device("cpu"))

    def step(loss, norm_factor):
        for parameter in student.parameters:
            parameter.grad = torch.full_like(parameter, 0.1 * norm_factor)
        values = torch.tensor(loss), torch.tensor(loss), torch.tensor(loss)
        return update(
            student.optimizer, student.parameters, 0.1, 1.0, ONE, lambda norm: guard.check(*values, norm)
        )

    def memory():
        return [
            t.clone() for p in student.parameters for t in (p.detach(), *student.optimizer.state[p].values())
        ]

    step(1.0, 1.0)
    before = memory()
    norm = step(*bad)
    assert not math.isfinite(norm) or not math.isfinite(bad[0])
    assert all(torch.equal(a, b) for a, b in zip(before, memory(), strict=True))
    assert all(parameter.grad is None for parameter in student.parameters)
    step(1.0, 1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, memory(), strict=True))
    skips = guard.newest(3, wait=True)
    assert (skips.total, skips.in_a_row) == (1, 0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [1e9, 1.0])
@pytest.mark.parametrize("divisor", [1.0, 64.0, 51.0])
def test_an_update_that_is_made_is_the_one_without_a_guard(make_config, divisor, clip, fused):
    """Bitwise where nothing is clipped and averages are exact, else but for roundings of gradients."""
    guarded, plain = opened(make_config()), opened(make_config())
    for student in (guarded, plain):
        student.optimizer = torch.optim.AdamW(student.parameters, fused=fused)
    generator = torch.Generator().manual_seed(0)
    exact = clip > 1.0 and divisor != 51.0
    for _ in range(3):
        for ours, theirs in zip(guarded.parameters, plain.parameters, strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad / divisor
        wanted = torch.nn.utils.clip_grad_norm_(plain.parameters, clip)
        divided = torch.tensor(divisor)
        found = update(guarded.optimizer, guarded.parameters, 1e-2, clip, divided, lambda _: torch.zeros(()))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        for group in plain.optimizer.param_groups:
            group["lr"] = 1e-2
        plain.optimizer.step()
    for ours, theirs in zip(guarded.parameters, plain.parameters, strict=True):
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(ours, theirs, **close)
        for name, moment in plain.optimizer.state[theirs].items():
            close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-9}
            torch.testing.assert_close(guarded.optimizer.state[ours][name], moment, **close)


def test_an_optimizer_that_cannot_skip_on_the_device_skips_on_the_host(make_config):
    student = opened(make_config())
    student.optimizer = torch.optim.AdamW(student.parameters, fused=False)
    before = [parameter.detach().clone() for parameter in student.parameters]
    for skip in (1.0, 0.0):
        for parameter in student.parameters:
            parameter.grad = torch.ones_like(parameter)
        update(student.optimizer, student.parameters, 0.1, 1.0, ONE, lambda _, skip=skip: torch.tensor(skip))
        same = [torch.equal(a, b) for a, b in zip(before, student.parameters, strict=True)]
        assert all(same) if skip else not any(same)


@pytest.mark.parametrize(("allowed", "last"), [(0, 4), (2, 6)])
def test_too_many_in_a_row_stop_the_run_with_step_and_positions(make_config, allowed, last):
    runtime = {"device": "cpu", "threads": 1, "log_every": 1000, "max_skipped_steps": allowed}
    config = make_config(runtime=runtime, checkpoint={"every": 256})
    with poisoned(2, *range(4, 13)), pytest.raises(UserError) as caught:
        run(config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    if allowed == 0:
        assert "step 2: loss is nan" in message
        return
    starts = opened(config).loader.batch(3).starts
    assert f"step 4: loss is nan, gradient norm nan, on the sequences from tokens {starts[0]:,}, " in message
    assert f"the updates of steps 4 to {last} were skipped (runtime.max_skipped_steps)" in message
    saved = sorted(path.name for path in directory_of(config).checkpoints.glob("step-*"))
    assert saved == ["step-000000001", "step-000000003"]


def test_a_run_is_not_finished_by_updates_that_were_skipped(make_config):
    config = make_config()
    told = Told()
    with poisoned(12), pytest.raises(UserError, match="steps 12 to 12 were skipped"):
        run(config, told)
    assert told.stages[run_id(config)][-1] == "failed"
    assert not directory_of(config).model.exists()
    assert run(config, told).is_done()  # from the checkpoint of step 8, this time without poison
    assert told.stages[run_id(config)][-1] == "done"


def test_the_count_survives_a_restart(make_config, tmp_path):
    config = make_config()
    with poisoned(3), pytest.raises(Stopped):
        run(config, StopAt(5))
    resumed = run(config)
    assert rows(resumed)[-1]["skipped_steps"] == 1
    with poisoned(3):
        whole = run(make_config(output=str(tmp_path / "whole")))
    assert_same_weights(resumed, whole)
    assert losses(resumed) == losses(whole)


def test_a_step_that_is_not_finite_leaves_the_others_of_a_cohort_alone(make_config, tmp_path):
    configs = [make_config(name="good", seed=5), make_config(name="bad", seed=6)]
    with poisoned(6):  # the second student's third step
        good, bad = run_cohort(configs)
    assert (rows(good)[-1]["skipped_steps"], rows(bad)[-1]["skipped_steps"]) == (0, 1)
    alone = run(make_config(name="good", seed=5, output=str(tmp_path / "alone")))
    assert_same_weights(good, alone)
    with poisoned(3):
        alone = run(make_config(name="bad", seed=6, output=str(tmp_path / "alone")))
    assert_same_weights(bad, alone)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_policy_has_seen_the_steps_whose_update_was_made(make_config, what):
    config = make_config(
        teacher={"kind": "unigram"}, objective={"alpha": {"policy": "gap_driven", "window": 100}}
    )
    with poisoned(6, 7, what=what):
        found = rows(run(config))
    seen = {row["step"]: row["policy_seen"] for row in found}  # all but the step itself
    assert seen == {step: step - 1 - 2 * (step > 7) for step in range(1, 13) if step not in (6, 7)}


@pytest.mark.parametrize(
    "objective",
    [
        {"alpha": {"policy": "gap_driven", "window": 3}},
        {"alpha": {"policy": "prequential", "period": 4, "probe": 3}},
        {"alpha": 0.5, "gate": {"kind": "student_entropy", "keep": 0.5}},
    ],
)
def test_policies_and_gates_forget_a_step_that_is_not_finite(make_config, objective):
    config = make_config(teacher={"kind": "unigram"}, objective=objective)
    with poisoned(6, 7):
        directory = run(config)
    found = rows(directory)
    assert found[-1]["skipped_steps"] == 2
    memory = [row[key] for row in found for key in row if key.startswith(("policy_", "gate_", "alpha"))]
    assert memory
    assert all(map(math.isfinite, memory))
    for path in directory.checkpoints.glob("*/counters.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


OBJECTIVES = [
    None,
    {"alpha": 0.5},
    {"alpha": 0.5, "gate": {"kind": "student_entropy", "keep": 0.5}},
    {"alpha": 0.5, "gate": {"kind": "teacher_entropy", "drop": 0.3}},
    {"alpha": 0.5, "divergence": "jsd"},
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_numbers_that_go_through_the_kernels_unchecked_end_alike(
    make_config, monkeypatch, tmp_path, objective
):
    """On a GPU nothing looks at the objective's inputs; NaN goes through all of it. So here, for once."""
    more = {}
    if objective is not None:
        teacher = run(make_config(name="teacher", tokens=512))
        more = {"teacher": {"kind": "model", "path": str(teacher.model)}, "objective": objective}
    with poisoned(5):
        checked = run(make_config(**more))
    monkeypatch.setattr("tutelage.objective.chunked.check_inputs", lambda *_: None)
    with poisoned(5):
        unchecked = run(make_config(**more, output=str(tmp_path / "unchecked")))
    assert rows(unchecked)[-1]["skipped_steps"] == 1
    assert_same_weights(checked, unchecked)
    assert losses(checked) == losses(unchecked)


def test_an_unchecked_teacher_that_is_not_finite_is_named(make_config, monkeypatch):
    teacher = run(make_config(name="teacher", tokens=512))
    config = make_config(teacher={"kind": "model", "path": str(teacher.model)}, objective={"alpha": 0.5})
    monkeypatch.setattr("tutelage.objective.chunked.check_inputs", lambda *_: None)
    targets = OnlineTeacher.targets

    def broken(self, batch):
        found = targets(self, batch)
        return dataclasses.replace(found, hidden_NE=found.hidden_NE * NAN)

    monkeypatch.setattr(OnlineTeacher, "targets", broken)
    with pytest.raises(UserError, match=r"step 1: the teacher's targets are not finite.* steps 1 to 11 "):
        run(config)
    assert not list(directory_of(config).checkpoints.glob("step-*"))


def test_weights_that_are_no_numbers_are_not_saved(make_config, monkeypatch):
    """The update that makes them is finite itself, and no loss has seen them yet."""
    config = make_config()

    def broken(optimizer, parameters, *rest):
        norm = update(optimizer, parameters, *rest)
        if optimizer.state[parameters[0]]["step"] == 4:
            with torch.no_grad():
                parameters[0][0, 0] = INF
        return norm

    monkeypatch.setattr("tutelage.train.step.update", broken)
    with pytest.raises(
        UserError, match=r"step 4: its update made weights that are not finite; lower optim\.lr"
    ):
        run(config)
    assert not list(directory_of(config).checkpoints.glob("step-*"))


def test_a_gpu_answers_one_step_late_unless_it_is_waited_for():
    guard = Guard(torch.device("cpu"))
    guard._late = True  # as on CUDA
    good, bad = torch.tensor(2.0), torch.tensor(NAN)
    seen = []
    for step, loss in enumerate((good, bad, bad, good, bad), 1):
        guard.check(loss, loss, loss, good)
        seen.append(guard.newest(step, wait=step == 5))
    assert seen[0] is None
    assert [(one.step, one.total, one.in_a_row) for one in seen[1:]] == [
        (1, 0, 0),
        (2, 1, 1),
        (3, 2, 2),
        (5, 3, 1),
    ]
    assert (seen[3].first, seen[4].first) == (2, 5)


def test_adamw_is_fused_where_the_guard_skips_on_the_device(make_config):
    student = opened(make_config())
    assert adamw(student.model, student.config.optim, 1e-3).defaults["fused"] is True
