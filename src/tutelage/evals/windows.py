"""Cut the documents of a text into windows, and say which of a domain's documents and tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tutelage.data.store_manifest import SCORED
from tutelage.evals.contamination import Contamination, Places, copied_grams, trained_on
from tutelage.evals.domains import role_after
from tutelage.evals.score_files import version_of
from tutelage.types import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from tutelage.data.store import Store
    from tutelage.evals.contamination import TrainingText
    from tutelage.types import Role, Split

FORWARD_TOKENS = 4096
"""Tokens, padding included, in one forward pass (or one window, if that is longer)."""


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """The beginning of one document, and which of its tokens are scored.

    Attributes:
        index: its place in the split.
        tokens_N: int64 ids, with the ids that begin a document; with the end mark only if that is scored.
        scored_N: whether each token is scored; never the first one.
        bytes_N: bytes of the source text that each token stands for.
    """

    index: int
    tokens_N: NDArray[np.int64]
    scored_N: NDArray[np.bool_]
    bytes_N: NDArray[np.uint32]

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return int(self.scored_N.sum())

    @property
    def size(self) -> int:
        """UTF-8 bytes of source text behind the scored tokens."""
        return int(self.bytes_N[self.scored_N].sum())


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows, padded on the right to the longest of them.

    Attributes:
        inputs_BT: int64 ids; padding is 0, which a causal model never sees from before it.
        labels_BT: int64 ids; `IGNORE_INDEX` where nothing is scored.
        documents_BT: index, in the list of documents, of each label's document.
        places_BT: index of each label in its document.
        windows_BT: index of the window in its document; 0 for the first.
        scored_BT: whether there is a label.
    """

    inputs_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor
    places_BT: Tensor
    windows_BT: Tensor
    scored_BT: Tensor


def read_documents(
    store: Store, split: Split, max_documents: int, max_tokens: int, skip: Collection[int] = ()
) -> list[ScoredDocument]:
    """The first documents of a split that have scored tokens, each cut after `max_tokens` of its text.

    In plain text all tokens are scored except the ids that begin it (the first token, if there are none) and
    the end-of-text mark. In prompts and completions the tokens that training learns are scored: completions,
    and the end-of-text mark that closes the last one.
    `max_tokens` does not count the ids that begin a document; `skip` are places in the split to pass over.
    """
    view = store.split(split)
    assert view.bytes is not None  # noqa: S101 - only train has none
    starts = view.offsets[:, 0].astype(np.int64)
    given = len(store.begin_ids)
    documents: list[ScoredDocument] = []
    for i in (i for i in range(len(starts) - 1) if i not in skip):
        if len(documents) == max_documents:
            break
        closing = starts[i + 1] - (1 if view.mask is None else 0)
        place = slice(starts[i], min(closing, starts[i] + given + max_tokens))
        tokens_N = np.asarray(view.tokens[place], dtype=np.int64)
        scored_N = np.ones(len(tokens_N), bool) if view.mask is None else view.mask[place] != 0
        scored_N[: max(1, given)] = False
        if scored_N.any():
            documents.append(ScoredDocument(i, tokens_N, scored_N, np.asarray(view.bytes[place])))
    return documents


def window_batches(documents: Sequence[ScoredDocument], context: int, stride: int) -> Iterator[WindowBatch]:
    """Yield every scored token of every document as a label once, in batches of windows of similar length.

    A window holds at most `context` tokens. The first starts with the document; each further one scores the
    next `stride` tokens, with the `context - stride` tokens before them as context only. Windows without a
    scored token are left out. With a stride of `context`, windows do not overlap.
    """
    windows = [
        window
        for owner, document in enumerate(documents)
        for window in _windows(owner, len(document.tokens_N) - 1, context, stride)
        if document.scored_N[window.first + 1 : window.end + 1].any()
    ]
    windows.sort(key=lambda window: window.start - window.end)  # longest first, so that memory fails early
    at = 0
    while at < len(windows):
        length = windows[at].end - windows[at].start
        rows = max(1, FORWARD_TOKENS // length)
        yield _window_batch(windows[at : at + rows], documents, length)
        at += rows


class _Window(NamedTuple):
    """A window of one document.

    Attributes:
        owner: the document.
        number: index among its windows.
        start: first input.
        end: end of inputs.
        first: first input whose next token is a label.
    """

    owner: int
    number: int
    start: int
    end: int
    first: int


def _windows(owner: int, inputs: int, context: int, stride: int) -> Iterator[_Window]:
    first = number = 0
    while first < inputs:
        start = max(0, first - (context - stride))
        end = min(inputs, context if first == 0 else first + stride)
        yield _Window(owner, number, start, end, first)
        first, number = end, number + 1


def _window_batch(
    windows: Sequence[_Window], documents: Sequence[ScoredDocument], length: int
) -> WindowBatch:
    shape = (len(windows), length)
    inputs_BT, labels_BT = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX)
    documents_BT, places_BT, windows_BT = (np.zeros(shape, np.int64) for _ in range(3))
    for row, (owner, number, start, end, first) in enumerate(windows):
        document, after = documents[owner], slice(first + 1, end + 1)
        inputs_BT[row, : end - start] = document.tokens_N[start:end]
        labels_BT[row, first - start : end - start] = np.where(
            document.scored_N[after], document.tokens_N[after], IGNORE_INDEX
        )
        places_BT[row, : end - start] = np.arange(start + 1, end + 1)
        documents_BT[row], windows_BT[row] = owner, number
    arrays = inputs_BT, labels_BT, documents_BT, places_BT, windows_BT, labels_BT != IGNORE_INDEX
    return WindowBatch(*map(torch.from_numpy, arrays))


