"""The directory of a run: its name, which is a hash of whatever changes the result, and its files."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.checksums import check_file, checked_write
from tutelage.config.base import parse_tokens
from tutelage.config.load import digest, load
from tutelage.config.run_config import NOT_THE_RESULT, RunConfig
from tutelage.config.teacher_config import ModelTeacher, SingleTeacher, each_teacher
from tutelage.config.wrong_settings import WrongSettingsError
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.files import flush, lock, make_directory, remove_leftovers
from tutelage.models.directory import hub_commit, is_local, weights_fingerprint
from tutelage.models.flops import parameters
from tutelage.models.shapes import find_shape
from tutelage.names import find, find_run_id, local_model, look_up, named_teacher
from tutelage.records import (
    UnreadableError,
    append_row,
    keep_rows,
    last_row,
    read_sealed,
    whole_rows,
    write_sealed,
)
from tutelage.types import SCORING_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


BRANCH_POINT = "branch-point-"
"""Prefix of the checkpoint that longer runs start from."""


def run_id(config: RunConfig) -> str:
    """Return `<name>-<hash8>`, the name of the run's directory.

    The hash covers the fields that change the trained weights, as the run uses them and not as they are
    spelled: budget and learning rate that depend on the model's shape enter as numbers. The token store and
    models given by path enter by their content, so moving them changes nothing; models on the Hub enter by
    name and commit.

    Raises:
        UserError: as `pinned`, or a directory is no model.
    """
    config = pinned(config)
    fields = recipe(config)
    store = open_store(config.data.store)
    if config.model.shape is not None:
        shape = find_shape(config.model.shape)
        fields["tokens"] = parse_tokens(config.tokens, parameters(shape, store.vocab_size).total)
        fields["optim"]["lr"] = config.optim.lr or shape.lr
    fields["objective"].pop("chunk_tokens")
    if not fields["data"]["document_mask"]:
        del fields["data"]["document_mask"]  # a run from before there was one keeps its name
    teacher = fields["teacher"] or {}
    for section in (fields["model"], teacher, *teacher.get("of", ())):
        section.pop("assume_same_tokenizer", None)  # a statement about the model, no change of it
        for placed in ("placement", "reshard_after_forward"):
            section.pop(placed, None)  # where its weights lie
        if section.get("dtype") == "auto":
            del section["dtype"]  # runs from before there was a choice keep their names
        path = section.get("path")
        if path is not None:
            section["path"] = _content(path, section.get("kind"))
        if path is None or Path(path).exists():
            section.pop("revision", None)  # it is one of the Hub's
    return f"{config.name}-{digest(fields)}"


def _content(path: str, kind: str | None) -> str:
    """Fingerprint of a local model directory or teacher cache; a Hub name stands beside its commit."""
    if kind == "cache":
        from tutelage.teachers.cache.layout import read_cache_manifest  # noqa: PLC0415 - its room imports torch

        return read_cache_manifest(Path(path)).fingerprint
    if not Path(path).exists():
        return path
    return weights_fingerprint(Path(path))


def recipe(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a run's result, as they are written; the token store by its content."""
    fields: dict[str, Any] = config.model_dump(mode="json", exclude=NOT_THE_RESULT)
    fields["data"]["store"] = open_store(config.data.store).fingerprint
    if fields["export_dtype"] == "float32":  # a run from before there was a choice keeps its name
        del fields["export_dtype"]
    for added in ("label_smoothing", "z_loss"):  # the same
        if not fields["objective"][added]:
            del fields["objective"][added]
    return fields


def named(config: RunConfig, *, planning: bool = False) -> RunConfig:
    """Return the config with the names of stores, runs and caches replaced by their paths and ids.

    With `planning` its token stores need not be there yet.

    Raises:
        UserError: nothing is called so, or several are.
    """
    base, runs = config.output.parent, config.output
    model, teacher, start = config.model, config.teacher, config.runtime.branch_from

    def store(path: Path, what: str) -> Path:
        return look_up("store", path, what, base) or path if planning else find("store", path, what, base)

    if model.run is not None:
        model = model.model_copy(update={"run": find_run_id(model.run, runs, "model.run")})
    elif model.path is not None:
        path = local_model(model.path, "model.path", model.revision)
        model = model.model_copy(update={"path": path})
    teacher = teacher and named_teacher(teacher, runs)
    if start is not None:
        start = find_run_id(start, runs, "runtime.branch_from")
    domains = tuple(
        domain.model_copy(update={"store": store(domain.store, f"store of eval.domains {domain.name}")})
        for domain in config.eval.domains
    )
    return config.model_copy(
        update={
            "model": model,
            "teacher": teacher,
            "data": config.data.model_copy(update={"store": store(config.data.store, "data.store")}),
            "eval": config.eval.model_copy(update={"domains": domains}),
            "runtime": config.runtime.model_copy(update={"branch_from": start}),
        }
    )


