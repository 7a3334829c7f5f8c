"""What an evaluation leaves behind: `scores.jsonl`, with no row twice, and what lies behind the scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from tutelage.config.load import digest
from tutelage.errors import UserError
from tutelage.files import atomic_write, write_json, write_text
from tutelage.models import export
from tutelage.types import SCORING_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tutelage.types import Score

ScoreKey = tuple[str, str, str, str, int]


def key(row: dict[str, Any]) -> ScoreKey:
    """What makes a row the same measurement as another: domain, split, metric, version and step."""
    return row["domain"], row["split"], row["metric"], row["version"], row["step"]


def version_of(identity: object) -> str:
    """The `version` of scores: how scores are made, and a digest of the text and settings behind them."""
    return f"{SCORING_VERSION}-{digest(identity)}"


def read_scores(path: Path) -> list[dict[str, Any]]:
    """All rows; none if the file does not exist.

    Raises:
        UserError: a line is no score.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            key(rows[-1])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no score; delete it and evaluate again") from None
    return rows


def add_scores(path: Path, scores: Iterable[Score]) -> None:
    """Add scores in one step; the same measurement made again replaces the one that was there.

    A model's card beside them lists them too: of each text those of the version that was scored last.
    """
    new = {key(row): row for row in map(asdict, scores)}
    rows = [*(row for row in read_scores(path) if key(row) not in new), *new.values()]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    file = path.parent / "model" / export.FILE
    if rows and file.is_file():
        last = max(row["step"] for row in rows)
        finished = [row for row in rows if row["step"] == last and row["split"] == "test"]
        latest = {row["domain"]: row["version"] for row in finished}
        finished = [row for row in finished if row["version"] == latest[row["domain"]]]
        write_text(file, export.with_scores(file.read_text(encoding="utf-8"), finished))


def add_documents(path: Path, frame: pl.DataFrame) -> None:
    """Keep per-document losses; those of the same domain, split and version that were there are replaced."""
    if frame.is_empty():
        return
    frames = [frame]
    if path.exists():
        frames.insert(0, pl.read_parquet(path).join(frame, on=["domain", "split", "version"], how="anti"))
    with atomic_write(path) as partial:
        pl.concat(frames, how="diagonal_relaxed").write_parquet(partial)


def add_calibration(path: Path, domain: str, version: str, record: dict[str, Any]) -> None:
    """Keep the fit and reliability curves of one version of a domain's scores, beside those of others."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | {domain: known.get(domain, {}) | {version: record}})
