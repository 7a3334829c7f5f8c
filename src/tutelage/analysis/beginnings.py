"""Warn where models lose more at the beginnings of documents than after them.

A window at the beginning of a document is as long as any other, so a loss there that is much higher says that
the model does not know how documents begin: it was trained with something else in front of them than it is
scored with. Such losses differ widely between training seeds and hide what is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.types import FIRST_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WORSE_BY = 0.2
"""Nats per token by which first windows may be worse than the others without a warning."""

_NAMED = 4


def beginning_warnings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One sentence for every text on which first windows are much worse, with the models it holds for.

    Args:
        rows: scores, with run, domain, split, metric and value; those of test splits count.
    """
    worse: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["metric"], row["split"]) == (FIRST_WINDOWS, "test") and row["value"] > WORSE_BY:
            worse.setdefault(row["domain"], {})[row["run"]] = row["value"]
    return [_sentence(domain, models) for domain, models in worse.items()]


def _sentence(domain: str, models: Mapping[str, float]) -> str:
    ordered = sorted(models.items(), key=lambda item: -item[1])
    named = ", ".join(f"{run} ({excess:.2f})" for run, excess in ordered[:_NAMED])
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return (
        f"{domain}: first windows of documents are worse than the others by more than {WORSE_BY:g} nats per "
        f"token for {named}{more}: does what begins a document here begin one in their training?"
    )
