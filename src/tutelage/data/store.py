"""The token store: text as token ids on disk, split by document, written once and then only read.

A store is a directory: `manifest.json`, `tokenizer.json` and, for each split, `<split>.bin` (ids, every
document begun by what the tokenizer puts in front of a text, which may be nothing, and closed by the
end-of-text id) and `<split>.idx` (uint64 [documents + 1, 2]: where each document begins, in tokens and in
bytes of its text). A store of prompts and completions also has `<split>.mask` (uint8 per token: 0 in a
prompt, 1 elsewhere), which is for stage sft. The splits that are scored have `<split>.bytes` (uint32 per
token: bytes of the source text that it stands for; 0 for what begins and closes a document).
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from tutelage.config.data_config import FilesSource
from tutelage.config.load import digest
from tutelage.data.sources import Mixture, describe
from tutelage.data.store_manifest import (
    SCHEMA_VERSION,
    SCORED,
    LeftRecord,
    Manifest,
    SourceRecord,
    SplitRecord,
    check_splits,
    read_manifest,
)
from tutelage.data.store_writer import training_texts, write_splits
from tutelage.data.text_files import cut_size, known_bytes
from tutelage.data.tokenizer import find_tokenizer, load_tokenizer, special_tokens, train_tokenizer
from tutelage.errors import UserError
from tutelage.files import atomic_directory, free_bytes, lock, make_directory, write_text
from tutelage.progress import NullProgress

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from pydantic import JsonValue

    from tutelage.config.data_config import StoreConfig
    from tutelage.data.chat import Chat
    from tutelage.data.tokenizer import TextTokenizer
    from tutelage.progress import Progress
    from tutelage.types import Split

_IDX_ROW, _BYTES_OF_COUNT = 16, 4
_COUNT_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class SplitView:
    """One split, mapped from disk and read-only.

    Attributes:
        tokens: ids of all documents, one after the other, each begun by the store's `begin_ids` and closed by
            the end-of-text id.
        offsets: uint64 [documents + 1, 2]; row i holds where document i begins in `tokens` and in the
            UTF-8 text; the last row holds the totals.
        mask: uint8 [tokens], 0 where a token belongs to a prompt and carries no loss, else 1; None where
            every token carries loss.
        bytes: uint32 [tokens], bytes of the source text that each token stands for; None for train.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.uint64]
    mask: NDArray[np.uint8] | None = None
    bytes: NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class Store:
    """An opened token store.

    Attributes:
        path: its directory.
        manifest: what it holds and where that came from.
    """

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Identity of the content, 64 hexadecimal digits; name, place and date do not count."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """The id that closes every document."""
        return self.manifest.eos_id

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids that begin every document; none where the tokenizer puts nothing in front of a text."""
        return self.manifest.begin_ids

    def split(self, name: Split) -> SplitView:
        """Map the split `name`; nothing is read before it is looked at."""
        record = self.manifest.splits[name]
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        per_token = (record.tokens,)
        files = {ending: self.path / f"{name}.{ending}" for ending in ("bin", "idx", "mask", "bytes")}
        return SplitView(
            tokens=_mapped(files["bin"], dtype, per_token),
            offsets=_mapped(files["idx"], np.dtype("<u8"), (record.documents + 1, 2)),
            mask=_mapped(files["mask"], np.dtype(np.uint8), per_token) if self.manifest.masked else None,
            bytes=_mapped(files["bytes"], np.dtype("<u4"), per_token) if name in SCORED else None,
        )


def token_counts(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """How often each id occurs in a split's tokens, end-of-text marks included."""
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _COUNT_TOKENS):  # bincount makes an int64 copy of what it is given
        counts_V += np.bincount(tokens[start : start + _COUNT_TOKENS], minlength=vocab_size)
    return counts_V


