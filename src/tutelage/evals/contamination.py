"""Find the texts that a run was trained on, and their overlap with the text of a domain.

Documents that were trained on are not scored. The other documents are reported with their share of word
8-grams that occur in a training split, and with the number of documents of which at least half do: those are
copies with changes. Words are runs of letters and digits, in lower case.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.config.load import digest
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import (
    CacheTeacher,
    ModelTeacher,
    RunTeacher,
    SingleTeacher,
    each_teacher,
    single_teachers,
)
from tutelage.data.hashing import splitmix64
from tutelage.data.store import Store, open_store
from tutelage.data.store_manifest import SCORED
from tutelage.errors import UserError
from tutelage.files import make_directory
from tutelage.names import kind_of, located
from tutelage.records import UnreadableError, read_sealed, write_sealed
from tutelage.run_directory import RunDirectory
from tutelage.teachers.cache.layout import read_cache_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from tutelage.data.store import SplitView
    from tutelage.types import Split

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainingText:
    """The token stores that a run and its teachers were trained on.

    Attributes:
        own: token store of the run; None if it is not where it was, or the model is not a run.
        stores: training stores of the run and of the runs it continues; its own first.
        teachers: training stores of its teachers, and of theirs, that are not among `stores`.
        unknown: one sentence for every model whose training text is not known.
    """

    own: Store | None = None
    stores: tuple[Store, ...] = ()
    teachers: tuple[Store, ...] = ()
    unknown: tuple[str, ...] = ()


def training_text(config: RunConfig, directory: Path) -> TrainingText:
    """The texts that a run was trained on, and those of its teachers; its directory need not exist yet."""
    unknown: list[str] = []
    own = _stores(ancestors(config, directory, unknown), unknown)
    seen = {store.fingerprint for store in own}
    taught = _stores(_teachers(config, directory, unknown), unknown)
    path = located(config.data.store, config, directory)
    return TrainingText(
        own=next((store for store in own if store.path == path), None),
        stores=tuple(own),
        teachers=tuple(store for store in taught if store.fingerprint not in seen),
        unknown=tuple(dict.fromkeys(unknown)),
    )


def read_again(config: RunConfig, directory: Path) -> Iterator[str]:
    """A sentence for each run that a run continues and that read the same text in the same order."""
    _, *before = ancestors(config, directory, [])
    for one, place in before:
        if _order(one) != _order(config):
            continue
        read = [store.fingerprint for store in _stores(iter([(one, place)]), [])]
        if read == [open_store(config.data.store).fingerprint]:
            yield (
                f"{place.name}, which this run continues, has read this text in this order (data.seed "
                f"= {one.data.seed}): its batches come again; another data.seed reads in another order"
            )


def _order(config: RunConfig) -> tuple[int, int]:
    """What decides the order in which a run reads a text."""
    return config.data.seed, config.data.sequence_length


_Run = tuple[RunConfig, Path]
"""A run and its directory."""


def _stores(runs: Iterator[_Run], unknown: list[str]) -> list[Store]:
    """The token stores of runs, each once."""
    found: dict[str, Store] = {}
    for config, directory in runs:
        try:
            store = open_store(located(config.data.store, config, directory))
        except UserError as error:
            unknown.append(f"overlap with the training text of {directory.name} is not known ({error})")
        else:
            found.setdefault(store.fingerprint, store)
    return [*found.values()]


def ancestors(config: RunConfig, directory: Path, unknown: list[str]) -> Iterator[_Run]:
    """A run and the runs it continues."""
    yield config, directory
    if config.model.run is not None:
        start = directory.parent / config.model.run
    elif config.model.path is not None:
        start = located(Path(config.model.path), config, directory).parent
    else:
        return
    what = f"{config.model.run or config.model.path}, which {directory.name} continues"
    if (before := _run(start, what, unknown, is_models=config.model.run is None)) is not None:
        yield from ancestors(*before, unknown)


def _teachers(config: RunConfig, directory: Path, unknown: list[str]) -> Iterator[_Run]:
    """The teachers of a run and of the runs it continues, and the runs and teachers behind those."""
    for one, place in ancestors(config, directory, []):
        for kind, name in _sources(one, place):
            if kind not in {"run", "model"}:
                continue
            start = place.parent / name if kind == "run" else located(Path(name), one, place).parent
            what = f"{name}, which taught {place.name}"
            if (found := _run(start, what, unknown, is_models=kind == "model")) is not None:
                yield from ancestors(*found, unknown)
                yield from _teachers(*found, unknown)


def _sources(config: RunConfig, directory: Path) -> Iterator[tuple[str, str]]:
    """The kind of each teacher of a run, and the id of a run or the path of a model."""
    for teacher in single_teachers(config.teacher):
        match teacher:
            case RunTeacher(run=run):
                yield "run", run
            case ModelTeacher(path=path):
                yield "model", path
            case CacheTeacher(path=path):
                try:
                    record = read_cache_manifest(located(path, config, directory)).teacher
                except UserError:
                    yield "model", str(path)
                else:
                    yield from record.parts or [(record.kind, record.id)]


def _run(path: Path, what: str, unknown: list[str], *, is_models: bool) -> _Run | None:
    """The run in a directory, or around a model; None, and a sentence in `unknown`, if there is none."""
    if is_models and kind_of(path) != "run":
        unknown.append(
            f"training text of {what}, is not known (it is the model of no run, so nothing names it)"
        )
        return None
    try:
        return RunDirectory(path).config(), path
    except UserError as error:
        unknown.append(f"training text of {what}, is not known ({error})")
    return None


def _anchored_teacher(teacher: SingleTeacher, _what: str) -> SingleTeacher:
    if isinstance(teacher, ModelTeacher) and Path(teacher.path).exists():
        return teacher.model_copy(update={"path": str(Path(teacher.path).absolute())})
    if isinstance(teacher, CacheTeacher):
        return teacher.model_copy(update={"path": teacher.path.absolute()})
    return teacher


def anchored(config: RunConfig) -> RunConfig:
    """The configuration as a run directory keeps it, so that `located` finds its paths.

    Where the output directory is absolute, paths relative to the working directory become absolute too.
    """
    if not config.output.is_absolute():
        return config
    model = config.model
    if model.path is not None and Path(model.path).exists():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    teacher = config.teacher and each_teacher(config.teacher, _anchored_teacher)
    data = config.data.model_copy(update={"store": config.data.store.absolute()})
    return config.model_copy(update={"data": data, "model": model, "teacher": teacher})


GRAM = 8
"""Number of consecutive words that count as copied if they occur in the training text."""

TRAINING_BYTES = 100_000_000
"""About as much training text is searched for 8-grams, in whole documents, evenly spread."""

_WORD = re.compile(r"\w+")
_DECODE = 256  # documents decoded at once
_ODD = np.uint64(0x9E3779B97F4A7C15)

DomainSplit = tuple[str, "Split"]
"""A domain's name and the split."""

