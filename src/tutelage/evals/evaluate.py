"""`tutelage eval`: models on domains; what was scored before is not scored again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tutelage.config.base import refuse_alike
from tutelage.config.load import load as load_config
from tutelage.config.run_config import RunConfig
from tutelage.data.store import Store, open_store
from tutelage.data.store_manifest import remarks
from tutelage.data.tokenizer_comparison import check_text_tokenizer
from tutelage.errors import UserError
from tutelage.evals.contamination import TrainingText, training_text
from tutelage.evals.domains import (
    DOMAINS,
    SUITES,
    Domain,
    check_sources,
    check_splits,
    domain_store,
    find_domain,
)
from tutelage.evals.evaluated_model import EvaluatedModel, check_tokenizer, find_models
from tutelage.evals.score_files import read_scores
from tutelage.evals.scoring import InDomain, save_scores, score_domain
from tutelage.evals.windows import TRAINING_TEXT, Target, with_contamination, without_training_text
from tutelage.files import lock, make_directory
from tutelage.models.hub import load, pick_device
from tutelage.models.positions import check_length
from tutelage.types import SCORING_VERSION, scoring_version

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from tutelage.data.store_writer import Progress
    from tutelage.types import Role


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class EvalWatcher(Protocol):
    """Who is told how an evaluation goes."""

    def store(self, stage: str, done: int) -> None:
        """`done` bytes of text have gone through `stage` of a token store."""

    def domain(self, subject: str, domain: str, number: int, of: int) -> None:
        """A domain begins."""

    def advance(self, tokens: int) -> None:
        """So many more tokens are scored."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What to score models on.

    Attributes:
        domains: named domains.
        stores: token stores by the name they are to have; made with the models' tokenizer.
        output: where token stores, and scores of models that are no run, go.
        max_documents: documents per domain and split; None: as the suite says.
        max_tokens: tokens per document, from its beginning; None: as the suite says.
        device: auto, cpu, cuda or mps.
    """

    domains: Mapping[str, Domain]
    stores: Mapping[str, Path]
    output: Path
    max_documents: int | None = None
    max_tokens: int | None = None
    device: str = "auto"


def select(
    domains: Sequence[str], suite: str | None, stores: Sequence[str]
) -> tuple[dict[str, Domain], dict[str, Path]]:
    """Domains and token stores out of what a user typed; nothing typed means the offline suite.

    Args:
        domains: names.
        suite: "offline" or "paper"; None adds no suite where domains or stores are named.
        stores: "NAME=DIRECTORY".

    Raises:
        UserError: a domain or suite is unknown, or a store has no name.
    """
    if suite not in (None, "offline", "paper"):
        raise UserError(f"--suite {suite}: no such suite; choose offline or paper")
    chosen = {name: entry for name, entry in DOMAINS.items() if entry.suite == suite}
    if suite is None and not domains and not stores:
        chosen = {name: entry for name, entry in DOMAINS.items() if entry.suite == "offline"}
    paths: dict[str, Path] = {}
    for text in stores:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UserError(
                f"--store {text}: write NAME=DIRECTORY, for example held-out=stores/speeches-1a2b3c4d"
            )
        if name in paths:
            raise UserError(f"--store {name}: given twice, for {paths[name]} and {path}; rename one")
        if not _NAME.fullmatch(name):
            raise UserError(f"--store {text}: a name has letters, digits, '.', '_' and '-' only")
        paths[name] = Path(path)
    chosen |= {name: find_domain(name) for name in domains}
    for name in paths:
        if name in chosen:
            raise UserError(f"--store {name}: a domain of that name is scored already; choose another name")
    try:
        refuse_alike("--store and --domain", [*chosen, *paths])
    except ValueError as error:
        raise UserError(str(error)) from None
    return chosen, paths


def evaluate(
    models: Sequence[str], request: EvalRequest, watcher: EvalWatcher
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Score every model on every domain, and write the scores beside each model's run.

    Args:
        models: run directories, model directories or names on the Hub.
        request: domains and settings.
        watcher: is told how it goes.

    Returns:
        All rows of the request, models and domains in order, also those that were there before; and the
        files they are in.

    Raises:
        UserError: something in the input is wrong; whatever can be known is said before anything is computed.
    """
    device = pick_device(request.device)
    evaluated_models = find_models(models, request.output)
    check_sources(request.domains)
    for evaluated in evaluated_models:
        _check(evaluated, request)
    rows = [row for evaluated in evaluated_models for row in _evaluated(evaluated, request, device, watcher)]
    return rows, [evaluated.scores for evaluated in evaluated_models]


