"""All scores of one model on one domain: raw, calibrated, and what is left after smoothing is taken away."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from tutelage import provenance
from tutelage.configio import digest
from tutelage.data.store import token_counts
from tutelage.evals.calibration import adaptive_edges, calibration_error, fixed_edges, reliability
from tutelage.evals.domains import SCORED
from tutelage.evals.perplexity import DocumentLosses, Measured, TokenScores, ratio, score_tokens
from tutelage.evals.records import add_calibration, add_documents, add_scores
from tutelage.evals.smoothing import FIT_TOKENS, POWERS, Fit, fit, frequencies, own_unigram
from tutelage.evals.windows import read_documents
from tutelage.types import Score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel

    from tutelage.data.store import Store
    from tutelage.evals.overlap import Overlap
    from tutelage.evals.subject import Subject
    from tutelage.evals.windows import Document
    from tutelage.types import Role, Split


@dataclass(frozen=True, slots=True)
class Target:
    """One domain, ready to be scored.

    Attributes:
        name: of the domain.
        role: whether the model was trained on such text.
        store: the domain in the model's tokens.
        context: window length in tokens.
        stride: tokens scored per further window.
        max_documents: documents per split.
        max_tokens: tokens per document, from its beginning.
        overlap: per split, what the model was trained on; None if that is not known.
    """

    name: str
    role: Role
    store: Store
    context: int
    stride: int
    max_documents: int
    max_tokens: int
    overlap: Mapping[Split, Overlap] | None = None

    @property
    def version(self) -> str:
        """Identity of the text and settings behind a score."""
        identity: list[Any] = [self.store.fingerprint, self.max_documents, self.max_tokens, self.context]
        if self.stride != self.context:
            identity.append({"stride": self.stride})
        left_out = [sorted(self.left_out(split)) for split in SCORED]
        if any(left_out):
            identity.append({"left_out": left_out})
        return digest(identity)

    def left_out(self, split: Split) -> frozenset[int]:
        """Places of documents that are not scored because the model was trained on them."""
        return frozenset() if self.overlap is None else self.overlap[split].trained_on

    def documents(self, split: Split) -> list[Document]:
        """What is scored."""
        return read_documents(self.store, split, self.max_documents, self.max_tokens, self.left_out(split))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything measured on one domain.

    Attributes:
        scores: rows for `scores.jsonl`.
        documents: rows for `documents.parquet`.
        calibration: the domain's entry of `calibration.json`: the fit and the reliability curves.
    """

    scores: list[Score]
    documents: pl.DataFrame
    calibration: dict[str, Any]


