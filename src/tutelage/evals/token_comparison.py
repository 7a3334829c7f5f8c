"""Compare a student, its teacher and a baseline on every token of a text, to show where the student gains.

A fourth model, the sorter, may say how hard a token is: an untaught student of another seed. Documents are
read as for perplexity, in windows that do not overlap. Matrices of probabilities exist for a chunk of tokens
only, which gets smaller as the vocabulary gets larger.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from tutelage.checksums import write_checksums
from tutelage.config.load import digest
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import compare_tokenizers
from tutelage.errors import UserError
from tutelage.evals.contamination import trained_on, training_text
from tutelage.evals.domains import SUITES, domain_store
from tutelage.evals.evaluated_model import check_tokenizer, find_model, load_evaluated
from tutelage.evals.token_quantities import Predictions, alone, kl_both_ways, summarise, together
from tutelage.evals.token_scores import NextTokenModel
from tutelage.evals.windows import read_documents, window_batches
from tutelage.files import atomic_directory, lock, make_directory, write_json
from tutelage.models.directory import weights_fingerprint
from tutelage.models.hub import pick_device
from tutelage.progress import NullProgress, staged
from tutelage.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from tutelage.data.store import Store
    from tutelage.evals.contamination import Places
    from tutelage.evals.evaluate import EvalRequest
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.windows import ScoredDocument
    from tutelage.progress import Progress
    from tutelage.types import Split

    Roles = Mapping[str, EvaluatedModel]

_ROLES = ("student", "teacher", "baseline")
_VERSION = 4
"""Raised when a quantity or the files change; older comparisons are then made again."""
_CHUNK_TOKENS = 1024
_CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**25, "mps": 2**25}
"""Probabilities of a model at a time, by device: 8 MB, which a CPU's allocator keeps (beyond 32 MB it asks
the system each time, which makes everything three times slower), or 134 MB."""
_KINDS = {"i": np.int32, "f": np.float32}


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
    left_out: Collection[int] = (),
    progress: Progress | None = None,
) -> Path:
    """Measure the models on the same tokens; a finished comparison is not computed again.

    Writes `tokens.parquet` (see `_read`), `summary.parquet` (see `summarise`) and `comparison.json`, which
    names models and text. Memory is the models, some 100 MB and 400 bytes a token.

    Args:
        student: the model trained with the teacher.
        teacher: its teacher.
        baseline: the student without a teacher; same seed, data and budget, or the gain has other causes.
        store: token store made with their tokenizer.
        split: "validation" or "test".
        max_documents: documents to read, from the split's first.
        max_tokens: tokens to read in each.
        device: "auto", "cpu", "cuda" or "mps".
        output: the directory is `<output>/token-comparisons/<id>--<id>--<id>[--<id>]/<text>-<hash8>`.
        sorter: untaught model of another seed that tokens are sorted by; default: the baseline.
        left_out: places in the split of documents to pass over, which were trained on.
        progress: told how many tokens are read, and which model may not fit; None shows nothing.

    Returns:
        The directory.

    Raises:
        UserError: the models do not share the store's tokenizer, the sorter is one of them, the split has
            nothing to read, or a model's probabilities are not numbers.
    """
    roles = _with_sorter(dict(zip(_ROLES, (student, teacher, baseline), strict=True)), sorter)
    notes = _notes(roles, store)
    documents = _documents(store, split, max_documents, max_tokens, left_out)
    settings = _settings(roles, store, split, max_documents, max_tokens, left_out)
    ids = {role: evaluated.id for role, evaluated in roles.items()}
    directory = output / "token-comparisons" / "--".join(ids.values())
    directory /= f"{store.manifest.name}-{split}-{digest(settings)}"
    if directory.is_dir():
        return directory
    place = make_directory(directory.parent) / f".{directory.name}.lock"
    with lock(place, str(directory)), atomic_directory(directory) as partial:
        tokens = _read(roles, store, documents, settings["context"], device, progress or NullProgress())
        counts = {"documents": len(documents), "tokens": len(tokens), "vocab_size": store.vocab_size}
        tokens.write_parquet(partial / "tokens.parquet")
        summarise(tokens, settings["context"]).write_parquet(partial / "summary.parquet")
        settings |= {"text": store.manifest.name, "notes": notes}
        write_json(partial / "comparison.json", ids | counts | settings)
        write_checksums(partial)
    return directory


def _notes(roles: Roles, store: Store) -> list[str]:
    """Remarks on the models' tokenizers, which must give every id of the store its meaning."""
    found = [
        compare_tokenizers(f"{role} {evaluated.id}", check_tokenizer(evaluated).json, store, same_cuts=False)
        for role, evaluated in roles.items()
    ]
    return [note for note in found if note is not None]


def _documents(
    store: Store, split: Split, max_documents: int, max_tokens: int, left_out: Collection[int]
) -> list[ScoredDocument]:
    documents = read_documents(store, split, max_documents, max_tokens, left_out)
    if not documents:
        few = "no document that was not trained on" if left_out else "no document to read"
        raise UserError(f"{store.path}: split '{split}' has {few}")
    return documents


def _settings(
    roles: Roles, store: Store, split: Split, max_documents: int, max_tokens: int, left_out: Collection[int]
) -> dict[str, Any]:
    """All settings that determine the numbers."""
    without = {"left_out": sorted(left_out)} if left_out else {}
    return without | {
        "version": _VERSION,
        "weights": {role: weights_fingerprint(evaluated.model) for role, evaluated in roles.items()},
        "store": store.fingerprint,
        "split": split,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
        "context": min(max_tokens, *(evaluated.context for evaluated in roles.values())),
    }


