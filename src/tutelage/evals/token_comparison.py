"""Where a student gains: student, teacher and baseline side by side on every token of a text.

A fourth model, the sorter, may say how hard a token is: an untaught student of another seed.

Documents are read as for perplexity, in windows that do not overlap. Matrices of probabilities exist for
a chunk of tokens only, which gets smaller as the vocabulary gets larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from tutelage.config.load import digest
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import compare_tokenizers
from tutelage.errors import UserError
from tutelage.evals.domains import SUITES, domain_store
from tutelage.evals.evaluated_model import check_tokenizer, find_model
from tutelage.evals.token_groups import summarise
from tutelage.evals.token_quantities import Predictions, alone, kl_both_ways, together
from tutelage.evals.windows import ScoredDocument, read_documents, window_batches
from tutelage.files import atomic_directory, lock, make_directory, write_json
from tutelage.models.hub import (
    body_and_head,
    head_logits,
    load,
    logit_transform,
    pick_device,
    weights_fingerprint,
)
from tutelage.types import IGNORE_INDEX, LogitTransform, Split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from tutelage.data.store import Store
    from tutelage.evals.evaluate import EvalRequest, EvalWatcher
    from tutelage.evals.evaluated_model import EvaluatedModel

_ROLES = ("student", "teacher", "baseline")
_VERSION = 3
"""Raised when a quantity or the layout of the files changes; older results are then computed again."""
_CHUNK_TOKENS = 1024
_CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**25, "mps": 2**25}
"""At most this many probabilities of a model at a time, by device: matrices of 8 MB, which a CPU's allocator
keeps (beyond 32 MB it asks the system each time and everything takes thrice as long), or of 134 MB."""
_KINDS = {"i": np.int32, "f": np.float32}


@dataclass(frozen=True, slots=True)
class _Model:
    """A model split at its hidden states, the head cut to the store's vocabulary."""

    body: nn.Module
    head: nn.Linear
    vocab_size: int
    transform: LogitTransform

    def hidden(self, inputs_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Hidden states [N, D] of the positions to keep."""
        hidden_BTD: Tensor = self.body(input_ids=inputs_BT, use_cache=False).last_hidden_state
        return hidden_BTD[keep_BT]

    def predictions(self, hidden_ND: Tensor) -> Predictions:
        """Of N positions."""
        return Predictions.of(head_logits(self.head, hidden_ND, self.transform, self.vocab_size))


def compare_tokens(
    student: EvaluatedModel,
    teacher: EvaluatedModel,
    baseline: EvaluatedModel,
    store: Store,
    split: Split,
    *,
    sorter: EvaluatedModel | None = None,
    max_documents: int,
    max_tokens: int,
    device: str,
    output: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Measure the models on the same tokens; a finished evaluation is not computed again.

    Writes `tokens.parquet` (see `_read`), `summary.parquet` (see `tutelage.evals.token_groups.summarise`) and
    `comparison.json` (the models and the text). Memory is the models, some 100 MB and 400 bytes a token.

    Args:
        student: the model trained with the teacher.
        teacher: its teacher.
        baseline: the model trained without; same seed, data and budget, or the gain is not the teacher's.
        store: token store made with their tokenizer.
        split: "validation" or "test".
        max_documents: documents to read, from the split's first.
        max_tokens: tokens to read in each.
        device: "auto", "cpu", "cuda" or "mps".
        output: the directory is `<output>/token-comparisons/<student>--<teacher>--<baseline>/<text>-<hash8>`;
            a sorter is named after the baseline.
        sorter: untaught model of another seed that tokens are sorted by; default: the baseline.
        progress: called with the number of tokens read since the last call.

    Returns:
        The directory.

    Raises:
        UserError: the models do not share the store's tokenizer, the sorter is one of them, there is nothing
            to read, or a model gives no numbers.
    """
    evaluated_models = _with_third(dict(zip(_ROLES, (student, teacher, baseline), strict=True)), sorter)
    notes = _notes(evaluated_models, store)
    documents = read_documents(store, split, max_documents, max_tokens)
    if not documents:
        raise UserError(f"{store.path}: split '{split}' has no document to read")
    settings = _settings(evaluated_models, store, split, max_documents, max_tokens)
    models = "--".join(evaluated.id for evaluated in evaluated_models.values())
    directory = output / "token-comparisons" / models / f"{store.manifest.name}-{split}-{digest(settings)}"
    if directory.is_dir():
        return directory
    make_directory(directory.parent)
    place = directory.parent / f".{directory.name}.lock"
    with lock(place, str(directory)), atomic_directory(directory) as partial:
        tokens = _read(evaluated_models, store, documents, settings["context"], device, progress)
        _check_finite(tokens, evaluated_models)
        names = {role: evaluated.id for role, evaluated in evaluated_models.items()}
        counts = {"documents": len(documents), "tokens": len(tokens), "vocab_size": store.vocab_size}
        about = {"text": store.manifest.name, "notes": notes}
        _keep(tokens, names | counts | settings | about, partial)
    return directory


def _keep(tokens: pl.DataFrame, facts: Mapping[str, Any], directory: Path) -> None:
    """Write what was measured and what it was measured on."""
    tokens.write_parquet(directory / "tokens.parquet")
    summarise(tokens, facts["context"]).write_parquet(directory / "summary.parquet")
    write_json(directory / "comparison.json", facts)


def _notes(evaluated_models: Mapping[str, EvaluatedModel], store: Store) -> list[str]:
    """What to know about the models' tokenizers, which must give every id of the store its meaning."""
    found = [
        compare_tokenizers(f"{role} {evaluated.id}", check_tokenizer(evaluated).json, store)
        for role, evaluated in evaluated_models.items()
    ]
    return [note for note in found if note is not None]


def _settings(
    evaluated_models: Mapping[str, EvaluatedModel],
    store: Store,
    split: Split,
    max_documents: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Everything that determines the numbers."""
    return {
        "version": _VERSION,
        "weights": {
            role: weights_fingerprint(evaluated.model) for role, evaluated in evaluated_models.items()
        },
        "store": store.fingerprint,
        "split": split,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
        "context": min(max_tokens, *(evaluated.context for evaluated in evaluated_models.values())),
    }


def compare_on_texts(
    student: str, teacher: str, baseline: str, sorter: str | None, request: EvalRequest, watcher: EvalWatcher
) -> list[Path]:
    """`compare_tokens` on the test split of every text of a request.

    Args:
        student: run directory, model directory or name on the Hub; `teacher` and `baseline` alike.
        teacher: its teacher.
        baseline: the model trained without.
        sorter: untaught model of another seed that tokens are sorted by; None: the baseline.
        request: domains and stores; without any, the text that the student was trained on.
        watcher: is told how it goes.

    Returns:
        The directories, one per text.

    Raises:
        UserError: as `compare_tokens`, or there is no text.
    """
    evaluated_models = {
        role: find_model(model, request.output)
        for role, model in zip(_ROLES, (student, teacher, baseline), strict=True)
    }
    learner = evaluated_models["student"]
    paths = [*request.stores.values()]
    if not paths and not request.domains:
        if learner.training_store is None:
            raise UserError(
                f"{student}: its training text is not known; name a text with --domain or --store"
            )
        paths = [learner.training_store]
    stores = [open_store(path) for path in paths]
    for name, domain in request.domains.items():
        kept = request.output / "stores"
        stores.append(domain_store(name, domain, learner.model, kept, watcher.store))
    directories = []
    for number, store in enumerate(stores, 1):
        watcher.domain(learner.id, store.manifest.name, number, len(stores))
        found = compare_tokens(
            **evaluated_models,
            store=store,
            split="test",
            max_documents=request.max_documents or SUITES.max_documents,
            max_tokens=request.max_tokens or SUITES.max_tokens,
            device=request.device,
            output=request.output,
            sorter=None if sorter is None else find_model(sorter, request.output),
            progress=watcher.advance,
        )
        directories.append(found)
    return directories


def _with_third(
    evaluated_models: dict[str, EvaluatedModel], sorter: EvaluatedModel | None
) -> dict[str, EvaluatedModel]:
    """The models, and the sorter if there is one: one that is half of a gain cannot say where it is."""
    if sorter is None:
        return evaluated_models
    own = weights_fingerprint(sorter.model)
    for role in ("student", "baseline"):
        if weights_fingerprint(evaluated_models[role].model) == own:
            raise UserError(
                f"sorter {sorter.id}: is the {role}; tokens must be sorted by a third model, such as the "
                "untaught student of another seed"
            )
    return evaluated_models | {"sorter": sorter}


def _open(evaluated: EvaluatedModel, store: Store, device: str) -> _Model:
    model = load(evaluated.model).to(pick_device(device)).eval()
    body, head = body_and_head(model)
    return _Model(body, head, store.vocab_size, logit_transform(model))


@torch.inference_mode()
def _read(
    evaluated_models: Mapping[str, EvaluatedModel],
    store: Store,
    documents: Sequence[ScoredDocument],
    context: int,
    device: str,
    progress: Callable[[int], None],
) -> pl.DataFrame:
    """The token table, in the order of the text.

    Columns are document (its place in the split), place (of the token in it), position (in the window),
    token (its id), and `<quantity>.<of>` as in `tutelage.evals.token_quantities`, null where undefined;
    KL(p || q) is `kl.p.q`.
    """
    models = {role: _open(evaluated, store, device) for role, evaluated in evaluated_models.items()}
    place = models["student"].head.weight.device
    parts: list[dict[str, np.ndarray]] = []
    index_of = np.array([document.index for document in documents])
    for batch in window_batches(documents, context, stride=context):
        scored_BT = batch.labels_BT != IGNORE_INDEX
        gold_N = batch.labels_BT[scored_BT]
        inputs_BT, keep_BT = batch.inputs_BT.to(place), scored_BT.to(place)
        hidden = {role: model.hidden(inputs_BT, keep_BT) for role, model in models.items()}
        where = {
            "document": index_of[batch.documents_BT[scored_BT].numpy()],
            "place": batch.places_BT[scored_BT].numpy(),
            "position": scored_BT.nonzero()[:, 1].numpy(),
            "token": gold_N.numpy(),
        }
        parts.append(where | _chunked(models, hidden, gold_N.to(place)))
        progress(len(gold_N))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns = {name: pl.Series(values.astype(_KINDS[values.dtype.kind])) for name, values in joined.items()}
    return pl.DataFrame(columns).with_columns(pl.col(pl.Float32).fill_nan(None)).sort("document", "place")


def _chunked(
    models: Mapping[str, _Model], hidden: Mapping[str, Tensor], gold_N: Tensor
) -> dict[str, np.ndarray]:
    """Every quantity of every token of a batch, some tokens at a time."""
    student = models["student"]
    values = _CHUNK_VALUES[student.head.weight.device.type]
    size = min(_CHUNK_TOKENS, max(1, values // student.vocab_size))
    parts = []
    for start in range(0, len(gold_N), size):
        rows = slice(start, start + size)
        of = {role: model.predictions(hidden[role][rows]) for role, model in models.items()}
        parts.append({name: value.cpu().numpy() for name, value in _measure(of, gold_N[rows]).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure(of: Mapping[str, Predictions], gold_N: Tensor) -> dict[str, Tensor]:
    found = {
        f"{quantity}.{role}": value
        for role, predictions in of.items()
        for quantity, value in alone(predictions, gold_N).items()
    }
    for p, q in combinations(_ROLES, 2):
        found[f"kl.{p}.{q}"], found[f"kl.{q}.{p}"] = kl_both_ways(of[p], of[q])
        found |= {f"{quantity}.{p}.{q}": value for quantity, value in together(of[p], of[q]).items()}
    return found


def _check_finite(tokens: pl.DataFrame, evaluated_models: Mapping[str, EvaluatedModel]) -> None:
    for role, evaluated in evaluated_models.items():
        if tokens[f"entropy.{role}"].null_count():
            raise UserError(
                f"{role} {evaluated.id}: its probabilities are no numbers; the weights are damaged"
            )