def score_domain(
    model: PreTrainedModel,
    subject: Subject,
    target: Target,
    unigram_V: np.ndarray | None,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Score both splits of a domain; fit on validation, apply to test.

    A split whose documents were all trained on is passed over. Without validation there are no fitted
    scores, without test no scores on test.

    Args:
        model: the subject's model, where it is to run.
        subject: whose scores these are.
        target: the domain.
        unigram_V: token probabilities of the training text; None: those of the domain's validation split.
        progress: called with the number of tokens scored since the last call.
    """
    validation, test = (target.documents(split) for split in SCORED)
    every = max(1, sum(len(document.tokens_N) for document in validation) // FIT_TOKENS)
    windows = {"eos_id": target.store.eos_id, "context": target.context, "stride": target.stride}
    rows: list[tuple[Split, str, Measured, int]] = []
    frames: list[pl.DataFrame] = []
    record: dict[str, Any] = {"version": target.version}
    fitted = None
    if validation:
        tokens = score_tokens(model, validation, **windows, powers=POWERS, every=every, progress=progress)
        losses = tokens.losses(validation)
        rows += _raw("validation", losses)
        frames.append(_frame(target.name, "validation", validation, losses, {}))
        fitted, unigram_V = _fitted(tokens, unigram_V, target.store.vocab_size)
        record["fit"] = asdict(fitted)
    if test:
        powers = fitted.powers if fitted else ()
        tokens = score_tokens(model, test, **windows, powers=powers, progress=progress)
        losses = tokens.losses(test)
        rows += _raw("test", losses)
        repaired = _repaired(tokens, test, fitted, unigram_V)
        rows += [
            ("test", f"bits_per_byte_{name}", found.bits_per_byte(), len(test))
            for name, found in repaired.items()
        ]
        found, record["reliability"] = _calibrated(tokens, len(test))
        rows += [("test", metric, measured, len(test)) for metric, measured in found.items()]
        frames.append(_frame(target.name, "test", test, losses, repaired))
    rows += _overlaps(target)
    scores = [_row(subject, target, *row) for row in rows]
    return Outcome(scores, pl.concat(frames) if frames else pl.DataFrame(), record)


def keep(subject: Subject, domain: str, outcome: Outcome) -> None:
    """Write what was measured on one domain; the scores last, because they say that it is done."""
    add_documents(subject.documents, outcome.documents)
    add_calibration(subject.calibration, domain, outcome.calibration)
    add_scores(subject.scores, outcome.scores)


def training_unigram(store: Store) -> np.ndarray:
    """Frequencies of a store's training tokens, as the unigram control has them."""
    return frequencies(token_counts(store.split("train").tokens, store.vocab_size))


def _fitted(tokens: TokenScores, unigram_V: np.ndarray | None, vocab_size: int) -> tuple[Fit, np.ndarray]:
    """The fit on a validation split, and the unigram to use on test."""
    if unigram_V is not None:
        return fit(tokens.powered_MK, unigram_V[tokens.label_N[tokens.sampled_N]], "training text"), unigram_V
    own_N = own_unigram(tokens.document_N, tokens.label_N, vocab_size)[tokens.sampled_N]
    counts_V = np.bincount(tokens.label_N, minlength=vocab_size)
    return fit(tokens.powered_MK, own_N, "validation split"), frequencies(counts_V)


def _repaired(
    tokens: TokenScores, documents: list[Document], fitted: Fit | None, unigram_V: np.ndarray | None
) -> dict[str, DocumentLosses]:
    if fitted is None or unigram_V is None:
        return {}
    alone_N, mixed_N = fitted.apply(tokens.powered_MK, unigram_V[tokens.label_N])
    return {"temperature": tokens.losses(documents, alone_N), "unigram": tokens.losses(documents, mixed_N)}


def _calibrated(tokens: TokenScores, documents: int) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Calibration scores, and the reliability curves behind them."""
    edges = {"ece": fixed_edges(), "ece_adaptive": adaptive_edges(tokens.confidence_N)}
    scores = {name: calibration_error(tokens, ends, documents) for name, ends in edges.items()}
    lengths_D = np.bincount(tokens.document_N, minlength=documents)
    scores["brier"] = ratio(tokens.per_document(tokens.brier_N, documents), lengths_D)
    return scores, {name: reliability(tokens, ends) for name, ends in edges.items()}


def _raw(split: Split, losses: DocumentLosses) -> list[tuple[Split, str, Measured, int]]:
    n = len(losses.nll_N)
    return [
        (split, "bits_per_byte", losses.bits_per_byte(), n),
        (split, "perplexity", losses.perplexity(), n),
    ]


def _overlaps(target: Target) -> Iterator[tuple[Split, str, Measured, int]]:
    """Shares of the test split that were trained on: of its documents, and of the rest's 8-grams."""
    if target.overlap is None:
        return
    overlap = target.overlap["test"]
    share = len(overlap.trained_on) / max(1, overlap.documents)
    deviation = math.sqrt(share * (1 - share) / max(1, overlap.documents))
    yield "test", "overlap_documents", Measured(share, deviation, None, None), overlap.documents
    if overlap.grams_N.sum():
        yield "test", "overlap_8grams", ratio(overlap.copied_N, overlap.grams_N), len(overlap.grams_N)


def _row(subject: Subject, target: Target, split: Split, metric: str, measured: Measured, n: int) -> Score:
    return Score(
        run=subject.id,
        step=subject.step,
        tokens=subject.tokens,
        domain=target.name,
        role=target.role,
        split=split,
        metric=metric,
        value=measured.value,
        stderr=measured.stderr,
        n=n,
        higher_is_better=False,
        version=target.version,
        low=measured.low,
        high=measured.high,
        code=provenance.code(),
    )


def _frame(
    domain: str,
    split: Split,
    documents: list[Document],
    losses: DocumentLosses,
    repaired: Mapping[str, DocumentLosses],
) -> pl.DataFrame:
    n = len(documents)
    columns: dict[str, Any] = {
        "domain": [domain] * n,
        "split": [split] * n,
        "document": [document.index for document in documents],
        "bytes": losses.bytes_N,
        "tokens": losses.tokens_N,
        "nll": losses.nll_N,
    }
    for name in ("temperature", "unigram"):
        columns[f"nll_{name}"] = repaired[name].nll_N if name in repaired else [None] * n
    return pl.DataFrame(columns, schema_overrides={"nll_temperature": pl.Float64, "nll_unigram": pl.Float64})
