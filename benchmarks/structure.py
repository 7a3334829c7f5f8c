"""How large the house is, and how many files one walks through on five ways.

    python benchmarks/structure.py            of this checkout
    python benchmarks/structure.py --files    and names the files on each way

A file is on a way if one of its functions runs between the way's two ends, counted by Python's profiler in a
process of its own; what runs in the worker processes of a study is not on the study's way.

    train config to step     `tutelage train`, taught by a run, up to the end of the first optimizer step
    targets to loss          the second step of a run that is taught by cached targets
    study file to results    `tutelage study run` of one cell, without `analysis/`
    scores to report         `tutelage report` of that study
    text to batch            a token store built, opened and read for one batch
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tutelage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import house  # noqa: E402 - from tests/support

SOURCE = Path(tutelage.__file__).parent
STORE = """
name: speeches
sources: [{kind: corpus, name: sotu}]
tokenizer: {vocab_size: 300}
validation: 0.2
test: 0.2
max_bytes: 300000
"""
RUN = """
name: walked
model: {shape: nano-20k}
data: {store: store, sequence_length: 64}
tokens: 2048
global_batch_tokens: 512
eval: {max_documents: 2, max_tokens: 64}
runtime: {device: cpu, threads: 1, log_every: 1}
"""
STUDY = """
name: walked
title: Which way?
corpus: {name: speeches, sources: [{kind: corpus, name: sotu}], tokenizer: {vocab_size: 300},
  validation: 0.2, test: 0.2, max_bytes: 300000}
domains:
  scripture: {source: {kind: corpus, name: kjv}, max_bytes: 100000}
teachers:
  small: {shape: nano-20k, tokens: 2K}
students:
  mixing: {shape: nano-20k, tokens: 2K, grid: {product: {teacher: [small], alpha: [0.5]}}}
seeds: [1]
run:
  data: {sequence_length: 64}
  global_batch_tokens: 512
  eval: {max_documents: 4, max_tokens: 128}
  runtime: {device: cpu, threads: 1}
"""
TRACER = """
import json, os, runpy, sys, threading
from pathlib import Path

source, found, between = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
seen, steps = set(), [0]

def look(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & 1 and code.co_filename.startswith(source):
        if between is None or steps[0] == between:
            seen.add(code.co_filename[len(source) + 1:])
    elif event == "return" and code.co_name == "step" and code.co_filename.endswith("optim/adam.py"):
        steps[0] += 1

threading.setprofile(look)
sys.setprofile(look)
sys.argv = sys.argv[4:]
try:
    runpy.run_module("tutelage", run_name="__main__") if sys.argv[0] == "tutelage" else exec(sys.argv[1])
finally:
    sys.setprofile(None)
    found.write_text(json.dumps(sorted(seen)))
"""
BATCH = """
from pathlib import Path
from tutelage import StoreConfig, build_store, open_store
from tutelage.config.load import load
from tutelage.data.loader import Loader
store = open_store(build_store(load(StoreConfig, Path("store.yaml")), Path("stores")))
Loader(store.split("train"), 64, 8, 1).batch(0)
"""


def walk(folder: Path, *command: str, between: int | None = None) -> list[str]:
    """Files of the package that `command` runs a function of, or only between two optimizer steps."""
    found = folder / "seen.json"
    arguments = [str(SOURCE), str(found), json.dumps(between), *command]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", TRACER, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return json.loads(found.read_text())


def walks(folder: Path) -> dict[str, list[str]]:
    """Files on each of the five ways."""
    for name, text in {"store": STORE, "run": RUN, "study": STUDY}.items():
        (folder / f"{name}.yaml").write_text(text)
    batch = walk(folder, "python", BATCH)
    store = next((folder / "stores").iterdir())
    train = ("tutelage", "train", "run.yaml", f"data.store={store}")
    alpha = "objective.alpha=0.5"
    walk(folder, *train, "name=teacher")
    taught = f"teacher={{kind: run, run: {next((folder / 'runs').iterdir()).name}, CACHE}}"
    cached = taught.replace("CACHE", "cache: {format: {kind: topk, k: 8}}")
    study = walk(folder, "tutelage", "study", "run", "study.yaml", "--output", "study", "--workers", "1")
    return {
        "train config to step": walk(folder, *train, alpha, taught.replace(", CACHE", ""), between=0),
        "targets to loss": walk(folder, *train, alpha, cached, between=1),
        "study file to results": [path for path in study if not path.startswith("analysis/")],
        "scores to report": walk(folder, "tutelage", "report", "study"),
        "text to batch": batch,
    }


def measured() -> list[tuple[str, str]]:
    """Sizes of the source, as rows of a table."""
    modules = house.read_package(SOURCE)
    graph = house.import_graph(modules)
    functions = [node for module in modules for node in house.functions(module.tree)]
    lengths = [house.length(node) for node in functions]
    once = sum(count == 1 for count in house.importers(graph).values())
    arrows = house.rooms(graph, modules)
    return [
        ("files", f"{len(modules)}"),
        ("lines", f"{sum(module.lines for module in modules):,}"),
        ("functions", f"{len(functions):,}"),
        ("lines of a function: median, longest", f"{statistics.median(lengths):g}, {max(lengths)}"),
        ("imports between files", f"{sum(map(len, graph.values()))}"),
        ("files that one other file imports", f"{once}"),
        ("rooms, arrows between them", f"{len(arrows)}, {sum(map(len, arrows.values()))}"),
        ("circles", f"{len(house.circles(graph))}"),
        ("file names used twice", f"{len(house.file_names_used_twice(modules))}"),
        ("public type names used twice", f"{len(house.types_used_twice(modules))}"),
    ]


def main() -> None:
    """Print both tables."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--files", action="store_true", help="name the files on each way")
    arguments = parser.parse_args()
    console = Console()
    table = Table("", "", title="The house")
    for row in measured():
        table.add_row(*row)
    console.print(table)
    with tempfile.TemporaryDirectory() as folder:
        ways = walks(Path(folder))
    table = Table("way", "files", *(["which"] if arguments.files else []), title="Files on the way")
    for name, files in ways.items():
        table.add_row(name, str(len(files)), *(["\n".join(files)] if arguments.files else []))
    console.print(table)


if __name__ == "__main__":
    main()
