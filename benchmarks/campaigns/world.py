"""A small world of text, stores, models, a cache and a study, in which commands are disturbed.

It is built by the commands themselves, in seconds, at the path where every case restores it: configs of runs
hold absolute paths. What each command makes of it undisturbed is the truth that a case is compared with.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from campaigns.commands import Outcome, count_changes, kill_at, on_changes, run
from tutelage.train.metrics import MEASURED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_WORDS = """the of and to in a that is was he for it with as his on be at by had not are but from or have an
they which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my now
over such our man me even most made after also did many off before must well back through"""

_RUN = """
model: {shape: nano-20k}
data: {store: STORE, sequence_length: 32}
tokens: 4096
global_batch_tokens: 256
checkpoint: {every: 512, keep: 2}
eval: {domains: [{name: own, store: STORE, role: in_domain}], max_documents: 4, max_tokens: 64}
runtime: {device: cpu, threads: 1, log_every: 1}
"""

FILES = {
    "corpus.yaml": """
name: words
sources: [{kind: files, paths: [text.jsonl]}]
tokenizer: {vocab_size: 300}
validation: 0.2
test: 0.2
""",
    "other.yaml": """
name: other
sources: [{kind: files, paths: [other.jsonl]}]
tokenizer: {path: STORE}
validation: 0.5
test: 0.5
""",
    "teacher.yaml": "name: teacher\nseed: 42\n" + _RUN,
    "plain.yaml": "name: plain\nseed: 43\n" + _RUN,
    "taught.yaml": "name: taught\nteacher: {kind: run, run: TEACHER}\nobjective: {alpha: 0.4}\n" + _RUN,
    "cached.yaml": "name: cached\nteacher: {kind: cache, path: CACHE}\nobjective: {alpha: 0.4}\n" + _RUN,
    "evil.yaml": "name: taught\nteacher: {kind: model, path: evil/model}\nobjective: {alpha: 0.4}\n" + _RUN,
    "cohort.yaml": "name: more\nteacher: {kind: run, run: TEACHER}\nobjective: {alpha: 0.8}\n" + _RUN,
    "teach.yaml": """
name: targets
store: STORE
teacher: {kind: run, run: TEACHER}
context_length: 32
shard_tokens: 1024
batch_tokens: 256
device: cpu
threads: 1
""",
    "study.yaml": """
name: small
title: A small study
corpus:
  name: words
  sources: [{kind: files, paths: [text.jsonl]}]
  tokenizer: {vocab_size: 300}
  validation: 0.2
  test: 0.2
domains: {other: {source: {kind: files, paths: [other.jsonl]}}}
teachers: {weak: {shape: nano-20k, tokens: 2048}}
students:
  main: {shape: nano-20k, tokens: 2048, grid: {product: {teacher: [weak], alpha: [0.4]}}}
seeds: [43]
run:
  data: {sequence_length: 32}
  global_batch_tokens: 256
  checkpoint: {every: 512, keep: 1}
  eval: {max_documents: 4, max_tokens: 64}
  runtime: {device: cpu, threads: 1, log_every: 1}