Places = frozenset[int]
"""Indices of documents in a split."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """The overlap of one split of a domain with training text.

    Attributes:
        documents: number of documents that are not empty.
        trained_on: places of documents that are in the training split too.
        grams_N: number of 8-grams of each scored document.
        copied_N: number of them that occur in the training split.
    """

    documents: int
    trained_on: Places
    grams_N: Ints
    copied_N: Ints

    @property
    def near(self) -> int:
        """Number of scored documents of whose 8-grams at least half occur in the training split."""
        return int(((self.grams_N > 0) & (2 * self.copied_N >= self.grams_N)).sum())


def trained_on(
    training: Sequence[Store], domains: Mapping[str, Store], cache: Path
) -> dict[DomainSplit, Places]:
    """Places, per domain and split, of documents that are in a training split, token for token.

    All stores have the same tokenizer. `cache` keeps the result for models with the same training stores.
    """
    keys: list[DomainSplit] = [(name, split) for name in domains for split in SCORED]
    fingerprints = sorted(store.fingerprint for store in training)
    identity = [fingerprints, {name: store.fingerprint for name, store in domains.items()}]

    def find() -> list[list[int]]:
        views = {key: domains[key[0]].split(key[1]) for key in keys}
        lengths = np.unique(np.concatenate([_lengths(view) for view in views.values()]))
        known = {key: dict(_digests(view, lengths)) for key, view in views.items()}
        wanted = {found for digests in known.values() for found in digests.values()}
        trained = (found for store in training for _, found in _digests(store.split("train"), lengths))
        there = wanted.intersection(trained)
        return [[i for i, found in known[key].items() if found in there] for key in keys]

    places = kept(cache / f"trained-on-{digest(identity)}.json", find)
    return dict(zip(keys, map(frozenset, places), strict=True))


def kept(
    path: Path, find: Callable[[], list[Any]], about: Mapping[str, object] = MappingProxyType({})
) -> list[Any]:
    """What was found before and is kept in a file; where there is none, or a wrong one, find it.

    `about` says in the file what it was found in.
    """
    with contextlib.suppress(UnreadableError):
        fields = read_sealed(path)
        if fields.get("name") == path.name:  # else an intact file in the place of another
            return list(fields["found"])
    found = find()
    write_sealed(make_directory(path.parent) / path.name, {"name": path.name, **about, "found": found})
    return found


def _lengths(view: SplitView) -> Ints:
    starts = view.offsets[:, 0].astype(np.int64)
    return starts[1:] - starts[:-1]


def _digests(view: SplitView, lengths: Ints) -> Iterator[tuple[int, bytes]]:
    """Place and digest of every document whose length is one of `lengths`; others cannot be equal."""
    starts = view.offsets[:, 0].astype(np.int64)
    for i in np.flatnonzero(np.isin(_lengths(view), lengths)).tolist():
        text = view.tokens[starts[i] : starts[i + 1]].tobytes()
        yield i, hashlib.blake2b(text, digest_size=16).digest()


def copied_grams(
    training: Sequence[Store], texts: Mapping[DomainSplit, Sequence[Ints]], cache: Path
) -> dict[DomainSplit, tuple[Ints, Ints]]:
    """Count the 8-grams of every document, and those that occur in the training split.

    Args:
        training: stores that the model was trained on.
        texts: ids of every scored document, per domain and split, by the same tokenizer.
        cache: directory of results.

    Returns:
        The two counts of each document, per domain and split.
    """
    fingerprints = sorted(store.fingerprint for store in training)
    identity = hashlib.sha256(json.dumps([fingerprints, GRAM, TRAINING_BYTES]).encode())
    for group in texts.values():
        for tokens_N in group:
            identity.update(tokens_N.tobytes() + b"\0")
        identity.update(b"\1")

    def find() -> list[list[list[int]]]:
        return [[x.tolist() for x in pair] for pair in _count(training, list(texts.values()))]

    read = kept(cache / f"copied-grams-{identity.hexdigest()[:16]}.json", find)
    return {key: (np.array(n), np.array(m)) for key, (n, m) in zip(texts, read, strict=True)}


def _count(training: Sequence[Store], groups: Sequence[Sequence[Ints]]) -> list[tuple[Ints, Ints]]:
    tokenizer = training[0].tokenizer()
    ids: dict[str, int] = {}
    texts = [tokenizer.decode_batch([tokens_N.tolist() for tokens_N in group]) for group in groups]
    grams = [
        [_grams([ids.setdefault(word, len(ids) + 1) for word in _words(text)]) for text in group]
        for group in texts
    ]
    no_gram = np.zeros(0, np.uint64)  # of texts without a document that is scored
    wanted = np.unique(np.concatenate([no_gram, *(gram for group in grams for gram in group)]))
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
    """A 64-bit hash of every 8 consecutive words; those with a word of no domain (0) are left out."""
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
