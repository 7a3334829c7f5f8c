"""Measure how well a model recalls the facts of its training text, by how often it has read them.

A question is the four words before a fact's answer, and four answers: its own and those of three other facts
that were read about as often, of the same kind. The four facts ask about each other, so each answer is right
once: a model that does not look at the words is right in one of four, whatever it prefers. Facts that were
not read, and facts of the test split, are the controls: what is right there above a fourth is language, not
recall. Answers are compared by the sum of their tokens' log-probabilities, as lm-eval's `acc` does.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tutelage.config.load import digest
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import compare_tokenizers
from tutelage.errors import UserError
from tutelage.evals.contamination import ancestors, kept
from tutelage.evals.evaluated_model import check_tokenizer, load_evaluated
from tutelage.evals.facts import WORDS, Fact, Reading, count_read, find_facts
from tutelage.evals.score_files import add_scores, known_scores, version_of
from tutelage.evals.token_scores import ScoreEstimate, ratio, score_tokens
from tutelage.evals.windows import ScoredDocument
from tutelage.files import lock, make_directory
from tutelage.models.hub import pick_device
from tutelage.names import located
from tutelage.run_directory import RunDirectory
from tutelage.types import RECALL, RECALL_BINS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.data.store import Store
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.progress import Progress
    from tutelage.types import Score

CHOICES = 4

MOST, FEWEST = 200, 20
"""Questions of a bin, at most and at least; a bin with fewer facts is left out."""

_HELD_OUT = "held_out"
_TIMES = {"0": (0, 0), "1": (1, 1), "2-3": (2, 3), "4-9": (4, 9), "10+": (10, math.inf)}

_FORMAT = 1


class RecallQuestion(NamedTuple):
    """One question.

    Attributes:
        prompt: the words before the answer; a space comes between.
        choices: four answers.
        gold: place of the right one.
        bin: one of `RECALL_BINS`.
        seen: how often the fact was read.
        document: place in its split of the first document that has it.
    """

    prompt: str
    choices: list[str]
    gold: int
    bin: str
    seen: int
    document: int


class TextRead(NamedTuple):
    """A text, and what a model has read of its training split.

    Attributes:
        store: the text.
        readings: of the run and of those it goes on from; None: all of it once, for what is no run.
    """

    store: Store
    readings: tuple[Reading, ...] | None

    @property
    def domain(self) -> str:
        """Name in scores: "recall" of what a run has read, "recall:<name>" of another text."""
        return RECALL if self.readings else f"{RECALL}:{self.store.manifest.name}"

    def version(self, context: int) -> str:
        """Identity of the questions for a model trained on sequences of `context` tokens."""
        return version_of([RECALL, _FORMAT, self.store.fingerprint, self.readings, context])


def text_read(config: RunConfig, directory: Path, step: int, store: Store | None = None) -> TextRead:
    """Find what a run has read after `step` steps.

    Args:
        config: of the run.
        directory: of the run; it need not exist yet.
        step: optimizer steps it has taken.
        store: the text; default: the run's training store, or that of the run that was fine-tuned.

    Raises:
        UserError: the store is not at hand, or no plain text.
    """
    chain = [
        (open_store(located(one.data.store, one, place)), one, place)
        for one, place in ancestors(config, directory, [])
    ]
    if store is None:
        plain = [found for found, _, _ in chain if not found.manifest.masked]
        store = plain[0] if plain else chain[0][0]
    _check_plain(store)
    readings = tuple(
        Reading(
            one.data.seed,
            one.data.sequence_length,
            one.global_batch_tokens // one.data.sequence_length,
            step if place == directory else int(RunDirectory(place).state()["step"]),
        )
        for found, one, place in chain
        if found.fingerprint == store.fingerprint
    )
    return TextRead(store, readings)


def _check_plain(store: Store) -> None:
    if store.manifest.masked:
        raise UserError(
            f"{store.path}: recall asks for facts of plain text; this is a store of prompts and completions"
        )


def questions(text: TextRead, context: int, cache: Path) -> list[RecallQuestion]:
    """The questions about a text, at most 200 of each bin; a function of the arguments alone.

    Args:
        text: the text, and what was read of it.
        context: tokens of the model's sequences; prompt and answer fit.
        cache: directory that keeps facts and questions for models with the same text.
    """
    of = {"store": text.store.fingerprint}
    about = of | {"version": text.version(context)}

    def facts() -> list[Fact]:
        rows = kept(cache / f"facts-{digest(of)}.json", lambda: find_facts(text.store), of)
        return [Fact(*row) for row in rows]

    rows = kept(cache / f"recall-{digest(about)}.json", lambda: [*_questions(text, context, facts())], about)
    return [RecallQuestion(*row) for row in rows]


def _questions(text: TextRead, context: int, facts: list[Fact]) -> Iterator[RecallQuestion]:
    tokenizer = text.store.tokenizer()
    room = (context - len(text.store.begin_ids)) // 2
    often = Counter({one.answer: 0 for one in facts})
    for one in facts:
        often[one.answer] += one.times
    facts = sorted(facts, key=lambda one: hashlib.sha256(one.context.encode()).digest())
    seen, untouched = Counter({one.context: one.times for one in facts}), set()
    if text.readings is not None:
        counted = [count_read(text.store, facts, reading) for reading in text.readings]
        seen = sum((counts for counts, _ in counted), Counter())
        untouched = {one.context for one in facts}.intersection(*(unread for _, unread in counted))
    for name, _ in RECALL_BINS:
        low, high = _TIMES.get(name, (0, math.inf))
        some = (
            one
            for one in facts
            if one.held_out == (name == _HELD_OUT)
            and (one.held_out or low <= seen[one.context] <= high)
            and (name != "0" or one.context in untouched)
            and max(_length(tokenizer, one.context), _length(tokenizer, one.answer)) < room
        )
        asked = list(_blocks(some, often))
        if len(asked) * CHOICES >= FEWEST:
            for block in asked:
                choices = [one.answer for one in block]
                for gold, one in enumerate(block):
                    count = 0 if one.held_out else seen[one.context]
                    yield RecallQuestion(one.context, choices, gold, name, count, one.document)


def _blocks(facts: Iterator[Fact], often: Counter[str]) -> Iterator[tuple[Fact, ...]]:
    """Four facts each, of one kind, with different answers that the text has about as often.

    The first facts of all answers come first, then the second ones, and so on.
    """
    rounds: defaultdict[int, list[Fact]] = defaultdict(list)
    asked: Counter[str] = Counter()
    for one in facts:
        rounds[asked[one.answer]].append(one)
        asked[one.answer] += 1
    room = MOST // CHOICES
    for number in sorted(rounds):
        some = rounds[number][: room * CHOICES]
        for kind in sorted({one.kind for one in some}):
            alike = [one for one in some if one.kind == kind]
            alike.sort(key=lambda one: (often[one.answer], len(one.answer), one.answer))
            blocks = [*islice(zip(*[iter(alike)] * CHOICES, strict=False), room)]
            room -= len(blocks)
            yield from blocks


def left_out(text: TextRead, asked: Sequence[RecallQuestion]) -> str | None:
    """A sentence about the bins that have too few facts; None if there are none.

    Raises:
        UserError: all have.
    """
    if not asked:
        raise UserError(
            f"{text.store.path}: its text has too few facts (names, dates and numbers that the {WORDS} words "
            f"before them determine) for {FEWEST} questions; recall needs longer or other text"
        )
    there = {question.bin for question in asked}
    few = [words for name, words in RECALL_BINS if name not in there]
    return (
        f"{text.domain}: fewer than {FEWEST} questions about facts {', '.join(few)}; left out"
        if few
        else None
    )


def recall(
    model: PreTrainedModel,
    asked: Sequence[RecallQuestion],
    store: Store,
    context: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, tuple[ScoreEstimate, int]]:
    """Ask a model.

    Args:
        model: on its device; put into eval mode.
        asked: the questions.
        store: their text; made with the model's tokenizer.
        context: tokens of the model's sequences.
        progress: called with the number of tokens scored since the last call.

    Returns:
        For each bin `accuracy_<bin>`, `rank_<bin>` (mean rank of the right one among the four answers, 1 to
        4) and `nats_per_token_<bin>` (of the right answer's tokens), with noise over the documents that have
        the facts; and the number of questions.
    """
    tokenizer = store.tokenizer()
    answers = [
        _answer(store, tokenizer, question.prompt, choice)
        for question in asked
        for choice in question.choices
    ]
    tokens = score_tokens(model, answers, store.vocab_size, context, progress=progress)
    logp_QC = tokens.per_document(tokens.logp_N, len(answers)).reshape(len(asked), CHOICES)
    length_QC = np.array([answer.scored for answer in answers]).reshape(len(asked), CHOICES)
    gold_Q = np.array([question.gold for question in asked])
    places = np.arange(len(asked)), gold_Q
    ones_Q = np.ones(len(asked))
    quantities = {
        "accuracy": (logp_QC.argmax(1) == gold_Q, ones_Q),
        "rank": (1 + (logp_QC > logp_QC[places][:, None]).sum(1), ones_Q),
        "nats_per_token": (-logp_QC[places], length_QC[places]),
    }
    found: dict[str, tuple[ScoreEstimate, int]] = {}
    for name in dict.fromkeys(question.bin for question in asked):
        inside_Q = np.array([question.bin == name for question in asked])
        documents = np.array([question.document for question in asked])[inside_Q]
        _, owner_Q = np.unique(documents, return_inverse=True)
        for metric, columns in quantities.items():
            sums = (np.bincount(owner_Q, column_Q[inside_Q].astype(np.float64)) for column_Q in columns)
            found[f"{metric}_{name}"] = ratio(*sums), int(inside_Q.sum())
    return found


def _answer(store: Store, tokenizer: Tokenizer, prompt: str, choice: str) -> ScoredDocument:
    """A prompt and an answer as the beginning of a document, of which the answer is scored."""
    whole = tokenizer.encode(f"{prompt} {choice}", add_special_tokens=False).ids
    tokens_N = np.array([*store.begin_ids, *whole], np.int64)
    scored_N = np.arange(len(tokens_N)) >= len(store.begin_ids) + _length(tokenizer, prompt)
    return ScoredDocument(0, tokens_N, scored_N, np.zeros(len(tokens_N), np.uint32))


def _length(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def recall_scores(
    model: PreTrainedModel,
    evaluated: EvaluatedModel,
    text: TextRead,
    asked: Sequence[RecallQuestion],
    progress: Callable[[int], None] = lambda _: None,
    *,
    writes: bool = True,
) -> list[Score]:
    """The answers of `recall` as scores; they are added to the model's if this process `writes`."""
    version = text.version(evaluated.context)
    found = recall(model, asked, text.store, evaluated.context, progress) if asked else {}
    scores = [
        evaluated.score(
            text.domain,
            "probe",
            "test",
            name,
            estimate,
            n,
            version,
            higher_is_better=name.startswith("accuracy"),
        )
        for name, (estimate, n) in found.items()
    ]
    if writes:
        add_scores(evaluated.scores, scores)
    return scores


def run_recall(
    evaluated: EvaluatedModel,
    stores: Path,
    progress: Progress,
    *,
    store: Path | None = None,
    device: str = "auto",
) -> list[Score]:
    """Measure a model's recall, and add the scores to its `scores.jsonl`; those that are there stay.

    Args:
        evaluated: the model.
        stores: directory that keeps facts and questions.
        progress: told what is done, and which bins are left out.
        store: the text, made with the model's tokenizer; default: the one a run was trained on.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: there is no text, it has too few facts, or another tokenizer made it.
    """
    named = None if store is None else open_store(store)
    if evaluated.training_store is not None:
        config = RunDirectory(evaluated.output).config()
        text = text_read(config, evaluated.output, evaluated.step, named)
    elif named is not None:
        _check_plain(named)
        text = TextRead(named, None)
    else:
        raise UserError(f"{evaluated.id}: recall needs the text that the model was trained on (--store)")
    compare_tokenizers(evaluated.id, check_tokenizer(evaluated).json, text.store, same_cuts=True)
    chosen, stage = pick_device(device), f"{evaluated.id}: recall"
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        found = known_scores(evaluated.scores, text.version(evaluated.context), evaluated.step)
        progress.start(stage)
        asked = questions(text, evaluated.context, stores)
        if (note := left_out(text, asked)) is not None:
            progress.note(note)
        if not found:
            model = load_evaluated(evaluated, chosen, progress)
            found = recall_scores(model, evaluated, text, asked)
        progress.finish(stage)
    return found
