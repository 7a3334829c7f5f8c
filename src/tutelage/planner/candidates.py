"""Find out what a plan needs of a teacher: its loss on the text, its cost, how a run names it."""

from __future__ import annotations

import contextlib
import glob
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutelage.config.base import parse_tokens, slug
from tutelage.data.store_manifest import read_manifest
from tutelage.errors import UserError, lookup
from tutelage.evals.score_files import read_scores
from tutelage.models.flops import forward_flops, parameters, training_flops
from tutelage.models.shapes import LADDER
from tutelage.names import located, look_up
from tutelage.planner.mixing_rule import Prediction
from tutelage.run_directory import RunDirectory
from tutelage.study.given_models import given_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tutelage.config.run_config import RunConfig
    from tutelage.models.shapes import ModelShape
    from tutelage.planner.study_fit import Basis

_EVALS = Path("evals")
TEXT = "text"
"""Name under which a teacher's loss on the student's text is looked for among its scores."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A teacher that a plan is asked about.

    Attributes:
        name: as the user wrote it.
        kind: a shape that is still to be trained, a run, or a given model.
        loss: nats per token on the student's text; None where nothing says it.
        measured: whether the loss was, or is a law's.
        outside: what of it is outside of the law's range; None if nothing is, or its loss was measured.
        forward_flops: of its forward pass, per token.
        training_flops: that its training still takes.
        width: of its hidden states.
        shape: None of a family whose memory the plan of a run does not know.
        tokens: that it is still to be trained on; 0 of a run or a given model.
        settings: section `teacher` of a run file.
        output: directory of its run, and so of its students' runs; None for the usual one.
    """

    name: str
    kind: Literal["shape", "run", "model"]
    loss: Prediction | None
    measured: bool
    outside: str | None
    forward_flops: float
    training_flops: float
    width: int
    shape: ModelShape | None
    tokens: int
    settings: dict[str, Any]
    output: Path | None = None


def find_candidate(text: str, student: RunConfig, vocab_size: int, basis: Basis, store: str) -> Candidate:
    """Describe the teacher that `text` names: SHAPE@TOKENS, a run, a model directory or a Hub name.

    Args:
        text: as the user wrote it.
        student: draft of the student's run.
        vocab_size: of the student.
        basis: the law that says the loss of what is not trained yet.
        store: the student's text, as a command names it.

    Raises:
        UserError: there is no such shape, run or model, or nothing says what its loss on the text is.
    """
    left, at, right = text.rpartition("@")
    if at and (left in LADDER or not any(mark in left for mark in "/.")):
        return _to_be_trained(left, right, student, vocab_size, basis)
    path = look_up("run", Path(text), "--teacher")
    if path is not None:
        return _run(text, RunDirectory(path), student, vocab_size, basis, store)
    return _model(text, student, store)


def _to_be_trained(name: str, budget: str, student: RunConfig, vocab_size: int, basis: Basis) -> Candidate:
    shape = lookup(LADDER, name, "--teacher: the shape")
    size = parameters(shape, vocab_size)
    try:
        tokens = parse_tokens(budget, size.total)
    except ValueError as error:
        raise UserError(f"--teacher {name}@{budget}: {error}") from None
    if tokens < student.global_batch_tokens:
        raise UserError(
            f"--teacher {name}@{budget}: {tokens:,} tokens are less than one batch of "
            f"{student.global_batch_tokens:,} (global_batch_tokens)"
        )
    tokens -= tokens % student.global_batch_tokens
    outside = basis.range.outside(size.non_embedding, tokens)
    measured = (float(size.non_embedding), float(tokens)) in basis.measured
    forward = forward_flops(shape, vocab_size, student.data.sequence_length)
    return Candidate(
        name=f"{name}@{budget}",
        kind="shape",
        loss=basis.alone(size.non_embedding, tokens) if outside is None or measured else None,
        measured=measured,
        outside=None if measured else outside,
        forward_flops=forward,
        training_flops=training_flops(forward) * tokens,
        width=shape.hidden,
        shape=shape,
        tokens=tokens,
        settings={"kind": "run", "run": f"planned-teacher-{slug(name)}-{slug(budget)}"},
    )


