"""What the objective costs beside the losses of other projects: CPU time, peak memory, error.

Every method computes its loss and the gradients of the student's hidden states and head, head products
included, from the same inputs: float32, T=1, student width 512, teacher width 1024. Each runs in a process of
its own. Its first run gives the peak memory above the inputs and is checked against float64; the later ones
are timed, in turn with the matrix products that the method cannot do without.

Each method is measured twice: with the allocator as it is installed, where large tensors are new memory each
time, and with memory kept (MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000). Claim no more than the
smaller lead. Without options: the methods nearest to ours at one shape, in about five minutes.

    python benchmarks/objective.py [--full] [--shape 2048x50304] [--repeats 2] [--json FILE] [--only T ...]

Peers that are not installed are skipped; benchmarks/peers.txt says how to install them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from losses.methods import GROUP_CE, GROUP_SPARSE, METHODS, Method, products
from losses.problem import load_sparse, load_truth, make_problem, save_truth, sparse_targets, tiny_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPES = ("512x8000", "2048x50304", "2048x128256")
SHORT_SHAPE, SHORT = "1024x50304", ("plain torch", "TRL GKD", "chunk 512", "ours")
INSTALLED, KEPT = "as installed", "memory kept"
ALLOCATORS: dict[str, dict[str, str]] = {
    INSTALLED: {},
    KEPT: {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}
WRONG = 1e-3
"""Relative error from which a loss is called wrong; float32 itself is near 1e-6."""

SECONDS = 2.0
"""Small shapes are repeated until this much time has been measured."""

Row = dict[str, Any]


def high_water_mib() -> float:
    """Peak resident memory of this process since it was last reset."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None  # noqa: S101 - Linux writes it
    return int(found[1]) / 1024


def measure(method: Method, shape: tuple[int, int], repeats: int, folder: Path) -> Row:
    """Peak, error and times of one method, in this process."""
    method.make(tiny_problem())()  # load every library first
    problem = make_problem(*shape, load_sparse(folder))
    step = method.make(problem)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = high_water_mib()
    value = step()
    row: Row = {"peak_mib": high_water_mib() - before, "cpu_s": [], "wall_s": [], "products_cpu_s": []}
    truth = load_truth(folder, method.truth)
    row["loss_error"] = abs(value.item() / truth["loss"].item() - 1)
    row["gradient_error"] = max(
        ((gradient - truth[name]).norm() / truth[name].norm()).item()
        for name, gradient in (("hs", problem.hs.grad), ("Ws", problem.Ws.grad))
    )
    del truth
    floor = products(problem, method.group)
    floor()
    while len(row["wall_s"]) < repeats or sum(row["wall_s"]) < SECONDS:
        problem.hs.grad = problem.Ws.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        row["cpu_s"].append(time.process_time() - cpu)
        row["wall_s"].append(time.perf_counter() - wall)
        cpu = time.process_time()
        floor()
        row["products_cpu_s"].append(time.process_time() - cpu)
    return row