def compare_on_texts(
    student: str,
    teacher: str,
    baseline: str,
    sorter: str | None,
    request: EvalRequest,
    cache: Path,
    progress: Progress,
) -> list[Path]:
    """`compare_tokens` on the test split of every text of a request, without what students were trained on.

    Args:
        student: run directory, model directory or name on the Hub, as are all models.
        teacher: its teacher.
        baseline: the student without a teacher.
        sorter: untaught model of another seed that tokens are sorted by; None: the baseline.
        request: domains and stores; without any, the student's training store.
        cache: directory that keeps which documents were trained on.
        progress: receives progress.

    Returns:
        The directories, one per text.

    Raises:
        UserError: as `compare_tokens`, or there is no text.
    """
    named = zip(_ROLES, (student, teacher, baseline), strict=True)
    roles = {role: find_model(model, request.output) for role, model in named}
    learner = roles["student"]
    directories, stores = [], _texts(student, learner, request, progress)
    third = None if sorter is None else find_model(sorter, request.output)
    training = _training_stores([learner, roles["baseline"], *([third] if third else [])])
    for store in stores:
        found = compare_tokens(
            **roles,
            store=store,
            split="test",
            max_documents=request.max_documents or SUITES.max_documents,
            max_tokens=request.max_tokens or SUITES.max_tokens,
            device=request.device,
            output=request.output,
            sorter=third,
            left_out=_learned(store, training, cache, progress),
            progress=progress,
        )
        directories.append(found)
    return directories


def _texts(student: str, learner: EvaluatedModel, request: EvalRequest, progress: Progress) -> list[Store]:
    """The token stores of a request, or what the student was trained on."""
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
        stores.append(domain_store(name, domain, learner.model, kept, progress))
    return stores


def _training_stores(models: Sequence[EvaluatedModel]) -> list[Store]:
    """The token stores that runs among the models were trained on, each once."""
    runs = [RunDirectory(one.output) for one in models if one.training_store is not None]
    found = [store for run in runs for store in training_text(run.config(), run.path).stores]
    return [*{store.fingerprint: store for store in found}.values()]


def _learned(store: Store, training: Sequence[Store], cache: Path, progress: Progress) -> Places:
    """Places of test documents that are in a training split, of which a note says how many they are."""
    if not training:
        return frozenset()
    known = trained_on(training, {"": store}, cache)["", "test"]
    if known:
        count = store.manifest.splits["test"].documents
        progress.note(f"{store.manifest.name}: {len(known)} of {count} documents left out: trained on")
    return known


def _with_sorter(roles: Roles, sorter: EvaluatedModel | None) -> Roles:
    """The models and the sorter; neither half of a gain can sort the tokens by which it is shown."""
    if sorter is None:
        return roles
    own = weights_fingerprint(sorter.model)
    for role in ("student", "baseline"):
        if weights_fingerprint(roles[role].model) == own:
            raise UserError(
                f"sorter {sorter.id}: is the {role}; tokens must be sorted by a third model, such as the "
                "untaught student of another seed"
            )
    return {**roles, "sorter": sorter}


@torch.inference_mode()
def _read(
    roles: Roles,
    store: Store,
    documents: Sequence[ScoredDocument],
    context: int,
    device: str,
    progress: Progress,
) -> pl.DataFrame:
    """The token table, in the order of the text.

    Columns are document (its place in the split), place (of the token in it), position (in the window),
    token (its id), and `<quantity>.<of>` as in `tutelage.evals.token_quantities`, null where undefined;
    KL(p || q) is `kl.p.q`.
    """
    chosen = pick_device(device)
    models = {
        role: NextTokenModel.of(load_evaluated(evaluated, chosen, progress), store.vocab_size)
        for role, evaluated in roles.items()
    }
    parts: list[dict[str, np.ndarray]] = []
    index_of = np.array([document.index for document in documents])
    stage = f"{roles['student'].id}: {store.manifest.name}"
    with staged(progress, stage, sum(document.scored for document in documents), "tokens") as told:
        for batch in window_batches(documents, context, stride=context):
            scored_BT = batch.scored_BT
            gold_N = batch.labels_BT[scored_BT]
            where = {
                "document": index_of[batch.documents_BT[scored_BT].numpy()],
                "place": batch.places_BT[scored_BT].numpy(),
                "position": scored_BT.nonzero()[:, 1].numpy(),
                "token": gold_N.numpy(),
            }
            hidden = {role: model.hidden(batch.inputs_BT, scored_BT) for role, model in models.items()}
            parts.append(where | _chunked(models, hidden, gold_N.to(chosen)))
            told(len(gold_N))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns = {name: pl.Series(values.astype(_KINDS[values.dtype.kind])) for name, values in joined.items()}
    table = pl.DataFrame(columns).with_columns(pl.col(pl.Float32).fill_nan(None))
    for role, evaluated in roles.items():
        if table[f"entropy.{role}"].null_count():
            raise UserError(
                f"{role} {evaluated.id}: its probabilities are no numbers; the weights are damaged"
            )
    return table.sort("document", "place")


def _chunked(
    models: Mapping[str, NextTokenModel], hidden: Mapping[str, Tensor], gold_N: Tensor
) -> dict[str, np.ndarray]:
    """Every quantity of every token of a batch, some tokens at a time."""
    student = models["student"]
    size = min(_CHUNK_TOKENS, max(1, _CHUNK_VALUES[student.device.type] // student.vocab_size))
    parts = []
    for start in range(0, len(gold_N), size):
        rows = slice(start, start + size)
        of = {role: Predictions.of(model.logits(hidden[role][rows])) for role, model in models.items()}
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
