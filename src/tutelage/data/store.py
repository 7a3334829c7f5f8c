"""Read a token store: text as token ids on disk, split by document, written once and then only read.

A store is a directory: `manifest.json`, `tokenizer.json` and, for each split, `<split>.bin` (ids, every
document begun by what the tokenizer puts in front of a text, which may be nothing, and closed by the
end-of-text id) and `<split>.idx` (uint64 [documents + 1, 2]: where each document begins, in tokens and in
bytes of its text). A store of prompts and completions also has `<split>.mask` (uint8 per token: 0 in a
prompt, 1 elsewhere), which is for stage sft. The splits that are scored have `<split>.bytes` (uint32 per
token: bytes of the source text that it stands for; 0 for what begins and closes a document). Beside each of
these lies `<file>.crc32` (`tutelage.data.checked_files`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.checksums import LISTING, listed, refuse_damage
from tutelage.data.checked_files import CheckedArray, Sliced
from tutelage.data.store_manifest import Manifest, file_endings, read_manifest
from tutelage.errors import UserError
from tutelage.files import regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from tutelage.types import Split

_COUNT_TOKENS = 2**24
_READ_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class SplitView:
    """One split, mapped from disk and read-only; what is read of it is checked against its checksums.

    Attributes:
        tokens: ids of all documents, one after the other, each begun by the store's `begin_ids` and closed by
            the end-of-text id.
        offsets: uint64 [documents + 1, 2]; row i holds where document i begins in `tokens` and in the
            UTF-8 text; the last row holds the totals.
        mask: uint8 [tokens], 0 where a token belongs to a prompt and carries no loss, else 1; None where
            every token carries loss.
        bytes: uint32 [tokens], bytes of the source text that each token stands for; None for train.
    """

    tokens: Sliced
    offsets: NDArray[np.uint64]
    mask: Sliced | None = None
    bytes: Sliced | None = None


@dataclass(frozen=True, slots=True)
class Store:
    """An opened token store.

    Attributes:
        path: its directory.
        manifest: its content and the origin of it.
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

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of its ids."""
        from tokenizers import Tokenizer  # noqa: PLC0415 - most who open a store need none

        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def split(self, name: Split) -> SplitView:
        """Map the split `name`; only `offsets` are read before they are used."""
        files = self.manifest.splits[name].files
        found = {
            ending: CheckedArray(
                self.path / f"{name}.{ending}", dtype, math.prod(shape), files[f"{name}.{ending}.crc32"]
            )
            for ending, dtype, shape in _arrays(self.manifest, name)
        }
        offsets = found["idx"][:].reshape(-1, 2)
        return SplitView(found["bin"], offsets, found.get("mask"), found.get("bytes"))


def learned_counts(view: SplitView, vocab_size: int) -> NDArray[np.int64]:
    """Count how often each id of a split carries loss, end-of-text marks included; int64 [vocab_size]."""
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(view.tokens), _COUNT_TOKENS):
        # Part by part, because bincount makes an int64 copy of what it is given.
        some = slice(start, start + _COUNT_TOKENS)
        tokens = view.tokens[some] if view.mask is None else view.tokens[some][view.mask[some] != 0]
        counts_V += np.bincount(tokens, minlength=vocab_size)
    return counts_V


def open_store(path: Path) -> Store:
    """Open a token store; check its tokenizer, and that its other files have the right sizes.

    Raises:
        UserError: it is no token store, has another schema version, its tokenizer is damaged, or a file is
            missing or cut short.
    """
    manifest = read_manifest(path)
    refuse_damage(path)
    for name in manifest.splits:
        for ending, dtype, shape in _arrays(manifest, name):
            _check_size(path / f"{name}.{ending}", dtype.itemsize * math.prod(shape))
    return Store(path, manifest)


def verify_store(path: Path, advance: Callable[[int], None] = lambda _: None) -> Store:
    """Open a token store and recompute every checksum; `advance` is told the bytes as they are read.

    Raises:
        UserError: as `open_store`, or the content of a file has changed; the message names the file.
    """
    store = open_store(path)
    expected = {"tokenizer.json": store.manifest.tokenizer_sha256}
    for record in store.manifest.splits.values():
        expected |= record.files
    for name, checksum in expected.items():
        try:
            digest = hashlib.sha256()
            with open(path / name, "rb", opener=regular) as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
                    advance(len(block))
            found = digest.hexdigest()
        except OSError as error:
            raise UserError(f"{path / name}: cannot be read ({error.strerror})") from None
        if found != checksum:
            raise UserError(
                f"{path / name}: damaged (sha256 {found[:16]}, expected {checksum[:16]}); "
                f"delete {path} and build it again"
            )
    if listed(path).keys() != {"tokenizer.json", "tokenizer_config.json"}:
        raise UserError(
            f"{path / LISTING}: missing; the tokenizer is used unchecked, or build the store again"
        )
    return store


def _arrays(manifest: Manifest, split: Split) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Yield the ending of each file of a split, and type and shape of the array in it."""
    record = manifest.splits[split]
    known: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "bin": (np.dtype(manifest.dtype).newbyteorder("<"), (record.tokens,)),
        "idx": (np.dtype("<u8"), (record.documents + 1, 2)),
        "mask": (np.dtype(np.uint8), (record.tokens,)),
        "bytes": (np.dtype("<u4"), (record.tokens,)),
    }
    for ending in file_endings(split, masked=manifest.masked):
        yield ending, *known[ending]


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the token store is incomplete") from None
    if found != expected:
        raise UserError(
            f"{path}: has {found} bytes, expected {expected}; delete the store and build it again"
        )
