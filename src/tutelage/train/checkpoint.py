"""Save and resume a run through torch's distributed checkpoint: each process its shards, as safetensors.

Weights and AdamW's moments are one flat dictionary of tensors, which any number of processes can read again:
bitwise what was saved. No random state is kept, because dropout is a function of seed, step and rank.
"""

from __future__ import annotations

import json
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

# The public `save` and `load` warn in every process that is alone, and a thread cannot silence a warning.
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from tutelage import agreement
from tutelage.checksums import FileSum
from tutelage.config.base import whole_batches
from tutelage.errors import DiskError, UserError
from tutelage.files import NO_SPACE, refuse_links
from tutelage.run_directory import BRANCH_POINT, recipe
from tutelage.train.checkpoint_files import (
    COUNTERS,
    CheckpointManifest,
    CheckpointOrigin,
    CheckpointWriter,
    check_origin,
    checkpoint_name,
    damage,
    damaged,
    read_counters,
    remove_checkpoint,
    remove_unfinished,
)

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path
    from typing import Any

    from torch import Tensor, nn

    from tutelage.config.run_config import RunConfig
    from tutelage.run_directory import RunDirectory
    from tutelage.train.distributed import World

_T = TypeVar("_T")

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Counters:
    """Progress of a run, and the memory of what adapts to it.

    Attributes:
        step: optimizer steps taken.
        seconds: training time over all sessions of this run.
        teacher_tokens: tokens the teacher has been run on.
        policy: what the alpha policy remembers.
        gate: what the per-token gate remembers.
        skipped: steps whose update was skipped.
        logged: step of the newest row of metrics.jsonl.
    """

    step: int = 0
    seconds: float = 0.0
    teacher_tokens: int = 0
    policy: dict[str, float] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    logged: int = 0


