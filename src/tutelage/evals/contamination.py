"""Was a domain's text in the training text? Whole documents are looked up, and 8-grams of words.

Documents that were trained on are not scored. What remains is reported with its share of word 8-grams
that occur in a training split, and with the number of documents of which at least half do: those are copies
with changes. Words are runs of letters and digits, in lower case.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from tutelage.config.load import digest, load
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import CacheTeacher, ModelTeacher, RunTeacher
from tutelage.data.hashing import splitmix64
from tutelage.data.store import Store, open_store
from tutelage.data.store_manifest import SCORED
from tutelage.errors import UserError
from tutelage.files import make_directory, write_json
from tutelage.teachers.cache.layout import read_cache_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from tutelage.data.store import SplitView, Store
    from tutelage.evals.windows import ScoredDocument
    from tutelage.types import Split


@dataclass(frozen=True, slots=True)
class TrainingText:
    """What a run has seen.

    Attributes:
        own: token store of the run; None if it is not where it was, or the model is no run.
        stores: token stores that the run, and the runs it goes on from, were trained on; its own first.
        teachers: token stores that only its teachers, or theirs, were trained on.
        unknown: of what the training text is not known, one sentence each.
    """

    own: Store | None
    stores: tuple[Store, ...]
    teachers: tuple[Store, ...]
    unknown: tuple[str, ...]


def training_text(config: RunConfig, directory: Path) -> TrainingText:
    """The texts that a run has seen.

    Args:
        config: of the run.
        directory: of the run; it need not exist yet.
    """
    unknown: list[str] = []
    own = _stores(_ancestors(config, directory, unknown), unknown)
    seen = {store.fingerprint for store in own}
    taught = _stores(_teachers(config, directory, unknown), unknown)
    place = store_of(config, directory)
    return TrainingText(
        own=next((store for store in own if store.path == place), None),
        stores=tuple(own),
        teachers=tuple(store for store in taught if store.fingerprint not in seen),
        unknown=tuple(dict.fromkeys(unknown)),
    )


def store_of(config: RunConfig, directory: Path) -> Path:
    """Where a run's token store lies.

    Relative paths in a run's configuration are relative to where the run was started, which nobody knows any
    more. But the store lies as far from the run directories as it did then; the same finds it after both were
    moved together.
    """
    return located(config.data.store, config, directory)


def located(path: Path, config: RunConfig, directory: Path) -> Path:
    """A path of a run's configuration, from wherever one is."""
    if path.is_absolute() and path.exists():
        return path
    return Path(os.path.normpath(directory.absolute().parent / os.path.relpath(path, config.output)))


_Run = tuple[RunConfig, Path]
"""A run and its directory."""


def _stores(runs: Iterator[_Run], unknown: list[str]) -> list[Store]:
    """The stores of runs, each once."""
    found: dict[str, Store] = {}
    for config, directory in runs:
        try:
            store = open_store(store_of(config, directory))
        except UserError as error:
            unknown.append(f"overlap with the training text of {directory.name} is not known ({error})")
        else:
            found.setdefault(store.fingerprint, store)
    return [*found.values()]


def _ancestors(config: RunConfig, directory: Path, unknown: list[str]) -> Iterator[_Run]:
    """A run and those it goes on from."""
    yield config, directory
    if config.model.run is not None:
        start = directory.parent / config.model.run
    elif config.model.path is not None:
        start = located(Path(config.model.path), config, directory).parent
    else:
        return
    name = config.model.run or config.model.path
    if (before := _run(start, f"{name}, which {directory.name} goes on from", unknown)) is not None:
        yield from _ancestors(*before, unknown)


def _teachers(config: RunConfig, directory: Path, unknown: list[str]) -> Iterator[_Run]:
    """Runs that taught a run or one that it goes on from, with all that is behind those."""
    for one, place in _ancestors(config, directory, []):
        teacher = one.teacher
        kind, name = (None, "") if teacher is None else _source(teacher, one, place)
        if kind is None:
            continue
        start = place.parent / name if kind == "run" else located(Path(name), one, place).parent
        if (found := _run(start, f"{name}, which taught {place.name}", unknown)) is not None:
            yield from _ancestors(*found, unknown)
            yield from _teachers(*found, unknown)


