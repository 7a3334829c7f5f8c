"""The domains that `tutelage eval` scores: entries of `presets/evals.yaml`, built into stores on demand."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.config.base import Fraction, Name, Section
from tutelage.config.data_config import Source, StoreConfig, TokenizerConfig
from tutelage.config.load import load
from tutelage.data.build import build_store
from tutelage.data.corpora import check_installed
from tutelage.data.store import open_store
from tutelage.data.store_manifest import SCORED
from tutelage.data.tokenizer import load_tokenizer
from tutelage.errors import UserError, lookup
from tutelage.files import atomic_directory, lock_when_free, make_directory
from tutelage.types import Role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

    from tutelage.data.store import Store
    from tutelage.progress import Progress

_POLL_SECONDS = 0.1
SuiteName = Literal["offline", "paper", "extra"]


class Domain(Section):
    """A text and its splits."""

    suite: SuiteName = Field(description="the suite it belongs to; `extra` is scored only when named")
    summary: str = Field(description="what the text is")
    source: Source = Field(description="where the text comes from")
    licence: str = Field(description="terms of the text")
    metric: Literal["bits_per_byte", "perplexity"] = Field("bits_per_byte", description="shown in tables")
    version: int = Field(ge=1, description="rises when the text or its reading changes")
    role: Role = Field("out_of_domain", description="for models whose training text is not known")
    validation: Fraction = Field(0.5, description="fraction of documents, by hash, on which fits are made")
    test: Fraction = Field(0.5, description="fraction of documents, by hash, that are scored")
    max_bytes: int | None = Field(None, ge=1, description="stop after this much text")
    length_extrapolation: float = Field(1.0, ge=1.0, description="window length over the trained length")


class Suites(Section):
    """All domains and their common limits."""

    max_documents: int = Field(ge=1, description="documents per domain and split")
    max_tokens: int = Field(ge=1, description="tokens per document, from its beginning")
    context: int = Field(ge=2, description="longest window in tokens; never more than the trained length")
    stride: float = Field(gt=0, le=1, description="tokens scored per window, as a fraction of the window")
    domains: dict[Name, Domain]


with resources.as_file(resources.files("tutelage.presets") / "evals.yaml") as _path:
    SUITES = load(Suites, Path(_path))

DOMAINS = {**SUITES.domains}
"""All domains by name."""


def find_domain(name: str) -> Domain:
    """The domain called `name`.

    Raises:
        UserError: there is none; the message lists the names and the nearest one.
    """
    return lookup(DOMAINS, name, "domain")


def check_sources(domains: Mapping[str, Domain]) -> None:
    """Raise one `UserError` for all missing packages."""
    check_installed([domain.source for domain in domains.values()], "domains")


def domain_store(
    name: str, domain: Domain, tokenizer: Path, stores: Path, progress: Progress | None = None
) -> Store:
    """The token store of a domain in a model's tokens, built on first use.

    Args:
        name: of the domain.
        domain: its entry.
        tokenizer: model directory or tokenizer.json.
        stores: directory of stores; models with the same tokenizer share them.
        progress: called while the store is built.

    Raises:
        UserError: the source or the tokenizer cannot be read, or a split has no text.
    """
    config = StoreConfig(
        name=name,
        sources=(domain.source,),
        tokenizer=TokenizerConfig(path=_kept_tokenizer(tokenizer, stores)),
        validation=domain.validation,
        test=domain.test,
        max_bytes=domain.max_bytes,
    )
    store = open_store(build_store(config, stores, progress))
    check_splits(name, store)
    return store


def check_splits(name: str, store: Store) -> None:
    """Raise `UserError` if a store has nothing to fit on or to score."""
    for split in SCORED:
        if store.manifest.splits[split].documents == 0:
            raise UserError(f"domain {name}: split '{split}' of {store.path} is empty")


def _kept_tokenizer(tokenizer: Path, stores: Path) -> Path:
    """A copy named by its content, so that a store's name does not depend on the first model."""
    found = load_tokenizer(tokenizer)
    path = stores.absolute() / f"tokenizer-{found.sha256[:12]}"
    if path.is_dir():
        return path
    make_directory(path.parent)
    with lock_when_free(path.with_name(f".{path.name}.lock"), f"tokenizer {path}", _wait):
        if not path.is_dir():
            with atomic_directory(path) as partial:
                found.save(partial)
    return path


def _wait() -> bool:
    """Wait a moment for another process, which takes no longer than one."""
    time.sleep(_POLL_SECONDS)
    return False


def role_after(training: Store, domain: Store) -> Role:
    """`in_domain` if the domain's text comes from a source of the training store."""
    known = {_origin(record.source) for record in training.manifest.sources}
    same = any(_origin(record.source) in known for record in domain.manifest.sources)
    return "in_domain" if same else "out_of_domain"


def _origin(source: dict[str, JsonValue]) -> str:
    """Identity of the text of a source, whatever its version or split."""
    return json.dumps([source.get(field) for field in ("kind", "name", "path", "subset", "files")])
