"""What surviving power cuts and finding damage costs a run: its waits for the disk, and its checksums.

A run is trained, exported and scored in this process. Every `os.fsync` is timed by the clock on the wall, by
the file that it flushes (Linux), and every checksum and seal by the processor time of its thread. Flushes
that are there for checks alone, of `checksums.json`, are a row of their own.

    python benchmarks/durability.py [--shape nano-50k] [--tokens 600K]
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import threading
import time
import traceback
import zlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tutelage import checksums, records
from tutelage.api import run
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.checked_files import CheckedArray

if TYPE_CHECKING:
    from collections.abc import Callable

TEMPORARY = re.compile(r"\.(.+)\.[0-9]+-[0-9a-f]{8}")
COSTS: dict[tuple[str, str], list[float]] = defaultdict(list)
"""Seconds of every call, by thread and what was done."""


def timed(place: Any, name: str, clock: Callable[[], float], label: Callable[..., str]) -> None:  # noqa: ANN401 - a module
    """Note the seconds by `clock` of every call of a module's or class's function in `COSTS`."""
    call = vars(place)[name]

    def wrapped(*args: Any) -> Any:  # noqa: ANN401 - whatever it is called with
        what, start = label(*args), clock()
        try:
            return call(*args)
        finally:
            thread = "training" if threading.current_thread() is threading.main_thread() else "others"
            COSTS[thread, what].append(clock() - start)

    setattr(place, name, wrapped)


def flushed(number: int) -> str:
    """What a descriptor is flushed for."""
    if any(one.name == "_write" and one.filename == checksums.__file__ for one in traceback.extract_stack()):
        return f"flush of {checksums.LISTING}, and of its name"
    path = Path(f"/proc/self/fd/{number}").readlink()
    if path.is_dir():
        return "flush of names"
    found = TEMPORARY.fullmatch(path.name)
    return f"flush of *{Path(found[1] if found else path.name).suffix}"


def main() -> None:
    """Train a run and print what it waited for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="nano-50k")
    parser.add_argument("--tokens", default="600K")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [{"kind": "corpus", "name": "sotu"}]
        store = build_store(validate(StoreConfig, {"name": "sotu", "sources": sources}, "benchmark"), folder)
        settings = {
            "name": "run", "model": {"shape": arguments.shape}, "tokens": arguments.tokens,
            "data": {"store": str(store), "sequence_length": 128}, "global_batch_tokens": 1024,
            "runtime": {"device": "cpu", "threads": 1}, "output": str(folder / "runs"),
            "eval": {"max_documents": 8, "domains": [{"name": "sotu", "store": str(store)}]},
        }  # fmt: skip
        timed(os, "fsync", time.perf_counter, flushed)
        for place, call in ((records, "_seal"), (checksums, "file_sum"), (CheckedArray, "_check")):
            timed(place, call, time.thread_time, lambda *_, call=call: f"{call} (processor)")
        timed(zlib, "crc32", time.thread_time, lambda *_: "crc32, partly in the others (processor)")
        start, cpu = time.perf_counter(), time.process_time()
        run(settings)
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"a run of {took:.1f} s, {cpu:.1f} s of processor time\n")
    print("| what | thread | calls | ms | longest, ms |", "|---|---|---:|---:|---:|", sep="\n")
    for (thread, what), seconds in sorted(COSTS.items(), key=lambda one: (one[0][1], one[0][0])):
        print(f"| {what} | {thread} | {len(seconds)} | {1e3 * sum(seconds):.1f} | {1e3 * max(seconds):.1f} |")


if __name__ == "__main__":
    main()
