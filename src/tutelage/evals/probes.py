"""Probes: copying in context, how a model's drafts would fare with a teacher, and samples for people to read.

They need a token store made with the model's tokenizer: its training split says which ids are in use, its
test split is the text.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import Tokenizer

from tutelage import provenance
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import check_text_tokenizer
from tutelage.errors import UserError
from tutelage.evals.evaluated_model import EvaluatedModel, check_tokenizer
from tutelage.evals.score_files import add_scores, read_scores, version_of
from tutelage.evals.token_scores import ScoreEstimate, ratio
from tutelage.evals.windows import FORWARD_TOKENS, read_documents, window_batches
from tutelage.files import lock, make_directory, write_json, write_text
from tutelage.models.hub import body_and_head, head_logits, load, logit_transform, pick_device
from tutelage.types import COPYING, IGNORE_INDEX, PLAIN, Score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.data.store import Store
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.windows import ScoredDocument

_PROMPTS, _DRAWS = 4, 2
_PROMPT_TOKENS, _NEW_TOKENS = 48, 64


def write_samples(model: PreTrainedModel, store: Store, evaluated: EvaluatedModel) -> None:
    """Write `samples.json` and `samples.md`: prompts, how the text goes on, greedy and drawn continuations.

    Drawn continuations are seeded, at temperature 1 from the whole distribution over the tokenizer's ids. In
    front of a prompt the model sees what begins a document. Files of the same model, text and settings are
    left as they are.

    Args:
        model: the loaded model of `evaluated`.
        store: its test split gives the prompts; made with the model's tokenizer.
        evaluated: whose output directory the files go to.
    """
    room = evaluated.context - len(store.begin_ids)
    prompt = min(_PROMPT_TOKENS, room // 2)
    new = min(_NEW_TOKENS, room - prompt)
    version = version_of([store.fingerprint, evaluated.id, evaluated.step, prompt, new, _PROMPTS, _DRAWS])
    path = evaluated.output / "samples.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["version"] == version:
        return
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    samples = []
    for tokens_N in _excerpts(store, prompt + new):
        ids = [
            tokens_N[:prompt],
            tokens_N[prompt:],
            *_continuations(model, [*store.begin_ids, *tokens_N[:prompt]], new, store),
        ]
        texts = [tokenizer.decode(list(part), skip_special_tokens=False) for part in ids]
        samples.append({"prompt": texts[0], "text": texts[1], "greedy": texts[2], "drawn": texts[3:]})
    title = f"{evaluated.id}, step {evaluated.step}"
    write_text(evaluated.samples, _page(title, samples))
    write_json(path, {"version": version, "model": evaluated.id, "step": evaluated.step, "samples": samples})


def padded_ids(model: PreTrainedModel, vocab_size: int) -> list[int] | None:
    """Ids that the head has and the tokenizer has not, as generation wants them: None if there are none."""
    return [*range(vocab_size, model.get_output_embeddings().weight.shape[0])] or None


def _excerpts(store: Store, length: int) -> list[list[int]]:
    """The middle of the first test documents that are long enough; beginnings are often all alike."""
    view = store.split("test")
    bounds = itertools.pairwise(view.offsets[:, 0].astype(np.int64).tolist())
    starts = [(start + end - length) // 2 for start, end in bounds if end - start > length]
    return [view.tokens[start : start + length].tolist() for start in starts[:_PROMPTS]]


def _continuations(model: PreTrainedModel, prompt: list[int], new: int, store: Store) -> list[list[int]]:
    """Greedy, then drawn; the global random state is left as it was."""
    tokens_BT = torch.tensor([prompt], device=model.device)
    fixed: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens_BT),
        "max_new_tokens": new,
        "eos_token_id": store.eos_id,
        "pad_token_id": store.eos_id,
        "suppress_tokens": padded_ids(model, store.vocab_size),
    }
    devices = [model.device] if model.device.type == "cuda" else []
    found = [model.generate(tokens_BT, do_sample=False, **fixed)]
    with torch.random.fork_rng(devices):
        for draw in range(_DRAWS):
            torch.manual_seed(draw)
            found.append(
                model.generate(tokens_BT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **fixed)
            )
    return [tokens_BT[0, len(prompt) :].tolist() for tokens_BT in found]


def _page(title: str, samples: list[dict[str, Any]]) -> str:
    """Markdown; texts are indented, so that nothing in them is taken for markup."""
    parts = [f"# Samples of {title}"]
    for number, sample in enumerate(samples, 1):
        named = [
            ("Prompt", sample["prompt"]),
            ("The text goes on", sample["text"]),
            ("Greedy", sample["greedy"]),
        ]
        named += [(f"Drawn, seed {seed}", text) for seed, text in enumerate(sample["drawn"])]
        parts.append(f"## {number}")
        parts += [f"{name}:\n\n{textwrap.indent(text, '    ', lambda _: True)}" for name, text in named]
    return "\n\n".join(parts) + "\n"


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
) -> list[Score]:
    """Probe a model, append what is new to its `scores.jsonl` and write `samples.md` beside it.

    What is there already, of the same version, is not computed again.

    Args:
        evaluated: the model.
        store: token store made with its tokenizer; default: the one a run was trained on.
        teacher: also measure how many of the model's tokens this one would accept in speculative decoding.
        device: auto, cpu, cuda or mps.

    Returns:
        The scores, those that were there before too: "accuracy" of domain "copying", and
        "acceptance_rate" and "accepted_length" of domain "acceptance:<teacher id>".

    Raises:
        UserError: there is no store, or it or the teacher has another tokenizer; before any compute.
    """
    path = store or evaluated.training_store
    if path is None:
        raise UserError(f"{evaluated.id}: probes need a token store made with its tokenizer; name one")
    text, chosen = open_store(path), pick_device(device)
    for model in (evaluated, teacher) if teacher else (evaluated,):
        check_text_tokenizer(model.id, check_tokenizer(model).json, text)
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        student = load(evaluated.model).to(chosen)
        write_samples(student, text, evaluated)
        scores = _copying(evaluated, student, text)
        if teacher:
            scores += _accepted(evaluated, student, teacher, text)
    return scores


def _copying(evaluated: EvaluatedModel, student: PreTrainedModel, text: Store) -> list[Score]:
    ids_V = used_ids(text)
    segment = min((evaluated.context + 1 - len(text.begin_ids)) // 2, LONGEST_SEGMENT)
    version = version_of(["copying", ids_V.tolist(), text.begin_ids, segment, SEQUENCES])

    def measure() -> dict[str, ScoreEstimate]:
        found = copying_accuracy(student, ids_V, text.begin_ids, text.vocab_size, segment)
        return {"accuracy": found}

    return _once(evaluated, COPYING, version, SEQUENCES, measure)


def _accepted(
    evaluated: EvaluatedModel, student: PreTrainedModel, teacher: EvaluatedModel, text: Store
) -> list[Score]:
    documents = read_documents(text, "test", _DOCUMENTS, _DOCUMENT_TOKENS)
    context = min(evaluated.context, teacher.context)
    settings = [text.fingerprint, _DOCUMENTS, _DOCUMENT_TOKENS, context, DRAFT]
    version = version_of(["acceptance", *settings, teacher.id, teacher.step])

    def measure() -> dict[str, ScoreEstimate]:
        loaded = load(teacher.model).to(student.device)
        return acceptance(student, loaded, documents, text.vocab_size, context)

    return _once(evaluated, f"acceptance:{teacher.id}", version, len(documents), measure)


def _once(
    evaluated: EvaluatedModel,
    domain: str,
    version: str,
    n: int,
    measure: Callable[[], dict[str, ScoreEstimate]],
) -> list[Score]:
    """The scores of one probe: what `scores.jsonl` has of this version, or measured now and appended."""
    there = read_scores(evaluated.scores)
    found = [Score(**row) for row in there if (row["version"], row["step"]) == (version, evaluated.step)]
    if not found:
        found = [
            _score(evaluated, domain, metric, measured, n, version) for metric, measured in measure().items()
        ]
        add_scores(evaluated.scores, found)
    return found


def used_ids(store: Store) -> NDArray[np.int64]:
    """Ids that occur in the (first ten million tokens of the) training split, without marks of documents."""
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
) -> ScoreEstimate:
    """How often the model's first choice continues a repeated segment of random tokens.

    A sequence is what begins a document, `segment` ids drawn from `ids_V` with replacement, and the same
    again. Scored are the tokens of the second copy but its first, which nothing announces. Chance is 1/V.

    Args:
        model: a causal language model; put into eval mode.
        ids_V: ids to draw from.
        begin_ids: what begins a document.
        vocab_size: number of ids of the tokenizer; what the head has beyond them is padding.
        segment: tokens in a copy, 2 or more.
        sequences: how many; the draw is a function of the arguments alone.

    Returns:
        Accuracy in [0, 1], with its noise over sequences.
    """
    generator = torch.Generator().manual_seed(0)
    picks_NS = torch.randint(len(ids_V), (sequences, segment), generator=generator)
    copy_NS = torch.from_numpy(ids_V)[picks_NS]
    begin_NB = torch.tensor([*begin_ids], dtype=torch.int64).expand(sequences, -1)
    tokens_NT = torch.cat([begin_NB, copy_NS, copy_NS], 1)
    model.eval()
    body, head = body_and_head(model)
    logits_of = partial(head_logits, head, transform=PLAIN, vocab_size=vocab_size)  # which one is largest
    right: list[Tensor] = []
    for rows in _slices(sequences, max(1, FORWARD_TOKENS // tokens_NT.shape[1])):
        rows_BT = tokens_NT[rows].to(head.weight.device)
        hidden_BTD = body(input_ids=rows_BT[:, :-1], use_cache=False).last_hidden_state[:, -segment + 1 :]
        hidden_ND = hidden_BTD.flatten(0, 1)
        parts = (logits_of(hidden_ND[part]) for part in _slices(len(hidden_ND)))
        choice_N = torch.cat([logits_NV.argmax(1) for logits_NV in parts])
        right.append((choice_N.view(len(rows_BT), -1) == rows_BT[:, -segment + 1 :]).sum(1))
    return ratio(torch.cat(right).cpu().numpy(), np.full(sequences, segment - 1))


@torch.inference_mode()
def acceptance(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    documents: Sequence[ScoredDocument],
    vocab_size: int,
    context: int,
    draft: int = DRAFT,
) -> dict[str, ScoreEstimate]:
    """How much of what the student drafts the teacher would accept in speculative decoding.

    A token that the student draws from p is accepted with probability sum_x min(p(x), q(x)), q being the
    teacher's distribution. It is taken along held-out text, so a draft's later tokens are judged where the
    text went on, not where the draft would have gone.

    Args:
        student: a causal language model; put into eval mode.
        teacher: another one with the same tokenizer, on the same device.
        documents: the text; all not empty.
        vocab_size: number of ids of their tokenizer; what a head has beyond them is padding.
        context: window length in tokens; at most what both were trained on.
        draft: tokens proposed at a time.

    Returns:
        acceptance_rate: mean over tokens of sum_x min(p, q), 0 to 1.
        accepted_length: mean, over the places where `draft` tokens follow in the document, of the tokens
            accepted before the first rejection, 0 to `draft`. Left out where no document is that long.
    """
    rates = _acceptance_rates(student, teacher, documents, vocab_size, context)
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
) -> list[NDArray[np.float64]]:
    """sum_x min(p, q) of every token of every document, NaN where a token is not scored.

    No more than `_LOGIT_TOKENS` rows of logits exist.
    """
    student.eval()
    teacher.eval()
    rates = [np.full(len(document.tokens_N), np.nan) for document in documents]
    for batch in window_batches(documents, context, context):
        scored_BT = batch.labels_BT != IGNORE_INDEX
        hidden = [_hidden(model, batch.inputs_BT, scored_BT) for model in (student, teacher)]
        shared = [
            torch.minimum(
                _probabilities(student, hidden[0][rows], vocab_size),
                _probabilities(teacher, hidden[1][rows], vocab_size),
            ).sum(1)
            for rows in _slices(int(scored_BT.sum()))
        ]
        where = zip(batch.documents_BT[scored_BT].tolist(), batch.places_BT[scored_BT].tolist(), strict=True)
        for (document, place), rate in zip(where, torch.cat(shared).tolist(), strict=True):
            rates[document][place] = rate
    return rates


def _slices(n: int, size: int = _LOGIT_TOKENS) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


def _hidden(model: PreTrainedModel, inputs_BT: Tensor, scored_BT: Tensor) -> Tensor:
    body, head = body_and_head(model)
    device = head.weight.device
    hidden_BTD: Tensor = body(input_ids=inputs_BT.to(device), use_cache=False).last_hidden_state
    return hidden_BTD[scored_BT.to(device)]


def _probabilities(model: PreTrainedModel, hidden_ND: Tensor, vocab_size: int) -> Tensor:
    _, head = body_and_head(model)
    return head_logits(head, hidden_ND, logit_transform(model), vocab_size).softmax(1)


def _accepted_lengths(rates_T: NDArray[np.float64], draft: int) -> NDArray[np.float64]:
    """Expected accepted tokens of a draft at every place where one fits: sum of products of first rates."""
    lengths_T: NDArray[np.float64] = sliding_window_view(rates_T, draft).cumprod(1).sum(1)
    return lengths_T[~np.isnan(lengths_T)]


def _mean_over_tokens(values: Sequence[NDArray[np.float64]]) -> ScoreEstimate:
    return ratio(np.array([x.sum() for x in values]), np.array([len(x) for x in values]))


def _score(
    evaluated: EvaluatedModel, domain: str, metric: str, measured: ScoreEstimate, n: int, version: str
) -> Score:
    return Score(
        run=evaluated.id,
        step=evaluated.step,
        tokens=evaluated.tokens,
        domain=domain,
        role="probe",
        split="test",
        metric=metric,
        value=measured.value,
        stderr=measured.stderr,
        n=n,
        higher_is_better=True,
        version=version,
        low=measured.low,
        high=measured.high,
        code=provenance.code(),
    )
