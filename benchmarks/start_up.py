"""What garbage collection costs a short command and a forked worker, and what seeding costs a micro-batch.

The command trains 11 steps of nano-150k. "collected" is the same command in a process whose collector can be
neither stopped nor frozen; the two take turns. A worker is forked with torch loaded, and collects once.

    python benchmarks/start_up.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.train.step import _seed_dropout

COLLECTED = "import gc; gc.freeze = gc.disable = lambda: None; from tutelage.cli.main import main; main()"
STARTS = {"collected": ("-c", COLLECTED), "as it is": ("-m", "tutelage")}
RUN = """
name: short
model: {shape: nano-150k}
data: {sequence_length: 128}
tokens: 11264
global_batch_tokens: 1024
runtime: {device: cpu, threads: 1}
"""
SEEDS = 300


def timed(start: tuple[str, ...], folder: Path, store: Path, number: int) -> tuple[float, float, float]:
    """Train a run of its own: seconds by the clock, of processor time, and peak memory in MB."""
    words = [sys.executable, *start, "train", "run.yaml", f"data.store={store}", f"seed={number}"]
    began = time.perf_counter()
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, used.ru_utime, used.ru_maxrss / 1024


def own_megabytes() -> float:
    """Memory that this process shares with no other (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def collect_in_a_fork(*, frozen: bool) -> None:
    """Print what one collection takes in a process that is forked from this one."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if frozen:
        gc.freeze()
    before, began = own_megabytes(), time.perf_counter()
    gc.collect()
    seconds, grown = time.perf_counter() - began, own_megabytes() - before
    print(
        f"worker, {'frozen' if frozen else 'collected'}: {grown:.0f} MB of its own, {seconds:.3f} s",
        flush=True,
    )
    os._exit(0)


def seeding(frames: int, *, plain: bool) -> float:
    """Microseconds of seeding below that many further frames of Python."""
    if frames:
        return seeding(frames - 1, plain=plain)
    device, began = torch.device("cpu"), time.perf_counter()
    for number in range(SEEDS):
        if plain:
            torch.manual_seed(number)
        else:
            _seed_dropout(number, device)
    return (time.perf_counter() - began) / SEEDS * 1e6


def main() -> None:
    """Print the table of starts, then workers and seeds."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STARTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(RUN, encoding="utf-8")
        speeches = StoreConfig(
            name="speeches",
            sources=[{"kind": "corpus", "name": "sotu"}],
            tokenizer=TokenizerConfig(vocab_size=300),
            validation=0.2,
            test=0.2,
            max_bytes=400_000,
        )
        store = build_store(speeches, folder)
        for number in range(rounds):
            for place, (kind, start) in enumerate(STARTS.items()):
                found[kind].append(timed(start, folder, store, 2 * number + place))
    table = Table("command of 11 steps", "seconds", "user seconds (all)", "peak MB", title="medians")
    for kind, rows in found.items():
        clock, user, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        spread = f"{min(row[1] for row in rows):.2f} to {max(row[1] for row in rows):.2f}"
        table.add_row(kind, f"{clock:.2f}", f"{user:.2f} ({spread})", f"{peak:.0f}")
    Console().print(table)
    import tutelage.run  # noqa: F401, PLC0415 - what a server of workers has loaded

    for frozen in (False, True):
        collect_in_a_fork(frozen=frozen)
    for frames in (5, 20, 60):
        plain, own = seeding(frames, plain=True), seeding(frames, plain=False)
        print(f"seed below {frames} frames: torch.manual_seed {plain:.0f} us, ours {own:.1f} us")


if __name__ == "__main__":
    main()
