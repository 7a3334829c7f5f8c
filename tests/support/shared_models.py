"""Models that processes share, against the same models whole, and whole runs on several processes.

python shared_models.py families DIRECTORY: it holds a Hugging Face directory per family.
python shared_models.py runs FILE: a line per run, how many processes and its config as JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import forked_ranks
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tutelage.config.run_config import RunConfig
from tutelage.models import hub, slices
from tutelage.models.sharding import Sharding
from tutelage.objective.products import dense_logits
from tutelage.run import run
from tutelage.teachers.live import OnlineTeacher
from tutelage.types import Batch

CPU = torch.device("cpu")


def batch(vocab_size, length):
    """Other tokens on every process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(vocab_size, (3, length), generator=generator)
    return Batch(tokens, tokens, (0, 1, 2))


def logits(teacher, its_batch):
    targets = teacher.targets(its_batch)
    assert not isinstance(targets.head_VE, DTensor)
    return dense_logits(targets, slice(None), None)


def check(directory, mesh, dtype):
    whole = hub.load(directory, dtype=dtype)
    its_batch = batch(whole.config.get_text_config().vocab_size, 16)
    expected = logits(OnlineTeacher(whole, 0.0), its_batch)
    for keep in (True, False):
        pending = slices.describe(directory, dtype=dtype)
        teacher = OnlineTeacher(pending.model, 0.0, sharding=Sharding(mesh, None, not keep))
        loaded = pending.load(CPU)
        assert all(weight.is_meta is False for weight in loaded.state_dict().values())
        own = sum(weight.to_local().numel() for weight in loaded.parameters())
        total = sum(weight.numel() for weight in loaded.parameters())
        assert own < total / mesh["shard"].size() * 1.3 + 2000, (own, total)
        teacher.use(lambda model: hub.check_logits(model, str(directory)))
        for _ in range(2):  # steps
            for _ in range(2):  # micro-batches
                assert torch.equal(logits(teacher, its_batch), expected), directory
            teacher.release()
            weights = dict(loaded.named_parameters())
            assert all(isinstance(weight, DTensor) for weight in weights.values())
        reference = whole.state_dict()
        for name, weight in weights.items():
            assert torch.equal(weight.full_tensor(), reference[name]), (directory, name)
            assert not weight.requires_grad
        for name, buffer in loaded.named_buffers():
            assert torch.equal(buffer, dict(whole.named_buffers())[name]), (directory, name)
    replicated = slices.describe(directory, dtype=dtype)
    teacher = OnlineTeacher(replicated.model, 0.0)
    replicated.load(CPU)
    assert torch.equal(logits(teacher, its_batch), expected)


def check_families(folder, replicate, dtypes):
    dist.init_process_group("gloo")
    shape = replicate, dist.get_world_size() // replicate
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for directory in sorted(Path(folder).iterdir()):
        try:
            for dtype in dtypes:
                check(directory, mesh, dtype)
        except Exception as error:
            raise AssertionError(f"{directory.name} on {shape}: {error}") from error
    dist.destroy_process_group()


def main(what, path):
    torch.set_num_threads(1)
    if what == "families":
        forked_ranks.run(2, partial(check_families, path, 1, [torch.bfloat16]))
        forked_ranks.run(4, partial(check_families, path, 2, [None]))
        return
    for line in Path(path).read_text().splitlines():
        processes, config = json.loads(line)
        forked_ranks.run(processes, partial(run, RunConfig.model_validate_json(config)))


if __name__ == "__main__":
    main(*sys.argv[1:])
