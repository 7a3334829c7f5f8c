"""Probe models: copying in context, and acceptance of a model's drafts by a teacher.

The probes need a token store made with the model's tokenizer: its training split tells which ids are in use,
its test split is the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import compare_tokenizers
from tutelage.errors import UserError
from tutelage.evals.evaluated_model import check_tokenizer, load_evaluated
from tutelage.evals.samples import write_samples
from tutelage.evals.score_files import add_scores, known_scores, version_of
from tutelage.evals.token_scores import NextTokenModel, ScoreEstimate, ratio
from tutelage.evals.windows import FORWARD_TOKENS, read_documents, window_batches
from tutelage.files import lock, make_directory
from tutelage.models.hub import body_and_head, pick_device
from tutelage.progress import NullProgress, staged
from tutelage.types import COPYING, PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from tutelage.data.store import Store
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.windows import ScoredDocument
    from tutelage.progress import Progress
    from tutelage.types import Score

SEQUENCES = 64
"""Random sequences of the copying probe."""

LONGEST_SEGMENT = 128

DRAFT = 4
"""Tokens that a draft proposes at a time."""

_DOCUMENTS, _DOCUMENT_TOKENS = 32, 2048
_LOGIT_TOKENS = 512
_VOCABULARY_TOKENS = 10_000_000


def run_probes(
    evaluated: EvaluatedModel,
    *,
    store: Path | None = None,
    teacher: EvaluatedModel | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Score]:
    """Probe a model, add what is new to its `scores.jsonl` and write `samples.md` beside it.

    Scores of the same version that exist are not computed again.

    Args:
        evaluated: the model.
        store: token store made with its tokenizer; default: the one a run was trained on.
        teacher: also measure how many of the model's tokens this one would accept in speculative decoding.
        device: auto, cpu, cuda or mps.
        progress: told of every probe that is made; None shows nothing.

    Returns:
        The scores, existing ones included: "accuracy" of domain "copying", and "acceptance_rate" and
        "accepted_length" of domain "acceptance:<teacher id>".

    Raises:
        UserError: there is no store, it or the teacher has another tokenizer, or there is too little of the
            text or of the model's context; before any compute.
    """
    path = store or evaluated.training_store
    if path is None:
        raise UserError(f"{evaluated.id}: probes need a token store made with its tokenizer (--store)")
    text, chosen = open_store(path), pick_device(device)
    for model in (evaluated, teacher) if teacher else (evaluated,):
        compare_tokenizers(model.id, check_tokenizer(model).json, text, same_cuts=True)
    documents = read_documents(text, "test", _DOCUMENTS, _DOCUMENT_TOKENS) if teacher else []
    if not text.manifest.splits["train"].documents:
        raise UserError(f"{path}: its training split, whose ids are copied, is empty; name another")
    if teacher and not documents:
        raise UserError(f"{path}: its test split, of which drafts are judged, is empty; name another")
    if evaluated.context < len(text.begin_ids) + 3:  # two segments of two, of which the last is no input
        raise UserError(f"{evaluated.id}: a context of {evaluated.context} tokens is too short to copy in")
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        progress = progress or NullProgress()
        student = load_evaluated(evaluated, chosen, progress)
        write_samples(student, text, evaluated, progress)
        scores = _copying(evaluated, student, text, progress)
        if teacher:
            scores += _accepted(evaluated, student, teacher, text, documents, progress)
    return scores


def _copying(
    evaluated: EvaluatedModel, student: PreTrainedModel, text: Store, progress: Progress
) -> list[Score]:
    ids_V = used_ids(text)
    segment = min((evaluated.context + 1 - len(text.begin_ids)) // 2, LONGEST_SEGMENT)
    version = version_of(["copying", ids_V.tolist(), text.begin_ids, segment, SEQUENCES])

    def measure() -> dict[str, ScoreEstimate]:
        with staged(progress, f"{evaluated.id}: copying", SEQUENCES, "sequences") as told:
            vocabulary = ids_V, text.begin_ids, text.vocab_size
            return {"accuracy": copying_accuracy(student, *vocabulary, segment, progress=told)}

    return _once(evaluated, COPYING, version, SEQUENCES, measure)


def _accepted(
    evaluated: EvaluatedModel,
    student: PreTrainedModel,
    teacher: EvaluatedModel,
    text: Store,
    documents: Sequence[ScoredDocument],
    progress: Progress,
) -> list[Score]:
    context = min(evaluated.context, teacher.context)
    settings = [text.fingerprint, _DOCUMENTS, _DOCUMENT_TOKENS, context, DRAFT]
    version = version_of(["acceptance", *settings, teacher.id, teacher.step])

    def measure() -> dict[str, ScoreEstimate]:
        loaded = load_evaluated(teacher, student.device, progress)
        scored = sum(document.scored for document in documents)
        with staged(progress, f"{evaluated.id}: drafts for {teacher.id}", scored, "tokens") as told:
            return acceptance(student, loaded, documents, text.vocab_size, context, progress=told)

    return _once(evaluated, f"acceptance:{teacher.id}", version, len(documents), measure)


def _once(
    evaluated: EvaluatedModel,
    domain: str,
    version: str,
    n: int,
    measure: Callable[[], dict[str, ScoreEstimate]],
) -> list[Score]:
    """The scores of one probe: those of this version in `scores.jsonl`, or new ones."""
    found = known_scores(evaluated.scores, version, evaluated.step)
    if not found:
        found = [
            evaluated.score(domain, "probe", "test", metric, estimate, n, version, higher_is_better=True)
            for metric, estimate in measure().items()
        ]
        add_scores(evaluated.scores, found)
    return found


def used_ids(store: Store) -> NDArray[np.int64]:
    """Ids that occur in the first ten million training tokens, without those that begin or end a document."""
    tokens = store.split("train").tokens[:_VOCABULARY_TOKENS]
    counts_V = np.bincount(tokens, minlength=store.vocab_size)
    counts_V[[store.eos_id, *store.begin_ids]] = 0
    return np.flatnonzero(counts_V)


@torch.inference_mode()
def copying_accuracy(
    model: PreTrainedModel,
    ids_V: NDArray[np.int64],
    begin_ids: Sequence[int],
    vocab_size: int,
    segment: int,
    sequences: int = SEQUENCES,
    progress: Callable[[int], None] = lambda _: None,
) -> ScoreEstimate:
    """Accuracy of the model's first choice in the second copy of a segment of random tokens.

    A sequence is the ids that begin a document, `segment` ids drawn from `ids_V` with replacement, and the
    same again. All tokens of the second copy are scored except the first, which cannot be known. Chance is
    1/V.

    Args:
        model: a causal language model; put into eval mode.
        ids_V: ids to draw from.
        begin_ids: ids that begin a document.
        vocab_size: number of ids of the tokenizer; rows of the head beyond them are padding.
        segment: tokens in a copy, 2 or more.
        sequences: number of sequences; the draw is a function of the arguments alone.
        progress: called with the number of sequences read since the last call.

    Returns:
        Accuracy in [0, 1], with its noise over sequences.
    """
    generator = torch.Generator().manual_seed(0)
    picks_NS = torch.randint(len(ids_V), (sequences, segment), generator=generator)
    copy_NS = torch.from_numpy(ids_V)[picks_NS]
    begin_NB = torch.tensor([*begin_ids], dtype=torch.int64).expand(sequences, -1)
    tokens_NT = torch.cat([begin_NB, copy_NS, copy_NS], 1)
    # Without the model's logit transform, which changes no order but may make logits equal.
    predictor = NextTokenModel(*body_and_head(model.eval()), PLAIN, vocab_size)
    scored_T = torch.arange(tokens_NT.shape[1] - 1) >= tokens_NT.shape[1] - segment
    right: list[torch.Tensor] = []
    for tokens_BT in torch.split(tokens_NT, max(1, FORWARD_TOKENS // tokens_NT.shape[1])):
        inputs_BT, labels_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        hidden_ND = predictor.hidden(inputs_BT, scored_T.expand_as(inputs_BT))
        parts = torch.split(hidden_ND, _LOGIT_TOKENS)
        choice_N = torch.cat([predictor.logits(part).argmax(1) for part in parts])
        right.append((choice_N.view(len(inputs_BT), -1).cpu() == labels_BT[:, scored_T]).sum(1))
        progress(len(inputs_BT))
    return ratio(torch.cat(right).numpy(), np.full(sequences, segment - 1))


@torch.inference_mode()
def acceptance(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    documents: Sequence[ScoredDocument],
    vocab_size: int,
    context: int,
    draft: int = DRAFT,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, ScoreEstimate]:
    """Measure how much of the student's drafts the teacher would accept in speculative decoding.

    A token that the student draws from p is accepted with probability sum_x min(p(x), q(x)), where q is the
    teacher's distribution. Both are taken along held-out text, so the later tokens of a draft are judged
    after the text's own tokens, not after the draft's.

    Args:
        student: a causal language model; put into eval mode.
        teacher: another one with the same tokenizer, on the same device.
        documents: the text; none is empty.
        vocab_size: number of ids of their tokenizer; rows of a head beyond them are padding.
        context: window length in tokens; at most the trained length of both.
        draft: tokens proposed at a time.
        progress: called with the number of tokens judged since the last call.

    Returns:
        acceptance_rate: mean over tokens of sum_x min(p, q), 0 to 1.
        accepted_length: mean, over the places where `draft` tokens follow in the document, of the tokens
            accepted before the first rejection, 0 to `draft`. Missing if no document is that long.
    """
    rates = _acceptance_rates(student, teacher, documents, vocab_size, context, progress)
    found = {"acceptance_rate": _mean_over_tokens([rates_T[~np.isnan(rates_T)] for rates_T in rates])}
    runs = [_accepted_lengths(rates_T, draft) for rates_T in rates if len(rates_T) >= draft]
    runs = [lengths_T for lengths_T in runs if len(lengths_T)]
    return found | ({"accepted_length": _mean_over_tokens(runs)} if runs else {})


def _acceptance_rates(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    documents: Sequence[ScoredDocument],
    vocab_size: int,
    context: int,
    progress: Callable[[int], None],
) -> list[NDArray[np.float64]]:
    """sum_x min(p, q) of every token of every document, NaN where a token is not scored.

    No more than `_LOGIT_TOKENS` rows of logits exist.
    """
    models = [NextTokenModel.of(model, vocab_size) for model in (student, teacher)]
    rates = [np.full(len(document.tokens_N), np.nan) for document in documents]
    for batch in window_batches(documents, context, context):
        hidden = (
            torch.split(model.hidden(batch.inputs_BT, batch.scored_BT), _LOGIT_TOKENS) for model in models
        )
        shared = [
            torch.minimum(
                *(model.logits(part).softmax(1) for model, part in zip(models, parts, strict=True))
            ).sum(1)
            for parts in zip(*hidden, strict=True)
        ]
        where = batch.documents_BT[batch.scored_BT].tolist(), batch.places_BT[batch.scored_BT].tolist()
        for document, place, rate in zip(*where, torch.cat(shared).tolist(), strict=True):
            rates[document][place] = rate
        progress(len(where[0]))
    return rates


def _accepted_lengths(rates_T: NDArray[np.float64], draft: int) -> NDArray[np.float64]:
    """Expected accepted tokens of a draft at every place: the sum of the products of its first rates."""
    lengths_T: NDArray[np.float64] = sliding_window_view(rates_T, draft).cumprod(1).sum(1)
    return lengths_T[~np.isnan(lengths_T)]


def _mean_over_tokens(values: Sequence[NDArray[np.float64]]) -> ScoreEstimate:
    return ratio(np.array([x.sum() for x in values]), np.array([len(x) for x in values]))
