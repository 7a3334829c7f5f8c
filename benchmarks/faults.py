"""What tutelage makes of kills, power cuts, corruption, full disks, wrong clocks and bad input, as one table.

    python benchmarks/faults.py --seed 1 [--part kills] [--only kills/train/3] [--small] [--jobs 2]
    python benchmarks/faults.py --seed 1 --minutes 30 --log faults.jsonl    until all are done

Each case is drawn by the seed. Some need the system's administrator, who may mount disks; others skip them.
It runs a copy of the code as it is when it begins, and first one case of every group, so that `--minutes` or
Ctrl-C, after which the figures so far are printed, leave a sample of all.
A case is right if the result is, to the bit, that of the undisturbed command, or if one line names what is
wrong and the same command gives that result once the cause is gone. Every other case is printed with the
arguments that repeat it, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from campaigns.judging import KINDS, RIGHT, UNCLEAR, Verdict
from campaigns.mounts import bind, own_mounts
from campaigns.parts import PARTS
from campaigns.world import TASKS, World, build, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    Case = tuple[str, str, int]

_WORLD: World | None = None
_COPY = "FAULTS_CODE"
"""Variable with the fingerprint of the code, in the process that runs a copy of it."""


def main() -> int:
    """Run the cases, print the table, and return 1 if one of them is wrong."""
    options = parse()
    with tempfile.TemporaryDirectory(dir=memory_disk()) as scratch:
        if _COPY not in os.environ:
            return run_copy(Path(scratch))
        known = {} if options.log is None else read_log(options.log, options.seed)
        cases = [case for case in cases_of(options.small) if wanted(case, options)]
        jobs = options.jobs if os.geteuid() == 0 else 1  # others cannot have two directories at one path
        began = time.monotonic()

        def keep(case: Case, verdict: Verdict) -> None:
            if verdict.kind != RIGHT or options.verbose:
                seconds = f"[{time.monotonic() - began:4.0f} s]"
                print(f"{seconds} {spelled(case)}: {verdict.kind}: {verdict.words}", flush=True)
            if options.log is not None:
                write_log(options.log, options.seed, case, verdict)

        left = [case for case in cases if case not in known]
        new = run_cases(left, options.seed, Path(scratch), jobs, options.minutes, keep) if left else {}
        verdicts = {case: known[case] for case in cases if case in known} | new
    took = time.monotonic() - began
    before = f", {len(verdicts) - len(new)} of them before" if len(verdicts) > len(new) else ""
    how = f"in {took:.0f} s with {jobs} at a time, seed {options.seed}"
    print(f"{len(verdicts)} of {len(cases)} cases{before}, {how}\n")
    show(verdicts, options.seed)
    return int(any(verdict.kind != RIGHT for verdict in verdicts.values()))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--part", action="append", help="only this part; may be repeated", choices=sorted(PARTS)
    )
    parser.add_argument("--only", action="append", help="only this case; may be repeated")
    parser.add_argument("--small", action="store_true", help="a few cases of each part")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no case after so long")
    parser.add_argument("--verbose", action="store_true", help="say of every case what was done")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--log", type=Path, help="remember verdicts there, and go on with those it has")
    return parser.parse_args()


def run_copy(scratch: Path) -> int:
    """Run this script from a copy of the code, which nobody changes while its commands import it."""
    root, code = Path(__file__).parents[1], scratch / "code"
    for part in ("src", "benchmarks"):
        shutil.copytree(root / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
    files = sorted(path for path in code.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(code)).encode() + path.read_bytes() for path in files)
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(code / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        _COPY: hashlib.sha256(content).hexdigest()[:12],
    }
    script = str(code / "benchmarks" / Path(__file__).name)
    child = subprocess.Popen([sys.executable, script, *sys.argv[1:]], env=variables)
    with contextlib.suppress(ValueError):  # no main thread, no signals
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # which the terminal sends the copy too
            return child.wait()


def read_log(path: Path, seed: int) -> dict[Case, Verdict]:
    """The verdicts that an earlier call with the same seed and the same code left."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return {
        tuple(row["case"]): Verdict(**row["verdict"])
        for row in rows
        if (row["seed"], row["code"]) == (seed, os.environ[_COPY])
    }


