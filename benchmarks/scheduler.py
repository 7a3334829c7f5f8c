"""Seconds of a study's runner per run: leases, failures, choosing what is next, giving leases back.

The engine ends every run at once, so nothing but the runner is measured; its files are on a real disk. Then
the same with two runners at the same time, which see each other's leases.

    python benchmarks/scheduler.py [--runs 1000]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Self

from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.progress import NullProgress
from tutelage.run_directory import RunDirectory
from tutelage.study.cells import Cell
from tutelage.study.engines import RunTask, TaskOutcome
from tutelage.study.leases import Failures, Leases
from tutelage.study.nodes import Cost, Node
from tutelage.study.runner import run_all


class Instant:
    """An engine whose runs are done when they start."""

    slots = 4

    def __init__(self, output: Path) -> None:
        self._output = output
        self._ended: dict[str, TaskOutcome] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, key: str, task: RunTask) -> None:
        """Write what says that the runs are done."""
        for config in task.configs:
            (self._output / config.name).mkdir(parents=True)
            RunDirectory(self._output / config.name).write_state("done")
        self._ended[key] = TaskOutcome(status="done")

    def wait(self, seconds: float) -> dict[str, TaskOutcome]:
        """What was started since."""
        ended, self._ended = self._ended, {}
        if not ended:
            time.sleep(min(seconds, 0.01))
        return ended

    def cancel(self, key: str) -> None:
        """Nothing is left to cancel."""


def nodes(output: Path, count: int) -> list[Node]:
    """Ten teachers, and students that wait for them."""
    found: list[Node] = []
    for number in range(count):
        kind = "teacher" if number < 10 else "student"
        name = f"run-{number}"
        settings = {
            "name": name,
            "model": {"shape": "nano-50k"},
            "data": {"store": "none"},
            "tokens": 1024,
            "output": str(output),
        }
        config = validate(RunConfig, settings, "benchmark")
        needs = () if kind == "teacher" else (f"run-{number % 10}",)
        cell = Cell(
            name=name,
            kind=kind,
            group="group",
            student="tiny",
            teacher=None,
            seed=number,
            shape="nano-50k",
            tokens=1,
            settings={},
        )
        found.append(Node(name, cell, config, needs, Cost(1024, 1, 1.0, 0.0)))
    return found


def run(folder: Path, count: int) -> None:
    """Run all of them."""
    with Leases(folder) as leases:
        run_all(
            nodes(folder / "runs", count),
            Instant(folder / "runs"),
            leases,
            Failures(folder, 1),
            NullProgress(),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as text:
        start, cpu = time.perf_counter(), time.process_time()
        run(Path(text), count)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"one runner   {1e3 * wall / count:6.1f} ms per run, {1e3 * cpu / count:.1f} ms of it CPU")
    with tempfile.TemporaryDirectory() as text:
        processes = [multiprocessing.Process(target=run, args=(Path(text), count)) for _ in range(2)]
        start = time.perf_counter()
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        wall = time.perf_counter() - start
        begun = len(list((Path(text) / "queue" / "leases").iterdir()))
    print(f"two runners  {1e3 * wall / count:6.1f} ms per run; {begun} leases for {count} runs")


if __name__ == "__main__":
    main()
