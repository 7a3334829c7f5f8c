"""Score one model on one domain: raw, calibration, and again after fitting it to other text of the domain."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

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
    ratio,
    rows_at_a_time,
    score_tokens,
)
from tutelage.evals.windows import FORWARD_TOKENS
from tutelage.models.devices import Hardware
from tutelage.models.directory import read_config
from tutelage.models.forward_memory import ForwardPass, may_not_fit, scoring_parts, shape_at
from tutelage.types import CHANGED_TEXT, FIRST_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.token_scores import WindowLosses
    from tutelage.evals.windows import ScoredDocument, Target
    from tutelage.types import Score, Split


_HALVES = ("float16", "bfloat16")
"""Types of weights, as config.json names them, that take two bytes each; others are computed in float32."""
FITTED = ("temperature", "unigram", "temperature_in_domain")
"""Repairs of the calibration: ends of metrics ("bits_per_byte_...") and columns ("nll_...")."""


@dataclass(frozen=True, slots=True)
class DomainScores:
    """All measurements of one domain.

    Attributes:
        scores: rows for `scores.jsonl`.
        documents: rows for `documents.parquet`: bytes, tokens and losses (nats) of every document, and lists
            of the same for each of its windows that has scored tokens, of which window 0 is the first.
        calibration: the version's entry of `calibration.json`: the fit and the reliability curves.
    """

    scores: list[Score]
    documents: pl.DataFrame
    calibration: dict[str, Any]


def save_scores(evaluated: EvaluatedModel, target: Target, found: DomainScores) -> None:
    """Write the measurements of one domain; the scores last, because they mark the domain as done."""
    add_documents(evaluated.documents, found.documents)
    add_calibration(evaluated.calibration, target.name, target.version, found.calibration)
    add_scores(evaluated.scores, found.scores)


class InDomain:
    """The temperature fitted on the validation split of a model's own training text.

    It serves where there is no text of the target domain. A model whose training text is unknown, or has no
    validation split, has none.

    Args:
        model: the model, on its device.
        target: the training text, with the windows and limits of the scored domains; None if unknown.
    """

    def __init__(self, model: PreTrainedModel, target: Target | None) -> None:
        self._model = model
        self._target = target
        self._fit: CalibrationFit | None = None

    def fit(self, target: Target, own: CalibrationFit | None) -> CalibrationFit | None:
        """The fit, made when it is first needed; `own` if the scored domain is the training text itself."""
        if self._target is None:
            return None
        if target.version == self._target.version:
            self._fit = own  # whichever domains were scored before: its noise is that of this text
        elif self._fit is None and (documents := self._target.documents("validation")):
            tokens = _validation_tokens(self._model, self._target, documents)
            self._fit, _ = _fitted(tokens, self._target.store.vocab_size)
        return self._fit


def memory_warning(evaluated: EvaluatedModel, targets: Sequence[Target], kind: str) -> str | None:
    """What to tell the user before a model is loaded if it may not fit into what is free; else None.

    Args:
        evaluated: the model.
        targets: what it is to be scored on.
        kind: type of the device, as torch names it.
    """
    if (shape := shape_at(str(evaluated.model), None)) is None:  # a family without a formula
        return None
    vocab_size = targets[0].store.vocab_size
    settings = read_config(evaluated.model)
    is_half = settings.get("dtype", settings.get("torch_dtype")) in _HALVES  # older files have the latter
    run = ForwardPass(
        shapes=[shape],
        vocab_size=vocab_size,
        tokens=max(FORWARD_TOKENS, *(target.context for target in targets)),
        bytes=2 if is_half else 4,
        cuda=kind == "cuda",
    )
    parts = scoring_parts(run, rows_at_a_time(vocab_size))
    return may_not_fit(evaluated.id, parts, "scoring", Hardware.here(kind, 1, 1))


class _Measurement(NamedTuple):
    """A score without its model and domain; `fit_error` is what the noise of a fit adds to its error."""

    split: Split
    metric: str
    estimate: ScoreEstimate
    n: int
    fit_error: float | None = None


def score_domain(
    model: PreTrainedModel,
    evaluated: EvaluatedModel,
    target: Target,
    in_domain: InDomain,
    progress: Callable[[int], None] = lambda _: None,
) -> DomainScores:
    """Score both splits of a domain; fit on validation, apply to test.

    A split whose documents were all trained on has no scores. Without validation there are no fitted scores,
    without test no scores on test.

    Args:
        model: the loaded model, on its device.
        evaluated: names the model in the scores.
        target: the domain.
        in_domain: gives the temperature fitted on the model's training text.
        progress: called with the number of tokens scored since the last call.
    """
    validation, test = (target.documents(split) for split in SCORED)
    rows: list[_Measurement] = []
    frames: list[pl.DataFrame] = []
    record: dict[str, Any] = {"fit": None}
    repairs: list[Repair] = []

    def add(split: Split, documents: list[ScoredDocument], repaired: Mapping[str, DocumentLosses]) -> None:
        losses, windows = tokens.losses(documents), tokens.windows(documents)
        rows.extend(_raw(split, losses, windows))
        frames.append(_frame(target, split, documents, losses, windows, repaired))

    if validation:
        tokens = _validation_tokens(model, target, validation, progress)
        add("validation", validation, {})
        fitted, unigram_V = _fitted(tokens, target.store.vocab_size)
        repairs = _repairs(fitted, unigram_V, tokens, in_domain.fit(target, fitted))
        record["fit"] = asdict(fitted)
    if test:
        powers = [repair.power for repair in repairs]
        tokens = score_tokens(model, test, **target.windows, powers=powers, progress=progress)
        repaired = {
            repair.name: tokens.losses(test, repair.apply(powered_N, tokens.label_N))
            for repair, powered_N in zip(repairs, tokens.powered_MK.T, strict=True)
        }
        add("test", test, repaired)
        for repair in repairs:
            found = repaired[repair.name]
            error = repair.error_nats(len(test)) * found.tokens_N.sum() / found.bytes_N.sum() / math.log(2)
            metric = f"bits_per_byte_{repair.name}"
            rows.append(_Measurement("test", metric, found.bits_per_byte(), len(test), error))
        calibrated, record["reliability"] = _calibrated(tokens, len(test))
        rows += [_Measurement("test", metric, estimate, len(test)) for metric, estimate in calibrated.items()]
    rows += [*_overlaps(target), *_changed(target)]
    scores = [
        evaluated.score(target.name, target.role, *row[:4], target.version, fit_error=row.fit_error)
        for row in rows
    ]
    return DomainScores(scores, pl.concat(frames) if frames else pl.DataFrame(), record)


@dataclass(frozen=True, slots=True)
class Repair:
    """A recalibration of a model's predictions, ready for the test split.

    Attributes:
        name: end of its metric and of its column in `documents.parquet`.
        power: inverse temperature.
        weight: of the unigram.
        unigram_V: the unigram.
        error_nats: error by the noise of the fit, in nats per token, of a score over so many documents; NaN
            for a fit on one document.
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
    scored = sum(document.scored for document in documents)
    every = max(1, min(scored // FIT_TOKENS, scored // len(documents)))  # or short ones have no token in it
    return score_tokens(model, documents, **target.windows, powers=POWERS, every=every, progress=progress)


def _fitted(tokens: TokenScores, vocab_size: int) -> tuple[CalibrationFit, np.ndarray]:
    """The fit on a validation split, and the split's unigram for the test split.

    In the fit, a document's tokens get the unigram of the other documents, as those of the test split do.
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


def _raw(split: Split, losses: DocumentLosses, windows: WindowLosses) -> Iterator[_Measurement]:
    n = len(losses.nll_N)
    yield _Measurement(split, "bits_per_byte", losses.bits_per_byte(), n)
    yield _Measurement(split, "perplexity", losses.perplexity(), n)
    excess, several = windows.first_excess(n)
    if excess is not None:
        yield _Measurement(split, FIRST_WINDOWS, excess, several)


def _overlaps(target: Target) -> Iterator[_Measurement]:
    """Shares of the test split that were trained on, by the model and by its teachers alone.

    The share of all documents; of the scored ones, the shares of copies with changes and of 8-grams. The
    share of the validation split that is left out is a score too.
    """
    left_out = target.contamination.get("validation")
    if left_out is not None and left_out.trained_on:
        share = len(left_out.trained_on), left_out.documents
        yield _share("overlap_documents", *share, split="validation")
    both = {"overlap": target.contamination, "teacher_overlap": target.teacher_contamination}
    for who, by_split in both.items():
        if (found := by_split.get("test")) is None:
            continue
        scored = len(found.grams_N)
        yield _share(f"{who}_documents", len(found.trained_on), found.documents)
        some_N = found.grams_N > 0  # documents of fewer words say nothing
        if some_N.any():
            copied = ratio(found.copied_N[some_N], found.grams_N[some_N])
            yield _Measurement("test", f"{who}_8grams", copied, scored)
            yield _share(f"{who}_near_documents", found.near, scored)


def _share(metric: str, some: int, of: int, split: Split = "test") -> _Measurement:
    share = some / max(1, of)
    deviation = math.sqrt(share * (1 - share) / max(1, of))
    return _Measurement(split, metric, ScoreEstimate(share, deviation), of)


def _changed(target: Target) -> Iterator[_Measurement]:
    """Shares of documents whose text the tokenizer changes: part of it is never predicted."""
    for split in SCORED:
        record = target.store.manifest.splits[split]
        if record.changed:
            # A share of all documents there are has no noise.
            share = ScoreEstimate(record.changed / record.documents, 0.0)
            yield _Measurement(split, CHANGED_TEXT, share, record.documents)


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
    by_window = {
        "window": windows.window_W,
        "window_bytes": windows.bytes_W,
        "window_tokens": windows.tokens_W,
        "window_nll": windows.nll_W,
    }
    columns: dict[str, Any] = {
        "domain": [target.name] * n,
        "split": [split] * n,
        "version": [target.version] * n,
        "document": [document.index for document in documents],
        "bytes": losses.bytes_N,
        "tokens": losses.tokens_N,
        "nll": losses.nll_N,
        **{
            name: [part.tolist() for part in np.split(values_W, cuts)] for name, values_W in by_window.items()
        },
        **{f"nll_{name}": repaired[name].nll_N if name in repaired else [None] * n for name in FITTED},
    }
    return pl.DataFrame(columns, schema_overrides={f"nll_{name}": pl.Float64() for name in FITTED})