""",
}


@dataclass(frozen=True, slots=True)
class Task:
    """A command, the state of the world it starts from, and what it makes.

    Attributes:
        arguments: after `tutelage`.
        start: name of the state of the world.
        makes: patterns of what is compared afterwards; "output" is what it prints.
        ranks: processes.
    """

    arguments: tuple[str, ...]
    start: str
    makes: tuple[str, ...]
    ranks: int = 1


def _run_files(pattern: str) -> tuple[str, ...]:
    files = ("model", "scores.jsonl", "documents.parquet", "calibration.json", "metrics.jsonl", "state.json")
    return tuple(f"{pattern}/{file}" for file in files)


_UNEQUAL = {"created", "seal", "crc32"}
"""Fields of a manifest that say when it was written, and checksums over them."""

MOST_REDONE = 4
"""Steps that a kill may cost here: every second is saved, while the next ones are taken."""

STUDY = "tutelage-small"
_SCORE = ("--max-documents", "4", "--max-tokens", "64")
TASKS = {
    "train": Task(("train", "plain.yaml"), "stores", _run_files("runs/plain-*")),
    "resume": Task(("train", "plain.yaml"), "stopped", _run_files("runs/plain-*")),
    "again": Task(("train", "teacher.yaml"), "cache", _run_files("runs/teacher-*")),
    "ranks": Task(("train", "plain.yaml"), "stores", _run_files("runs/plain-*"), ranks=2),
    "taught": Task(("train", "taught.yaml"), "teacher", _run_files("runs/taught-*")),
    "cohort": Task(
        ("train", "taught.yaml", "cohort.yaml"),
        "teacher",
        (*_run_files("runs/taught-*"), *_run_files("runs/more-*")),
    ),
    "cached": Task(("train", "cached.yaml"), "cache", _run_files("runs/cached-*")),
    "teach": Task(("teach", "teach.yaml"), "teacher", ("caches/*",)),
    "teach on": Task(("teach", "teach.yaml"), "half a cache", ("caches/*",)),
    "build": Task(("data", "build", "corpus.yaml"), "text", ("stores/*",)),
    "eval": Task(
        ("eval", "score", "runs/TEACHER", "--store", "other=OTHER", *_SCORE),
        "cache",
        ("runs/TEACHER/scores.jsonl", "runs/TEACHER/documents.parquet", "runs/TEACHER/calibration.json"),
    ),
    "study": Task(
        ("study", "run", "study.yaml", "--workers", "1", "--retries", "9"),
        "text",
        _run_files(f"{STUDY}/runs/*"),
    ),
    "study on": Task(
        ("study", "run", "study.yaml", "--workers", "1"), "half a study", _run_files(f"{STUDY}/runs/*")
    ),
    "report": Task(
        ("report", STUDY), "study", (f"{STUDY}/report.html", f"{STUDY}/tables", f"{STUDY}/figures")
    ),
    "verdicts": Task(("report", "--markdown", STUDY), "study", ("output",)),
}
"""What is disturbed, by name."""


@dataclass
class Truth:
    """What a task does undisturbed."""

    result: dict[str, Any]
    changes: int
    seconds: float
    bytes: int = 0
    files: int = 0


@dataclass
class World:
    """The world at one place, with the states that tasks start from.

    Attributes:
        place: where it lies whenever a command runs.
        states: kept copies, by name.
        names: what STORE, TEACHER, ... stand for in arguments.
    """

    scratch: Path
    names: dict[str, str] = field(default_factory=dict)
    truths: dict[Task, Truth] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Where the world lies whenever a command runs."""
        return self.scratch / "w"

    def state(self, name: str) -> Path:
        """The kept copy of a state."""
        return self.scratch / f"state-{name}"

    def clear(self) -> None:
        """Remove everything; the directory itself stays, which may be a mount point."""
        for path in self.place.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def restore(self, name: str) -> None:
        """Put the world into a state."""
        self.clear()
        shutil.copytree(self.state(name), self.place, symlinks=True, dirs_exist_ok=True)

    def keep(self, name: str) -> None:
        """Remember how the world is now."""
        shutil.copytree(self.place, self.state(name), symlinks=True)

    def arguments(self, task: Task) -> list[str]:
        """The arguments of a task with the names of this world."""
        return [self.filled(text) for text in task.arguments]

    def patterns(self, task: Task) -> tuple[str, ...]:
        """Where the results of a task are."""
        return tuple(self.filled(pattern) for pattern in task.makes)

    def filled(self, text: str) -> str:
        """Put names for STORE, OTHER, TEACHER and CACHE."""
        for name, value in self.names.items():
            text = text.replace(name, value)
        return text

    def run(self, *arguments: str) -> Outcome:
        """Run a command that must succeed."""
        done = run([self.filled(text) for text in arguments], self.place)
        if done.code:
            raise RuntimeError(f"tutelage {' '.join(arguments)}: {done.code}\n{done.err}")
        return done

    def truth(self, task: Task) -> Truth:
        """What the task makes undisturbed; computed once."""
        if task not in self.truths:
            self.restore(task.start)
            before = usage(self.place)
            changes, done = count_changes(self.arguments(task), self.place, ranks=task.ranks)
            if done.code:
                raise RuntimeError(f"{task}: {done.code}\n{done.err}")
            after = usage(self.place)
            found = result(self.place, self.patterns(task), done)
            if not found:
                raise RuntimeError(f"{task}: makes nothing that could be compared")
            self.truths[task] = Truth(
                found, changes, done.seconds, after[0] - before[0], after[1] - before[1]
            )
        return self.truths[task]


