"""Score models on texts, for `tutelage eval score` and for runs; existing scores are not computed again."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config.base import refuse_alike
from tutelage.config.run_config import EvalDomain, RunConfig
from tutelage.data.store import Store, open_store
from tutelage.data.store_manifest import SCORED, not_comparable, remarks
from tutelage.data.tokenizer import tokenizer_json
from tutelage.data.tokenizer_comparison import compare_tokenizers
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
from tutelage.evals.evaluated_model import EvaluatedModel, check_tokenizer, find_models, load_evaluated
from tutelage.evals.recall import left_out, questions, recall_scores, text_read
from tutelage.evals.score_files import add_scores, read_scores
from tutelage.evals.scoring import InDomain, memory_warning, save_scores, score_domain
from tutelage.evals.windows import TRAINING_TEXT, Target, with_contamination, without_training_text
from tutelage.files import lock, make_directory
from tutelage.models.hub import pick_device
from tutelage.models.packed import check_length
from tutelage.names import find
from tutelage.progress import NullProgress, counter
from tutelage.run_directory import RunDirectory
from tutelage.types import RECALL, SCORING_VERSION, scoring_version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from tutelage.evals.recall import RecallQuestion, TextRead
    from tutelage.progress import Progress
    from tutelage.types import Role, Score

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """The texts and settings of an evaluation.

    Attributes:
        domains: named domains.
        stores: token stores by the name of their scores; made with the models' tokenizer.
        output: directory of token stores, and of scores of models that are not runs.
        max_documents: documents per domain and split; None: the number of the suites.
        max_tokens: tokens per document, from its beginning; None: the number of the suites.
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
    """Find the domains and token stores that a user names; without any, the offline suite.

    Args:
        domains: names.
        suite: "offline" or "paper"; None adds no suite where domains or stores are named.
        stores: "NAME=STORE", a directory or its name.

    Raises:
        UserError: a domain or suite is unknown, or a store has no name.
    """
    if suite not in (None, "offline", "paper"):
        raise UserError(f"--suite {suite}: no such suite; choose offline or paper")
    suite = suite if suite or domains or stores else "offline"
    chosen = {name: entry for name, entry in DOMAINS.items() if entry.suite == suite}
    paths: dict[str, Path] = {}
    for text in stores:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UserError(
                f"--store {text}: write NAME=STORE, for example held-out=stores/speeches-1a2b3c4d"
            )
        if name in paths:
            raise UserError(f"--store {name}: given twice, for {paths[name]} and {path}; rename one")
        if not _NAME.fullmatch(name):
            raise UserError(f"--store {text}: a name has ASCII letters, digits, '.', '_' and '-' only")
        paths[name] = Path(path)
    chosen |= {name: find_domain(name) for name in domains}
    for name in paths:
        if name in chosen:
            raise UserError(f"--store {name}: a domain of that name is scored already; choose another name")
    try:
        refuse_alike("--store and --domain", [*chosen, *paths])
    except ValueError as error:
        raise UserError(str(error)) from None
    return chosen, {name: find("store", path, f"--store {name}") for name, path in paths.items()}


def evaluate(
    models: Sequence[str], request: EvalRequest, progress: Progress
) -> tuple[list[Score], list[Path]]:
    """Score every model on every domain, and write the scores to each model's directory.

    Args:
        models: run directories, model directories or names on the Hub.
        request: domains and settings.
        progress: receives progress.

    Returns:
        All scores of the request, by model and domain, existing ones included; and the files they are in.

    Raises:
        UserError: an input is wrong; before any compute where that can be known.
    """
    device = pick_device(request.device)
    found = find_models(models, request.output)
    check_sources(request.domains)
    for evaluated in found:
        tokenizer = check_tokenizer(evaluated)
        for name, path in request.stores.items():
            store = open_store(path)
            compare_tokenizers(f"store {name}: {evaluated.model}", tokenizer.json, store, same_cuts=True)
            check_splits(name, store)
    scores = [score for evaluated in found for score in _evaluated(evaluated, request, device, progress)]
    return scores, [evaluated.scores for evaluated in found]