def _run(
    text: str, run: RunDirectory, student: RunConfig, vocab_size: int, basis: Basis, store: str
) -> Candidate:
    if run.lacks_weights():
        raise UserError(f"--teacher {text}: {run.to_have_model()}")
    if not run.is_trained():
        raise UserError(f"--teacher {text}: {run.path} has no model yet; `tutelage train` goes on with it")
    given = given_model(str(run.model), student.data.sequence_length)
    if given is None:
        raise UserError(f"--teacher {text}: {run.model} cannot be read")
    config, text_store = run.config(), student.data.store
    own = {domain.name: _same(domain.store, text_store) for domain in config.eval.domains}
    read_it = _same(config.data.store, text_store)
    loss = measured_loss([run.scores], lambda domain: own.get(domain, read_it))
    outside, measured = None, True
    tokens = run.state().get("tokens")
    law = (loss is None and read_it) or not basis.surfaces
    if given.shape is not None and isinstance(tokens, int) and law:
        # The published laws speak of their own text, so both losses are taken from them.
        size = parameters(given.shape, vocab_size).non_embedding
        outside, measured = basis.range.outside(size, tokens), False
        loss = basis.alone(size, tokens) if outside is None else None
    if loss is None and outside is None:
        raise _unmeasured(text, store)
    return Candidate(
        name=text,
        kind="run",
        loss=loss,
        measured=measured,
        outside=outside,
        forward_flops=given.forward_flops,
        training_flops=0.0,
        width=given.width,
        shape=given.shape,
        tokens=0,
        settings={"kind": "run", "run": run.id},
        output=run.path.parent,
    )


def _model(text: str, student: RunConfig, store: str) -> Candidate:
    given = given_model(text, student.data.sequence_length)
    if given is None:
        raise UserError(
            f"--teacher {text}: no shape with its tokens (llama-8b@50B), no run, and no model that can be "
            "read here is called so"
        )
    loss = measured_loss(sorted(_EVALS.glob(f"{glob.escape(Path(text).name)}-????????/scores.jsonl")))
    if loss is None:
        raise _unmeasured(text, store)
    return Candidate(
        name=text,
        kind="model",
        loss=loss,
        measured=True,
        outside=None,
        forward_flops=given.forward_flops,
        training_flops=0.0,
        width=given.width,
        shape=given.shape,
        tokens=0,
        settings={"kind": "model", "path": text},
    )


def _same(first: Path, second: Path) -> bool:
    """Whether two token stores hold the same, as far as both are here."""
    try:
        return read_manifest(first).fingerprint == read_manifest(second).fingerprint
    except UserError:
        return True


def learned_text(directory: Path, runs: Iterable[str]) -> str | None:
    """Fingerprint of the token store that runs of a study learned from; None if it is not here any more."""
    for run in runs:
        place = RunDirectory(directory / "runs" / run)
        with contextlib.suppress(UserError):
            config = place.config()
            return read_manifest(located(config.data.store, config, place.path)).fingerprint
    return None


def measured_loss(files: Iterable[Path], own: Callable[[str], bool] = lambda _: True) -> Prediction | None:
    """The loss on the student's text among the last scores of a model: nats per token, validation split.

    That is the text that is called `text`, or else one in domain.

    Args:
        files: of scores.
        own: whether a text in domain, by its name, is the student's.
    """
    for path in files:
        rows = [
            score
            for score in read_scores(path)
            if (score.metric, score.split) == ("perplexity", "validation")
            and (score.domain == TEXT or (score.role == "in_domain" and own(score.domain)))
        ]
        if rows:
            last = max(rows, key=lambda score: (score.step, score.domain == TEXT))
            return Prediction(math.log(last.value), None, None)
    return None


def _unmeasured(text: str, store: str) -> UserError:
    typed = shlex.join([text, "--store", f"{TEXT}={store}"])
    return UserError(
        f"--teacher {text}: its loss on the student's text is not known; measure it: "
        f"`tutelage eval score {typed}`, then plan again"
    )
