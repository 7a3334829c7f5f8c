"""Scores of a run on the domains of its config, appended once and never twice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tutelage.config.run_config import EvalDomain
from tutelage.data.store import open_store
from tutelage.data.store_manifest import SCORED, not_comparable
from tutelage.data.tokenizer import tokenizer_json
from tutelage.data.tokenizer_comparison import check_text_tokenizer
from tutelage.evals.contamination import training_text
from tutelage.evals.domains import check_splits
from tutelage.evals.evaluated_model import EvaluatedModel
from tutelage.evals.score_files import add_scores, read_scores
from tutelage.evals.scoring import InDomain, save_scores, score_domain
from tutelage.evals.windows import (
    TRAINING_TEXT,
    Target,
    with_contamination,
    without_training_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.evals.contamination import TrainingText
    from tutelage.run_directory import RunDirectory
    from tutelage.types import Score

_FAR_APART = 1.0
"""Nats per token between training and held-out loss from which a run is warned about."""


def missing(config: RunConfig, directory: RunDirectory, step: int) -> list[EvalDomain]:
    """Domains that `config` asks for and of which `directory` lacks a score of a split after `step` steps."""
    rows = read_scores(directory.scores)
    there = {(row["domain"], row["split"], row["version"]) for row in rows if row["step"] == step}
    known = versions(config, directory)
    return [
        domain
        for domain in config.eval.domains
        if any((domain.name, split, known[domain.name]) not in there for split in SCORED)
    ]


def check(config: RunConfig) -> None:
    """Raise UserError before training if a domain cannot be scored after it."""
    own = tokenizer_json(config.data.store)
    for domain in config.eval.domains:
        store = open_store(domain.store)
        check_text_tokenizer(f"eval domain {domain.name}: {config.data.store}", own, store)
        check_splits(domain.name, store)


def notes(config: RunConfig, directory: RunDirectory) -> list[str]:
    """What somebody should know of the scores before they are computed, in words."""
    changed = {
        domain.name: not_comparable(open_store(domain.store).manifest) for domain in config.eval.domains
    }
    unknown = training_text(config, directory.path).unknown if config.eval.domains else ()
    return [*unknown, *(f"domain {name}: {note}" for name, note in changed.items() if note is not None)]


def versions(config: RunConfig, directory: RunDirectory) -> dict[str, str]:
    """Identity of the text and settings behind the scores of each domain, by its name."""
    targets = _targets(config, config.eval.domains, training_text(config, directory.path))
    return {target.name: target.version for target in targets}


def score(
    config: RunConfig, directory: RunDirectory, model: PreTrainedModel, step: int, *, finished: bool
) -> list[Score]:
    """Compute and append every score that is missing after `step` steps.

    Args:
        config: says what is scored.
        directory: of the run.
        model: its model as it is after `step` steps; left in eval mode.
        step: optimizer steps it has taken.
        finished: the model is the run's last, whose losses per document and reliability curves are kept too.

    Returns:
        The scores that were missing.
    """
    domains = missing(config, directory, step)
    evaluated = EvaluatedModel(
        id=directory.id,
        model=directory.model,
        revision=None,
        step=step,
        tokens=step * config.global_batch_tokens,
        context=config.data.sequence_length,
        output=directory.path,
        training_store=config.data.store,
    )
    own = EvalDomain(name=TRAINING_TEXT, store=config.data.store, role="in_domain")
    text = training_text(config, directory.path)
    training, *targets = _targets(config, [own, *domains], text)
    in_domain = InDomain(model, training)
    found: list[Score] = []
    for target in with_contamination(targets, text, _cache(config)):
        outcome = score_domain(model, evaluated, target, in_domain)
        if finished:
            save_scores(evaluated, target, outcome)
        else:
            add_scores(evaluated.scores, outcome.scores)
        found += outcome.scores
    return found


def parted(scores: Sequence[Score], directory: RunDirectory) -> str | None:
    """A sentence if the loss on held-out text of the training distribution is far from the training loss.

    Args:
        scores: new ones of the run, of its latest step.
        directory: of the run, whose metrics say what it lost in training lately.
    """
    training = directory.recent_ce()
    for score in scores:
        if training is None or (score.role, score.split, score.metric) != (
            "in_domain",
            "validation",
            "perplexity",
        ):
            continue
        held_out = math.log(score.value)
        if abs(held_out - training) > _FAR_APART:
            return (
                f"step {score.step:,}: {held_out:.2f} nats per token on held-out text of {score.domain}, "
                f"{training:.2f} lately in training; more than {_FAR_APART:g} apart: the model knows its "
                "text by heart, or the held-out text is of another kind or in other tokens"
            )
    return None


def _targets(config: RunConfig, domains: Sequence[EvalDomain], text: TrainingText) -> list[Target]:
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
    return without_training_text(targets, text, _cache(config))


def _cache(config: RunConfig) -> Path:
    """Where all runs of an output directory keep what they found out about their texts."""
    return config.output.parent / "overlap"
