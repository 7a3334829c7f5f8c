"""Checkpoints are read by any number of processes, bit for bit, and a fault of one process is told by all."""

from __future__ import annotations

import filecmp
import re
import shutil
import subprocess
import sys
from pathlib import Path

import killed_ranks
import pytest
import sharded_checkpoints as sharded
import torch
import yaml
from small_disk import small_disk
from training import assert_same_weights, losses, weights
from transformers import AutoModelForCausalLM

from tutelage.run_directory import RunDirectory
from tutelage.train.checkpoint import Checkpoints, Counters
from tutelage.train.checkpoint_files import CheckpointManifest
from tutelage.train.distributed import World
from tutelage.train.setup import open_student

pytestmark = pytest.mark.slow

RESTARTED = str(Path(__file__).parents[1] / "support" / "restarted_rank.py")

ALONE = World(torch.device("cpu"))


@pytest.fixture
def start(make_config, tmp_path):
    """A function that lets two processes, then one, then four save; further arguments go to the script."""

    def call(*places):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
        command = [sys.executable, sharded.__file__, file, *places]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr

    return call


def resumed(config, directory):
    """The state that one process finds, and where it goes on."""
    model, optimizer = sharded.build(config)
    checkpoints = Checkpoints(config, RunDirectory(directory), ALONE)
    return checkpoints, model, optimizer, checkpoints.load(model, optimizer)


def assert_resumes_from(config, directory, counters):
    checkpoints, model, optimizer, found = resumed(config, directory)
    checkpoints.close()
    assert found == counters
    sharded.assert_equal(sharded.state(model, optimizer), sharded.reference(config, counters.step))


def test_two_processes_then_one_then_four(make_config, start, tmp_path):
    config = make_config()
    start(tmp_path / "run-1")
    for processes, first, last in ((2, 0, 3), (1, 3, 5), (4, 5, 8)):
        directory = tmp_path / f"after{processes}-1"
        assert_resumes_from(config, directory, Counters(last))
        # The first save held what was there when it was asked for, although training went on.
        shutil.rmtree(directory / "checkpoints" / f"step-{last:09d}")
        assert_resumes_from(config, directory, Counters(first + 1, 0.5, policy={"rank": 0.0}))

    newest = tmp_path / "run-1" / "checkpoints" / "step-000000008"
    manifest = CheckpointManifest.read(newest)
    assert (manifest.origin.replicate, manifest.origin.shard) == (2, 2)
    # Both copies of the model take part, and nothing is written twice.
    assert len(manifest.files) == 1 + 4
    tensors = sum(tensor.nbytes for tensor in sharded.reference(config, 8).values())
    assert sum(file.stat().st_size for file in newest.glob("*.safetensors")) < 1.1 * tensors

    for heads in ("tied", "untied"):
        one, *others = (tmp_path / f"{heads}-on-{processes}" for processes in (1, 2, 4))
        model, optimizer = sharded.build(config, tied=heads == "tied")
        sharded.train(model, optimizer, range(2))
        exported = AutoModelForCausalLM.from_pretrained(one)
        sharded.assert_equal(exported.state_dict(), model.state_dict())
        assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == (heads == "tied")
        for other in others:
            assert not filecmp.dircmp(one, other).diff_files
            assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
            files = [directory / "model.safetensors" for directory in (one, other)]
            assert files[0].read_bytes() == files[1].read_bytes()

    assert re.search(
        "step-000000008: cannot be resumed from .shard-00004.safetensors is damaged: .*; remove it to resume "
        "from step-000000006, which is intact",
        (tmp_path / "damaged-1" / "message").read_text(),
    )


def test_all_processes_say_that_a_disk_is_full(start, tmp_path):
    with small_disk(tmp_path / "full", "300k"):
        start("-", tmp_path / "full")
    assert re.search(
        "step-000000001: cannot be written .No space left on device.; earlier checkpoints are intact;",
        (tmp_path / "message").read_text(),
    )


def test_killed_processes_cost_nothing_but_time(make_config, tmp_path):
    config = make_config(tokens=24 * 256, checkpoint={"every": 2 * 256})
    file, whole, killed = tmp_path / "run.yaml", tmp_path / "whole", tmp_path / "killed"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, killed_ranks.__file__, str(file), str(whole), str(killed)]
    command += [str(tmp_path / "relay"), "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    launcher = [*(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "2", "--max-restarts", "1")]  # fmt: skip
    command = [*launcher, RESTARTED, "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("resuming after step [68] of 24", done.stderr)  # the last save may have been under way

    relay = RunDirectory(next((tmp_path / "relay").iterdir()))
    first, *others = (RunDirectory(next(output.iterdir())) for output in (whole, killed, config.output))
    for other in others:
        assert losses(first) == losses(other)
        assert_same_weights(first, other)
        assert not list(other.checkpoints.glob(".*"))

    # Two processes, then one, then four: the sums of gradients are rounded differently.
    assert_same_weights(first, relay, rtol=1e-3, atol=2e-4)
    for a, b in zip(losses(first), losses(relay), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for run in (first, relay):  # what is exported is what the last checkpoint holds
        student = open_student(config, run, ALONE)
        assert student.checkpoints.load(student.model, student.optimizer).step == 24
        sharded.assert_equal(weights(run), dict(student.model.named_parameters()))
