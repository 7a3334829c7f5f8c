"""Checkpoints of one process: what is kept, what is refused and why, and that nothing is ever pickled."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import asdict

import pytest
import sharded_checkpoints as sharded
import torch
from safetensors.torch import load_file
from small_disk import small_disk
from training import Notes, StopAt, assert_same_weights, losses

from tutelage.errors import Stopped, UserError
from tutelage.models import hub, shapes
from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id
from tutelage.train import checkpoint
from tutelage.train.checkpoint import Checkpoints, Counters
from tutelage.train.checkpoint_files import CheckpointManifest, write_tensors
from tutelage.train.distributed import World
from tutelage.train.optim import adamw

ALONE = World(torch.device("cpu"))


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run-1")


@pytest.fixture
def saved(make_config, directory):
    """A run's directory with the checkpoints of steps 2 and 4."""
    write(make_config(), directory, (2, 4))
    return directory


def write(config, directory, steps):
    model, optimizer = sharded.build(config)
    checkpoints = Checkpoints(config, directory, ALONE)
    first = checkpoints.load(model, optimizer).step
    for step in steps:
        sharded.train(model, optimizer, range(first, step))
        checkpoints.save(model, optimizer, Counters(step, 1.5, 7, {"gap": 0.1}, {"threshold": 0.2}))
        first = step
    checkpoints.close()


def read(config, directory):
    model, optimizer = sharded.build(config)
    checkpoints = Checkpoints(config, directory, ALONE)
    counters = checkpoints.load(model, optimizer)
    checkpoints.close()
    return counters, sharded.state(model, optimizer)


