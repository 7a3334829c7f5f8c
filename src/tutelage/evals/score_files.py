"""Read and write the files of an evaluation: scores.jsonl, documents.parquet and calibration.json."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

import polars as pl

from tutelage.checksums import CARD, check_file, checked_write
from tutelage.config.load import digest
from tutelage.errors import UserError
from tutelage.models import export
from tutelage.records import UnreadableError, read_lines, read_sealed
from tutelage.types import SCORING_VERSION, Role, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path


def version_of(identity: object) -> str:
    """The `version` of scores: `SCORING_VERSION` and a digest of the text and settings behind them."""
    return f"{SCORING_VERSION}-{digest(identity)}"


def read_scores(path: Path) -> list[Score]:
    """All scores in a file; none if it is empty or does not exist.

    Raises:
        UserError: the file is damaged, or a line is not a `Score`.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return []
    with _again(path):
        scores = read_lines(path, Score)
        check_file(path)
    return scores


@contextlib.contextmanager
def _again(path: Path) -> Iterator[None]:
    """Say what to do about a damaged file of an evaluation: its three files belong together."""
    try:
        yield
    except UnreadableError as error:
        raise UserError(
            f"{path.parent}: {error}; delete scores.jsonl, documents.parquet and calibration.json there, and "
            "evaluate again"
        ) from None


def known_scores(path: Path, version: str, step: int) -> list[Score]:
    """The scores of one version that a file has of a model after `step` steps."""
    return [score for score in read_scores(path) if (score.version, score.step) == (version, step)]


def last_bits_per_byte(scores: Sequence[Score]) -> dict[tuple[str, str], float]:
    """Bits per byte of the test splits of texts after the last step, by domain and version.

    Those of a task are left out, which may be called as a text is.
    """
    wanted = ("bits_per_byte", "test", max((score.step for score in scores), default=0))
    return {
        (score.domain, score.version): score.value
        for score in scores
        if (score.metric, score.split, score.step) == wanted and score.role in get_args(Role)
    }


def add_scores(path: Path, scores: Iterable[Score]) -> None:
    """Add scores in one step; a measurement that is made again replaces the one that was there."""
    new = {_key(score): score for score in scores}
    kept = [score for score in read_scores(path) if _key(score) not in new]
    both = [*kept, *new.values()]
    show_in_card(path, both)
    if not both:
        return
    # Last, since what these rows say is not done again.
    with checked_write(path) as partial:
        partial.write_text("".join(json.dumps(asdict(row)) + "\n" for row in both), encoding="utf-8")


def show_in_card(path: Path, scores: Iterable[Score]) -> None:
    """List scores in the card of the model beside `path`: of each text, those of the version scored last."""
    card, rows = path.parent / "model" / CARD, [asdict(score) for score in scores]
    if not rows or not card.is_file():
        return
    last = max(row["step"] for row in rows)
    finished = [row for row in rows if row["step"] == last and row["split"] == "test"]
    latest = {(row["domain"], row["role"]): row["version"] for row in finished}
    finished = [row for row in finished if row["version"] == latest[row["domain"], row["role"]]]
    before = card.read_text(encoding="utf-8")
    if (text := export.with_scores(before, finished)) != before:
        with checked_write(card) as partial:
            partial.write_text(text, encoding="utf-8")


def _key(score: Score) -> tuple[str, str, str, str, int]:
    """Two scores with the same key are the same measurement."""
    return score.domain, score.split, score.metric, score.version, score.step


def add_documents(path: Path, frame: pl.DataFrame) -> None:
    """Add losses of documents; they replace those of the same domain, split and version."""
    if frame.is_empty():
        return
    with _again(path):
        if path.is_file():
            check_file(path)
            try:
                kept = pl.read_parquet(path, glob=False)
                kept = kept.join(frame, on=["domain", "split", "version"], how="anti")
                frame = pl.concat([kept, frame], how="diagonal_relaxed")
            except pl.exceptions.PolarsError as error:
                reason = " ".join(str(error).split())[:200]
                raise UnreadableError(path.name, f"holds no losses of documents ({reason})") from None
        with checked_write(path) as partial:
            frame.write_parquet(partial)


def add_calibration(path: Path, domain: str, version: str, record: dict[str, Any]) -> None:
    """Add the fit and the reliability curves behind one version of a domain's scores."""
    with _again(path):
        known = {}
        if path.is_file():
            check_file(path)
            known = read_sealed(path)
        with checked_write(path) as partial:
            record = known.get(domain, {}) | {version: record}
            partial.write_text(json.dumps(known | {domain: record}, indent=2) + "\n", encoding="utf-8")
