"""All scores of one model on one domain: raw, calibrated, and what is left after smoothing is taken away."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from tutelage import provenance
from tutelage.data.store_manifest import SCORED
from tutelage.evals.calibration import (
    FIT_TOKENS,
    POWERS,
    CalibrationFit,
    adaptive_edges,
    calibration_error,
    fit,
    fixed_edges,
    foreign_noise,
    frequencies,
    mixed,
    own_unigram,
    reliability,
)
from tutelage.evals.score_files import add_calibration, add_documents, add_scores
from tutelage.evals.token_scores import (
    DocumentLosses,
    ScoreEstimate,
    TokenScores,
    WindowLosses,
    ratio,
    score_tokens,
)
from tutelage.types import CHANGED_TEXT, FIRST_WINDOWS, Score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel

    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.windows import ScoredDocument, Target
    from tutelage.types import Split


FITTED = ("temperature", "unigram", "temperature_in_domain")
"""Repairs of the calibration: ends of metrics ("bits_per_byte_...") and columns ("nll_...")."""


@dataclass(frozen=True, slots=True)
class DomainScores:
    """Everything measured on one domain.

    Attributes:
        scores: rows for `scores.jsonl`.
        documents: rows for `documents.parquet`: bytes, tokens and losses (nats) of every document, and lists
            with the same for each of its windows that scores something, of which window 0 is the first.
        calibration: the version's entry of `calibration.json`: the fit and the reliability curves.
    """

    scores: list[Score]
    documents: pl.DataFrame
    calibration: dict[str, Any]


class InDomain:
    """The temperature fitted on the validation split of a model's own training text.

    It is what somebody gets who has no text of the target domain. A model whose training text is not known,
    or has no validation split, has none.

    Args:
        model: the model, where it is to run.
        target: the training text, with the windows and limits of the scored domains; None if not known.
    """

    def __init__(self, model: PreTrainedModel, target: Target | None) -> None:
        self._model = model
        self._target = target
        self._fit: CalibrationFit | None = None

    def fit(self, target: Target, own: CalibrationFit | None) -> CalibrationFit | None:
        """The fit, made when it is first needed.

        Args:
            target: the domain that is scored.
            own: its own fit, which is the answer where it is the training text itself.
        """
        if self._target is None:
            return None
        if self._fit is None and target.version == self._target.version:
            self._fit = own
        elif self._fit is None and (documents := self._target.documents("validation")):
            tokens = _validation_tokens(self._model, self._target, documents)
            self._fit, _ = _fitted(tokens, self._target.store.vocab_size)
        return self._fit


def score_domain(
    model: PreTrainedModel,
    evaluated: EvaluatedModel,
    target: Target,
    in_domain: InDomain,
    progress: Callable[[int], None] = lambda _: None,
) -> DomainScores:
    """Score both splits of a domain; fit on validation, apply to test.

    A split whose documents were all trained on is passed over. Without validation there are no fitted
    scores, without test no scores on test.

    Args:
        model: the evaluated model, where it is to run.
        evaluated: whose scores these are.
        target: the domain.
        in_domain: gives the temperature fitted on its training text.
        progress: called with the number of tokens scored since the last call.
    """
    validation, test = (target.documents(split) for split in SCORED)
    rows: list[Measurement] = []
    frames: list[pl.DataFrame] = []
    record: dict[str, Any] = {"fit": None}
    repairs: list[Repair] = []
    if validation:
        tokens = _validation_tokens(model, target, validation, progress)
        losses = tokens.losses(validation)
        windows = tokens.windows(validation)
        rows += _raw("validation", losses, windows)
        frames.append(_frame(target, "validation", validation, losses, windows, {}))
        fitted, unigram_V = _fitted(tokens, target.store.vocab_size)
        repairs = _repairs(fitted, unigram_V, tokens, in_domain.fit(target, fitted))
        record["fit"] = asdict(fitted)
    if test:
        powers = [repair.power for repair in repairs]
        tokens = score_tokens(model, test, **target.windows, powers=powers, progress=progress)
        losses = tokens.losses(test)
        windows = tokens.windows(test)
        rows += _raw("test", losses, windows)
        repaired = {
            repair.name: tokens.losses(test, repair.apply(powered_N, tokens.label_N))
            for repair, powered_N in zip(repairs, tokens.powered_MK.T, strict=True)
        }
        for repair in repairs:
            found = repaired[repair.name]
            error = repair.error_nats(len(test)) * found.tokens_N.sum() / found.bytes_N.sum() / math.log(2)
            rows.append(
                Measurement("test", f"bits_per_byte_{repair.name}", found.bits_per_byte(), len(test), error)
            )
        calibrated, record["reliability"] = _calibrated(tokens, len(test))
        rows += [Measurement("test", metric, measured, len(test)) for metric, measured in calibrated.items()]
        frames.append(_frame(target, "test", test, losses, windows, repaired))
    rows += [*_overlaps(target), *_changed(target)]
    scores = [_score(evaluated, target, row) for row in rows]
    return DomainScores(scores, pl.concat(frames) if frames else pl.DataFrame(), record)


def save_scores(evaluated: EvaluatedModel, target: Target, found: DomainScores) -> None:
    """Write what was measured on one domain; the scores last, because they say that it is done."""
    add_documents(evaluated.documents, found.documents)
    add_calibration(evaluated.calibration, target.name, target.version, found.calibration)
    add_scores(evaluated.scores, found.scores)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measurement on its way to `scores.jsonl`.

    Attributes:
        split: where it was made.
        metric: what was measured.
        measured: the value.
        n: documents.
        fit_error: what the noise of a fit adds to its standard error; NaN where that is not known, None where
            nothing was fitted.
    """

    split: Split
    metric: str
    measured: ScoreEstimate
    n: int
    fit_error: float | None = None