TRAINING_TEXT = "training-text"
"""Name of a model's own training store as a text to fit on."""

_SAME_TEXT = 0.1
"""From this share of documents that were trained on, a domain is in domain."""


@dataclass(frozen=True, slots=True)
class Target:
    """One domain for one model, with the windows and limits of its scores.

    Attributes:
        name: of the domain.
        role: whether the model was trained on such text.
        store: the domain in the model's tokens.
        context: window length in tokens.
        stride: tokens scored per further window.
        max_documents: documents per split.
        max_tokens: tokens per document, from its beginning.
        trained_on: places of documents that are left out because the model was trained on them, by split.
        contamination: overlap with the model's training text, by split; empty where it was not measured.
        teacher_contamination: overlap with texts that only its teachers were trained on.
    """

    name: str
    role: Role
    store: Store
    context: int
    stride: int
    max_documents: int
    max_tokens: int
    trained_on: Mapping[Split, Places] = field(default_factory=dict)
    contamination: Mapping[Split, Contamination] = field(default_factory=dict)
    teacher_contamination: Mapping[Split, Contamination] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Identity of the text and settings behind a score."""
        identity: list[Any] = [self.store.fingerprint, self.max_documents, self.max_tokens, self.context]
        if self.stride != self.context:
            identity.append({"stride": self.stride})
        left_out = [sorted(self.trained_on.get(split, ())) for split in SCORED]
        if any(left_out):
            identity.append({"left_out": left_out})
        return version_of(identity)

    @property
    def windows(self) -> dict[str, int]:
        """Arguments of `score_tokens`: vocabulary and windows."""
        return {"vocab_size": self.store.vocab_size, "context": self.context, "stride": self.stride}

    @property
    def lacks(self) -> list[str]:
        """Sentences on what is not scored because every document that it takes was trained on."""
        found = []
        for split in SCORED:
            everything = self.store.manifest.splits[split].documents
            if 0 < everything == len(self.trained_on.get(split, ())):
                what = "nothing is fitted to it" if split == "validation" else "it has no scores"
                found.append(f"every document of split '{split}' was trained on and is left out, so {what}")
        return found

    def documents(self, split: Split) -> list[ScoredDocument]:
        """The documents of a split that are scored."""
        left_out = self.trained_on.get(split, frozenset())
        return read_documents(self.store, split, self.max_documents, self.max_tokens, left_out)


def without_training_text(targets: Sequence[Target], text: TrainingText, cache: Path) -> list[Target]:
    """Leave out the documents that the model was trained on, and correct the roles.

    A text is in domain if its target says so, if it comes from a source of a training store, or if a tenth
    of its documents were trained on. `cache` keeps results for models with the same training text.
    """
    if not text.stores or not targets:
        return list(targets)
    known = trained_on(text.stores, {target.name: target.store for target in targets}, cache)
    found = []
    for target in targets:
        places = {split: known[target.name, split] for split in SCORED}
        documents = sum(target.store.manifest.splits[split].documents for split in SCORED)
        shared = sum(map(len, places.values())) >= _SAME_TEXT * documents
        roles = {target.role, *(role_after(store, target.store) for store in text.stores)}
        role: Role = "in_domain" if shared or "in_domain" in roles else "out_of_domain"
        found.append(replace(target, role=role, trained_on=places))
    return found


def with_contamination(targets: Sequence[Target], text: TrainingText, cache: Path) -> list[Target]:
    """Measure the overlap of each target with the training text of the model and of its teachers."""
    domains = {target.name: target.store for target in targets}
    texts = {
        (target.name, split): [document.tokens_N for document in target.documents(split)]
        for target in targets
        for split in SCORED
    }

    def measured(training: Sequence[Store]) -> dict[str, dict[Split, Contamination]]:
        if not training or not targets:
            return {name: {} for name in domains}
        exact, grams = trained_on(training, domains, cache), copied_grams(training, texts, cache)
        return {
            name: {
                split: Contamination(
                    store.manifest.splits[split].documents, exact[name, split], *grams[name, split]
                )
                for split in SCORED
            }
            for name, store in domains.items()
        }

    own, taught = measured(text.stores), measured(text.teachers)
    return [
        replace(target, contamination=own[target.name], teacher_contamination=taught[target.name])
        for target in targets
    ]