def _source(teacher: object, config: RunConfig, directory: Path) -> tuple[str | None, str]:
    """What a teacher is, "run" or "model", and its name; None for controls."""
    if isinstance(teacher, RunTeacher):
        return "run", teacher.run
    if isinstance(teacher, ModelTeacher):
        return "model", teacher.path
    if isinstance(teacher, CacheTeacher):
        try:
            record = read_cache_manifest(located(teacher.path, config, directory)).teacher
        except UserError:
            return "model", str(teacher.path)
        return (record.kind, record.id) if record.kind in {"run", "model"} else (None, "")
    return None, ""


def _run(path: Path, what: str, unknown: list[str]) -> _Run | None:
    """The run in a directory; None if there is none, which is noted."""
    try:
        return load(RunConfig, path / "config.yaml"), path
    except UserError as error:
        unknown.append(f"training text of {what}, is not known ({error})")
    return None


def anchored(config: RunConfig) -> RunConfig:
    """The configuration as it is to be written down, so that `store_of` and its like find what it names.

    Where run directories have an absolute path, what lies relative to the working directory gets one too.
    """
    if not config.output.is_absolute():
        return config
    model, teacher = config.model, config.teacher
    if model.path is not None and Path(model.path).exists():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    if isinstance(teacher, ModelTeacher) and Path(teacher.path).exists():
        teacher = teacher.model_copy(update={"path": str(Path(teacher.path).absolute())})
    if isinstance(teacher, CacheTeacher):
        teacher = teacher.model_copy(update={"path": teacher.path.absolute()})
    data = config.data.model_copy(update={"store": config.data.store.absolute()})
    return config.model_copy(update={"data": data, "model": model, "teacher": teacher})


GRAM = 8
"""Words in a row that count as copied when they occur in the training text."""

TRAINING_BYTES = 100_000_000
"""8-grams are looked up in whole training documents, evenly spread, of about this much text in all."""

_WORD = re.compile(r"\w+")
_DECODE = 256  # documents turned back into text at once
_ODD = np.uint64(0x9E3779B97F4A7C15)

DomainSplit = tuple[str, "Split"]
"""A domain's name and the split."""

