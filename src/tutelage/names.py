"""Find stores, runs, caches and studies by their names, so that nobody has to type the hash of a directory.

A path stays what it is. Where it does not exist, its last part may be a name: that of the directory without
its hash, or as much of its beginning as no other has. A name alone is looked up in the working directory and
in `stores`, `data`, `runs` and `caches` there; that of a run in a config in the config's `output`.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tutelage.errors import UserError, as_written, check_visible, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.config.teacher_config import TeacherConfig

DirectoryKind = Literal["store", "run", "cache", "study"]

_PLACES: dict[DirectoryKind, tuple[str, ...]] = {
    "store": ("", "stores", "data"),
    "run": ("", "runs"),
    "cache": ("", "caches"),
    "study": ("",),
}
_PLURAL: dict[DirectoryKind, str] = {"store": "stores", "run": "runs", "cache": "caches", "study": "studies"}
_HASH = re.compile(r"-[0-9a-f]{8}$")
_STUDY = "tutelage-"
"""What `tutelage study run` puts before a study's name."""
_MOST_LISTED, _LONGEST = 12, 200
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def kind_of(path: Path) -> DirectoryKind | None:
    """The kind of a directory by the files that are in it; None for any other."""
    if (path / "plan.json").is_file():
        return "study"
    if (path / "config.yaml").is_file() or (path / "state.json").is_file():
        return "run"
    if (path / "manifest.json").is_file():
        return "cache" if (path / "shards").is_dir() else "store"
    return None


