"""Read stores, caches, runs and studies in full, and say of everything in them if it is as it was written.

What a directory is shows in the files that are in it. Nothing is changed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from tutelage.checksums import CARD, LISTING, difference, listed
from tutelage.config.teacher_config import (
    MeanTeacher,
    ModelTeacher,
    RunTeacher,
    single_teachers,
    teacher_id,
)
from tutelage.data.store import verify_store
from tutelage.errors import UserError, check_visible
from tutelage.files import read_bytes
from tutelage.models.directory import check_directory
from tutelage.records import UnreadableError, checked_rows, is_sealed, read_object, read_sealed, split_row
from tutelage.run_directory import BRANCH_POINT, RunDirectory
from tutelage.teachers.cache.layout import read_cache_manifest
from tutelage.teachers.cache.reader import damaged_parts
from tutelage.train.checkpoint_files import COUNTERS, damage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tutelage.config.teacher_config import CacheSettings
    from tutelage.teachers.cache.layout import CacheManifest

_RECORDS = {
    "state.json": "status",
    "provenance.json": "command",
    "plan.json": "runs",
    "samples.json": "samples",
}
_FOLDERS = ("leases", "failures", "overlap")
"""JSON files that have a seal, each with a field that only it has; directories in which all have one."""
_RUN, _STORE = ("state.json", "config.yaml", "metrics.jsonl"), ("manifest.json", "train.bin", "train.idx")
_SCORES = ("scores.jsonl", "documents.parquet", "calibration.json")
_FOREIGN = (
    f"no {LISTING}: another program wrote it, and it is used as it is; there is nothing here to compare it "
    "with, but `hf cache verify REPO --local-dir PATH` compares it with its repository on the Hub"
)
_AGAIN = "the same `tutelage train` or `tutelage study run`"
_EDITED = f"if it was changed on purpose, delete the {LISTING} beside it"
_REMEDIES = {
    "state.json": f"{_AGAIN} makes it again from the last checkpoint",
    "config.yaml": f"{_AGAIN} writes it again",
    "provenance.json": "what is in it is lost; no result depends on it; delete it, or train the run again",
    "metrics.jsonl": "the curve is lost, the model is not; train the run again to have it back",
    "plan.json": "`tutelage study run` writes it again",
    LISTING: "delete it to use the files beside it unchecked, or have them made again",
    **dict.fromkeys(_SCORES, f"delete {', '.join(_SCORES)} there, and evaluate again"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about a file, or about a directory that is right or wrong as a whole.

    Attributes:
        path: of it.
        what: it is, in words.
        wrong: what is wrong with it and what to do; None: it is as it was written.
        unknown: nothing is wrong with it, but there is nothing to compare it with, which `wrong` says.
    """

    path: Path
    what: str
    wrong: str | None = None
    unknown: bool = False