def usage(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files below a directory, in pages as a disk in memory counts them."""
    sizes = [-(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*")]
    return sum(sizes), len(sizes)


def build(scratch: Path) -> World:
    """Build the world in an empty directory and keep the states that tasks start from."""
    world = World(scratch)
    world.place.mkdir(parents=True)
    dice = random.Random(0)  # noqa: S311 - text, no secret
    for name, words, documents in (("text", _WORDS.split(), 400), ("other", _WORDS.split()[::-2], 60)):
        rows = [json.dumps({"text": " ".join(dice.choices(words, k=40)) + "."}) for _ in range(documents)]
        (world.place / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name, text in FILES.items():
        (world.place / name).write_text(text, encoding="utf-8")
    world.keep("text")
    world.run("data", "build", "corpus.yaml")
    _name(world, "STORE", "stores/words-*")
    world.run("data", "build", "other.yaml")
    _name(world, "OTHER", "stores/other-*")
    world.keep("stores")
    world.run("train", "teacher.yaml")
    _name(world, "TEACHER", "runs/teacher-*")
    world.keep("teacher")
    world.run("teach", "teach.yaml")
    _name(world, "CACHE", "caches/targets-*")
    world.keep("cache")
    return world


def prepare(world: World, tasks: Iterable[Task]) -> None:
    """Make the states that tasks start from, where `build` has not."""
    for state in {task.start for task in tasks}:
        if not world.state(state).exists():
            _LATER[state](world)


def _stop(world: World, name: str, state: str) -> None:
    """Keep the state that a task is in after it was killed when it had done most of its work."""
    task = TASKS[name]
    changes = world.truth(task).changes
    world.restore(task.start)
    run(world.arguments(task), world.place, prepare=on_changes(kill_at(changes * 3 // 5)))
    world.keep(state)


def _finish_study(world: World) -> None:
    world.restore("text")
    world.run(*TASKS["study on"].arguments)  # a model card has the command, and both are compared
    world.keep("study")


def _halve_study(world: World) -> None:
    prepare(world, [TASKS["report"]])
    world.restore("study")
    (student,) = world.place.glob(f"{STUDY}/runs/student-*-alpha-*")
    shutil.rmtree(student)
    world.keep("half a study")


_LATER = {
    "stopped": lambda world: _stop(world, "train", "stopped"),
    "half a cache": lambda world: _stop(world, "teach", "half a cache"),
    "study": _finish_study,
    "half a study": _halve_study,
}
"""How to make the states that few tasks start from."""


def _name(world: World, name: str, pattern: str) -> None:
    """Let a name stand for what was just made, here and in the files."""
    (found,) = world.place.glob(pattern)
    world.names[name] = found.name if name == "TEACHER" else str(found.relative_to(world.place))
    for file in world.place.glob("*.yaml"):
        file.write_text(world.filled(file.read_text(encoding="utf-8")), encoding="utf-8")


def result(place: Path, patterns: tuple[str, ...], outcome: Outcome) -> dict[str, Any]:
    """What was made, by path, without what no two runs have in common."""
    found: dict[str, Any] = {"output": outcome.out} if "output" in patterns else {}
    for pattern in patterns:
        for top in sorted(place.glob(pattern)):
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.is_file() and not path.is_symlink() and (kept := _kept(path)) is not None:
                    found[str(path.relative_to(place))] = kept
    return found


def _kept(path: Path) -> Any:  # noqa: ANN401 - whatever can be compared
    """The part of a file that is a result, or all of a damaged one; None if nothing of it is."""
    try:
        return _read(path)
    except ValueError:
        return path.read_bytes()


def _read(path: Path) -> Any:  # noqa: ANN401 - whatever can be compared
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
    if path.name == "state.json":
        state = json.loads(path.read_bytes())
        return {key: state.get(key) for key in ("status", "step", "error", "evaluations")}
    if path.name == "checksums.json":  # a file that was replaced has its earlier sum too
        return {name: sums[-1] for name, sums in json.loads(path.read_bytes())["files"].items()}
    if path.suffix == ".json":  # tables may be in another order
        record = json.loads(path.read_bytes())
        return record if type(record) is list else {key: record[key] for key in record if key not in _UNEQUAL}
    if path.name in ("provenance.json", "config.yaml", "lock") or path.name.startswith("."):
        return None
    # A commit beside the campaign is not its doing.
    lines = path.read_bytes().split(b"\n")
    return b"\n".join(line for line in lines if not line.startswith(b"| made with |"))


def last_steps(place: Path) -> dict[Path, int]:
    """The last step that each run has logged."""
    found = {}
    for log in place.rglob("metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in log.read_bytes().split(b"\n")[:-1]]
        if steps:
            found[log.parent] = steps[-1]
    return found


def steps_redone(place: Path, logged: dict[Path, int] | None = None) -> int | None:
    """Most steps of a run that were logged and have to be taken again; None before any was logged."""
    redone = [
        step
        - max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)
        for run, step in (last_steps(place) if logged is None else logged).items()
    ]
    return max(redone, default=None)
