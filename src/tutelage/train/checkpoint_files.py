"""What a checkpoint is on disk: shards as safetensors, counters and a manifest that says if it is whole.

    step-000000012/
        shard-00001.safetensors    weights and moments that rank 0 wrote
        counters.json              progress of the run
        manifest.json              run, settings, layout; size and checksum of each file

A directory is filled under a name that begins with `.partial-` and gets its own when nothing is missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, DTYPE_MAP, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tutelage.checksums import FileSum, difference
from tutelage.errors import UserError, as_written
from tutelage.files import publish, read_bytes, remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

COUNTERS, MANIFEST = "counters.json", "manifest.json"
PARTIAL = ".partial-"
_FORMAT = 1
_OLDER = "state.safetensors"
_DTYPES = {dtype: name for name, dtype in DTYPE_MAP.items()}
_SHOWN = 3
"""Differing settings that a message shows."""


@dataclass(frozen=True, slots=True)
class CheckpointOrigin:
    """Which run a checkpoint is of, and how many processes wrote it.

    Attributes:
        run: id of the run.
        recipe: the settings that decide its result.
        replicate: copies of the model.
        shard: processes that share one copy.
    """

    run: str
    recipe: dict[str, Any]
    replicate: int
    shard: int

    def is_of(self, run: str) -> bool:
        """Whether it is of the run with this id; the name in it is no difference."""
        return self.run.rpartition("-")[2] == run.rpartition("-")[2]


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """Contents of manifest.json."""

    origin: CheckpointOrigin
    files: dict[str, FileSum]

    @classmethod
    def read(cls, path: Path) -> CheckpointManifest:
        """Read the manifest of the checkpoint `path`.

        Raises:
            OSError: it is not there.
            ValueError: it is damaged, or of another format.
        """
        try:
            text = read_bytes(path / MANIFEST).decode()
            data = json.loads(text)
            number = data["format"]
            files = {name: FileSum(**record) for name, record in data["files"].items()}
            found = cls(CheckpointOrigin(**data["origin"]), files)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{MANIFEST} is damaged") from None
        if number != _FORMAT:
            raise ValueError(f"{MANIFEST} has format {number} and not {_FORMAT}")
        if text != found._text():
            raise ValueError(f"{MANIFEST} is damaged: it is not what was written")
        return found

    def write(self, path: Path) -> None:
        """Write it into the checkpoint `path`."""
        (path / MANIFEST).write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        """All of the file, which ends with a checksum of the rest."""
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        data = {"format": _FORMAT, "origin": asdict(self.origin), "files": files}
        data["crc32"] = zlib.crc32(json.dumps(data, sort_keys=True).encode())
        return json.dumps(data, indent=1) + "\n"


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's directory, which sorts by step."""
    return f"step-{step:09d}"


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed session left unfinished."""
    for path in directory.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            remove(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves no half of it under its name."""
    gone = path.with_name(f"{PARTIAL}gone-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def read_counters(path: Path) -> dict[str, Any]:
    """Read counters.json of the checkpoint `path`."""
    counters: dict[str, Any] = json.loads(read_bytes(path / COUNTERS))
    return counters


def check_origin(path: Path, manifest: CheckpointManifest, ours: CheckpointOrigin) -> None:
    """Refuse a checkpoint of another run, and show what differs. The run's name is no difference.

    Raises:
        UserError: naming the settings.
    """
    theirs = manifest.origin
    if theirs.is_of(ours.run):
        return
    found = list(recipe_differences(theirs.recipe, ours.recipe))
    shown = "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    what = shown or "its settings are the same, so the model or the targets that it starts from have changed"
    raise UserError(
        f"{path}: it is a checkpoint of another run, {theirs.run} ({what}); remove it, or give both runs the "
        "same settings"
    )


def recipe_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a clause for each setting in which two recipes differ."""
    for field in dict.fromkeys([*ours, *theirs]):
        there, here = theirs.get(field), ours.get(field)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from recipe_differences(there, here, f"{prefix}{field}.")
        elif there != here:
            yield f"{prefix}{field} is {as_written(there)} there and {as_written(here)} here"


def adopt(path: Path, run: str, recipe: dict[str, Any]) -> None:
    """Make a checkpoint that was copied one of another run, which has computed the same steps."""
    manifest = CheckpointManifest.read(path)
    origin = replace(manifest.origin, run=run, recipe=recipe)
    CheckpointManifest(origin, manifest.files).write(path)


def damage(path: Path, part: slice = slice(None)) -> str | None:
    """Why the checkpoint `path` is not what was written, or None; every file is read for its checksum.

    Args:
        path: of the checkpoint.
        part: which of the files to read; several processes divide them.
    """
    if (path / _OLDER).is_file():
        return "an older version of tutelage wrote it, in a format that this one does not read"
    try:
        records = [*CheckpointManifest.read(path).files.items()][part]
        found = ((name, difference(path / name, record)) for name, record in records)
        return next((f"{name} {reason}" for name, reason in found if reason is not None), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())


def damaged(path: Path, reason: str, earlier: Sequence[Path]) -> UserError:
    """The error for a checkpoint that cannot be resumed from; it offers the newest intact one before it."""
    intact = next((one for one in reversed(earlier) if damage(one) is None), None)
    rest = (
        "to train from the beginning" if intact is None else f"to resume from {intact.name}, which is intact"
    )
    return UserError(f"{path}: cannot be resumed from ({reason}); remove it {rest}")


class _CountedFile(io.BufferedWriter):
    """A file that knows the checksum of what was meant to be written, whatever the disk makes of it."""

    checksum = 0
    size = 0

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += memoryview(data).nbytes
        return super().write(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]]) -> FileSum:
    """Write a safetensors file and wait until it is on the disk.

    safetensors' own functions keep Python's global lock for seconds per gigabyte, which is training's too.
    Here it is free while checksums are computed and bytes are written, and no second copy is made in memory.

    Args:
        path: of the file.
        tensors: parts of tensors, contiguous, by name; copied to the CPU one by one.
        offsets: where each part begins in its tensor.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that all are aligned
    sharding = {name: {SAVED_OFFSETS_KEY: list(offsets[name])} for name in ordered}
    header: dict[str, Any] = {"__metadata__": {CUSTOM_METADATA_KEY: json.dumps(sharding)}}
    end = 0
    for name in ordered:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _CountedFile(io.FileIO(path, "w")) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(file.size, file.checksum)


class CheckpointWriter(HuggingFaceStorageWriter):
    """Write the shards of all ranks, then on rank 0 the manifest; the directory appears when it is whole.

    torch plans who writes what; replicas are written once. Its `finish` would do nothing for this format:
    the pickled `.metadata` belongs to another one.
    """

    def __init__(self, path: Path, finished: Callable[[Path, dict[str, FileSum]], None]) -> None:
        """Prepare to write.

        Args:
            path: of the checkpoint; files are written to its unfinished directory.
            finished: called on rank 0 with the unfinished directory and its files, to add what is left.
        """
        self.target = path
        self.unfinished = path.with_name(PARTIAL + path.name)
        super().__init__(str(self.unfinished), save_distributed=True)
        self._finished = finished

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; the result is its file."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, Sequence[int]] = {}
        for item in plan.items:
            tensor, data = planner.resolve_data(item), item.tensor_data
            assert isinstance(tensor, Tensor)  # noqa: S101 - nothing else is in the state
            assert data is not None  # noqa: S101
            if tensor.numel():  # of a tensor with fewer rows than ranks, some have none
                tensors[item.index.fqn], offsets[item.index.fqn] = tensor.detach(), data.chunk.offsets
        results: Future[list[WriteResult]] = Future()
        results.set_result([])
        if tensors:
            name = f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            file = write_tensors(self.unfinished / name, tensors, offsets)
            results.value().append(WriteResult(MetadataIndex(name), file.bytes, file))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002 - torch's
        """Complete the directory and give it its name."""
        records = {result.index.fqn: result.storage_data for rank in results for result in rank}
        self._finished(self.unfinished, records)
        publish(self.unfinished, self.target)
