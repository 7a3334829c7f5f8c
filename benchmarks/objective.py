"""What the objective costs beside the losses of other projects: CPU time, peak memory, error.

Every method computes its loss and the gradients of the student's hidden states and head, head products
included, from the same inputs: float32, T=1, student width 512, teacher width 1024. Each runs in a process of
its own. Its first run gives the peak memory above the inputs and is checked against float64; the later ones
are timed, in turn with the matrix products that the method cannot do without.

    python benchmarks/objective.py [--quick] [--shape 2048x50304] [--repeats 3] [--json FILE] [--only T ...]

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
from typing import Any

import torch

from losses.methods import GROUP_CE, GROUP_SPARSE, METHODS, Method, products
from losses.problem import load_sparse, load_truth, make_problem, save_truth, sparse_targets, tiny_problem

SHAPES = ("512x8000", "2048x50304", "2048x128256")
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
    """The row of one method, or what kept it from running."""
    method = METHODS[index]
    row: Row = {"name": method.name, "group": method.group}
    if method.package:
        try:
            row["version"] = version(method.package)
        except PackageNotFoundError:
            return row | {"failed": f"not installed: pip install --no-deps {method.package}"}
    command = [sys.executable, __file__, "--shape", shape, "--repeats", str(repeats)]
    # Threads that wait must sleep, or CPU time would count the waiting.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*command, "--worker", str(index), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return row | {"failed": done.stderr.strip().splitlines()[-1]}
    return row | json.loads(done.stdout.splitlines()[-1])


def fastest_chunks(rows: list[Row]) -> list[Row]:
    """Of methods that differ only in their chunk size, the one with the least CPU time."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["group"], row["name"].split(", chunk ")[0]
        if key not in best or ratio(row) < ratio(best[key]):
            best[key] = row
    return list(best.values())


def ratio(row: Row) -> float:
    """CPU time over that of the bare products right after it: the machine's other load falls on both."""
    if "failed" in row:
        return float("inf")
    return statistics.median(x / y for x, y in zip(row["cpu_s"], row["products_cpu_s"], strict=True))


def table(rows: list[Row]) -> str:
    """Markdown: times, ratios, memory and errors."""
    our_ce = next(ratio(row) for row in rows if row["group"] == GROUP_CE and row["name"] == "ours")
    lines = [
        "| loss | method | CPU s | wall s | x products | peak MiB | loss error | gradient error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in fastest_chunks(rows):
        name = f"{row['name']} ({row['version']})" if "version" in row else row["name"]
        if "failed" in row:
            lines.append(f"| {row['group']} | {name} | {row['failed']} | | | | | |")
            continue
        times = [f"{statistics.median(row[part]):.2f}" for part in ("cpu_s", "wall_s")]
        factor = f"{ratio(row):.2f}"
        if row["group"] == GROUP_SPARSE:
            factor += f" ({ratio(row) / our_ce:.2f} x our CE)"
        errors = [shown(row[part]) for part in ("loss_error", "gradient_error")]
        cells = [row["group"], name, *times, factor, f"{row['peak_mib']:.0f}", *errors]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(error: float) -> str:
    """An error, called by its name if it is one."""
    return f"{error:.0e}" if error < WRONG else f"**wrong: {error:.1g}**"


def measure_all(shape: str, repeats: int, only: list[str]) -> list[Row]:
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
    parser.add_argument("--quick", action="store_true", help=f"only {SHAPES[0]}")
    parser.add_argument("--shape", action="append", help="TOKENSxVOCABULARY; repeat for several")
    parser.add_argument("--repeats", type=int, default=3, help="least number of timed runs of each method")
    parser.add_argument("--only", nargs="+", default=[""], help="methods whose 'group: name' contains one")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = arguments.shape or (SHAPES[:1] if arguments.quick else SHAPES)
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
        found = measure_all(shape, arguments.repeats, arguments.only)
        print(f"\nN x V = {shape}\n\n{table(found)}", flush=True)
        rows += found
    if arguments.json:
        about = {"when": when, "torch": torch.__version__, "threads": threads, "load": load}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
