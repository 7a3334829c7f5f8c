"""Teachers of several families on a mesh, against the same teachers whole. Started by torchrun.

python sharded_teacher.py DIRECTORY REPLICATE: DIRECTORY holds a Hugging Face directory per family.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tutelage.models import hub, slices
from tutelage.models.sharding import Sharding
from tutelage.objective.products import dense_logits
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


def main(folder, replicate):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shape = int(replicate), dist.get_world_size() // int(replicate)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for directory in sorted(Path(folder).iterdir()):
        try:
            check(directory, mesh, None)
            check(directory, mesh, torch.bfloat16)
        except Exception as error:
            raise AssertionError(f"{directory.name}: {error}") from error
        if dist.get_rank() == 0:
            print(directory.name, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
