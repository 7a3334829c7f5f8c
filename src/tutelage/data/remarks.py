"""What somebody should know of a token store before using it, in words: what was left out, cut or changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import JsonValue

    from tutelage.data.config import StoreConfig
    from tutelage.data.manifest import LeftRecord, Manifest, SourceRecord
    from tutelage.data.sources import Tally
    from tutelage.types import Split

_NO_SHARE = 1e-9  # what rounding leaves of nothing


def source_name(source: dict[str, JsonValue]) -> str:
    """What a person calls a source: its corpus, data set, or first file and how many more there are."""
    match source:
        case {"kind": "hub" | "hub_pairs", "path": str(path)}:
            return path
        case {"files": [{"name": str(first)}, *more]}:
            return f"{first} and {len(more)} more" if more else first
        case {"name": str(name)}:
            return name
    return str(source["kind"])


def remarks(manifest: Manifest) -> list[str]:
    """One line for everything unusual: rows left out, files cut, how the mixture ended, changed text."""
    numbered = list(enumerate(manifest.sources, 1))
    lines = [line for number, record in numbered for line in _of_source(f"source {number}", record)]
    lines += _of_mixture(manifest)
    spelled = sum(record.special_tokens_in_text for record in manifest.splits.values())
    if spelled:
        lines.append(
            f"{spelled:,} documents spell a special token of the tokenizer: text here, the token itself to "
            "other programs that encode them"
        )
    match manifest.config["tokenizer"]:
        case {"path": None, "vocab_size": int(wanted)} if manifest.vocab_size < wanted:
            lines.append(
                f"the tokenizer has {manifest.vocab_size:,} entries of the {wanted:,} that were asked for "
                "(tokenizer.vocab_size): the text that it learned from has no more"
            )
    changed = not_comparable(manifest)
    return [*lines, *([changed] if changed else [])]


def not_comparable(manifest: Manifest, split: Split | None = None) -> str | None:
    """Why bits per byte of a store, or of one split, mean nothing beside another tokenizer's; None: they do.

    Args:
        manifest: of the store.
        split: the one that is scored; None: all.
    """
    records = [record for name, record in manifest.splits.items() if split in (None, name)]
    changed, documents = (
        sum(counts) for counts in zip(*((r.changed, r.documents) for r in records), strict=True)
    )
    if changed == 0:
        return None
    return (
        f"the tokenizer changes the text of {changed:,} of {documents:,} documents (for example "
        f"{manifest.changed_example}), so bits per byte compare only with those of the same tokenizer"
    )


def check_splits(config: StoreConfig, manifest: Manifest) -> None:
    """Raise `UserError` if a split that is to have a share of the text got nothing."""
    documents = sum(record.documents for record in manifest.splits.values())
    shares = {
        "train": 1.0 - config.validation - config.test,
        "validation": config.validation,
        "test": config.test,
    }
    empty = [
        name for name, record in manifest.splits.items() if shares[name] > _NO_SHARE and record.documents == 0
    ]
    known = "".join(f"; {line}" for line in remarks(manifest))
    if documents == 0:
        raise UserError(f"store {config.name}: the sources hold no text{known}")
    if empty:
        raise UserError(
            f"store {config.name}: split '{empty[0]}' is empty: its share is {shares[empty[0]]:.2g}, and the "
            f"documents are {documents:,}; add text, raise the share or set it to 0, or cut .txt files into "
            f"more documents (document_bytes){known}"
        )


def rows_left_out(source: Tally | SourceRecord) -> str:
    """How many rows of a source are not used for which reason; "" if all are."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items() if count)
    first = f"; the first bad one: {source.first_bad}" if source.first_bad else ""
    return f"rows left out: {counts}{first}" if counts else ""


def _of_source(number: str, record: SourceRecord) -> Iterator[str]:
    name = f"{number} ({source_name(record.source)})"
    left_out = rows_left_out(record)
    if left_out:
        yield f"{name}: {left_out}"
    if record.documents == 0:
        yield f"{name}: nothing was taken of it"
    elif record.document_bytes is not None:
        yield f"{name}: long text files are cut into documents of about {record.document_bytes:,} bytes"


def _of_mixture(manifest: Manifest) -> Iterator[str]:
    if manifest.ended_by == "max_bytes":
        yield f"reading ended at max_bytes = {manifest.config['max_bytes']:,}; what comes after was not read"
    elif manifest.ended_by is not None:
        ended = manifest.ended_by
        rest = [
            f"{_amount(record.left)} of source {number} ({source_name(record.source)})"
            for number, record in enumerate(manifest.sources, 1)
            if number != ended + 1 and (record.left is None or record.left.documents)
        ]
        if rest:
            yield (
                f"the mixture ended when source {ended + 1} ({source_name(manifest.sources[ended].source)}) "
                f"ran out; not used: {', '.join(rest)}"
            )


def _amount(left: LeftRecord | None) -> str:
    if left is None:
        return "an unknown rest"
    return f"{'' if left.is_all else 'more than '}{left.documents:,} documents ({left.bytes:,} bytes)"