def as_path(given: object, what: str, others: str = "") -> Path:
    """Make a path of what a caller in Python gave, where the error of pathlib would name no argument.

    Args:
        given: a path, or a name.
        what: the argument, for the message.
        others: what else it may be.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{what} is a {type(given).__name__}: give a path or a name{others}")
    return Path(given)


def find(kind: DirectoryKind, path: Path | str, what: str, base: Path | None = None) -> Path:
    """The directory that a path or name stands for, or the path as it is, if it has several parts or exists.

    Args:
        kind: of the directory.
        path: as the user wrote it.
        what: the argument or setting, for messages.
        base: another directory with `stores`, `runs` and so on to look in.

    Raises:
        UserError: several are called so; the message lists them with the settings in which they differ. Or
            it is a mere name, and nothing is called so; or no path at all.
    """
    path = as_path(path, what)
    found = look_up(kind, path, what, base)
    if found is None and len(path.parts) == 1 and path.name and not path.exists():
        check_visible(path)
        raise _unknown(what, path.name, kind, _folders(kind, base))
    return path if found is None else found


def look_up(kind: DirectoryKind, path: Path, what: str, base: Path | None = None) -> Path | None:
    """As `find`; None where nothing is called so."""
    if kind_of(path) == kind:
        return path
    if path.name in {"", ".."}:
        return None
    folders = _folders(kind, base) if len(path.parts) == 1 else [completed(path.parent, what)]
    found = _called(path.name, (kind,), folders)
    if len(found) > 1:
        raise _ambiguous(what, path.name, kind, found)
    return found[0] if found else None


def find_any(name: str) -> Path:
    """The one directory of any kind that is called `name`.

    Raises:
        UserError: there is none, or there are several.
    """
    path = Path(name)
    if kind_of(path) is not None:
        return path
    found = [found for kind in _PLACES if (found := look_up(kind, path, "name")) is not None]
    if len(found) > 1:
        listed = ", ".join(f"{one} (a {kind_of(one)})" for one in found)
        raise UserError(f"{name}: {len(found)} directories are called so: {listed}; write the path")
    if not found:
        check_visible(path)
        raise UserError(f"{name}: no store, run, cache or study is called so here, nor has that path")
    return found[0]


def _folders(kind: DirectoryKind, base: Path | None) -> list[Path]:
    """Where a name alone is looked up."""
    return [root / place for root in dict.fromkeys((Path(), base or Path())) for place in _PLACES[kind]]


def typed(kind: DirectoryKind, path: Path) -> str:
    """What to type for a directory: the shortest name that finds it and no other, else its path."""
    for name in (_HASH.sub("", path.name), path.name):
        called = _called(name, (kind,), _folders(kind, None))
        if [one.resolve() for one in called] == [path.resolve()]:
            return name
    return str(path)


def find_run_id(name: str, runs: Path, what: str) -> str:
    """The id of the run in the directory `runs` that is called `name`.

    An id of a run that is not there stays as it is: the runs of a study have ids before they exist.

    Raises:
        UserError: several are called so, or none.
    """
    if (runs / name).is_dir():
        return name
    found = _called(name, ("run",), [runs])
    if len(found) > 1:
        raise _ambiguous(what, name, "run", found)
    if not found and not _HASH.search(name):
        raise _unknown(what, name, "run", [runs])
    return found[0].name if found else name


def completed(path: Path, what: str) -> Path:
    """The path with each part that does not exist taken for a name; as it is if nothing is called so.

    Raises:
        UserError: several are called so.
    """
    found = Path()
    for part in path.parts:
        if (found / part).exists():
            found /= part
            continue
        called = _called(part, tuple(_PLACES), [found])
        if len(called) > 1:
            raise _ambiguous(what, part, "run", called)
        if not called:
            return path
        (found,) = called
    return found


def local_model(path: str, what: str, revision: str | None = None) -> str:
    """The path of a model with names in it completed; what is not there, a Hub name too, stays as it is.

    Raises:
        UserError: a revision is asked for, of what is a directory here.
    """
    found = completed(Path(path), what)
    local = path if Path(path).exists() or not found.exists() else str(found)
    if revision is not None and Path(local).exists():
        setting = what.removesuffix("path") + "revision"
        raise UserError(
            f"{what} = {path}: is a directory on this machine, which has no revisions, and {setting} = "
            f"{revision!r} asks for one of the Hub's; remove {setting}, or rename the directory to have the "
            "Hub's model"
        )
    return local


def named_teacher(teacher: TeacherConfig, runs: Path) -> TeacherConfig:
    """The teacher, or the mean of teachers, with names of runs, models and caches replaced by ids and paths.

    Raises:
        UserError: nothing is called so, or several are.
    """
    from tutelage.config import teacher_config as kinds  # noqa: PLC0415 - names of directories need none

    def named(one: kinds.SingleTeacher, what: str) -> kinds.SingleTeacher:
        match one:
            case kinds.RunTeacher(run=run):
                return one.model_copy(update={"run": find_run_id(run, runs, f"{what}.run")})
            case kinds.ModelTeacher(path=model, revision=revision):
                return one.model_copy(update={"path": local_model(model, f"{what}.path", revision)})
            case kinds.CacheTeacher(path=cache):
                return one.model_copy(update={"path": find("cache", cache, f"{what}.path", runs.parent)})
        return one

    return kinds.each_teacher(teacher, named)


def _called(name: str, kinds: Sequence[DirectoryKind], folders: Sequence[Path]) -> list[Path]:
    """Directories called `name`: by their whole name, else without their hash, else by the beginning."""
    found = {path.resolve(): path for folder in folders for path in _beginning(name, folder)}
    paths = [path for path in found.values() if kind_of(path) in kinds]
    for same in (lambda path: path.name == name, lambda path: name in _short(path.name)):
        if chosen := [path for path in paths if same(path)]:
            return chosen
    return paths


def _beginning(name: str, folder: Path) -> Iterator[Path]:
    """Directories in `folder` that are called `name`, or so and more."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entry.name for entry in entries if _is_directory(entry))
    except OSError:  # no such folder, or none that may be read
        return
    for entry in found:
        if any(one.startswith(name) for one in (entry, *_short(entry))):
            yield folder / entry


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory or links to one; `entry.is_dir` raises at a link to itself."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry).is_dir())


