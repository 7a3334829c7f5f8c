"""Plant what an enemy would: links, models with code, archives that swell, false records.

A file outside of where commands write must stay as it is, code in a model must not run, and little time and
memory be used. Models, archives and records that are wrong must be refused in one line.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from typing import TYPE_CHECKING, Any

import zstandard

from campaigns.commands import run
from campaigns.judging import HANG, RIGHT, SILENT, TRACEBACK, UNCLEAR, Verdict, broken, finish, judge
from campaigns.world import STUDY, TASKS
from tutelage.records import write_sealed

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from campaigns.world import World

_MEMORY = 2 << 30
_CPU_SECONDS = 20.0
_NOBODY = 65534

_PLANTS: dict[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda path, victim: path.symlink_to(victim),
    "dangling link": lambda path, victim: path.symlink_to(victim.parent / "new"),
    "hard link": lambda path, victim: path.hardlink_to(victim),
    "pipe": lambda path, _: os.mkfifo(path),
} | (
    {"link to a directory": lambda path, victim: path.symlink_to(victim.parent)} if os.geteuid() == 0 else {}
)
_PLACES = {
    "train": (
        *("lock", "state.json", "metrics.jsonl", "config.yaml", "provenance.json", "checkpoints", "model"),
        *("scores.jsonl", "documents.parquet", "calibration.json", "checksums.json"),
    ),
    "teach": ("lock", "manifest.json", "shards"),
    "report": ("report.html", "tables", "figures", "tables/gains.csv", "figures/alpha.png"),
}


def plant_link(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Plant a link or a pipe where a command is about to write."""
    task = TASKS[name]
    world.truth(task)
    world.restore(task.start)
    outside = world.place / "outside"  # on the same disk, where hard links reach it
    outside.mkdir()
    victim = outside / "victim"
    victim.write_text("precious", encoding="utf-8")
    made = next(iter(world.truths[task].result)).split("/")
    top = world.place / (made[0] if name == "report" else f"{made[0]}/{made[1]}")
    place, plant = top / dice.choice(_PLACES[name]), dice.choice(sorted(_PLANTS))
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    _PLANTS[plant](place, victim)
    if os.geteuid() == 0:  # links to directories are refused if another user made them
        os.chown(place, _NOBODY, _NOBODY, follow_symlinks=False)
    words = f"{plant} as {place.relative_to(world.place)}"
    outcome = run(world.arguments(task), world.place, 60)
    if victim.read_text(encoding="utf-8") != "precious" or sorted(outside.iterdir()) != [outside / "victim"]:
        return Verdict(SILENT, f"{words}: what it leads to was written")
    if outcome.code == 0:
        return finish(world, task, words)
    return judge(world, task, outcome, words, names=(place.name, place.parent.name), mend=place.unlink)


def _edit(file: Path, **fields: Any) -> None:  # noqa: ANN401 - JSON
    file.write_text(json.dumps(json.loads(file.read_bytes()) | fields), encoding="utf-8")


def _code(model: Path) -> None:
    places = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    _edit(model / "config.json", model_type="evil", auto_map=places)
    (model / "evil.py").write_text("open('CANARY', 'w').close()\nraise SystemExit\n", encoding="utf-8")


def _pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch CANARY'\ntR.")


def _index(model: Path) -> None:
    names = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], "../../outside.safetensors")
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": names})
    (model / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _header(length: int, text: bytes = b"{}") -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + text)


def _nested(file: str) -> Callable[[Path], object]:
    return lambda model: (model / file).write_text("[" * 200_000, encoding="utf-8")


