"""A run that breaks is one line, saves nothing broken, and takes no other run with it."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tutelage.errors import UserError
from tutelage.run import run, run_cohort
from tutelage.run_directory import RunDirectory, run_id

HOT = {"lr": 1e6, "clip": 1e30, "warmup": 0.0}


def directory_of(config):
    return RunDirectory(config.output / run_id(config))


def finite(path):
    return all(weight.isfinite().all() for weight in load_file(path).values() if weight.is_floating_point())


def assert_nothing_broken_is_saved(directory):
    assert not directory.model.exists()
    for path in directory.path.rglob("*.safetensors"):
        assert finite(path)
    assert directory.state()["status"] == "failed"


@pytest.mark.parametrize("lr", [1e6, 1e12, 1e30])
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_a_rate_far_too_high_is_one_line(make_config, lr, taught, log_every):
    more = {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.4}} if taught else {}
    config = make_config(
        optim=HOT | {"lr": lr},
        runtime={"device": "cpu", "threads": 1, "log_every": log_every},
        **more,
    )
    with pytest.raises(UserError, match=r"lower optim\.lr") as caught:
        run(config)
    assert len(str(caught.value).splitlines()) == 1
    assert_nothing_broken_is_saved(directory_of(config))


def test_damage_that_is_found_at_the_last_step_is_not_exported(make_config, monkeypatch):
    config = make_config(
        optim=HOT | {"lr": 1e30},
        checkpoint={"every": "1M"},
        runtime={"device": "cpu", "threads": 1, "log_every": 1000},
    )
    monkeypatch.setattr(sys.modules["tutelage.run"], "export", None)
    with pytest.raises(UserError, match=r"step 2: loss is .* steps 2 to 12 .*lower optim\.lr"):
        run(config)
    assert_nothing_broken_is_saved(directory_of(config))


@pytest.mark.parametrize("order", [0, 1])
def test_the_good_run_of_a_cohort_ends_as_it_does_alone(make_config, tmp_path, order):
    good = make_config(name="good", seed=5)
    bad = make_config(name="bad", seed=5, optim=HOT | {"lr": 1e30})
    with pytest.raises(UserError, match=r"bad-\w+: ") as caught:
        run_cohort([good, bad][:: -1 if order else 1])
    assert "good-" not in str(caught.value)
    assert_nothing_broken_is_saved(directory_of(bad))
    assert directory_of(good).state()["status"] == "done"
    alone = run(make_config(name="good", seed=5, output=str(tmp_path / "alone")))
    ours = (directory_of(good).model / "model.safetensors").read_bytes()
    assert (alone.model / "model.safetensors").read_bytes() == ours


def test_a_branch_point_of_a_broken_run_is_not_kept(make_config):
    wsd = {"schedule": "wsd", "decay": 0.5, "warmup": 0.0, "lr": 1e30, "clip": 1e30}
    config = make_config(
        optim=wsd,
        checkpoint={"every": "1M", "keep_before_decay": True},
        runtime={"device": "cpu", "log_every": 1000},
    )
    with pytest.raises(UserError, match=r"step 2: loss is "):
        run(config)
    assert not list(directory_of(config).checkpoints.glob("*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["teacher", "start"])
def test_models_with_weights_that_are_no_numbers_are_refused_before_compute(
    make_config, tmp_path, value, part
):
    model = tmp_path / "broken"
    shutil.copytree(run(make_config()).model, model, ignore=shutil.ignore_patterns("checksums.json"))
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][-1, 0] = value  # of one rare token
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    if part == "teacher":
        config = make_config(teacher={"kind": "model", "path": str(model)}, objective={"alpha": 0.4}, seed=9)
    else:
        config = make_config(model={"path": str(model)}, seed=9)
    with pytest.raises(UserError, match="not finite") as caught:
        run(config)
    assert len(str(caught.value).splitlines()) == 1
    assert not directory_of(config).model.exists()


def test_a_teacher_that_overflows_is_named(make_config, tmp_path):
    """Finite weights whose hidden states are not: the student is not to blame."""
    model = tmp_path / "loud"
    shutil.copytree(run(make_config()).model, model, ignore=shutil.ignore_patterns("checksums.json"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    weights["model.embed_tokens.weight"].mul_(100)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = make_config(teacher={"kind": "model", "path": str(model)}, objective={"alpha": 0.4}, seed=9)
    with pytest.raises(UserError) as caught:
        run(config)
    assert len(str(caught.value).splitlines()) == 1
    assert "teacher" in str(caught.value) or "logits" in str(caught.value)


@pytest.mark.parametrize("output", ["file", "file/x", "file/x/y"])
def test_an_output_that_cannot_be_a_directory_is_refused(make_config, tmp_path, output):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file is a file and no directory; choose another output"):
        run(make_config(output=str(tmp_path / output)))


def test_state_says_why(make_config):
    config = make_config(optim=HOT | {"lr": 1e30})
    with pytest.raises(UserError) as caught:
        run(config)
    state = json.loads((directory_of(config).path / "state.json").read_text())
    assert state["error"] == str(caught.value)
    assert torch.isfinite(torch.tensor([row["loss"] for row in metrics(config)])).all()


def metrics(config):
    path = directory_of(config).path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
