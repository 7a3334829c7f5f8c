"""What tutelage makes of kills, power cuts, corruption, full disks, wrong clocks and bad input, as one table.

    python benchmarks/faults.py --seed 1 [--part kills] [--only kills/train/3] [--small] [--jobs 2]

Each case is drawn by the seed. Some need the system's administrator, who may mount disks; others skip them.
A case is right if the result is, to the bit, that of the undisturbed command, or if one line names what is
wrong and the same command gives that result once the cause is gone. Every other case is printed with the
arguments that repeat it, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from campaigns.judging import KINDS, RIGHT, UNCLEAR, Verdict
from campaigns.mounts import bind, own_mounts
from campaigns.parts import PARTS
from campaigns.world import TASKS, World, build, prepare

_WORLD: World | None = None


def main() -> int:
    """Run the cases, print the table, and return 1 if one of them is wrong."""
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
    options = parser.parse_args()
    cases = [case for case in cases_of(options.small) if wanted(case, options)]
    random.Random(options.seed).shuffle(cases)  # noqa: S311 - so that a part of them is a sample of all
    jobs = options.jobs if os.geteuid() == 0 else 1  # others cannot have two directories at one path
    with tempfile.TemporaryDirectory(dir=memory_disk()) as scratch:
        verdicts = run_cases(
            cases, options.seed, Path(scratch), jobs, options.minutes, verbose=options.verbose
        )
    show(verdicts, options.seed)
    return int(any(verdict.kind != RIGHT for verdict in verdicts.values()))


def memory_disk() -> str | None:
    """A place in memory for the cases, where there is one; elsewhere they wait for the disk to flush."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a private directory in it


def cases_of(small: bool) -> list[tuple[str, str, int]]:
    """Every case, as (part, name, number)."""
    return [
        (part, name, number)
        for part, spec in PARTS.items()
        if spec.possible()
        for name, count in (spec.few if small else spec.many).items()
        for number in range(count)
    ]


def wanted(case: tuple[str, str, int], options: argparse.Namespace) -> bool:
    """Whether the options ask for a case."""
    if options.only:
        return spelled(case) in options.only
    return options.part is None or case[0] in options.part


def spelled(case: tuple[str, str, int]) -> str:
    """A case as `--only` takes it."""
    part, name, number = case
    return f"{part}/{name}/{number}"


def run_cases(
    cases: list[tuple[str, str, int]], seed: int, scratch: Path, jobs: int, minutes: float, *, verbose: bool
) -> dict[tuple[str, str, int], Verdict]:
    """Run cases in some processes, each with a copy of the world at the same path."""
    began, verdicts = time.monotonic(), {}
    world = build(scratch)
    needed = {name for part, name, _ in cases for name in (name, *PARTS[part].needs)}
    prepare(world, [TASKS[name] for name in TASKS if name in needed])
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=settle, initargs=(world,)) as pool:
        tasks = {pool.submit(run_case, case, seed): case for case in cases}
        for task in concurrent.futures.as_completed(tasks):
            if time.monotonic() - began > 60 * minutes:
                for waiting in tasks:
                    waiting.cancel()
            if task.cancelled():
                continue
            case, verdict = tasks[task], task.result()
            verdicts[case] = verdict
            if verdict.kind != RIGHT or verbose:
                print(
                    f"[{time.monotonic() - began:4.0f} s] {spelled(case)}: {verdict.kind}: {verdict.words}",
                    flush=True,
                )
    took = time.monotonic() - began
    print(f"{len(verdicts)} of {len(cases)} cases in {took:.0f} s with {jobs} at a time, seed {seed}\n")
    return verdicts


def settle(world: World) -> None:
    """Give this process a view of the file system in which the world's directory is its own."""
    global _WORLD  # noqa: PLW0603 - one for each process
    _WORLD = world
    world.clear()
    if os.geteuid() == 0:
        own_mounts()
        mine = world.scratch / str(os.getpid())
        mine.mkdir()
        bind(mine, world.place)


def run_case(case: tuple[str, str, int], seed: int) -> Verdict:
    """Run one case."""
    assert _WORLD is not None  # noqa: S101 - `settle` was called
    part, name, number = case
    dice = random.Random(f"{seed} {spelled(case)}")  # noqa: S311 - no secret
    try:
        return PARTS[part].run(_WORLD, dice, name, number)
    except Exception:  # noqa: BLE001 - a mistake of the harness in one case leaves the others
        return Verdict(UNCLEAR, f"the case itself failed: {traceback.format_exc().strip()[-500:]}")


def show(verdicts: dict[tuple[str, str, int], Verdict], seed: int) -> None:
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