class Checkpoints:
    """The checkpoints of one run. Every process calls every method, in the same order.

    Saving copies the state to memory and writes it in a thread, while training goes on. The thread talks to
    those of the other processes through a process group of its own, so its messages cannot meet training's.

    Attributes:
        warnings: what the user should know about saves that failed; whoever shows them empties the list.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, world: World) -> None:
        """Name the place of the checkpoints; nothing is read or written."""
        self.warnings: list[str] = []
        self._directory = directory
        self._settings = config.checkpoint
        self._world = world
        kept, batch = config.checkpoint.keep_every, config.global_batch_tokens
        self._every = whole_batches(config.checkpoint.every, batch)
        self._keep_every = None if kept is None else whole_batches(kept, batch)
        replicate, shard = (1, 1) if world.mesh is None else world.mesh.shape
        self._origin = CheckpointOrigin(directory.id, recipe(config), replicate, shard)
        self._timeout = timedelta(seconds=config.parallel.timeout)
        self._group: dist.ProcessGroup | None = None
        self._stager: StateDictStager | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def is_due(self, step: int) -> bool:
        """Whether the settings ask for a checkpoint after `step`."""
        return step % self._every == 0 or (self._keep_every is not None and step % self._keep_every == 0)

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed and the run is to end; `wait` says why."""
        if self._pending is None or not self._pending.done():
            return False
        error = self._pending.exception()
        goes_on = isinstance(error, _NotWrittenError) and self._settings.on_full_disk == "continue"
        return error is not None and not goes_on

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Counters:
        """Restore the newest checkpoint in place; without one, leave everything as it is.

        What an earlier session left unfinished is removed. Every file is read twice, once for its checksum:
        the processes divide that, and it takes each about a second per gigabyte of its share.

        Raises:
            UserError: the checkpoint is damaged, or of another run, model or version.
        """
        if dist.is_initialized():
            with agreement.waiting_for_others():
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        if self._world.is_main:
            refuse_links(self._directory.checkpoints)
            remove_unfinished(self._directory.checkpoints)
            self._remove_old()
        found = self._from_main([*self._directory.saved().values()])
        if not found:
            return Counters()
        path = found[-1]
        reasons = self._from_all(damage(path, slice(self._world.rank, None, self._world.size)))
        if (reason := next((one for one in reasons if one is not None), None)) is not None:
            message = str(damaged(path, reason, found[:-1])) if self._world.is_main else ""
            raise UserError(self._from_main(message))
        check_origin(path, CheckpointManifest.read(path), self._origin)
        reader = HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        _make_room(model, optimizer, stored)
        state = _state(model, optimizer)
        _check_tensors(path, stored, state)
        try:
            _load_state_dict(state, reader, self._group, no_dist=self._group is None)
        except CheckpointException as error:
            raise _cause(error) from None
        try:
            return Counters(**read_counters(path))
        except TypeError as error:
            raise UserError(
                f"{path}: another version of tutelage wrote {COUNTERS} ({error}); go on with that one, or "
                f"remove {path.name}"
            ) from None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        counters: Counters,
        *,
        branch_point: bool = False,
        goes_on: bool = True,
    ) -> None:
        """Write `step-N`, or `branch-point-step-N`, which is kept: longer runs start from it.

        With `checkpoint.asynchronous` this returns when the state is copied; the save before is waited for.
        Where no training `goes_on` meanwhile, it is written as it is, and no copy takes memory.

        Raises:
            UserError: as `wait`.
        """
        self.wait()
        path = self._directory.checkpoints / (
            (BRANCH_POINT if branch_point else "") + checkpoint_name(counters.step)
        )
        state = {name: tensor.contiguous() for name, tensor in _state(model, optimizer).items()}
        asynchronous = self._settings.asynchronous and goes_on
        if asynchronous:
            state = self._copied(state)
        self._pending = self._thread.submit(self._write, path, state, counters)
        if not asynchronous:
            self.wait()

    def _copied(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy the state to memory of the CPU that is kept for the next save, pinned if it is on a GPU.

        What torch has around this, `DefaultStager`, can be used only once in torch 2.11.
        """
        cuda = self._world.device.type == "cuda"
        self._stager = self._stager or StateDictStager(pin_memory=cuda)
        copied: dict[str, Tensor] = self._stager.stage(state, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize(self._world.device)
        return copied

    def wait(self) -> None:
        """Wait for the save in the background, if there is one.

        Raises:
            DiskError: the disk is full, and `checkpoint.on_full_disk` is "stop".
            UserError: it could not be written for another reason, and that is "stop".
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except _NotWrittenError as error:
            if self._settings.on_full_disk == "stop":
                if error.is_full:
                    raise DiskError(f"{error}; free some space and run the same command") from None
                raise UserError(f"{error}; mend that and run the same command") from None
            self.warnings.append(f"{error}; training goes on, and the next checkpoint is tried again")

    def close(self) -> None:
        """Wait for the save in the background, and let its thread and memory go.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()  # type: ignore[no-untyped-call]

    def _write(self, path: Path, state: dict[str, Tensor], counters: Counters) -> None:
        """Write a checkpoint with the other processes, and remove those that are not kept."""
        writer = CheckpointWriter(path, partial(self._complete, counters))
        try:
            _save_state_dict(state, writer, self._group, no_dist=self._group is None)
        except CheckpointException as error:  # the same on every process; all have stopped writing
            if self._world.is_main:
                shutil.rmtree(writer.unfinished, ignore_errors=True)
            cause = _cause(error)
            if isinstance(cause, OSError):
                raise _NotWrittenError(
                    f"{path}: cannot be written ({cause.strerror}); earlier checkpoints are intact",
                    is_full=cause.errno in NO_SPACE,
                ) from None
            raise cause from None
        if self._world.is_main:
            self._remove_old()

    def _complete(self, counters: Counters, path: Path, files: dict[str, FileSum]) -> None:
        """Add counters and manifest to the shards of all processes; their steps' rows are flushed first."""
        self._directory.flush_log()
        text = json.dumps(asdict(counters)).encode()
        (path / COUNTERS).write_bytes(text)
        files[COUNTERS] = FileSum(len(text), zlib.crc32(text))
        CheckpointManifest(self._origin, files).write(path)

    def _remove_old(self) -> None:
        """Remove all but the newest checkpoints and those that are kept for good."""
        for step, path in [*self._directory.saved().items()][: -self._settings.keep]:
            if self._keep_every is None or step % self._keep_every != 0:
                remove_checkpoint(path)

    def _from_main(self, value: _T) -> _T:
        """The value that the main process has."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, group=self._group)
        return values[0]

    def _from_all(self, value: _T) -> list[_T]:
        """The values of all processes."""
        if self._group is None:
            return [value]
        values = [value] * self._world.size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first process that says so, the same on all of them."""
    return error.failures[min(error.failures)][0]


class _NotWrittenError(Exception):
    """The disk refused a checkpoint, because it is full or for another reason."""

    def __init__(self, message: str, *, is_full: bool) -> None:
        super().__init__(message)
        self.is_full = is_full


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, and the moments of those that had a gradient, by name; nothing is copied."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def _make_room(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Container[str]) -> None:
    """Give the optimizer the moments that are stored, as zeros to be read into."""
    for name, parameter in model.named_parameters():
        optimizer.state.pop(parameter, None)
        if f"optimizer.step.{name}" in stored:  # else it had no gradient yet
            moments = {key: torch.zeros_like(parameter.detach()) for key in _MOMENTS[1:]}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def _check_tensors(path: Path, stored: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint has the tensors of the model, in their shapes and dtypes.

    Raises:
        UserError: naming the first that differs.
    """
    for name in dict.fromkeys([*state, *stored]):
        if name not in state or name not in stored:
            where = "the checkpoint" if name in stored else "the model"
            raise UserError(f"{path}: it is of another model: {name} is in {where} only; remove it")
        there = tuple(stored[name].size), stored[name].properties.dtype
        here = tuple(state[name].shape), state[name].dtype
        if there != here:
            raise UserError(
                f"{path}: it is of another model: {name} is {there} there and {here} in the model; remove it"
            )
