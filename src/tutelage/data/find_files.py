"""Find the files that the sources of a token store name, and tell by their endings what they are."""

from __future__ import annotations

import glob
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import UserError, check_visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tutelage.config.data_config import FilePairs, FilesSource, Kind

ENDINGS = (
    ".txt, .md, .rst, .html, .csv, .tsv, .jsonl (each also .gz, .zst, .xz or .bz2) and .parquet can be read; "
    "a list in .json has to become .jsonl, a line for each; format: text reads other plain text, such as code"
)
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_PACKED = {".gz", ".zst", ".xz", ".bz2"}


def find(names: Sequence[str], kind: Kind | None = None) -> list[Path]:
    """Return the files that paths and patterns name: these in turn, their matches sorted.

    A directory stands for the files in it, however deep, that can be read by their endings (with `kind`: for
    all files in it); `passed_over` counts the others.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a directory has nothing to read.
    """
    found: dict[Path, None] = {}
    for text in names:
        try:
            found.update(dict.fromkeys(_matches(text, kind)))
        except OSError as error:
            raise UserError(f"{text}: cannot be read ({error.strerror})") from None
    return list(found)


def _matches(text: str, kind: Kind | None) -> list[Path]:
    path = Path(text).expanduser()
    paths = [path]
    if _is_pattern(path):
        paths = [path for path in _globbed(path) if not path.is_dir()]
    elif path.is_dir():
        paths = [inner for inner in _inside(path) if not _why_not(inner, kind)]
        if not paths:
            held = ", ".join(f"{count:,} {what}" for what, count in passed_over([text], kind).items())
            raise UserError(
                f"{text}: no file in this directory can be read; it has: {held or 'none'}; {ENDINGS}"
            )
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: no such file: a link to {path.readlink()}, which is not there")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file that can be read twice")
    if not paths or not paths[0].exists():
        check_visible(path)
        raise UserError(f"{text}: no such file")
    return paths


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _globbed(path: Path) -> list[Path]:
    """Return what a pattern matches, sorted."""
    return [Path(name) for name in sorted(glob.glob(_pattern(path), recursive=True))]  # noqa: PTH207 - absolute too


def _pattern(path: Path) -> str:
    """Return a pattern in which the first directories are literal, brackets or not, as far as they exist."""
    fixed = Path()
    for place, part in enumerate(path.parts):
        if not (fixed / part).exists():
            return str(Path(glob.escape(str(fixed)), *path.parts[place:]))
        fixed /= part
    return glob.escape(str(fixed))


def _inside(directory: Path) -> Iterator[Path]:
    """Yield the files in a directory in a fixed order, and, unopened, hidden directories and links."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for place, folders, files in os.walk(directory, onerror=refuse):
        yield from (Path(place, name) for name in sorted(files))
        closed = {name for name in folders if name.startswith(".") or Path(place, name).is_symlink()}
        yield from (Path(place, name) for name in sorted(closed))
        folders[:] = sorted(set(folders) - closed)


def _why_not(path: Path, kind: Kind | None) -> str | None:
    """Say in a word or two why a file of a directory is not read; None if it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "links to directories"
    if path.is_file() and path.stat().st_size == 0:
        return "empty files"
    if kind is None and kind_of(path) is None:
        return path.suffix.lower() or "files without an ending"
    return None


def passed_over(names: Sequence[str], kind: Kind | None) -> dict[str, int]:
    """Count the files of the directories among `names` that `find` leaves out, by ending or reason.

    A pattern stands for files alone. Of directories that it matches, the files are counted that could be read
    and that nothing else names.
    """
    paths = [Path(text).expanduser() for text in names]
    inside = (inner for path in paths if path.is_dir() for inner in _inside(path))
    counts = Counter(reason for reason in (_why_not(inner, kind) for inner in inside) if reason)
    matched = [one for path in paths if _is_pattern(path) for one in _globbed(path)]
    if folders := [one for one in matched if one.is_dir() and not one.is_symlink()]:
        below = {inner for one in folders for inner in _inside(one) if not _why_not(inner, kind)}
        counts["in directories that a pattern matches"] = len(below.difference(find(names, kind)))
    return dict(sorted((+counts).items()))


def kind_of(path: Path) -> Kind | None:
    """Return what a file is by its ending; None if that says nothing."""
    is_packed = path.suffix.lower() in _PACKED
    kind = _KINDS.get(Path(path.stem).suffix.lower() if is_packed else path.suffix.lower())
    return None if is_packed and kind == "parquet" else kind


def kind_in(path: Path, source: FilesSource | FilePairs) -> Kind:
    """Return what a file of `source` is read as.

    Raises:
        UserError: neither the source nor the file's ending says it.
    """
    kind = source.format or kind_of(path)
    if kind is None and not _ARCHIVES.isdisjoint(path.suffixes):
        raise UserError(
            f"{path}: an archive, which is not read; unpack it and name the directory that it becomes, whose "
            "files are then read and named one by one"
        )
    if kind is None:
        raise UserError(f"{path}: unknown kind of file; {ENDINGS}")
    return kind


def known_bytes(source: FilesSource) -> int:
    """Return the bytes of text that `source` holds at least: those of its plain text files."""
    if source.encoding is not None:
        return 0
    plain = (path for path in find(source.paths, source.format) if path.suffix.lower() not in _PACKED)
    return sum(path.stat().st_size for path in plain if kind_in(path, source) == "text")
