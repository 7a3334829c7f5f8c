"""Save and load checkpoints of a sharded model; what is trained is exact on any number of processes.

Gradients are made up whole, by step and name, and AdamW works by element. So weights and moments after a
step are the same bits however they are divided, and can be compared with one process that never saved.

    python sharded_checkpoints.py CONFIG DIRECTORY
    python sharded_checkpoints.py CONFIG - FULL

FULL is a directory on a disk without space.
"""

from __future__ import annotations

import shutil
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked_ranks
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.config.runtime_config import ParallelConfig
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.models.sharding import Sharding, fill, shard_model
from tutelage.run_directory import RunDirectory
from tutelage.train import distributed
from tutelage.train.checkpoint import Checkpoints, Counters
from tutelage.train.optim import adamw
from tutelage.train.save_model import whole_model

VOCABULARY, CONTEXT = 301, 32  # an odd number of rows: the shards differ in size


def build(config, mesh=None, **changes):
    shape = replace(shapes.find_shape(config.model.shape), **changes)
    model = hub.build(shape, VOCABULARY, CONTEXT, config.seed)
    model.model.norm.weight.requires_grad_(False)  # a frozen weight has no moments
    if mesh is not None:
        shard_model(model, Sharding(mesh, None, reshard_after_forward=True))
    return model, adamw(model, config.optim, 1e-2)


def train(model, optimizer, steps):
    """Take the steps whose numbers are given."""
    for step in steps:
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode()))
            weight.grad = torch.zeros_like(weight)
            fill(weight.grad, torch.randn(weight.shape, generator=generator))
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model, optimizer):
    """Weights and moments, whole, on every process."""
    found = {name: whole(weight.detach()) for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state.get(weight, {}).items():
            found[f"{key}.{name}"] = whole(value)
    return found


def reference(config, steps):
    """What one process has after some steps without ever having saved."""
    model, optimizer = build(config)
    train(model, optimizer, range(steps))
    return state(model, optimizer)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def flip_a_bit(directory, number):
    """Damage the newest checkpoint as a disk does."""
    newest = max(directory.glob("step-*"))
    file = sorted(newest.glob("*.safetensors"))[number]
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    return file


def refused(call):
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


def same_everywhere(values):
    """The values of rank 0, which all ranks must have."""
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, values)
    assert all(one == values for one in everywhere), everywhere
    return values


def resume_and_save(config, directory, steps):
    """Resume, take one step, save, train on while that is being written, and save again."""
    world = distributed.start(config.runtime, config.parallel)
    model, optimizer = build(config, world.mesh)
    checkpoints = Checkpoints(config, RunDirectory(directory), world)
    first = checkpoints.load(model, optimizer).step
    assert_equal(state(model, optimizer), reference(config, first))
    train(model, optimizer, range(first, first + 1))
    checkpoints.save(model, optimizer, Counters(first + 1, 0.5, policy={"rank": float(world.rank)}))
    train(model, optimizer, range(first + 1, steps))
    checkpoints.save(model, optimizer, Counters(steps))
    checkpoints.close()
    distributed.stop()


def export(config, directory, **changes):
    """Train two steps and write the model, from whichever processes there are."""
    world = distributed.start(config.runtime, config.parallel)
    model, optimizer = build(config, world.mesh, **changes)
    train(model, optimizer, range(2))
    found = whole_model(model, keep=world.is_main)
    assert (found is not None) == world.is_main
    if found is not None:
        hub.save(found, directory, config.data.store)
    distributed.stop()


def meet_damage(config, directory, report):
    """Try to resume from a directory that holds a flipped bit; every process is to say the same."""
    world = distributed.start(config.runtime, config.parallel)
    model, optimizer = build(config, world.mesh)
    checkpoints = Checkpoints(config, RunDirectory(directory), world)
    message = same_everywhere(refused(lambda: checkpoints.load(model, optimizer)))
    if world.is_main:
        report.write_text(message)
    distributed.stop()


def meet_full_disk(config, directory, report):
    """Save where there is no room; every process is to say the same, and nothing is to be left."""
    world = distributed.start(config.runtime, config.parallel)
    model, optimizer = build(config, world.mesh)
    checkpoints = Checkpoints(config, RunDirectory(directory), world)
    checkpoints.load(model, optimizer)
    train(model, optimizer, range(1))
    checkpoints.save(model, optimizer, Counters(1))
    message = same_everywhere(refused(checkpoints.wait))
    checkpoints.close()
    if world.is_main:
        assert [*(directory / "checkpoints").iterdir()] == []
        report.write_text(message)
    distributed.stop()


def main(config, directory):
    """Two processes, one, and four of which two share a copy; then two that meet a flipped bit."""
    hybrid = config.model_copy(update={"parallel": ParallelConfig(replicate=2)})
    for processes, layout, steps in ((2, config, 3), (1, config, 5), (4, hybrid, 8)):
        forked_ranks.run(processes, partial(resume_and_save, layout, directory, steps))
        shutil.copytree(directory, directory.with_name(f"after{processes}-1"))
    for tied in (True, False):
        for processes, layout in ((1, config), (2, config), (4, hybrid)):
            place = directory.with_name(f"{'tied' if tied else 'untied'}-on-{processes}")
            forked_ranks.run(processes, partial(export, layout, place, tied=tied))
    damaged = directory.with_name("damaged-1")
    shutil.copytree(directory, damaged)
    flip_a_bit(damaged / "checkpoints", -1)
    forked_ranks.run(2, partial(meet_damage, config, damaged, damaged / "message"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, place, *full = map(Path, sys.argv[1:])
    settings = load(RunConfig, path)
    if full:
        told = full[0].with_name("message")
        forked_ranks.run(2, partial(meet_full_disk, settings, full[0] / "run-1", told))
    else:
        main(settings, place)