def write_log(path: Path, seed: int, case: Case, verdict: Verdict) -> None:
    """Add a verdict."""
    row = {"seed": seed, "code": os.environ[_COPY], "case": case, "verdict": asdict(verdict)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def memory_disk() -> str | None:
    """A place in memory for the cases, where there is one; elsewhere they wait for the disk to flush."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a private directory in it


def cases_of(small: bool) -> list[Case]:
    """Every case, as (part, name, number): one of each group first, then each group's in proportion."""
    order = {
        (part, name, number): number and (number + 0.5) / count
        for part, spec in PARTS.items()
        if spec.possible()
        for name, count in (spec.few if small else spec.many).items()
        for number in range(count)
    }
    return sorted(order, key=order.__getitem__)


def wanted(case: Case, options: argparse.Namespace) -> bool:
    """Whether the options ask for a case."""
    if options.only:
        return spelled(case) in options.only
    return options.part is None or case[0] in options.part


def spelled(case: Case) -> str:
    """A case as `--only` takes it."""
    part, name, number = case
    return f"{part}/{name}/{number}"


def run_cases(
    cases: list[Case],
    seed: int,
    scratch: Path,
    jobs: int,
    minutes: float,
    keep: Callable[[Case, Verdict], None],
) -> dict[Case, Verdict]:
    """Run cases in some processes, each with a copy of the world at the same path, until told to stop."""
    began, verdicts = time.monotonic(), {}
    world = build(scratch)
    needed = {name for part, name, _ in cases for name in (name, *PARTS[part].needs)}
    prepare(world, [TASKS[name] for name in TASKS if name in needed])
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=settle, initargs=(world,)) as pool:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        tasks = {pool.submit(run_case, case, seed): case for case in cases}
        try:
            left = max(0.0, 60 * minutes - (time.monotonic() - began))
            for task in concurrent.futures.as_completed(tasks, timeout=left):
                verdicts[tasks[task]] = task.result()
                keep(tasks[task], task.result())
        except (TimeoutError, KeyboardInterrupt):
            pool.shutdown(cancel_futures=True)  # waits for those that have begun
            for task, case in tasks.items():
                if case not in verdicts and not task.cancelled():
                    verdicts[case] = task.result()
                    keep(case, task.result())
    return verdicts


def settle(world: World) -> None:
    """Give this process a view of the file system in which the world's directory is its own."""
    global _WORLD  # noqa: PLW0603 - one for each process
    _WORLD = world
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends its case; commands get handlers of their own
        signal.signal(number, lambda *_: None)
    world.clear()
    if os.geteuid() == 0:
        own_mounts()
        mine = world.scratch / str(os.getpid())
        mine.mkdir()
        bind(mine, world.place)


def run_case(case: Case, seed: int) -> Verdict:
    """Run one case."""
    assert _WORLD is not None  # noqa: S101 - `settle` was called
    part, name, number = case
    dice = random.Random(f"{seed} {spelled(case)}")  # noqa: S311 - no secret
    try:
        return PARTS[part].run(_WORLD, dice, name, number)
    except Exception:  # noqa: BLE001 - a mistake of the harness in one case leaves the others
        return Verdict(UNCLEAR, f"the case itself failed: {traceback.format_exc().strip()[-500:]}")


def show(verdicts: dict[Case, Verdict], seed: int) -> None:
    """Print the table, what the words in it mean, and how to repeat each case that is wrong."""
    width = max([len(f"{part}, {name}") for part, name, _ in verdicts] + [8])
    print(
        "".join(
            [
                f"{'case':{width}}",
                f"{'tried':>7}",
                *(f"{kind:>11}" for kind in KINDS),
                "   ended in an error first",
            ]
        )
    )
    groups: dict[str, list[Verdict]] = collections.defaultdict(list)
    for (part, name, _), verdict in sorted(verdicts.items()):
        groups[f"{part}, {name}"].append(verdict)
    for group, found in [*groups.items(), ("all", [*verdicts.values()])]:
        counts = collections.Counter(verdict.kind for verdict in found)
        errors = sum(verdict.error for verdict in found)
        print(
            "".join(
                [
                    f"{group:{width}}",
                    f"{len(found):7}",
                    *(f"{counts[kind]:11}" for kind in KINDS),
                    f"{errors:10}",
                ]
            )
        )
    redone = [verdict.redone for verdict in verdicts.values() if verdict.redone is not None]
    if redone:
        mean = sum(redone) / len(redone)
        print(f"\nsteps taken again after a kill or a cut: at most {max(redone)}, {mean:.1f} on average")
    print("\n" + "\n".join(f"{kind}: {words}" for kind, words in KINDS.items()))
    for part, spec in PARTS.items():
        if not spec.possible():
            print(f"not tried: {part}, which needs the system's administrator")
    for case, verdict in verdicts.items():
        if verdict.kind != RIGHT:
            print(f"{verdict.kind}: --seed {seed} --only '{spelled(case)}': {verdict.words}")


if __name__ == "__main__":
    sys.exit(main())