def build_store(config: StoreConfig, output: Path, progress: Progress | None = None) -> Path:
    """Build the token store of `config` in `output`, or return the one that is there already.

    The directory is `<output>/<name>-<hash8>`, where the hash covers the config without its name and
    the identity of every input. It appears only when it is complete. Memory does not grow with the
    text, but for 16 bytes and Python's overhead per document.

    Args:
        config: sources, tokenizer, split.
        output: directory of stores; made if need be.
        progress: is told the bytes of text read, for the tokenizer and then for the tokens.

    Returns:
        The store's directory.

    Raises:
        UserError: a source or the tokenizer cannot be read, a split that is to have text has none, or the
            disk is too small.
    """
    progress = progress or NullProgress()
    place = None if config.tokenizer.path is None else find_tokenizer(config.tokenizer.path)
    ready = None if place is None else load_tokenizer(place)
    chat = None if ready is None or place is None else _chat(config, ready, place)
    named = special_tokens(place, Tokenizer.from_str(ready.json)) if ready and place else {}
    named |= chat.settings if chat else {}
    sources = [describe(source) for source in config.sources]
    identity = {
        "schema_version": SCHEMA_VERSION,
        "config": _hashed(config),
        "sources": sources,
        "tokenizer": ready and [ready.sha256, ready.end_of_text, *([named] if named else [])],
    }
    path = output / f"{config.name}-{digest(identity)}"
    if _is_built(path):
        return path
    make_directory(output)
    _check_space(config, output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(output / f".{path.name}.lock", f"store {path}"))
        if _is_built(path):  # by another process, which some may be reading by now
            return path
        partial = stack.enter_context(atomic_directory(path))
        tokenizer = ready or train_tokenizer(training_texts(config, progress), config.tokenizer.vocab_size)
        tokenizer.save(partial, named)
        mixture = Mixture(config.sources, config.max_bytes, chat)
        splits, changed_example = write_splits(config, tokenizer, mixture, partial, progress)
        records = _source_records(config, sources, mixture)
        manifest = _manifest(config, tokenizer, records, mixture, splits, changed_example)
        check_splits(config, manifest)
        write_text(partial / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
    return path


def _manifest(
    config: StoreConfig,
    tokenizer: TextTokenizer,
    sources: tuple[SourceRecord, ...],
    mixture: Mixture,
    splits: dict[Split, SplitRecord],
    changed_example: str | None,
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
        vocab_size=tokenizer.vocab_size,
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",  # noqa: PLR2004 - bytes of uint16
        eos_id=tokenizer.eos_id,
        begin_ids=tokenizer.begin_ids,
        tokenizer_sha256=tokenizer.sha256,
        sources=sources,
        ended_by=mixture.ended_by,
        changed_example=changed_example,
        splits=splits,
    )


def _source_records(
    config: StoreConfig, described: list[dict[str, JsonValue]], mixture: Mixture
) -> tuple[SourceRecord, ...]:
    return tuple(
        SourceRecord(
            source=identity,
            weight=source.weight,
            document_bytes=cut_size(source) if isinstance(source, FilesSource) else None,
            left=None if left is None else LeftRecord(**asdict(left)),
            **asdict(tally),
        )
        for source, identity, tally, left in zip(
            config.sources, described, mixture.tallies, mixture.count_left(), strict=True
        )
    )


def open_store(path: Path) -> Store:
    """Open a token store and check that its files have the right sizes.

    Raises:
        UserError: it is no token store, has another schema version, or a file is missing or cut short.
    """
    manifest = read_manifest(path)
    itemsize = np.dtype(manifest.dtype).itemsize
    for name, record in manifest.splits.items():
        _check_size(path / f"{name}.bin", record.tokens * itemsize)
        _check_size(path / f"{name}.idx", (record.documents + 1) * _IDX_ROW)
        if manifest.masked:
            _check_size(path / f"{name}.mask", record.tokens)
        if name in SCORED:
            _check_size(path / f"{name}.bytes", _BYTES_OF_COUNT * record.tokens)
    return Store(path, manifest)


def verify_store(path: Path) -> Store:
    """Open a token store and recompute every checksum.

    Raises:
        UserError: as `open_store`, or the content of a file has changed; the message names the file.
    """
    store = open_store(path)
    expected = {"tokenizer.json": store.manifest.tokenizer_sha256}
    for record in store.manifest.splits.values():
        expected |= record.files
    for name, checksum in expected.items():
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path / name}: cannot be read ({error.strerror})") from None
        if found != checksum:
            raise UserError(
                f"{path / name}: damaged (sha256 {found[:16]}, expected {checksum[:16]}); "
                f"delete {path} and build it again"
            )
    return store


def _hashed(config: StoreConfig) -> dict[str, Any]:
    """The settings that a store's name covers beside its inputs, which enter by content: no places."""
    fields = config.model_dump(mode="json", exclude={"name"})
    for source in fields["sources"]:
        source.pop("paths", None)
    if config.tokenizer.path is not None:  # then nothing else in its section is used
        fields.pop("tokenizer")
    return fields


def _chat(config: StoreConfig, tokenizer: TextTokenizer, place: Path) -> Chat | None:
    if not config.uses_chat:
        return None
    from tutelage.data.chat import load_chat  # noqa: PLC0415 - imports jinja2 and more, rarely needed

    return load_chat(tokenizer, place)


def _is_built(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True


def _check_space(config: StoreConfig, output: Path) -> None:
    """Refuse early when the text's size is known and half a byte on disk per byte of text does not fit.

    A large vocabulary needs about half a byte, a small one up to one.
    """
    known = sum(known_bytes(source) for source in config.sources if isinstance(source, FilesSource))
    needed = min(known, config.max_bytes or known) // 2
    free = free_bytes(output)
    if needed > free:
        raise UserError(
            f"{output}: the store needs at least {needed / 1e6:,.0f} MB, free are {free / 1e6:,.0f} MB"
        )


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the token store is incomplete") from None
    if found != expected:
        raise UserError(
            f"{path}: has {found} bytes, expected {expected}; delete the store and build it again"
        )


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape)