@dataclass(frozen=True, slots=True)
class Repair:
    """One way of giving a model the calibration that suits it, ready for the test split.

    Attributes:
        name: ending of its metric and of its column in `documents.parquet`.
        power: inverse temperature.
        weight: of the unigram.
        unigram_V: the unigram.
        error_nats: error by the noise of the fit, in nats per token, of a score over so many documents.
    """

    name: str
    power: float
    weight: float
    unigram_V: np.ndarray
    error_nats: Callable[[int], float]

    def apply(self, powered_N: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Log-probabilities of tokens, given those at `power`."""
        if self.weight == 0.0:
            return powered_N.astype(np.float64)
        return mixed(powered_N, self.unigram_V[label_N], self.weight)


def _repairs(
    own: CalibrationFit, unigram_V: np.ndarray, validation: TokenScores, in_domain: CalibrationFit | None
) -> list[Repair]:
    repairs = [
        Repair("temperature", 1 / own.temperature, 0.0, unigram_V, own.alone_noise.nats),
        Repair("unigram", 1 / own.mixed_temperature, own.weight, unigram_V, own.mixed_noise.nats),
    ]
    if in_domain is not None:
        foreign = foreign_noise(validation.powered_MK, in_domain)
        error = own.alone_noise.nats if in_domain is own else lambda _: foreign
        repairs.append(Repair("temperature_in_domain", 1 / in_domain.temperature, 0.0, unigram_V, error))
    return repairs


def _validation_tokens(
    model: PreTrainedModel,
    target: Target,
    documents: list[ScoredDocument],
    progress: Callable[[int], None] = lambda _: None,
) -> TokenScores:
    """Every token of a validation split, some of them at all powers for the fit."""
    every = max(1, sum(document.scored for document in documents) // FIT_TOKENS)
    return score_tokens(model, documents, **target.windows, powers=POWERS, every=every, progress=progress)


def _fitted(tokens: TokenScores, vocab_size: int) -> tuple[CalibrationFit, np.ndarray]:
    """The fit on a validation split, and the split's unigram, to be used on test.

    In the fit, a document's tokens have the unigram of the other documents, as the test split's have.
    """
    own_N = own_unigram(tokens.document_N, tokens.label_N, vocab_size)
    some_N = tokens.sampled_N
    unigram_V = frequencies(np.bincount(tokens.label_N, minlength=vocab_size))
    return fit(tokens.powered_MK, own_N[some_N], tokens.document_N[some_N]), unigram_V


def _calibrated(tokens: TokenScores, documents: int) -> tuple[dict[str, ScoreEstimate], dict[str, Any]]:
    """Calibration scores, and the reliability curves behind them."""
    edges = {"ece": fixed_edges(), "ece_adaptive": adaptive_edges(tokens.confidence_N)}
    scores = {name: calibration_error(tokens, ends, documents) for name, ends in edges.items()}
    lengths_D = np.bincount(tokens.document_N, minlength=documents)
    scores["brier"] = ratio(tokens.per_document(tokens.brier_N, documents), lengths_D)
    return scores, {name: reliability(tokens, ends) for name, ends in edges.items()}


def _raw(split: Split, losses: DocumentLosses, windows: WindowLosses) -> Iterator[Measurement]:
    n = len(losses.nll_N)
    yield Measurement(split, "bits_per_byte", losses.bits_per_byte(), n)
    yield Measurement(split, "perplexity", losses.perplexity(), n)
    excess, several = windows.first_excess(n)
    if excess is not None:
        yield Measurement(split, FIRST_WINDOWS, excess, several)


def _overlaps(target: Target) -> Iterator[Measurement]:
    """Shares of the test split that were trained on, by the model and by its teachers alone.

    Of all documents; of the scored ones those that are copies with changes, and of their 8-grams. What is
    left out of the validation split is counted too.
    """
    if "validation" in target.contamination and (left_out := target.contamination["validation"]).trained_on:
        share = len(left_out.trained_on), left_out.documents
        yield _share("overlap_documents", *share, split="validation")
    for who, overlaps in (
        ("overlap", target.contamination),
        ("teacher_overlap", target.teacher_contamination),
    ):
        if "test" not in overlaps:
            continue
        overlap, scored = overlaps["test"], len(overlaps["test"].grams_N)
        yield _share(f"{who}_documents", len(overlap.trained_on), overlap.documents)
        if overlap.grams_N.sum():
            measured = ratio(overlap.copied_N, overlap.grams_N)
            yield Measurement("test", f"{who}_8grams", measured, scored)
            yield _share(f"{who}_near_documents", overlap.near, scored)


def _share(metric: str, some: int, of: int, split: Split = "test") -> Measurement:
    share = some / max(1, of)
    deviation = math.sqrt(share * (1 - share) / max(1, of))
    return Measurement(split, metric, ScoreEstimate(share, deviation, None, None), of)


def _changed(target: Target) -> Iterator[Measurement]:
    """Shares of documents whose text the tokenizer changes: part of it is never predicted."""
    for split in SCORED:
        record = target.store.manifest.splits[split]
        if record.changed:
            # A share of all documents there are has no noise.
            share = ScoreEstimate(record.changed / record.documents, 0.0, None, None)
            yield Measurement(split, CHANGED_TEXT, share, record.documents)


def _score(evaluated: EvaluatedModel, target: Target, row: Measurement) -> Score:
    return Score(
        run=evaluated.id,
        step=evaluated.step,
        tokens=evaluated.tokens,
        domain=target.name,
        role=target.role,
        split=row.split,
        metric=row.metric,
        value=row.measured.value,
        stderr=row.measured.stderr,
        n=row.n,
        higher_is_better=False,
        version=target.version,
        low=row.measured.low,
        high=row.measured.high,
        fit_error=row.fit_error,
        code=provenance.code(),
    )


def _frame(
    target: Target,
    split: Split,
    documents: list[ScoredDocument],
    losses: DocumentLosses,
    windows: WindowLosses,
    repaired: Mapping[str, DocumentLosses],
) -> pl.DataFrame:
    n = len(documents)
    cuts = np.searchsorted(windows.document_W, np.arange(1, n))
    columns: dict[str, Any] = {
        "domain": [target.name] * n,
        "split": [split] * n,
        "version": [target.version] * n,
        "document": [document.index for document in documents],
        "bytes": losses.bytes_N,
        "tokens": losses.tokens_N,
        "nll": losses.nll_N,
        "window": [part.tolist() for part in np.split(windows.window_W, cuts)],
        "window_bytes": [part.tolist() for part in np.split(windows.bytes_W, cuts)],
        "window_tokens": [part.tolist() for part in np.split(windows.tokens_W, cuts)],
        "window_nll": [part.tolist() for part in np.split(windows.nll_W, cuts)],
    }
    fitted = {f"nll_{name}": pl.Float64() for name in FITTED}
    for name in FITTED:
        columns[f"nll_{name}"] = repaired[name].nll_N if name in repaired else [None] * n
    return pl.DataFrame(columns, schema_overrides=fitted)
