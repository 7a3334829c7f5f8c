"""The memory of real training steps on tensors without values, and on processes that are not there.

`FakeTensorMode` computes shapes only, torch's `fake` process group sends nothing, and torch's trackers follow
every storage of one rank. What runs is the step of `tutelage.train`, from the sharding to AdamW.
"""

from __future__ import annotations

import contextlib
import warnings
from unittest import mock

import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.models import hub
from tutelage.models.shapes import find_shape
from tutelage.models.sharding import Sharding
from tutelage.run_directory import RunDirectory
from tutelage.teachers.live import OnlineTeacher
from tutelage.train.distributed import MESH_AXES, World
from tutelage.train.layers import compile_layers, recompute
from tutelage.train.objective_model import ObjectiveModel
from tutelage.train.optim import adamw
from tutelage.train.parallel import begin_micro_batch, place
from tutelage.train.setup import _half_dtype
from tutelage.train.step import train_step
from tutelage.train.student import StepInputs, Student
from tutelage.types import Batch

CPU = torch.device("cpu")
ALPHA, LR = 0.4, 1e-3


class Values(TorchDispatchMode):
    """Answers the questions about values that fake tensors cannot.

    All tokens have a label. Whether positions are those of one document depends on the document mask.
    """

    def __init__(self, *, mask):
        super().__init__()
        self._answer = not mask

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:
            (tensor,) = args
            return torch.zeros((tensor.numel(), tensor.ndim), dtype=torch.long, device=tensor.device)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class NoModules:
    """Stands in for the part of `MemTracker` that tells modules apart, which micro-batches confuse."""

    is_bw = False
    parents = frozenset({"Global"})

    def register_user_hooks(self, *_):
        pass

    def clear_user_hooks(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class OneProcess(MemTracker):
    def __init__(self, module, optimizer):
        super().__init__()
        self._mod_tracker = NoModules()
        self.track_external(module, optimizer)


def meta_model(shape, vocab_size, config):
    """A model without memory."""
    length, attention = config.data.sequence_length, config.model.attn_implementation
    return hub.build(find_shape(shape), vocab_size, length, 1, "meta", attention)


def give_memory(module, device, dtype=torch.float32):
    """Give tensors on the meta device memory and some values; `to_empty` cannot in a fake mode."""
    made = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in made:
                        new = torch.empty_like(tensor, device=device, dtype=dtype).normal_(std=0.02)
                        if isinstance(tensor, torch.nn.Parameter):
                            new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                        made[id(tensor)] = new, tensor
                    tensors[name] = made[id(tensor)][0]


def open_steps(config, vocab_size, world, teacher=None):
    """The student of a run with random weights, and its teacher, a shape."""
    half = _half_dtype(config, world.device)
    model = meta_model(config.model.shape, vocab_size, config)
    recompute(model, config.runtime)
    compile_layers(model, config.runtime, world.device)
    module = ObjectiveModel(model, config.objective, vocab_size, half if world.mesh is None else None)
    give_memory(module, world.device)
    if world.mesh is not None:
        place(module, world, config.parallel, half, None)
    student = Student(
        config=config,
        directory=RunDirectory(config.output / config.name),
        world=world,
        module=module,
        optimizer=adamw(model, config.optim, LR),
        autocast=half,
        policy=None,
        gate=None,
        loader=None,
        steps=2,
        lr=LR,
        base=None,
        notes=(),
    )
    if teacher is not None:
        taught = meta_model(teacher, vocab_size, config)
        give_memory(taught, world.device, half or torch.float32)
        shared = world.mesh is not None and config.teacher.placement == "shard"
        sharding = Sharding(world.mesh, None, config.teacher.reshard_after_forward) if shared else None
        student.teacher = OnlineTeacher(taught, 0.0, (), sharding)
    model.train()
    return student


def take_steps(student, count=2):
    """Train on batches of zeros."""
    config, world = student.config, student.world
    length = config.data.sequence_length
    share = config.global_batch_tokens // world.size // length
    piece = min(share, (config.micro_batch_tokens or config.global_batch_tokens) // length)
    tokens = torch.zeros((piece, length), dtype=torch.long, device=world.device)
    positions = torch.zeros_like(tokens) if config.data.document_mask else None
    batches = [Batch(tokens, tokens, tuple(range(piece)), positions) for _ in range(share // piece)]
    for _ in range(count):
        train_step([StepInputs(student, 0.0 if student.teacher is None else ALPHA, LR)], batches)


@contextlib.contextmanager
def world_of(config, processes, device):
    """The world of rank 0, with a process group in which nobody else is."""
    if processes == 1:
        yield World(device)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        mesh = init_device_mesh(device.type, config.parallel.mesh(processes), mesh_dim_names=MESH_AXES)
        axes = {axis: mesh[axis] for axis in MESH_AXES}
        # A part of a mesh is found by looking at values, which is for outside the fake mode.
        with mock.patch.object(DeviceMesh, "__getitem__", lambda _, axis: axes[axis]):
            yield World(device, size=processes, mesh=mesh)
    finally:
        dist.destroy_process_group()


def traced(config, vocab_size, processes=1, teacher=None, device=CPU):
    """Peak bytes of two steps on one process, and what they consist of by torch's own names."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        world = stack.enter_context(world_of(config, processes, device))
        for name, answer in (
            # transformers would take fake tensors for an export and give every layer a mask of its own.
            ("transformers.masking_utils.is_tracing", False),
            # DTensor asks for shapes in a fake mode of its own, or what it makes there would be counted.
            ("torch.distributed.tensor._sharding_prop.detect_fake_mode", None),
            ("tutelage.objective.chunked.check_inputs", None),
        ):
            stack.enter_context(mock.patch(name, return_value=answer))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Values(mask=bool(config.data.document_mask)))
        student = open_steps(config, vocab_size, world, teacher)
        kind = OneProcess if world.mesh is None else FSDPMemTracker
        tracker = kind(student.module, student.optimizer)
        if teacher is not None and world.mesh is None:
            tracker.track_external(student.teacher._root)

        def begin(student, *, last):
            tracker.reset_mod_stats()  # it takes a second micro-batch for a mistake
            begin_micro_batch(student, last=last)

        stack.enter_context(mock.patch("tutelage.train.step.begin_micro_batch", begin))
        with tracker:
            take_steps(student)
        peak = tracker.get_tracker_snapshot("peak")[device]
        names = {name if isinstance(name, str) else name.value: size for name, size in peak.items()}
        return names.pop("Total"), names
