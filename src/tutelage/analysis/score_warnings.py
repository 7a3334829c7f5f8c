"""Warnings about scores that are not what they seem.

Models may lose more at the beginnings of documents than after them. A window at the beginning of a document
is as long as any other, so a loss there that is much higher says that the model does not know how documents
begin: it was trained with something else in front of them than it is scored with. Such losses differ widely
between training seeds and hide what is compared.

And a tokenizer may change the text, so that part of it is never predicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.types import CHANGED_TEXT, FIRST_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WORSE_BY = 0.2
"""Nats per token by which first windows may be worse than the others without a warning."""

_NAMED = 4


def score_warnings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One sentence for every text and what is wrong with its scores, with the models that it holds for.

    Args:
        rows: scores, with run, domain, split, metric and value; those of test splits count.
    """
    worse: dict[str, dict[str, float]] = {}
    changed: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["metric"], row["split"]) == (FIRST_WINDOWS, "test") and row["value"] > WORSE_BY:
            worse.setdefault(row["domain"], {})[row["run"]] = row["value"]
        elif (row["metric"], row["split"]) == (CHANGED_TEXT, "test"):
            changed.setdefault(row["domain"], {})[row["run"]] = row["value"]
    return [
        *(
            f"{domain}: first windows of documents are worse than the others by more than {WORSE_BY:g} nats "
            f"per token for {_named(models, '.2f')}: does what begins a document here begin one in their "
            "training? (Too little training, or a text with a hard beginning, shows the same.)"
            for domain, models in worse.items()
        ),
        *(
            f"{domain}: part of the text is never predicted, because the tokenizer changes it (share of "
            f"documents: {_named(models, '.1%')}): these bits per byte compare only with those of the same "
            "tokenizer"
            for domain, models in changed.items()
        ),
    ]


def _named(models: Mapping[str, float], form: str) -> str:
    """Some models with their values, the largest first, and how many more there are."""
    ordered = sorted(models.items(), key=lambda item: -item[1])
    named = ", ".join(f"{run} ({value:{form}})" for run, value in ordered[:_NAMED])
    return f"{named} and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else named
