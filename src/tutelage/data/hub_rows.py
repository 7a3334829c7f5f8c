"""Rows of a Hugging Face data set, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tutelage.config.data_config import HubPairs, HubSource
    from tutelage.data.text_files import Row


def read_rows(source: HubSource | HubPairs) -> Iterator[Row]:
    """(data set and row, row), in order; nothing is downloaded that is not read.

    Raises:
        UserError: the package is missing, or the data set, its subset or its split; or a row cannot be
            decoded, after which no other can be read.
    """
    try:
        from datasets import load_dataset  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise UserError(
            f"hub source {source.path}: the package 'datasets' is missing; run: pip install 'tutelage[hub]'"
        ) from None
    where = f"hub source {source.path}"
    number = 0
    try:
        rows = load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield f"{where}, row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        place = f", after row {number}" if number else ""
        # the library decodes rows in bulk and goes no further than the first that it cannot decode
        hint = "; such rows can be skipped with kind: files only" if source.on_bad_row == "skip" else ""
        raise UserError(f"{where}{place}: {' '.join(str(error).split())}{hint}") from None
