"""Damage one file of a kind before the command that uses it: equal results, or one line that names the file.

After an error the file is put back, and the same command must end in the undisturbed result.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from campaigns.commands import run
from campaigns.judging import Verdict, judge
from campaigns.world import STUDY, TASKS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from campaigns.world import World

_STORE = {
    "store": "stores/words-*/*.bin",
    "index": "stores/words-*/*.idx",
    "checksums": "stores/words-*/*.crc32",
} | {
    "bytes": "stores/words-*/*.bytes",
    "store manifest": "stores/words-*/manifest.json",
    "tokenizer": "stores/words-*/tokenizer*.json",
}
_MODEL = {"model": "runs/teacher-*/model/*", "weights": "runs/teacher-*/model/*.safetensors"}
_RUN = {"state": "runs/*/state.json", "metrics": "runs/*/metrics.jsonl", "config": "runs/*/config.yaml"} | {
    "provenance": "runs/*/provenance.json",
    "scores": "runs/*/scores.jsonl",
    "documents": "runs/*/documents.parquet",
    "calibration": "runs/*/calibration.json",
}
_CACHE = {"cache shard": "caches/*/shards/*", "cache manifest": "caches/*/manifest.json"}
_STUDIED = {name: f"{STUDY}/{pattern}" for name, pattern in _RUN.items()} | {
    "plan": f"{STUDY}/plan.json",
    "queue": f"{STUDY}/queue/*/*",
    "model": f"{STUDY}/runs/*/model/*",
    "overlap": f"{STUDY}/overlap/*",
    "stores of a study": f"{STUDY}/data/*/*",
}

KINDS: dict[str, dict[str, str]] = {
    "train": _STORE,
    "resume": _STORE
    | {"shard": "runs/*/checkpoints/*/*.safetensors", "checkpoint": "runs/*/checkpoints/*/*.json"}
    | {name: _RUN[name] for name in ("state", "metrics", "config", "provenance")},
    "again": _RUN | _MODEL | _STORE,
    "taught": _STORE
    | _MODEL
    | {"config": "runs/teacher-*/config.yaml", "state": "runs/teacher-*/state.json"},
    "cached": _STORE | _CACHE,
    "teach": _STORE | _MODEL,
    "teach on": _CACHE,
    "eval": _RUN | _MODEL | {"text": "stores/other-*/*"},
    "study on": _STUDIED,
    "verdicts": _STUDIED,
}
"""Kinds of files that are damaged before each task, by pattern."""


def corrupt(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Damage a file and run a command that may use it."""
    task = TASKS[name]
    world.truth(task)
    world.restore(task.start)
    kind = dice.choice(sorted(KINDS[name]))
    files = sorted(path for path in world.place.glob(KINDS[name][kind]) if path.is_file())
    path = dice.choice(files)
    damage = dice.choice(sorted(DAMAGES))
    kept = world.scratch / f"kept-{world.place.stat().st_ino}"
    shutil.copyfile(path, kept)
    DAMAGES[damage](path, dice, files)
    where = str(path.relative_to(world.place))
    outcome = run(world.arguments(task), world.place, ranks=task.ranks)
    return judge(
        world,
        task,
        outcome,
        f"{damage} of {where}",
        names=(path.name, path.parent.name),
        mend=lambda: put_back(kept, path),
        # What is there already, and nobody asked to look at, may stay as it is.
        ignored=where,
    )


def put_back(kept: Path, path: Path) -> None:
    """Replace what lies there now, which may be a pipe, by a copy of what lay there before."""
    path.unlink(missing_ok=True)
    shutil.copyfile(kept, path)


def _pipe(path: Path, _dice: random.Random, _: list[Path]) -> None:
    path.unlink()
    os.mkfifo(path)


def _flip(path: Path, dice: random.Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, dice: random.Random, _: list[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(max(1, len(data)))])


def _zero(path: Path, dice: random.Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    begin = dice.randrange(max(1, len(data))) // 512 * 512
    data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    path.write_bytes(data)


def _repeat(path: Path, dice: random.Random, _: list[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data + data[dice.randrange(max(1, len(data))) :])


def _swap(path: Path, dice: random.Random, files: list[Path]) -> None:
    others = [one for one in files if one != path] or [one for one in path.parent.iterdir() if one.is_file()]
    path.write_bytes(dice.choice(others).read_bytes())


DAMAGES: dict[str, Callable[[Path, random.Random, list[Path]], object]] = {
    "flipped bit": _flip,
    "truncation": _truncate,
    "zeroed block": _zero,
    "repeated tail": _repeat,
    "exchange": _swap,
    "pipe": _pipe,
    "loss": lambda path, dice, files: path.unlink(),  # noqa: ARG005 - as the others are called
    "emptying": lambda path, dice, files: path.write_bytes(b""),  # noqa: ARG005 - as the others are called
}
"""Kinds of damage to a file, given others of its kind."""