def _short(name: str) -> tuple[str, str]:
    """A directory's name as people say it: a run, store or cache without its hash, a study without prefix."""
    return _HASH.sub("", name), name.removeprefix(_STUDY)


def _ambiguous(what: str, name: str, kind: DirectoryKind, found: Sequence[Path]) -> UserError:
    lines = [f"{what} = {name}: {len(found)} {_PLURAL[kind]} are called so; write more of the name"]
    for path, differs in zip(found, differences([settings(path) for path in found]), strict=True):
        words = [f"{key} {as_written(value)}" for key, value in differs.items()]
        fitting = list(
            itertools.takewhile(lambda length: length <= _LONGEST, itertools.accumulate(map(len, words)))
        )
        cut = ", ..." if len(fitting) < len(words) else ""
        lines.append(f"  {path}{'  ' if words else ''}{', '.join(words[: len(fitting)])}{cut}")
    rest = [f"  and {len(lines) - 1 - _MOST_LISTED} more"] if len(lines) - 1 > _MOST_LISTED else []
    return UserError("\n".join(lines[: _MOST_LISTED + 1] + rest))


def _unknown(what: str, name: str, kind: DirectoryKind, folders: Sequence[Path]) -> UserError:
    known = _known(kind, folders)
    there = f"there: {', '.join(known[:_MOST_LISTED])}" if known else f"there are no {_PLURAL[kind]} yet"
    places = ", ".join(dict.fromkeys(f"{folder}{os.sep}" for folder in folders))
    return UserError(f"{what} = {name}: no {kind} is called so in {places}; {_near(name, known)}{there}")


def nearest(kind: DirectoryKind, name: str) -> str:
    """The words "did you mean '...'? " with the directory of a kind that is called nearly so; "" if none."""
    return _near(name, _known(kind, _folders(kind, None)))


def _known(kind: DirectoryKind, folders: Sequence[Path]) -> list[str]:
    return [path.name for folder in folders for path in _beginning("", folder) if kind_of(path) == kind]


def _near(name: str, known: Sequence[str]) -> str:
    return suggestion(name, [short for one in known for short in (_HASH.sub("", one), one)])


def settings(path: Path) -> dict[str, object]:
    """The settings that a directory was made with, by dotted name; none where they cannot be read.

    Names, and where it was computed and put, are left out: they do not change what it holds.
    """
    file = path / ("config.yaml" if kind_of(path) == "run" else "manifest.json")
    if not file.is_file():
        return {}
    try:
        read = yaml.load(file.read_bytes(), _LOADER)  # noqa: S506 - a safe loader; JSON is YAML
    except (OSError, yaml.YAMLError):
        return {}
    read = read if isinstance(read, dict) else {}
    return dict(flat(read.get("config", read)))


_APART = {"name", "output", "parallel", "runtime", "checkpoint", "files", "created", "seal"}


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """Settings in sections and lists of sections as dotted names, less those that change no result."""
    for key, value in values.items():
        if above == "" and key in _APART:
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            yield from flat({str(place): one for place, one in enumerate(value)}, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def differences(many: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Of each mapping the entries that are not the same in all of them."""
    keys = dict.fromkeys(key for one in many for key in one)
    differ = [key for key in keys if any(one.get(key) != many[0].get(key) for one in many)]
    return [{key: one[key] for key in differ if one.get(key) is not None} for one in many]


def located(path: Path, config: RunConfig, directory: Path) -> Path:
    """Find a path of a run's configuration from any working directory.

    Relative paths in it are relative to the directory in which the run was started, which is not recorded.
    But the way from the run directories to the path is the same as then, also after both moved together.
    """
    if path.is_absolute() and path.exists():
        return path
    return Path(os.path.normpath(directory.absolute().parent / os.path.relpath(path, config.output)))
