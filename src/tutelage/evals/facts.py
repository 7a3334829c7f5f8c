"""Find facts in the text of a token store: names, dates and numbers that the words before them determine.

A fact is four words of one sentence and what follows them, if the text has it everywhere: wherever the four
words stand, the same answer follows. Words are what spaces divide; the answer is a name (capitalised words
after one that is not), a date or a number. So facts depend on the text alone, not on its tokens.

Facts are counted in the whole training split and in what a run has read of it: the windows of its data order.
A window counts a fact whose words lie whole within it. Facts of the test split count as held out if the
training split has their four words nowhere.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tutelage.data.loader import Loader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tutelage.data.store import Store
    from tutelage.types import Split

WORDS = 4
"""Words before an answer that determine it."""

_ANSWER_WORDS = 5
_LONGEST = 128  # bytes of words and answer together
_KEPT_TOKENS = 2**26
_AT_ONCE = 256
_SPACE = "▁"
_CONTEXT = re.compile(r"[^\s.!?:;]+(?: [^\s.!?:;]+)*")
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NAME = r"[^\W\d_a-z][^\W\d_]{2,}"
_ANSWER = re.compile(
    rf"(?:(?P<date>{_MONTH} \d\d?(?:, \d{{4}})?|\d\d? {_MONTH}(?: \d{{4}})?|1\d{{3}}|20\d\d)"
    rf"|(?P<number>[$£€]?\d+(?:[.,]\d+)*)|(?P<name>{_NAME}(?:[ -]{_NAME})*))(?!\w|[.,]\d)"
)


class Fact(NamedTuple):
    """Four words and the answer that always follows them.

    Attributes:
        context: the words, with a space between each two.
        answer: what follows after a space.
        kind: name, date or number.
        times: how often the split has it.
        document: place in the split of the first document that has it.
        held_out: whether it is one of the test split, whose words the training split does not have.
    """

    context: str
    answer: str
    kind: str
    times: int
    document: int
    held_out: bool


class Reading(NamedTuple):
    """What one run has read of a training split: the windows of its first steps.

    Attributes:
        seed: of the data order.
        sequence_length: tokens of a window.
        sequences_per_step: windows of a step.
        steps: that it has taken.
    """

    seed: int
    sequence_length: int
    sequences_per_step: int
    steps: int


def find_facts(store: Store) -> list[Fact]:
    """Find all facts of the training split, and those held out.

    The text is read twice, as a stream. Of more than 67 million tokens an evenly drawn part of the facts is
    kept, each counted in all of the text, so that memory is bounded.
    """
    every = 1 + len(store.split("train").tokens) // _KEPT_TOKENS
    splits: tuple[Split, Split] = ("train", "test")
    found: dict[str, Fact] = {}
    several: set[str] = set()
    for split in splits:
        for document, words in _document_lines(store, split):
            for context, answer, kind in _answers(words):
                if zlib.crc32(context.encode()) % every:
                    continue
                one = found.setdefault(context, Fact(context, answer, kind, 0, document, split == "test"))
                if one.answer != answer:
                    several.add(context)
                elif one.held_out == (split == "test"):
                    found[context] = one._replace(times=one.times + 1)
    totals = {split: _totals(store, split, found) for split in splits}
    return [
        one
        for context, one in found.items()
        if context not in several
        and one.times == totals["test" if one.held_out else "train"][context]
        and not (one.held_out and totals["train"][context])
    ]


def _totals(store: Store, split: Split, contexts: Mapping[str, Fact]) -> Counter[str]:
    """How often a split has each of `contexts`, whatever follows."""
    counts: Counter[str] = Counter()
    for _, words in _document_lines(store, split):
        grams = map(" ".join, zip(*(words[k:] for k in range(WORDS)), strict=False))
        counts.update(gram for gram in grams if gram in contexts)
    return counts


def count_read(store: Store, facts: Iterable[Fact], reading: Reading) -> tuple[Counter[str], set[str]]:
    """How often a run has read each fact of the training split, and the facts of which it has read nothing.

    A fact that a border of windows cuts wherever the run has read it is in neither.

    Returns:
        The number of readings by context: occurrences within windows, each as often as it was read; and the
        contexts of facts that lie whole in text that was not read.
    """
    answers = {one.context: one for one in facts if not one.held_out}
    loader = Loader(store.split("train"), *reading[1:3], reading.seed)
    length, total = reading.sequence_length, len(store.split("train").tokens)
    windows = [loader.windows(step) for step in range(reading.steps)]
    times_W = np.bincount(np.concatenate([[], *windows]).astype(np.int64), minlength=loader.n_windows + 1)
    read = np.flatnonzero(times_W)
    seen: Counter[str] = Counter()
    ranges = ((int(w) * length, int(w) * length + length + 1) for w in read)
    for place, words in _lines(store, "train", ranges):
        for context, answer, _ in _answers(words):
            if context in answers and answers[context].answer == answer:
                seen[context] += int(times_W[read[place]])
    elsewhere: Counter[str] = Counter()
    # The first token after a window that was read was its last label.
    borders = [-1, *read.tolist(), loader.n_windows + 1]
    gaps = (
        ((a + 1) * length + 1 if a >= 0 else 0, min(b * length, total))
        for a, b in itertools.pairwise(borders)
    )
    for _, words in _lines(store, "train", (gap for gap in gaps if gap[0] < gap[1])):
        elsewhere.update(context for context, _, _ in _answers(words) if context in answers)
    return seen, {context for context, one in answers.items() if elsewhere[context] == one.times}


def _answers(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """Every answer in the words of a line: the words before it, the answer and its kind."""
    for i in range(WORDS, len(words)):
        first, before = words[i][:1], words[i - 1][:1]
        if not (first.isupper() or first.isdigit() or (first and first in "$£€")):
            continue
        if before.isupper() or before.isdigit():
            continue  # the middle of a name, a date or a list
        match = _ANSWER.match(" ".join(words[i : i + _ANSWER_WORDS]))
        context = " ".join(words[i - WORDS : i])
        if match is None or not _CONTEXT.fullmatch(context):
            continue
        if len(context.encode()) + len(match[0].encode()) < _LONGEST:
            yield context, match[0], str(match.lastgroup)


def _document_lines(store: Store, split: Split) -> Iterator[tuple[int, list[str]]]:
    starts = store.split(split).offsets[:, 0].astype(np.int64).tolist()
    return _lines(store, split, itertools.pairwise(starts))


def _lines(store: Store, split: Split, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, list[str]]]:
    """The words of every line in ranges of a split's tokens, with the number of the range.

    A range is cut where documents begin. Words that its ends may cut are left out.
    """
    view, tokenizer = store.split(split), store.tokenizer()
    starts = view.offsets[:, 0].astype(np.int64)
    numbered = enumerate(ranges)
    while some := list(itertools.islice(numbered, _AT_ONCE)):
        pieces: list[tuple[int, int, int]] = []
        for number, (begin, end) in some:
            inner = starts[np.searchsorted(starts, begin + 1) : np.searchsorted(starts, end)].tolist()
            pieces += [(number, a, b) for a, b in itertools.pairwise([begin, *inner, end])]
        ends = np.array([piece[1:] for piece in pieces])
        whole = starts[np.searchsorted(starts, ends)] == ends  # of documents
        ids = [view.tokens[a:b].tolist() for _, a, b in pieces]
        # The decoders of SentencePiece's kind take the space away that its first token begins with.
        spaced = [(tokenizer.id_to_token(some_ids[0]) or "").startswith(_SPACE) for some_ids in ids]
        read = zip(pieces, tokenizer.decode_batch(ids), spaced, whole.tolist(), strict=True)
        for (number, _, _), text, is_spaced, (begins, closes) in read:
            opens = begins or is_spaced or text[:1].isspace()
            inside = text if opens else "".join(text.split(None, 1)[1:])
            if not (closes or inside[-1:].isspace()):
                inside = "".join(inside.rsplit(None, 1)[:-1])
            for line in inside.splitlines():
                yield number, line.split(" ")