Places = frozenset[int]
"""Places of documents in a split."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """How much of one split of a domain was trained on.

    Attributes:
        documents: documents that hold any token.
        trained_on: places, in the split, of those that are documents of the training split as well.
        grams_N: 8-grams of each scored document.
        copied_N: how many of them occur in the training split.
    """

    documents: int
    trained_on: Places
    grams_N: NDArray[np.int64]
    copied_N: NDArray[np.int64]

    @property
    def near(self) -> int:
        """Scored documents of whose 8-grams at least half occur in the training split."""
        return int(((self.grams_N > 0) & (2 * self.copied_N >= self.grams_N)).sum())


def trained_on(
    training: Sequence[Store], domains: Mapping[str, Store], cache: Path
) -> dict[DomainSplit, Places]:
    """Places, per domain and split, of documents that are in a training split, token for token.

    Args:
        training: stores the model was trained on.
        domains: stores with the same tokenizer.
        cache: directory where the answer is kept for the next model with the same training stores.
    """
    keys: list[DomainSplit] = [(name, split) for name in domains for split in SCORED]
    fingerprints = sorted(store.fingerprint for store in training)
    identity = [fingerprints, {name: store.fingerprint for name, store in domains.items()}]
    path = cache / f"trained-on-{digest(identity)}.json"
    if not path.exists():
        views = {key: domains[key[0]].split(key[1]) for key in keys}
        lengths = np.unique(np.concatenate([_lengths(view) for view in views.values()]))
        known = {key: dict(_digests(view, lengths)) for key, view in views.items()}
        wanted = {found for digests in known.values() for found in digests.values()}
        trained = (found for store in training for _, found in _digests(store.split("train"), lengths))
        there = wanted.intersection(trained)
        places = [[i for i, found in known[key].items() if found in there] for key in keys]
        write_json(make_directory(cache) / path.name, places)
    return dict(zip(keys, map(frozenset, json.loads(path.read_text(encoding="utf-8"))), strict=True))


def _lengths(view: SplitView) -> NDArray[np.int64]:
    starts = view.offsets[:, 0].astype(np.int64)
    return starts[1:] - starts[:-1]


def _digests(view: SplitView, lengths: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """Place and digest of every document that is as long as one of `lengths`; others need not be read."""
    starts = view.offsets[:, 0].astype(np.int64)
    for i in np.flatnonzero(np.isin(_lengths(view), lengths)).tolist():
        text = view.tokens[starts[i] : starts[i + 1]].tobytes()
        yield i, hashlib.blake2b(text, digest_size=16).digest()


def copied_grams(
    training: Sequence[Store], documents: Mapping[DomainSplit, list[ScoredDocument]], cache: Path
) -> dict[DomainSplit, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """8-grams of every document and how many of them occur in the training split.

    Args:
        training: stores the model was trained on.
        documents: what is scored, per domain and split, in the tokens of the same tokenizer.
        cache: directory where the answer is kept.

    Returns:
        Per key, the number of 8-grams and of copied ones, one of each per document.
    """
    fingerprints = sorted(store.fingerprint for store in training)
    identity = hashlib.sha256(json.dumps([fingerprints, GRAM, TRAINING_BYTES]).encode())
    for group in documents.values():
        for document in group:
            identity.update(document.tokens_N.tobytes() + b"\0")
        identity.update(b"\1")
    path = cache / f"copied-grams-{identity.hexdigest()[:16]}.json"
    if not path.exists():
        counts = _count(training, list(documents.values()))
        write_json(make_directory(cache) / path.name, [[x.tolist() for x in pair] for pair in counts])
    read = json.loads(path.read_text(encoding="utf-8"))
    return {key: (np.array(n), np.array(m)) for key, (n, m) in zip(documents, read, strict=True)}


def _count(
    training: Sequence[Store], groups: list[list[ScoredDocument]]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    tokenizer = Tokenizer.from_file(str(training[0].path / "tokenizer.json"))
    ids: dict[str, int] = {}
    texts = [tokenizer.decode_batch([document.tokens_N.tolist() for document in group]) for group in groups]
    grams = [
        [_grams([ids.setdefault(word, len(ids) + 1) for word in _words(text)]) for text in group]
        for group in texts
    ]
    wanted = np.unique(np.concatenate([gram for group in grams for gram in group]))
    found = np.zeros(len(wanted), bool)
    texts_trained_on = (text for store in training for text in _training_texts(store, tokenizer))
    for text in texts_trained_on if len(wanted) else ():
        seen = _grams([ids.get(word, 0) for word in _words(text)])
        places = np.searchsorted(wanted, seen)
        places[places == len(wanted)] = 0
        found[places[wanted[places] == seen]] = True
    copied = wanted[found]
    return [
        (
            np.array([len(gram) for gram in group]),
            np.array([int(np.isin(gram, copied).sum()) for gram in group]),
        )
        for group in grams
    ]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: list[int]) -> NDArray[np.uint64]:
    """A 64-bit hash of every 8 words in a row; rows with a word of no domain (0) are left out."""
    ids_N = np.array(words, np.uint64)
    if len(ids_N) < GRAM:
        return np.zeros(0, np.uint64)
    mixed_N, n = splitmix64(ids_N), len(ids_N) - GRAM + 1
    hashed_N = np.zeros(n, np.uint64)
    strange_N = np.zeros(n, bool)
    for k in range(GRAM):
        hashed_N = hashed_N * _ODD + mixed_N[k : k + n]
        strange_N |= ids_N[k : k + n] == 0
    return splitmix64(hashed_N)[~strange_N]


def _training_texts(training: Store, tokenizer: Tokenizer) -> Iterator[str]:
    view = training.split("train")
    starts = view.offsets[:, 0].astype(np.int64)
    every = max(1, round(int(view.offsets[-1, 1]) / TRAINING_BYTES))
    chosen = range(0, len(starts) - 1, every)
    for some in (chosen[i : i + _DECODE] for i in range(0, len(chosen), _DECODE)):
        yield from tokenizer.decode_batch([view.tokens[starts[i] : starts[i + 1] - 1].tolist() for i in some])
