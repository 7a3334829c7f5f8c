"""Run ids and evaluation ids: hashes of everything that changes a result, and of nothing else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config import NOT_THE_RESULT, ModelTeacher
from tutelage.configio import digest
from tutelage.data.store import open_store
from tutelage.models.directory import hub_commit, is_local
from tutelage.models.flops import parameters
from tutelage.models.ladder import rung
from tutelage.settings import parse_tokens
from tutelage.types import SCORING_VERSION

if TYPE_CHECKING:
    from tutelage.config import RunConfig


def pinned(config: RunConfig) -> RunConfig:
    """The config with models on the Hub fixed to the commits that their names stand for now.

    A branch moves; without its commit, the same config would train from or with other weights one day and
    land in the same directory.

    Raises:
        UserError: the Hub has no such model, or cannot be reached and nothing was downloaded before.
    """
    changes: dict[str, Any] = {}
    if config.model.path is not None and not Path(config.model.path).exists():
        commit = _commit(config.model.path, config.model.revision)
        changes["model"] = config.model.model_copy(update={"revision": commit})
    teacher = config.teacher
    if isinstance(teacher, ModelTeacher) and not Path(teacher.path).exists():
        commit = _commit(teacher.path, teacher.revision)
        changes["teacher"] = teacher.model_copy(update={"revision": commit})
    return config.model_copy(update=changes)


@functools.cache  # so that every run of a study means the same commit
def _commit(name: str, revision: str | None) -> str | None:
    return None if is_local(name) else hub_commit(name, revision)


def run_id(config: RunConfig) -> str:
    """`<name>-<hash8>`: the name of the run's directory.

    The hash covers the fields that change the trained weights, as the run uses them and not as they are
    spelled: what the model's shape decides of budget and learning rate as a number. The token store and
    models given by path enter by their content, so moving them changes nothing and changing them changes
    everything; models on the Hub enter by name and commit.

    Raises:
        UserError: as `pinned`, or a directory is no model.
    """
    config = pinned(config)
    fields: dict[str, Any] = config.model_dump(mode="json", exclude=NOT_THE_RESULT)
    store = open_store(config.data.store)
    fields["data"]["store"] = store.fingerprint
    if config.model.rung is not None:
        shape = rung(config.model.rung)
        fields["tokens"] = parse_tokens(config.tokens, parameters(shape, store.vocab_size).total)
        fields["optim"]["lr"] = config.optim.lr or shape.lr
    fields["objective"].pop("chunk_tokens")
    if fields["stage"] == "pretrain":  # as in run ids from before there were stages
        fields.pop("stage")
    if fields["model"]["run"] is None:  # as in run ids from before a run could be named
        fields["model"].pop("run")
    if fields["teacher"] and fields["teacher"].get("cache") is None:  # as before targets could be kept
        fields["teacher"].pop("cache", None)
    for section in ("model", "teacher"):
        if fields[section] is not None:
            fields[section].pop("assume_same_tokenizer", None)  # a statement about the model, no change of it
            if fields[section].get("attn_implementation") is None:  # as before it could be chosen
                fields[section].pop("attn_implementation", None)
        path = (fields[section] or {}).get("path")
        if path is not None:
            fields[section]["path"] = _content(path, fields[section].get("kind"))
        if fields[section] is not None and (path is None or Path(path).exists()):
            fields[section].pop("revision", None)  # it is one of the Hub's
    return f"{config.name}-{digest(fields)}"


def evaluation_id(config: RunConfig) -> str:
    """Identity of what a run is scored on at its end, and of the rules by which it is.

    With the run id it says which scores are meant: a run may have others beside them, by `tutelage eval`.
    Stores enter by the names of their directories, which hold a hash of what they were built from.
    """
    domains = [(domain.name, domain.store.name, domain.role) for domain in config.eval.domains]
    settings = config.eval.model_dump(mode="json", exclude={"domains", "every"})
    return digest([SCORING_VERSION, domains, settings])


def _content(path: str, kind: str | None) -> str:
    """Fingerprint of a local model directory or teacher cache; a Hub name stands beside its commit."""
    if kind == "cache":
        from tutelage.teachers.manifest import cache_fingerprint  # noqa: PLC0415 - its room imports torch

        return cache_fingerprint(Path(path))
    if not Path(path).exists():
        return path
    from tutelage.models.hub import weights_fingerprint  # noqa: PLC0415 - imports torch, rarely needed

    return weights_fingerprint(Path(path))