def verify(path: Path, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Read everything below a directory.

    Args:
        path: a token store, teacher cache, run, study, model or evaluation, or a directory of such.
        advance: called with the bytes read since the last call.

    Raises:
        UserError: there is nothing in it that can be verified.
    """
    if not path.is_dir():
        check_visible(path)
        raise UserError(f"{path}: no such directory")
    found = 0
    for finding in _walk(path, advance, set()):
        found += 1
        yield finding
    if not found:
        raise UserError(f"{path}: holds no token store, teacher cache, run, study or model")


def _walk(path: Path, advance: Callable[[int], None], seen: set[Path]) -> Iterator[Finding]:
    if path.resolve() in seen:  # a link upwards
        return
    seen.add(path.resolve())
    if path.name.startswith(("step-", f"{BRANCH_POINT}step-")):
        reason = damage(path)
        advance(sum(file.stat().st_size for file in path.iterdir() if file.is_file()))
        remedy = f"; delete it; {_AGAIN} goes on from the one before, or makes what is missing again"
        yield Finding(path, "checkpoint", None if reason is None else reason + remedy)
    elif (path / "shards").is_dir():
        yield from _cache(path, advance)
    elif _has(path, _STORE):
        yield _whole(path, "token store", lambda: verify_store(path, advance))
    else:
        if _has(path, _RUN):
            yield from _run(RunDirectory(path))
        if _has(path, ("plan.json", "queue")):
            yield from _study(path)
        yield from _listed(path, advance)
        yield from _records(path, advance)
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _walk(child, advance, seen)


def _has(path: Path, names: Sequence[str]) -> bool:
    return any((path / name).exists() for name in names)


def _whole(path: Path, what: str, check: Callable[[], object]) -> Finding:
    """Verify what is built as a whole, and mended by one command."""
    try:
        check()
    except UserError as error:
        return Finding(path, what, str(error).removeprefix(f"{path}: "))
    return Finding(path, what)


def _cache(path: Path, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Name all that is wrong with a teacher cache, since each shard is mended by itself."""
    intact = True
    for error in damaged_parts(path, advance):
        intact = False
        yield Finding(path, "teacher cache", str(error).removeprefix(f"{path}: "))
    if intact:
        yield Finding(path, "teacher cache")


def _listed(path: Path, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Compare the files of a directory with its listing."""
    try:
        known = listed(path)
    except UnreadableError as error:
        yield Finding(path / LISTING, "checksums", error.reason)
        return
    needed = [name for name in ("config.yaml", *_SCORES) if (path / name).exists()]
    if any(path.glob("*.safetensors")):
        if not known and not _has(path.parent, _RUN):
            yield _foreign(path)
            return
        needed += ["config.json", "model.safetensors"]
    unknown = [name for name in needed if name not in known and (path / name).exists()]
    for name in unknown:
        yield Finding(
            path / name, "file", f"no checksum in {LISTING}: it cannot be compared; {_remedy(name)}"
        )
    wrong = False
    for name, sums in sorted(known.items()):
        reason = difference(path / name, *sums)
        advance(sums[-1].bytes)
        if reason is not None:
            wrong = True
            yield Finding(path / name, "file", f"{reason.removeprefix('is ')}; {_remedy(name)}")
    if known and not wrong and not unknown:
        yield Finding(path, f"{len(known)} file{'s' * (len(known) > 1)}")


def _foreign(path: Path) -> Finding:
    """Say of a model that another program wrote whether it can be one; if it is intact nobody knows."""
    checked = _whole(path, "model", lambda: check_directory(path))
    return checked if checked.wrong is not None else Finding(path, "model", _FOREIGN, unknown=True)


def _remedy(name: str) -> str:
    if name == CARD:
        return f"it is for people, and used for nothing; {_EDITED}"
    return _REMEDIES.get(name, f"delete the directory and have it made again by {_AGAIN}; {_EDITED}")


def _records(path: Path, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Check the seals of JSON files, and the rows of metrics.jsonl."""
    whole = path.name in _FOLDERS
    files = sorted(path.glob("*.json")) if whole else [path / name for name in _RECORDS]
    files = [file for file in files if file.exists()]
    wrong = False
    for file in files:
        advance(file.stat().st_size)
        if (reason := _wrong_record(file)) is not None:
            wrong = True
            remedy = _REMEDIES.get(file.name, "delete it; it is made again where it is needed")
            yield Finding(file, "record", f"{reason}; {remedy}")
    if files and not wrong:
        yield Finding(path, f"{len(files)} record{'s' * (len(files) > 1)}")


def _wrong_record(file: Path) -> str | None:
    """Why a JSON file is not what was written; an intact one in the place of another is wrong too."""
    try:
        if not is_sealed(file):
            return "no checksum: it cannot be compared"
        fields = read_sealed(file)
    except UnreadableError as error:
        return error.reason
    if file.parent.name == "overlap" and fields.get("name") != file.name:
        return f"another file's, or of an older version: its name is {fields.get('name')}"
    own = _RECORDS.get(file.name)
    return None if own is None or own in fields else f"another file's: it has no '{own}'"


def _run(run: RunDirectory) -> Iterator[Finding]:
    """Check that a run has what its state says it must."""
    state = run.state()
    for name in ("state.json", "config.yaml", "provenance.json"):
        if not (run.path / name).exists():
            yield Finding(run.path / name, "record", f"missing; {_REMEDIES[name]}")
    if state.get("status") == "done" and not run.is_done():
        yield Finding(run.path, "run", f"its model or scores are missing; {_AGAIN} makes them again")
    log = run.path / "metrics.jsonl"
    try:
        reason = _wrong_rows(run, state, read_bytes(log).decode(errors="replace"))
    except FileNotFoundError:
        reason = "missing" if state.get("step") else None
    except OSError as error:
        reason = str(error.strerror)
    if reason is not None:
        yield Finding(log, "rows", f"{reason}; {_REMEDIES[log.name]}")
    elif state:
        yield Finding(log, "rows")


def _wrong_rows(run: RunDirectory, state: Mapping[str, object], text: str) -> str | None:
    """Why the log of a run is not what was written; a last line without an end is of a kill."""
    done = state.get("status") == "done"
    lines = text if done else text[: text.rfind("\n") + 1]
    rows, damaged = checked_rows(lines)
    if damaged:
        return f"damaged in line {damaged[0]}: it is not what was written"
    if not all(split_row(line)[1] for line in lines.splitlines()):
        return "no checksums: it cannot be compared"
    last = rows[-1].get("step") if rows else 0
    if done and last != state.get("step"):
        return f"its last row is of step {last}, and the run's last step was {state.get('step')}"
    logged = 0
    with contextlib.suppress(UserError):  # a checkpoint that is damaged is named by itself
        for newest in [*run.saved().values()][-1:]:
            logged = read_object(newest / COUNTERS).get("logged", 0)
    if isinstance(last, int) and isinstance(logged, int) and last < logged:
        return f"its last row is of step {last}, and there was one of step {logged}"
    return None


def _study(path: Path) -> Iterator[Finding]:
    """Check that a study has its plan, and that runs that were finished are there."""
    if not (path / "plan.json").exists():
        yield Finding(path / "plan.json", "plan", f"missing; {_REMEDIES['plan.json']}")
    planned = _planned(path)  # there are leases on a run's questions too
    for file in sorted((path / "queue" / "leases").glob("*.json")):
        try:
            is_done = read_sealed(file).get("state") == "done"
        except UnreadableError:  # named among the records
            continue
        run = RunDirectory(path / "runs" / file.stem.rpartition(".")[0])
        if is_done and run.id in planned and not run.is_done():
            yield Finding(
                run.path, "run", "it was finished, and is not any more; `tutelage study run` mends it"
            )
    yield from _lost(path)


def _planned(path: Path) -> set[str]:
    """Ids of the runs of a study; none where its plan is missing or damaged, which is named by itself."""
    runs: object = None
    with contextlib.suppress(UnreadableError):
        runs = read_sealed(path / "plan.json").get("runs")
    return {run.get("run", "") for run in runs if isinstance(run, dict)} if isinstance(runs, list) else set()


def _lost(path: Path) -> Iterator[Finding]:
    """Token stores and teacher caches that finished runs of a study were made with, and that are gone."""
    stores, taught = set(), set()
    for run in map(RunDirectory, (path / "runs").glob("*/")):
        try:
            config = run.config() if run.is_done() else None
        except UserError:  # named among the files of the run
            continue
        if config is None:
            continue
        used = (config.data.store, *(domain.store for domain in config.eval.domains))
        stores |= {store.name for store in used if store.parent == config.output.parent / "data"}
        teacher = config.teacher
        if isinstance(teacher, RunTeacher | ModelTeacher | MeanTeacher) and teacher.cache is not None:
            length, mask = config.data.sequence_length, bool(config.data.document_mask)
            names = _names(teacher_id(one) for one in single_teachers(teacher))
            taught.add((names, *_kept(teacher.cache), length, mask))
    remedy = "`tutelage study run` makes it again where it is needed"
    for place in sorted(path / "data" / name for name in stores):
        if not place.is_dir():
            yield Finding(place, "token store", f"lost; {remedy}")
    with contextlib.suppress(UserError):  # a cache that cannot be opened, which is named by itself
        known = [read_cache_manifest(place) for place in (path / "caches").glob("*/")]
        there = {
            (
                _names([one for _, one in cache.teacher.parts] or [cache.teacher.id]),
                *_kept(cache),
                cache.layout.context_length,
                cache.document_mask,
            )
            for cache in known
        }
        for name, form, temperature, length, _ in sorted(taught - there):
            which = f"with format {form} at temperature {temperature:g}, contexts of {length:,} tokens"
            yield Finding(path / "caches", "teacher cache", f"the one of {name} {which}, is lost; {remedy}")


def _names(teachers: Iterable[str]) -> str:
    """Names of teachers without the places of models, which a cache has as they were given."""
    return ", ".join(PurePath(one).name for one in teachers)


def _kept(settings: CacheSettings | CacheManifest) -> tuple[str, float]:
    """What a cache keeps of its teacher's distributions."""
    return settings.format.model_dump_json(), settings.temperature
