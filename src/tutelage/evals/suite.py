"""Scores of a finished run on all its domains, appended once and never twice."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import polars as pl

from tutelage.configio import digest
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.perplexity import DocumentLosses, score_documents
from tutelage.files import replacing, write_text
from tutelage.types import Score, Split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from tutelage.config import EvalDomain, RunConfig
    from tutelage.train.rundir import RunDirectory

SPLITS: tuple[Split, Split] = ("validation", "test")


def missing(config: RunConfig, directory: RunDirectory) -> list[tuple[EvalDomain, Split]]:
    """Domains and splits that `config` asks for and `directory` has no score of."""
    there = {(row["domain"], row["split"], row["version"]) for row in _rows(directory)}
    return [
        (domain, split)
        for domain in config.eval.domains
        for split in SPLITS
        if (domain.name, split, version(config, domain)) not in there
    ]


def check(config: RunConfig) -> None:
    """Raise UserError before training if a domain cannot be scored after it."""
    training = open_store(config.data.store)
    for domain in config.eval.domains:
        store = open_store(domain.store)
        if store.manifest.tokenizer_sha256 != training.manifest.tokenizer_sha256:
            raise UserError(
                f"eval domain {domain.name}: {domain.store} was made with another tokenizer than "
                f"{config.data.store}; build it with tokenizer.path={config.data.store}"
            )
        for split in SPLITS:
            if len(store.split(split).offsets) < 2:  # noqa: PLR2004 - one document has two offsets
                raise UserError(f"eval domain {domain.name}: split '{split}' of {domain.store} is empty")


def version(config: RunConfig, domain: EvalDomain) -> str:
    """Identity of the text and settings behind a score."""
    limits = [config.eval.max_documents, config.eval.max_tokens, config.data.sequence_length]
    return digest([open_store(domain.store).fingerprint, *limits])


def score(config: RunConfig, directory: RunDirectory, model: PreTrainedModel, step: int) -> None:
    """Compute and append every missing score and the document losses behind it."""
    scores: list[Score] = []
    frames = [pl.read_parquet(directory.documents)] if directory.documents.exists() else []
    for domain, split in missing(config, directory):
        losses = score_documents(
            model,
            open_store(domain.store),
            split,
            config.data.sequence_length,
            config.eval.max_documents,
            config.eval.max_tokens,
        )
        scores.extend(_scores(config, directory, domain, split, losses, step))
        frames.append(_frame(domain.name, split, losses))
    if not scores:
        return
    table = pl.concat(frames).unique(["domain", "split", "document"], keep="last", maintain_order=True)
    with replacing(directory.documents) as partial:
        table.write_parquet(partial)
    rows = [*_rows(directory), *(asdict(row) for row in scores)]
    write_text(directory.scores, "".join(json.dumps(row) + "\n" for row in rows))


def _scores(
    config: RunConfig,
    directory: RunDirectory,
    domain: EvalDomain,
    split: Split,
    losses: DocumentLosses,
    step: int,
) -> Iterator[Score]:
    for metric, (value, stderr) in (
        ("bits_per_byte", losses.bits_per_byte()),
        ("perplexity", losses.perplexity()),
    ):
        yield Score(
            run=directory.id,
            step=step,
            tokens=step * config.global_batch_tokens,
            domain=domain.name,
            role=domain.role,
            split=split,
            metric=metric,
            value=value,
            stderr=stderr,
            n=len(losses.nll_N),
            higher_is_better=False,
            version=version(config, domain),
        )


def _frame(domain: str, split: str, losses: DocumentLosses) -> pl.DataFrame:
    n = len(losses.nll_N)
    return pl.DataFrame(
        {
            "domain": [domain] * n,
            "split": [split] * n,
            "document": range(n),
            "bytes": losses.bytes_N,
            "tokens": losses.tokens_N,
            "nll": losses.nll_N,
        }
    )


def _rows(directory: RunDirectory) -> list[dict[str, object]]:
    if not directory.scores.exists():
        return []
    return [json.loads(line) for line in directory.scores.read_text(encoding="utf-8").splitlines()]
