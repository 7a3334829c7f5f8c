"""Each process is bound to its own GPU before anything is sent; stand-ins for CUDA, which is not here."""

from __future__ import annotations

import pytest
import torch

from tutelage.config.runtime_config import ParallelConfig, RuntimeConfig
from tutelage.errors import UserError
from tutelage.processes import Place
from tutelage.train import distributed


@pytest.fixture
def cuda(monkeypatch):
    """A function that pretends that a process sees some GPUs; what is done to them is noted in order."""

    def pretend(gpus, place):
        done = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: done.append(("bind", number)))
        monkeypatch.setattr(distributed.processes, "place", lambda: place)
        return done

    return pretend


@pytest.fixture
def no_group(monkeypatch, cuda):
    """A function that starts a world without others, as far as the process group; what was done, and it."""

    def start(gpus, place, parallel=None):
        done = cuda(gpus, place)

        class Together:
            def __init__(self, seconds):
                done.append(("agree", seconds))

            def __enter__(self):
                return {}

            def __exit__(self, *_):
                return None

        class Group:
            def __init__(self, name):
                self._name = name

            def set_timeout(self, wait):
                done.append(("timeout", wait.total_seconds(), self._name))

        class Mesh:
            def get_all_groups(self):
                return [Group("a"), Group("b")]

        def mesh(device_type, shape, *, mesh_dim_names):
            done.append(("mesh", device_type, shape, mesh_dim_names))
            return Mesh()

        def group(backend, *, timeout, rank, world_size, device_id, store):
            done.append(("group", backend, timeout.total_seconds(), rank, world_size, device_id))

        monkeypatch.setattr(distributed.agreement, "together", Together)
        monkeypatch.setattr(distributed.agreement, "meeting_place", lambda: None)
        monkeypatch.setattr(distributed, "PrefixStore", lambda _, store: store)
        monkeypatch.setattr(distributed.dist, "init_process_group", group)
        monkeypatch.setattr(distributed, "init_device_mesh", mesh)
        world = distributed.start(RuntimeConfig(device="cuda"), parallel or ParallelConfig(timeout=90))
        return done, world

    return start


def test_the_device_is_bound_before_the_group_is_made_on_it(no_group):
    done, world = no_group(4, Place(rank=6, local_rank=2, size=8), ParallelConfig(replicate=2, timeout=90))
    device = torch.device("cuda", 2)
    assert [one for one in done if one[0] != "agree"] == [
        ("bind", 2),
        ("group", "cpu:gloo,cuda:nccl", 90.0, 6, 8, device),
        ("mesh", "cuda", (2, 4), ("replicate", "shard")),
        ("timeout", 90.0, "a"),
        ("timeout", 90.0, "b"),
    ]
    assert (world.device, world.rank, world.local_rank, world.size) == (device, 6, 2, 8)
    assert not world.is_main


def test_a_process_that_sees_one_gpu_takes_it(no_group):
    done, world = no_group(1, Place(rank=3, local_rank=3, size=4))
    assert world.device == torch.device("cuda", 0)
    assert ("bind", 0) in done


def test_too_few_gpus_are_one_line(no_group):
    with pytest.raises(UserError, match="there are 2 GPUs, none is left for process 2") as error:
        no_group(2, Place(rank=2, local_rank=2, size=3))
    assert "\n" not in str(error.value)


def test_a_mesh_that_does_not_fit_is_one_line(no_group):
    with pytest.raises(UserError, match=r"parallel: replicate = 2 times shard = 3 does not make 4 processes"):
        no_group(4, Place(rank=0, local_rank=0, size=4), ParallelConfig(replicate=2, shard=3))


def test_one_process_is_bound_to_nothing(cuda):
    done = cuda(4, Place())
    world = distributed.start(RuntimeConfig(device="cuda"), ParallelConfig(replicate=2))
    assert (world.device, world.mesh, done) == (torch.device("cuda"), None, [])