def pinned(config: RunConfig) -> RunConfig:
    """Return the config with names replaced, and models on the Hub fixed to what they are now.

    A branch moves; without its commit, the same config would train from or with other weights one day and
    land in the same directory.

    Raises:
        UserError: as `named`, or the Hub has no such model, or cannot be reached and nothing was downloaded.
    """
    config = named(config)
    changes: dict[str, Any] = {}
    if config.model.path is not None and not Path(config.model.path).exists():
        commit = _commit(config.model.path, config.model.revision)
        changes["model"] = config.model.model_copy(update={"revision": commit})
    if config.teacher is not None:
        changes["teacher"] = each_teacher(config.teacher, _pinned_teacher)
    return config.model_copy(update=changes)


def _pinned_teacher(teacher: SingleTeacher, _what: str) -> SingleTeacher:
    if not isinstance(teacher, ModelTeacher) or Path(teacher.path).exists():
        return teacher
    return teacher.model_copy(update={"revision": _commit(teacher.path, teacher.revision)})


@functools.cache  # so that every run of a study means the same commit
def _commit(name: str, revision: str | None) -> str | None:
    return None if is_local(name) else hub_commit(name, revision)


def evaluation_id(config: RunConfig) -> str:
    """Return a hash of what a run is scored on at its end, and of the scoring rules.

    A run may have other scores too, by `tutelage eval`; this hash identifies its own. Stores enter by the
    names of their directories, which contain a hash of what they were built from.
    """
    domains = [(domain.name, domain.store.name, domain.role) for domain in config.eval.domains]
    settings = config.eval.model_dump(mode="json", exclude={"domains", "every"})
    if not settings["recall"]:  # scores from before there was a choice keep their name
        del settings["recall"]
    return digest([SCORING_VERSION, domains, settings])


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths and files of one run."""

    path: Path

    @property
    def id(self) -> str:
        """The run id, `<name>-<hash8>`."""
        return self.path.name

    @property
    def model(self) -> Path:
        """The finished model; it exists only when training is complete."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Parent of `step-N` directories."""
        return self.path / "checkpoints"

    @property
    def scores(self) -> Path:
        """Rows of `tutelage.types.Score`."""
        return self.path / "scores.jsonl"

    @property
    def documents(self) -> Path:
        """Per-document losses behind the scores."""
        return self.path / "documents.parquet"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; a second process gets a `UserError`.

        A run that leaves nothing behind, because it never began, leaves no directory either.
        """
        empty = [self.path] if self.path.parent.exists() else [self.path, self.path.parent]
        make_directory(self.path)
        try:
            with lock(self.path / "lock", str(self.path)):
                remove_leftovers(self.path, self.model)
                yield
        finally:
            for place in empty:
                with contextlib.suppress(OSError):  # it holds something
                    place.rmdir()

    def status(self) -> str:
        """Where the run stands: "not started", "running" (or killed), "stopped", "failed" or "done".

        One that has lost its model, or its state, is stopped: the next start goes on from a checkpoint.
        """
        word = self.state().get("status")
        if word in ("running", "failed") or (word == "done" and self.is_done()):
            return str(word)
        return "stopped" if (self.path / "state.json").exists() else "not started"

    def saved(self, prefix: str = "") -> dict[int, Path]:
        """The checkpoints `<prefix>step-N` by step, oldest first; what has another name is none."""
        if not self.checkpoints.is_dir():
            return {}
        name = re.compile(re.escape(prefix) + "step-([0-9]{1,18})")
        matches = [(name.fullmatch(path.name), path) for path in self.checkpoints.iterdir() if path.is_dir()]
        return dict(sorted((int(match[1]), path) for match, path in matches if match is not None))

    def branch_point(self) -> tuple[int, Path] | None:
        """Step and place of the checkpoint that longer runs start from, if it was kept."""
        return next(iter(self.saved(BRANCH_POINT).items()), None)

    def state(self) -> dict[str, Any]:
        """Contents of state.json; empty before the run has started, and where they cannot be read."""
        return _read(self.path / "state.json")

    def is_trained(self) -> bool:
        """Whether the model is there, and the state is that of the last step; it is left to score it."""
        return self._has_model(self.state())

    def is_done(self) -> bool:
        """Whether the run is trained and scored, so that nothing is left to do.

        A lost model is made again from the last checkpoint. Without both this is a copy of results from
        another machine, and done as it is.
        """
        state = self.state()
        if state.get("status") != "done":
            return False
        if self._has_model(state):
            evaluations = state.get("evaluations")
            scored = isinstance(evaluations, dict) and any(evaluations.values())
            return self.scores.exists() or not scored
        return not self.saved()

    def lacks_weights(self) -> bool:
        """Whether this is done without a model: a copy of results from another machine."""
        return self.is_done() and not self.is_trained()

    def to_have_model(self) -> str:
        """What to do to have the model that is not there."""
        if self.lacks_weights():
            return f"only results are here, without weights; delete {self.path} and train that run again"
        if self._at_last_step(self.state()):
            return "the same `tutelage train` writes it again from the last checkpoint"
        return "train that run to its end first"

    def _at_last_step(self, state: Mapping[str, Any]) -> bool:
        step = state.get("step")
        return isinstance(step, int) and step == state.get("steps", step)

    def _has_model(self, state: Mapping[str, Any]) -> bool:
        return self._at_last_step(state) and (self.model / "config.json").is_file()

    def write_state(self, status: str, **fields: object) -> None:
        """Update state.json: `status` is running, stopped, done or failed; other fields stay."""
        state = self.state() | {"error": None} | fields | {"status": status}
        write_sealed(self.path / "state.json", state)

    def write_config(self, text: str, provenance: Mapping[str, object]) -> None:
        """Record what runs and where. `sessions` lists every earlier start of the same run."""
        self._write_config(text)
        path = self.path / "provenance.json"
        earlier = _read(path)
        sessions = [*earlier.pop("sessions", []), earlier] if earlier else []
        write_sealed(path, {**provenance, "sessions": sessions})

    def mend_config(self, text: str) -> bool:
        """Write config.yaml again if it is missing or damaged; return whether it was."""
        path = self.path / "config.yaml"
        with contextlib.suppress(UnreadableError):
            if path.exists():
                check_file(path)
                return False
        self._write_config(text)
        return True

    def _write_config(self, text: str) -> None:
        with checked_write(self.path / "config.yaml") as partial:
            partial.write_text(text, encoding="utf-8")

    def config(self) -> RunConfig:
        """Read config.yaml, as the run was last started.

        Raises:
            UserError: it is missing or damaged, or another version of tutelage wrote it.
        """
        path = self.path / "config.yaml"
        try:
            check_file(path)
            return load(RunConfig, path)
        except UnreadableError as error:
            raise UserError(
                f"{self.path}: {error}; `tutelage train` with the run's settings writes it again"
            ) from None
        except WrongSettingsError as error:
            raise UserError(
                f"{path}: written by another version of tutelage (this one does not read its "
                f"{', '.join(error.fields)}); train the run again, or use its model by itself, {self.model}"
            ) from None

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add one row to metrics.jsonl. Raises `UserError` if that is not allowed."""
        append_row(self.path / "metrics.jsonl", row)

    def metrics(self) -> list[dict[str, Any]]:
        """The undamaged rows of metrics.jsonl."""
        return whole_rows(self.path / "metrics.jsonl")[0]

    def last_metrics(self) -> dict[str, float]:
        """The newest whole row of metrics.jsonl; empty before there is one."""
        return last_row(self.path / "metrics.jsonl")

    def keep_metrics_until(self, step: int, logged: int = 0) -> str | None:
        """Drop metrics after `step`, and damaged rows; a sentence if rows up to step `logged` are lost."""
        return keep_rows(self.path / "metrics.jsonl", step, logged)

    def flush_log(self) -> None:
        """Wait until the rows of metrics.jsonl and the names in the directory would survive a power cut."""
        log = self.path / "metrics.jsonl"
        for path in (log, self.path) if log.is_file() else (self.path,):
            flush(path)

    def recent_ce(self) -> float | None:
        """Mean training loss of the last rows of metrics.jsonl, in nats per token; None without rows.

        At most ten rows, and of a short history its last quarter, so that a loss that still falls fast is
        not averaged over its fall.
        """
        losses = [row["ce"] for row in self.metrics() if isinstance(row.get("ce"), float)]
        last = losses[-max(1, min(10, len(losses) // 4)) :]
        return sum(last) / len(last) if last else None

    def damaged_records(self) -> list[str]:
        """A line for each JSON file of the run that is there and cannot be read."""
        return [
            f"{self.path / name} is damaged: {consequence}"
            for name, consequence in (
                ("state.json", "the run is read as unfinished"),
                ("provenance.json", "what it says of earlier sessions is lost"),
            )
            if (self.path / name).exists() and not _read(self.path / name)
        ]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file or it is damaged."""
    try:
        return read_sealed(path)
    except UnreadableError:
        return {}


def find_run(name: Path | str) -> RunDirectory:
    """The run that has this name, this beginning of a name, this id or this path, in `runs` or here.

    Raises:
        UserError: there is none, or there are several; the message lists them with what differs.
    """
    return RunDirectory(find("run", name, "run"))