def in_own_process(index: int, shape: str, repeats: int, folder: Path) -> Row:
    """The row of one method with either allocator, or what kept it from running."""
    method = METHODS[index]
    row: Row = {"name": method.name, "group": method.group}
    if method.package:
        try:
            row["version"] = version(method.package)
        except PackageNotFoundError:
            return row | {"failed": f"not installed: pip install --no-deps {method.package}"}
    command = [sys.executable, __file__, "--shape", shape, "--repeats", str(repeats)]
    for allocator, settings in ALLOCATORS.items():
        # Threads that wait must sleep, or CPU time would count the waiting.
        done = subprocess.run(
            [*command, "--worker", str(index), str(folder)],
            env=os.environ | {"OMP_WAIT_POLICY": "passive"} | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return row | {"failed": done.stderr.strip().splitlines()[-1]}
        row[allocator] = json.loads(done.stdout.splitlines()[-1])
    return row


def fastest_chunks(rows: list[Row]) -> list[Row]:
    """Of methods that differ only in their chunk size, the one with the least CPU time, memory kept."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["group"], row["name"].split(", chunk ")[0]
        if key not in best or ratio(row, KEPT) < ratio(best[key], KEPT):
            best[key] = row
    return list(best.values())


def ratio(row: Row, allocator: str) -> float:
    """CPU time over that of the bare products right after it: the machine's other load falls on both."""
    if "failed" in row:
        return float("inf")
    found = row[allocator]
    return statistics.median(x / y for x, y in zip(found["cpu_s"], found["products_cpu_s"], strict=True))


def table(rows: list[Row]) -> str:
    """Markdown: times, ratios and memory with either allocator, and errors."""
    our_ce = next(row for row in rows if row["group"] == GROUP_CE and row["name"] == "ours")
    lines = [
        "| loss | method | CPU s | kept | x products | kept | peak MiB | kept | loss error | gradient |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in fastest_chunks(rows):
        name = f"{row['name']} ({row['version']})" if "version" in row else row["name"]
        if "failed" in row:
            lines.append(f"| {row['group']} | {name} | {row['failed']} | | | | | | | |")
            continue
        times, factors, peaks = [], [], []
        for allocator in ALLOCATORS:
            times.append(f"{statistics.median(row[allocator]['cpu_s']):.2f}")
            factors.append(f"{ratio(row, allocator):.2f}")
            if row["group"] == GROUP_SPARSE:
                factors[-1] += f" ({ratio(row, allocator) / ratio(our_ce, allocator):.2f} x our CE)"
            peaks.append(f"{row[allocator]['peak_mib']:.0f}")
        errors = [shown(row[INSTALLED][part]) for part in ("loss_error", "gradient_error")]
        lines.append(f"| {' | '.join([row['group'], name, *times, *factors, *peaks, *errors])} |")
    return "\n".join(lines)


def shown(error: float) -> str:
    """An error, called by its name if it is one."""
    return f"{error:.0e}" if error < WRONG else f"**wrong: {error:.1g}**"


def measure_all(shape: str, repeats: int, only: Sequence[str]) -> list[Row]:
    """Every method at one shape, one process after the other."""
    tokens, vocab = (int(part) for part in shape.split("x"))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        problem = make_problem(tokens, vocab, {})
        save_truth(make_problem(tokens, vocab, sparse_targets(problem)), folder)
        del problem
        for index, method in enumerate(METHODS):
            name = f"{method.group}: {method.name}"
            if any(text in name for text in only) or method.group == GROUP_CE:
                rows.append(in_own_process(index, shape, repeats, folder) | {"shape": shape})
                print(json.dumps(rows[-1]), file=sys.stderr)  # so that a run cut short is not lost
    return rows


def main() -> None:
    """Measure and print markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help=f"every method at {', '.join(SHAPES)}")
    parser.add_argument("--shape", action="append", help="TOKENSxVOCABULARY; repeat for several")
    parser.add_argument("--repeats", type=int, default=2, help="least number of timed runs of each method")
    parser.add_argument("--only", nargs="+", help="methods whose 'group: name' contains one")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = arguments.shape or (SHAPES if arguments.full else (SHORT_SHAPE,))
    only = arguments.only or (SHORT if shapes == (SHORT_SHAPE,) else ("",))
    if arguments.worker:
        index, folder = int(arguments.worker[0]), Path(arguments.worker[1])
        tokens, vocab = (int(part) for part in shapes[0].split("x"))
        print(json.dumps(measure(METHODS[index], (tokens, vocab), arguments.repeats, folder)))
        return
    when, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
    threads = torch.get_num_threads()
    print(f"{when}, torch {torch.__version__}, {threads} threads, load {load:.2f} at the start, ", end="")
    print(f"median of at least {arguments.repeats} runs")
    rows = []
    for shape in shapes:
        found = measure_all(shape, arguments.repeats, only)
        print(f"\nN x V = {shape}\n\n{table(found)}", flush=True)
        rows += found
    if arguments.json:
        about = {"when": when, "torch": torch.__version__, "threads": threads, "load": load}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