_MODELS: dict[str, Callable[[Path], object]] = {
    "code of its own": _code,
    "pickled weights": _pickle,
    "weights elsewhere": _index,
    "a header of 2^60 bytes": _header(1 << 60),
    "a header of no bytes": _header(0, b""),
    "a header that overlaps": _header(
        90, b'{"lm_head.weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,99999999]}}'
    ),
    "an endless file of weights": lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors").symlink_to("/dev/zero"),
    ),
    "a pipe as config": lambda model: ((model / "config.json").unlink(), os.mkfifo(model / "config.json")),
    "no positions": lambda model: _edit(model / "config.json", max_position_embeddings=0),
    "no layers": lambda model: _edit(model / "config.json", num_hidden_layers=-1),
    "a billion layers": lambda model: _edit(model / "config.json", num_hidden_layers=10**9),
    "a width of 2^40": lambda model: _edit(model / "config.json", hidden_size=1 << 40),
    "no heads": lambda model: _edit(model / "config.json", num_attention_heads=0),
    "a vocabulary of words": lambda model: _edit(model / "config.json", vocab_size="many"),
    "no known kind": lambda model: _edit(model / "config.json", model_type="../evil"),
    "an endless nesting of config": _nested("config.json"),
    "an endless nesting of tokenizer": _nested("tokenizer.json"),
    "half a tokenizer": lambda model: (model / "tokenizer.json").write_bytes(
        (model / "tokenizer.json").read_bytes()[:999]
    ),
    "a tokenizer of 10^9 ids": lambda model: _edit(
        model / "tokenizer.json", added_tokens=[{"id": 10**9, "content": "x", "special": True}]
    ),
}

_LINE = json.dumps({"text": "words and more words of text"}).encode() + b"\n"
_ZEROS = bytes(1 << 20)


def _swelling_gzip(file: Path) -> None:
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for _ in range(500):
            stream.write(_ZEROS)


def _swelling_zstd(file: Path) -> None:
    with file.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        for _ in range(4000):
            stream.write(_ZEROS)


_ARCHIVES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "500 MB in a .gz": ("x.txt.gz", _swelling_gzip),
    "500 MB in one row": ("x.jsonl.gz", _swelling_gzip),
    "4 GB in a .zst": ("x.txt.zst", _swelling_zstd),
    "4 GB in one row of .zst": ("x.jsonl.zst", _swelling_zstd),
    "half a .gz": ("x.jsonl.gz", lambda file: file.write_bytes(gzip.compress(_LINE * 999)[:90])),
    "a damaged .gz": (
        "x.jsonl.gz",
        lambda file: file.write_bytes(gzip.compress(_LINE * 999)[:-8] + bytes(8)),
    ),
    "half a .zst": ("x.jsonl.zst", lambda file: file.write_bytes(zstandard.compress(_LINE * 999)[:-9])),
    "text as .gz": ("x.jsonl.gz", lambda file: file.write_bytes(_LINE)),
    "text as .parquet": ("x.parquet", lambda file: file.write_bytes(_LINE)),
    "only the magic of .parquet": ("x.parquet", lambda file: file.write_bytes(b"PAR1" * 9)),
    "an endless nesting": (
        "x.jsonl",
        lambda file: file.write_text('{"text":' + "[" * 500_000, encoding="utf-8"),
    ),
    "an endless file": ("x.jsonl", lambda file: file.symlink_to("/dev/zero")),
    "a number of a million digits": (
        "x.jsonl",
        lambda file: file.write_text('{"text": 1' + "0" * 10**6 + "}\n"),
    ),
    "half a surrogate pair": ("x.jsonl", lambda file: file.write_text('{"text": "\\ud800"}\n')),
    "no UTF-8": ("x.jsonl", lambda file: file.write_bytes(b'{"text": "\xff\xfe"}\n')),
}


def _store_manifest(**fields: Any) -> Callable[[World], tuple[str, ...]]:  # noqa: ANN401 - JSON
    def plant(world: World) -> tuple[str, ...]:
        _sealed(world.place / world.names["STORE"] / "manifest.json", fields)
        return ("train", "plain.yaml")

    return plant


def _cache_manifest(**layout: Any) -> Callable[[World], tuple[str, ...]]:  # noqa: ANN401 - JSON
    def plant(world: World) -> tuple[str, ...]:
        file = world.place / world.names["CACHE"] / "manifest.json"
        _sealed(file, {"layout": json.loads(file.read_bytes())["layout"] | layout})
        return ("train", "cached.yaml")

    return plant


