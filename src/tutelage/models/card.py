"""The model card of a model directory: README.md with YAML in front, as people expect it on the Hub."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FILE = "README.md"
_SCORES = "## Scores\n"
_UNSCORED = "Not scored yet; `tutelage eval` does it and writes the table here."


def card(
    title: str,
    front: Mapping[str, Any],
    summary: str,
    facts: Mapping[str, str],
    sources: Sequence[Sequence[str]],
    config: str,
) -> str:
    """The text of a card without scores.

    Args:
        title: name of the model.
        front: metadata, as the Hub names it.
        summary: what the model is, in a paragraph of Markdown.
        facts: how it was made, by name.
        sources: text it was trained on: name, licence, documents.
        config: the run's config.yaml.
    """
    parts = [
        f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        summary,
        "## Training",
        _table(("", ""), facts.items()),
        "## Data",
        _table(("source", "licence", "documents"), sources),
        "Whoever publishes this model chooses its licence (`license` above) with those of the data in mind.",
        f"## Config\n\n```yaml\n{config.strip()}\n```",
        f"{_SCORES}\n{_UNSCORED}",
    ]
    return "\n\n".join(parts) + "\n"


def with_scores(text: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The card with a table of scores in place of the one it had.

    Args:
        text: of the card.
        rows: fields of `tutelage.types.Score`, all of the finished model.
    """
    before, heading, _ = text.rpartition(_SCORES)
    if not heading:
        return text
    cells = [
        (
            str(row["domain"]),
            str(row["split"]),
            str(row["metric"]),
            f"{row['value']:.4g}",
            "" if math.isnan(row["stderr"]) else f"{row['stderr']:.2g}",
        )
        for row in rows
    ]
    head = ("text or task", "split", "metric", "value", "standard error")
    return f"{before}{heading}\n{_table(head, cells) if cells else _UNSCORED}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
