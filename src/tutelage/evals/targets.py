"""What is scored of a text for one model: its windows, its limits, and what the model has seen of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tutelage.data.manifest import SCORED
from tutelage.evals.domains import role_after
from tutelage.evals.overlap import Overlap, Places, copied_grams, trained_on
from tutelage.evals.records import version_of
from tutelage.evals.windows import read_documents

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tutelage.data.store import Store
    from tutelage.evals.overlap import Key
    from tutelage.evals.trainingtext import TrainingText
    from tutelage.evals.windows import Document
    from tutelage.types import Role, Split

TRAINING_TEXT = "training-text"
"""What a model's own training store is called where it is a text to fit on and not one of the domains."""

_SAME_TEXT = 0.1
"""A domain of which this share of documents was trained on is of the training distribution."""


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
        trained_on: places of documents that are not scored because the model was trained on them, by split.
        overlap: what the model was trained on, by split; without entries where that was not measured.
        teacher_overlap: the same of texts that its teachers were trained on, and it was not.
    """

    name: str
    role: Role
    store: Store
    context: int
    stride: int
    max_documents: int
    max_tokens: int
    trained_on: Mapping[Split, Places] = field(default_factory=dict)
    overlap: Mapping[Split, Overlap] = field(default_factory=dict)
    teacher_overlap: Mapping[Split, Overlap] = field(default_factory=dict)

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
        """Which ids there are, and how a document is cut into windows, as arguments of `score_tokens`."""
        return {"vocab_size": self.store.vocab_size, "context": self.context, "stride": self.stride}

    def documents(self, split: Split) -> list[Document]:
        """What is scored."""
        left_out = self.trained_on.get(split, frozenset())
        return read_documents(self.store, split, self.max_documents, self.max_tokens, left_out)


def without_training_text(targets: Sequence[Target], text: TrainingText, cache: Path) -> list[Target]:
    """The targets without the documents that the model was trained on, and with the role that follows.

    A text is in domain if it is said to be, if it comes from a source of a training store, or if a tenth of
    its documents were trained on, whatever it is called.

    Args:
        targets: domains in the model's tokens.
        text: what it was trained on.
        cache: directory where answers are kept for other models with the same training text.
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


def with_overlaps(targets: Sequence[Target], text: TrainingText, cache: Path) -> list[Target]:
    """The targets with what the model and its teachers have seen of them, whole documents and 8-grams.

    Args:
        targets: as `without_training_text` gives them.
        text: what model and teachers were trained on.
        cache: as there.
    """
    documents: dict[Key, list[Document]] = {
        (target.name, split): target.documents(split) for target in targets for split in SCORED
    }
    own = _overlaps(targets, text.stores, documents, cache)
    taught = _overlaps(targets, text.teachers, documents, cache)
    return [
        replace(target, overlap=own.get(target.name, {}), teacher_overlap=taught.get(target.name, {}))
        for target in targets
    ]


def _overlaps(
    targets: Sequence[Target],
    stores: Sequence[Store],
    documents: Mapping[Key, list[Document]],
    cache: Path,
) -> dict[str, dict[Split, Overlap]]:
    if not stores or not targets:
        return {}
    exact = trained_on(stores, {target.name: target.store for target in targets}, cache)
    grams = copied_grams(stores, documents, cache)
    return {
        target.name: {
            split: Overlap(
                target.store.manifest.splits[split].documents,
                exact[target.name, split],
                *grams[target.name, split],
            )
            for split in SCORED
        }
        for target in targets
    }