def _sealed(file: Path, fields: dict[str, Any]) -> None:
    """Change a record as somebody would who can compute its seal."""
    record = json.loads(file.read_bytes()) | fields
    record.pop("seal", None)
    write_sealed(file, record)


def _plan(**fields: Any) -> Callable[[World], tuple[str, ...]]:  # noqa: ANN401 - JSON
    def plant(world: World) -> tuple[str, ...]:
        world.restore("study")
        file = world.place / STUDY / "plan.json"
        runs = json.loads(file.read_bytes())["runs"]
        _sealed(file, {"runs": [run | fields for run in runs]})
        return ("report", "--markdown", STUDY)

    return plant


_RECORDS: dict[str, Callable[[World], tuple[str, ...]]] = {
    "store: name that leads out": _store_manifest(name="../../../../ESCAPED"),
    "store: vocabulary of 10^15": _store_manifest(vocab_size=10**15),
    "store: no vocabulary": _store_manifest(vocab_size=0),
    "store: no splits": _store_manifest(splits={}),
    "store: fields of other kinds": _store_manifest(splits=[1, 2], sources="none"),
    "store: schema of the future": _store_manifest(schema_version=10**6),
    "cache: 10^15 positions": _cache_manifest(positions=10**15),
    "cache: no positions": _cache_manifest(positions=0),
    "cache: contexts of 2^60": _cache_manifest(context_length=1 << 60),
    "plan: runs that lead out": _plan(run="../../outside"),
    "plan: runs at the root": _plan(run="/etc"),
    "plan: numbers as names": _plan(run=5),
}


def plant(world: World, dice: random.Random, name: str, number: int) -> Verdict:
    """Give a command a hostile model, archive or record; all of a kind are tried, in their order."""
    del dice
    world.restore("cache")
    if name == "models":
        what, change = [*_MODELS.items()][number]
        model = world.place / "evil" / "model"
        shutil.copytree(world.place / "runs" / world.names["TEACHER"] / "model", model)
        (model / "checksums.json").unlink(missing_ok=True)
        change(model)
        arguments: tuple[str, ...] = ("train", "evil.yaml")
        culprit = "run taught" if what == "a width of 2^40" else "evil/model"  # the run does not fit
    elif name == "archives":
        what, (file, write) = [*_ARCHIVES.items()][number]
        write(world.place / file)
        source = f"sources=[{{kind: files, paths: [{file}]}}]"
        arguments = ("data", "build", "corpus.yaml", "max_bytes=1000000", source, "--output", "new")
        culprit = file
    else:
        what, change_world = [*_RECORDS.items()][number]
        arguments = change_world(world)
        culprit = {"store": world.names["STORE"], "cache": world.names["CACHE"]}.get(what[:5], "plan.json")
    outcome = run([*arguments], world.place, 60, memory=_MEMORY)
    words = f"{what}: {outcome.code} {outcome.complaint[:300]}"
    outside = world.scratch.glob("ESCAPED*")  # deeper lie the worlds of others
    if [*world.place.rglob("CANARY"), *world.place.rglob("ESCAPED*"), *outside]:
        return Verdict(SILENT, f"{words}: it ran, or was written where it wanted")
    if outcome.hung or outcome.cpu > _CPU_SECONDS:
        return Verdict(HANG, f"{words}: {outcome.cpu:.0f} s")
    if (kind := broken(outcome)) is not None or outcome.code not in (0, 2):
        return Verdict(kind or TRACEBACK, words)
    if outcome.code == 0:
        return Verdict(SILENT, words)
    if not outcome.complaint.startswith("error: ") or culprit not in outcome.complaint:
        return Verdict(UNCLEAR, words)
    return Verdict(RIGHT, words, error=True)


COUNTS = {"models": len(_MODELS), "archives": len(_ARCHIVES), "records": len(_RECORDS)}
"""How many there are of each kind."""