def _evaluated(
    evaluated: EvaluatedModel, request: EvalRequest, device: torch.device, progress: Progress
) -> list[Score]:
    """The scores of one model, whose directory is locked meanwhile."""
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        text = TrainingText()
        if evaluated.training_store is not None:
            text = training_text(RunDirectory(evaluated.output).config(), evaluated.output)
        for sentence in text.unknown:
            progress.note(f"{evaluated.id}: {sentence}")
        targets, training = _targets(evaluated, request, text, progress)
        found = read_scores(evaluated.scores)
        _name_old_scores(evaluated, found, {target.name for target in targets}, progress)
        there = {
            (row.domain, row.version, row.step)
            for row in found
            if not text.stores or row.metric == "overlap_documents"  # else made before the text was known
        }
        todo = [target for target in targets if (target.name, target.version, evaluated.step) not in there]
        if todo:
            todo = with_contamination(todo, text, request.output / "stores")
            if warning := memory_warning(evaluated, todo, device.type):
                progress.note(f"warning: {warning}")
            unwarned = NullProgress() if warning else progress  # else of the same weights twice
            model = load_evaluated(evaluated, device, unwarned)
            note = check_length(model, evaluated.id, max(target.context for target in todo))
            if note is not None:
                progress.note(note)
            in_domain = InDomain(model, training)
        for number, target in enumerate(todo, 1):
            stage = f"{evaluated.id}: {target.name} ({number} of {len(todo)})"
            scored_tokens = sum(one.scored for split in SCORED for one in target.documents(split))
            progress.start(stage, scored_tokens, "tokens")
            for line in (*remarks(target.store.manifest), *target.lacks):
                progress.note(f"{target.name}: {line}")
            scored = score_domain(model, evaluated, target, in_domain, counter(progress, stage))
            save_scores(evaluated, target, scored)
            progress.finish(stage)
    found = [score for score in read_scores(evaluated.scores) if score.step == evaluated.step]
    wanted = [(target.name, target.version) for target in targets]
    return [score for which in wanted for score in found if (score.domain, score.version) == which]


def _name_old_scores(
    evaluated: EvaluatedModel, rows: Sequence[Score], domains: Collection[str], progress: Progress
) -> None:
    """Note which scores of the request are left out because another scoring version made them."""
    old = {row.domain: scoring_version(row.version) for row in rows if row.domain in domains}
    old = {domain: made_by for domain, made_by in old.items() if made_by != SCORING_VERSION}
    if old:
        progress.note(
            f"{evaluated.id}: scores of {', '.join(old)} by scoring version {max(old.values())} are left "
            f"out; this is version {SCORING_VERSION}, and the numbers do not compare"
        )


def _targets(
    evaluated: EvaluatedModel, request: EvalRequest, text: TrainingText, progress: Progress
) -> tuple[list[Target], Target | None]:
    """Every domain in the model's tokens, without documents of its training text; and that text itself."""
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
    """A text in windows `factor` times the trained length, or the suites' context if that is shorter."""
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


_FAR_APART = 1.0
"""Nats per token between training and held-out loss from which a run gets a warning."""


def check_domains(config: RunConfig) -> None:
    """Raise `UserError` before training if a domain cannot be scored after it."""
    own = tokenizer_json(config.data.store)
    for domain in config.eval.domains:
        store = open_store(domain.store)
        compare_tokenizers(f"eval domain {domain.name}: {config.data.store}", own, store, same_cuts=True)
        check_splits(domain.name, store)


def domain_notes(config: RunConfig, directory: RunDirectory, steps: int) -> list[str]:
    """Sentences about a run's domains and training text that a reader of its scores should know.

    Args:
        config: names the domains.
        directory: of the run.
        steps: that it will have taken; if recall is asked for, its questions are found here.

    Raises:
        UserError: there are too few facts to ask for.
    """
    changed = {
        domain.name: not_comparable(open_store(domain.store).manifest) for domain in config.eval.domains
    }
    notes = [f"domain {name}: {note}" for name, note in changed.items() if note is not None]
    unknown = training_text(config, directory.path).unknown if config.eval.domains else ()
    if config.eval.recall:
        notes += filter(None, [left_out(*_recall(config, directory, steps))])
    return [*unknown, *notes]


def score_versions(config: RunConfig, directory: RunDirectory, step: int | None = None) -> dict[str, str]:
    """Version of a run's scores after `step` steps, default its last, by domain: text and settings."""
    targets = _run_targets(config, config.eval.domains, training_text(config, directory.path))
    versions = {target.name: target.version for target in targets}
    if config.eval.recall:
        read = text_read(config, directory.path, int(directory.state()["step"]) if step is None else step)
        versions[RECALL] = read.version(config.data.sequence_length)
    return versions