def names(directory):
    return sorted(path.name for path in directory.checkpoints.iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_read_is_what_was_saved(make_config, directory, asynchronous):
    config = make_config(checkpoint={"asynchronous": asynchronous})
    write(config, directory, (2, 4))
    counters, found = read(config, directory)
    assert counters == Counters(4, 1.5, 7, {"gap": 0.1}, {"threshold": 0.2})
    sharded.assert_equal(found, sharded.reference(config, 4))
    shutil.rmtree(directory.checkpoints / "step-000000004")
    sharded.assert_equal(read(config, directory)[1], sharded.reference(config, 2))


def test_the_memory_of_a_copy_is_that_of_the_one_before(make_config, directory, monkeypatch):
    """torch's own `DefaultStager` fails the second time in torch 2.11."""
    places = []
    monkeypatch.setattr(
        Checkpoints,
        "_write",
        lambda _self, _path, state, _: places.append([*map(torch.Tensor.data_ptr, state.values())]),
    )
    write(make_config(), directory, (2, 4, 6))
    assert places[0] == places[1] == places[2]


def test_the_last_checkpoint_is_written_without_a_copy(make_config, monkeypatch):
    """Nothing is trained meanwhile: 12 bytes a weight more than training took, for nothing."""
    copied, copy = [], Checkpoints._copied
    monkeypatch.setattr(Checkpoints, "_copied", lambda *given: copied.append(1) or copy(*given))
    batch = make_config().global_batch_tokens
    assert run(make_config(tokens=4 * batch, checkpoint={"every": 4 * batch})).is_done()
    assert not copied
    stopped = make_config(tokens=12 * batch, checkpoint={"every": 4 * batch})
    with pytest.raises(Stopped):
        run(stopped, StopAt(6))
    assert len(copied) == 1  # of step 4, not of the one at which it was stopped
    assert run(stopped).is_done()
    assert len(copied) == 2


def test_a_weight_that_had_no_gradient_yet_has_no_moments(make_config, directory):
    config = make_config()
    model, optimizer = sharded.build(config)
    checkpoints = Checkpoints(config, directory, ALONE)
    checkpoints.load(model, optimizer)
    checkpoints.save(model, optimizer, Counters())
    checkpoints.close()
    _, found = read(config, directory)
    assert found.keys() == dict(model.named_parameters()).keys()


def test_nothing_is_pickled(make_config, directory, monkeypatch):
    def never(*_arguments, **_keywords):
        raise AssertionError("pickled")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "dump"), (pickle, "load")):
        monkeypatch.setattr(module, name, never)
    for name in ("dumps", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    write(make_config(), directory, (1,))
    assert read(make_config(), directory)[0].step == 1
    found = directory.checkpoints / "step-000000001"
    assert names(directory) == [found.name]
    assert sorted(path.name for path in found.iterdir()) == [
        "counters.json",
        "manifest.json",
        "shard-00001.safetensors",
    ]
    for file in ("counters.json", "manifest.json"):
        json.loads((found / file).read_text())


def test_a_shard_is_a_safetensors_file(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "matrix": torch.randn(7, 3),
        "number": torch.tensor(2.5),
        "count": torch.arange(5),
        "double": torch.randn(2, dtype=torch.float64),
    }
    record = write_tensors(tmp_path / "shard.safetensors", tensors, {name: [] for name in tensors})
    found = load_file(tmp_path / "shard.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert record.bytes == (tmp_path / "shard.safetensors").stat().st_size


def test_the_newest_are_kept_and_those_every_so_many_tokens(make_config, directory):
    config = make_config(checkpoint={"every": 2 * 256, "keep": 2, "keep_every": 3 * 256})
    checkpoints = Checkpoints(config, directory, ALONE)
    assert [step for step in range(1, 13) if checkpoints.is_due(step)] == [2, 3, 4, 6, 8, 9, 10, 12]
    write(config, directory, (2, 3, 4, 6, 8, 9, 10))
    assert names(directory) == [f"step-{step:09d}" for step in (3, 6, 9, 10)]


def test_what_was_not_finished_is_not_read_and_removed(make_config, saved):
    unfinished = saved.checkpoints / ".partial-step-000000006"
    shutil.copytree(saved.checkpoints / "step-000000004", unfinished)
    (unfinished / "manifest.json").unlink()
    assert read(make_config(), saved)[0].step == 4
    assert names(saved) == ["step-000000002", "step-000000004"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "counters.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "empty"])
def test_damage_is_one_line_that_offers_the_checkpoint_before(make_config, saved, file, harm):
    path = saved.checkpoints / "step-000000004" / file
    {"missing": path.unlink, "cut": lambda: truncate(path), "flipped": lambda: flip(path),
     "empty": lambda: path.write_bytes(b"")}[harm]()  # fmt: skip
    with pytest.raises(UserError) as refused:
        read(make_config(), saved)
    message = str(refused.value)
    assert "\n" not in message
    offer = "remove it to resume from step-000000002, which is intact"
    assert re.search(rf"step-000000004: cannot be resumed from \({file} .*\); {offer}", message)
    shutil.rmtree(path.parent)
    assert read(make_config(), saved)[0].step == 2


def test_a_damaged_one_is_not_offered(make_config, saved):
    for step in (2, 4):
        flip(saved.checkpoints / f"step-{step:09d}" / "shard-00001.safetensors")
    with pytest.raises(UserError, match=r"checksum.*; remove it to train from the beginning"):
        read(make_config(), saved)


def test_the_format_before_this_one_is_refused(make_config, directory):
    old = directory.checkpoints / "step-000000004"
    old.mkdir(parents=True)
    (old / "state.safetensors").write_bytes(b"")
    (old / "counters.json").write_text('{"step": 4}')
    with pytest.raises(UserError, match=r"an older version of tutelage wrote it.*; remove it to train from"):
        read(make_config(), directory)


def test_counters_of_another_version_are_refused(make_config, directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "asdict", lambda counters: asdict(counters) | {"novel": 1})
        write(make_config(), directory, (2,))
    with pytest.raises(UserError, match=r"another version of tutelage wrote counters\.json .*'novel'"):
        read(make_config(), directory)


def test_a_checkpoint_of_another_run_shows_what_differs(make_config, saved, tmp_path):
    other = RunDirectory(tmp_path / "run-2")
    shutil.copytree(saved.path, other.path)
    config = make_config(optim={"lr": 0.5}, data={"store": str(make_config().data.store), "seed": 3})
    with pytest.raises(UserError) as refused:
        read(config, other)
    message = str(refused.value)
    assert "\n" not in message
    assert "it is a checkpoint of another run, run-1 (" in message
    assert "optim.lr is null there and 0.5 here" in message
    assert "data.seed is 42 there and 3 here" in message


def test_a_renamed_run_is_the_same_run(make_config, saved, tmp_path):
    shutil.copytree(saved.path, tmp_path / "renamed-1")
    assert read(make_config(), RunDirectory(tmp_path / "renamed-1"))[0].step == 4


def test_a_checkpoint_of_another_head_is_refused(make_config, saved):
    config = make_config()
    shape = shapes.find_shape(config.model.shape)
    model = hub.build(shape, sharded.VOCABULARY + 2, sharded.CONTEXT, config.seed)
    with pytest.raises(UserError, match=r"another model: model\.model\.embed_tokens\.weight is \(\(301, "):
        Checkpoints(config, saved, ALONE).load(model, adamw(model, config.optim, 1e-2))
    model, optimizer = sharded.build(config)
    model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"model\.extra\.weight is in the model only"):
        Checkpoints(config, saved, ALONE).load(model, optimizer)


def test_a_manifest_says_who_wrote_it(saved):
    manifest = CheckpointManifest.read(saved.checkpoints / "step-000000004")
    assert manifest.origin.run == "run-1"
    assert (manifest.origin.replicate, manifest.origin.shard) == (1, 1)
    assert manifest.origin.recipe["model"]["shape"] == "nano-50k"


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_keeps_the_checkpoint_before(make_config, tmp_path, policy):
    whole = run(make_config(output=str(tmp_path / "whole")))
    config = make_config(checkpoint={"every": 4 * 256, "on_full_disk": policy})
    directory = RunDirectory(config.output / run_id(config))
    refused = (
        r"step-000000008: cannot be written \(No space left on device\); earlier checkpoints are intact; "
    )
    with small_disk(directory.checkpoints, "1500k") as resize:  # of which a checkpoint takes 1000k
        told = Notes()
        if policy == "stop":
            with pytest.raises(UserError, match=refused + "free some space and run the same command"):
                run(config, told)
            assert directory.state()["status"] == "failed"
            assert directory.state()["step"] < 12
        else:
            run(config, told)
            assert re.search(refused + "training goes on, and the next checkpoint is tried", told.warnings[0])
            assert_same_weights(directory, whole)
        assert names(directory) == ["step-000000004"]
        if policy == "stop":
            resize("10m")
            told = Notes()
            run(config, told)
            assert "resuming after step 4 of 12" in told.notes
            assert_same_weights(directory, whole)
            assert losses(directory) == losses(whole)