def _check(evaluated: EvaluatedModel, request: EvalRequest) -> None:
    """Refuse before any compute what cannot work."""
    tokenizer = check_tokenizer(evaluated)
    for name, path in request.stores.items():
        store = open_store(path)
        check_text_tokenizer(f"store {name}: {evaluated.model}", tokenizer.json, store)
        check_splits(name, store)


def _evaluated(
    evaluated: EvaluatedModel, request: EvalRequest, device: torch.device, watcher: EvalWatcher
) -> list[dict[str, Any]]:
    """The rows of one model; its directory is held meanwhile."""
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        text = _training_text(evaluated)
        for sentence in text.unknown:
            watcher.note(f"{evaluated.id}: {sentence}")
        targets, training = _targets(evaluated, request, text, watcher.store)
        found = read_scores(evaluated.scores)
        _name_old_scores(evaluated, found, {target.name for target in targets}, watcher)
        there = {
            (row["domain"], row["version"], row["step"])
            for row in found
            if not text.stores or row["metric"] == "overlap_documents"  # made while the text was not known
        }
        todo = [target for target in targets if (target.name, target.version, evaluated.step) not in there]
        if todo:
            todo = with_contamination(todo, text, request.output / "stores")
            model = load(evaluated.model)
            note = check_length(model, evaluated.id, max(target.context for target in todo))
            if note is not None:
                watcher.note(note)
            model.to(device)
            in_domain = InDomain(model, training)
        for number, target in enumerate(todo, 1):
            watcher.domain(evaluated.id, target.name, number, len(todo))
            for line in remarks(target.store.manifest):
                watcher.note(f"{target.name}: {line}")
            save_scores(evaluated, target, score_domain(model, evaluated, target, in_domain, watcher.advance))
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {
        (target.name, target.version, evaluated.step): [] for target in targets
    }
    for row in read_scores(evaluated.scores):
        rows.get((row["domain"], row["version"], row["step"]), []).append(row)
    return [row for found in rows.values() for row in found]


def _name_old_scores(
    evaluated: EvaluatedModel,
    rows: Sequence[Mapping[str, Any]],
    domains: Collection[str],
    watcher: EvalWatcher,
) -> None:
    """Say which scores of the request are not shown because documents were scored otherwise."""
    old = {row["domain"]: scoring_version(row["version"]) for row in rows if row["domain"] in domains}
    old = {domain: made_by for domain, made_by in old.items() if made_by != SCORING_VERSION}
    if old:
        watcher.note(
            f"{evaluated.id}: scores of {', '.join(old)} by scoring version {max(old.values())} are left "
            f"out; this is version {SCORING_VERSION}, and the numbers do not compare"
        )


def _training_text(evaluated: EvaluatedModel) -> TrainingText:
    """What a run was trained on; of other models nothing is known."""
    if evaluated.training_store is None:
        return TrainingText(None, (), (), ())
    return training_text(load_config(RunConfig, evaluated.output / "config.yaml"), evaluated.output)


def _targets(
    evaluated: EvaluatedModel, request: EvalRequest, text: TrainingText, progress: Progress
) -> tuple[list[Target], Target | None]:
    """Every domain in the model's tokens, with what it was trained on left out; and its own training text."""
    targets = []
    for name, domain in request.domains.items():
        store = domain_store(name, domain, evaluated.model, request.output / "stores", progress)
        role = "out_of_domain" if text.stores else domain.role
        targets.append(_target(evaluated, request, name, store, role, domain.length_extrapolation))
    for name, path in request.stores.items():
        targets.append(_target(evaluated, request, name, open_store(path), "out_of_domain"))
    if text.own is not None:
        targets.append(_target(evaluated, request, TRAINING_TEXT, text.own, "in_domain"))
    targets = without_training_text(targets, text, request.output / "stores")
    return (targets, None) if text.own is None else (targets[:-1], targets[-1])


def _target(
    evaluated: EvaluatedModel, request: EvalRequest, name: str, store: Store, role: Role, factor: float = 1.0
) -> Target:
    """A text in the windows that suit the model, `factor` times as long as it was trained on."""
    context = round(min(evaluated.context, SUITES.context) * factor)
    return Target(
        name=name,
        role=role,
        store=store,
        context=context,
        stride=max(1, round(SUITES.stride * context)),
        max_documents=request.max_documents or SUITES.max_documents,
        max_tokens=request.max_tokens or SUITES.max_tokens,
    )