def missing_domains(config: RunConfig, directory: RunDirectory, step: int | None = None) -> list[str]:
    """Names of domains (and "recall") of which a run lacks a score of a split after `step` steps."""
    step = int(directory.state()["step"]) if step is None else step
    scores = read_scores(directory.scores)
    there = {(score.domain, score.split, score.version) for score in scores if score.step == step}
    return [
        name
        for name, version in score_versions(config, directory, step).items()
        if any((name, split, version) not in there for split in (("test",) if name == RECALL else SCORED))
    ]


def score_run(
    config: RunConfig,
    directory: RunDirectory,
    model: PreTrainedModel,
    step: int,
    *,
    finished: bool,
    writes: bool = True,
    meet: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Compute, append and return the scores of a run that are missing after `step` steps.

    Processes that share the weights of the model call this together and run the same forward passes.

    Args:
        config: names the domains.
        directory: of the run.
        model: its model after `step` steps; left in eval mode.
        step: optimizer steps it has taken.
        finished: the model is the run's last, of which losses of documents and calibration are kept too.
        writes: this process writes files; the others only compute.
        meet: waits for the others.
        progress: called with the number of tokens scored since the last call.
    """
    if not writes:
        meet()  # what the one that writes finds out about the texts is kept on disk for the others
    missing = missing_domains(config, directory, step)
    evaluated = EvaluatedModel(
        id=directory.id,
        model=directory.model,
        step=step,
        tokens=step * config.global_batch_tokens,
        context=config.data.sequence_length,
        output=directory.path,
        training_store=config.data.store,
    )
    own = EvalDomain(name=TRAINING_TEXT, store=config.data.store, role="in_domain")
    text = training_text(config, directory.path)
    domains = [domain for domain in config.eval.domains if domain.name in missing]
    training, *targets = _run_targets(config, [own, *domains], text)
    in_domain = InDomain(model, training)
    targets = with_contamination(targets, text, _overlap_cache(config))
    asked = _recall(config, directory, step) if RECALL in missing else None
    if writes:
        meet()
    meet()  # all know which scores are missing, before one of them is written
    scores: list[Score] = []
    for target in targets:
        found = score_domain(model, evaluated, target, in_domain, progress)
        if finished:
            save_scores(evaluated, target, found)
        elif writes:
            add_scores(evaluated.scores, found.scores)
        scores += found.scores
    if asked is not None:
        scores += recall_scores(model, evaluated, *asked, progress, writes=writes)
    return scores


def loss_gap_warning(scores: Sequence[Score], directory: RunDirectory) -> str | None:
    """A sentence if the loss on held-out text of the training distribution is far from the training loss.

    Args:
        scores: new ones of the run, of its latest step.
        directory: of the run, whose metrics have its recent training loss.
    """
    training = directory.recent_ce()
    tuned = directory.config().stage == "sft"
    for score in scores:
        measured = score.role, score.split, score.metric
        if training is None or measured != ("in_domain", "validation", "perplexity"):
            continue
        held_out = math.log(score.value)
        gap = held_out - training
        # The text that a tuned run was pretrained on may well lose less than completions.
        if (gap if tuned else abs(gap)) > _FAR_APART:
            return (
                f"step {score.step:,}: {held_out:.2f} nats per token on held-out text of {score.domain}, "
                f"{training:.2f} lately in training; more than {_FAR_APART:g} apart: the model knows its "
                "text by heart, or the held-out text is of another kind or in other tokens"
            )
    return None


def _run_targets(config: RunConfig, domains: Sequence[EvalDomain], text: TrainingText) -> list[Target]:
    targets = [
        Target(
            name=domain.name,
            role=domain.role,
            store=open_store(domain.store),
            context=config.data.sequence_length,
            stride=config.data.sequence_length,
            max_documents=config.eval.max_documents,
            max_tokens=config.eval.max_tokens,
        )
        for domain in domains
    ]
    return without_training_text(targets, text, _overlap_cache(config))


def _recall(config: RunConfig, directory: RunDirectory, step: int) -> tuple[TextRead, list[RecallQuestion]]:
    """What a run has read after `step` steps, and the questions about it."""
    read = text_read(config, directory.path, step)
    return read, questions(read, config.data.sequence_length, _overlap_cache(config))


def _overlap_cache(config: RunConfig) -> Path:
    """Directory of what the runs of an output directory found out about their texts."""
    return config.output.parent / "overlap"
