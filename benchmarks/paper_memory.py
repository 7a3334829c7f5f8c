"""Two training steps of every size of run in the paper's presets, on eight processes that are not there.

The real step runs, sharded by FSDP2, on tensors without values (tests/support/fake_steps.py): the teacher's
forward pass, the student's, the objective, backward pass, AdamW. Printed is the peak of one process as
torch's own tracker counts it, beside the formula that `tutelage train --plan` and `tutelage study plan` use.
A step has two micro-batches here, of as many tokens as in the preset; chunks of logits are as large as on
CUDA, and their rows are worked on in place, as Triton's kernels do (the CPU's take a few rows at a time).

    python benchmarks/paper_memory.py [--only STUDENT[+TEACHER] ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from fake_steps import traced

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import merged, validate
from tutelage.config.run_config import RunConfig
from tutelage.data.build import build_store
from tutelage.models.devices import Hardware, find_device
from tutelage.models.memory import plan_memory
from tutelage.models.shapes import find_shape
from tutelage.run_footprint import footprint
from tutelage.study.cost import works_of
from tutelage.study.expand import expand
from tutelage.study.presets import load_study, preset_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PASSES = 2


def sizes() -> Iterator[tuple[str, str | None, int]]:
    """(student, teacher beside it, processes) of the paper's runs, each once."""
    studies = [expand(load_study(name)) for name in preset_names() if name.startswith("paper/")]
    works, _, _ = works_of(studies, "h100")
    found = dict.fromkeys((work.cell.shape, work.beside, work.processes) for work in works)
    for shape, beside, processes in found:
        if beside is None or beside.startswith(("llama-", "qwen3-")):
            yield shape, beside, processes


def config_of(shape: str, teacher: str | None, processes: int, store: Path) -> RunConfig:
    """A run of the paper with few micro-batches to a step."""
    study = load_study("paper/mixing").run
    vocab_size = find_shape(shape).vocab_size or 0
    batch = PASSES * processes * study["micro_batch_tokens"]
    own = {
        "model": {"shape": shape},
        "data": {"store": str(store)},
        "tokens": 100 * batch,
        "global_batch_tokens": batch,
        "runtime": {"device": "cpu"},
        "checkpoint": {"asynchronous": False},  # no copy beside the steps, which are not saved
        "objective": {
            "chunk_tokens": RunConfig.model_fields["objective"].default.tokens_per_chunk(
                vocab_size, "cuda", dense=teacher is not None
            )
        },
        "output": str(store.parent / "runs"),
    }
    if teacher is not None:
        own["teacher"] = {"kind": "model", "path": teacher}
        own["objective"]["alpha"] = 0.4
    return validate(RunConfig, merged(study, own), "benchmark")


def in_place(numbers: int, student_CV: Tensor, *_: object) -> tuple[Tensor, ...]:
    """Take the memory of Triton's rows: the gradient in the place of the logits, a few numbers per row."""
    student_CV.mul_(1.0)
    return tuple(student_CV.new_zeros(len(student_CV)) for _ in range(numbers))


def compare(shape: str, teacher: str | None, processes: int, store: Path) -> tuple[float, float]:
    """Bytes at the peak of a process: traced, and by formula."""
    config = config_of(shape, teacher, processes, store)
    student, taught = find_shape(shape), [] if teacher is None else [find_shape(teacher)]
    vocab_size = student.vocab_size or 0
    hardware = Hardware("cpu", find_device("cpu"), processes, 1e12, cuda=False)
    plan = plan_memory(footprint(config, student, taught, vocab_size, hardware))
    room = "tutelage.objective.chunks"
    with (
        mock.patch(f"{room}.sparse_rows", partial(in_place, 2)),
        mock.patch(f"{room}.dense_rows", partial(in_place, 3)),
    ):
        total, _ = traced(config, vocab_size, processes, teacher)
    return total, plan.tensors


def small_store(directory: Path) -> Path:
    """A token store, since a run names one; its tokens are not read."""
    sources = ({"kind": "corpus", "name": "sotu"},)
    config = StoreConfig(
        name="any",
        sources=sources,
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.2,
        test=0.2,
        max_bytes=400_000,
    )
    return build_store(config, directory)


def main() -> None:
    """Print a row for every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="sizes, such as llama-1.7b+llama-8b")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as directory:
        store = small_store(Path(directory))
        print("size | devices | traced GB | formula GB | ratio | seconds")
        for shape, teacher, processes in sizes():
            name = shape if teacher is None else f"{shape}+{teacher}"
            if only and name not in only:
                continue
            began = time.perf_counter()
            total, formula = compare(shape, teacher, processes, store)
            seconds = time.perf_counter() - began
            row = name, processes, f"{total / 1e9:.1f}", f"{formula / 1e9:.1f}", f"{formula / total:.2f}"
            print(*row, f"{seconds:.0f}", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
