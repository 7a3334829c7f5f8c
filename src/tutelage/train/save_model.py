"""Write a trained model as a Hugging Face directory with a model card, checked against the one in memory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tutelage import provenance
from tutelage.config.load import to_yaml
from tutelage.config.teacher_config import (
    CacheTeacher,
    ControlTeacher,
    ModelTeacher,
    RunTeacher,
    SingleTeacher,
    single_teachers,
)
from tutelage.data.store import open_store
from tutelage.models import hub
from tutelage.models.export import card, plain
from tutelage.models.sharding import fill, gathered, materialise
from tutelage.models.slices import keep_float32
from tutelage.train.layers import eagerly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.data.store import Store
    from tutelage.train.student import Student

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_KINDS = {"hub", "hub_pairs"}


def export(student: Student) -> None:
    """Write the model directory of a trained run, and say in state.json how its logits compare.

    All processes have to take part; the main one writes.

    Raises:
        UserError: it cannot be written, or what was written has another weight or computes other logits.
    """
    dtype = _DTYPES[student.config.export_dtype]
    model = whole_model(student.model, keep=student.world.is_main, dtype=dtype)
    if model is None:
        return
    directory, store = student.directory, open_store(student.config.data.store)
    text = _card(student, store)
    with eagerly():
        difference = hub.save(model, directory.model, store.path, student.base, text)
    directory.write_state("running", export={"largest_logit_difference": difference})


def whole_model(
    model: PreTrainedModel, *, keep: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel | None:
    """Return the model, or a whole one on the CPU if it is sharded or of another dtype; None if not kept.

    All processes have to take part. Devices hold one whole tensor at a time; the machine of the process that
    keeps the model needs room for all of them twice, because what is written is read again.
    """
    if dtype == model.dtype and not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return model if keep else None
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    keep_float32(copy, dtype)
    if keep:
        materialise(copy, torch.device("cpu"))
    tensors = dict(copy.named_parameters()) | dict(copy.named_buffers())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        on_cpu = gathered(value)
        if keep:
            fill(tensors[name], on_cpu)
    return copy if keep else None


def _card(student: Student, store: Store) -> str:
    config = student.config
    records = [record.source for record in store.manifest.sources]
    hub_data = [
        str(source["path"]) for source in records if source["kind"] in _HUB_KINDS and "files" not in source
    ]
    alone = "pretraining" if config.stage == "pretrain" else config.stage
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "not-chosen",
        "tags": ["tutelage", "distillation" if config.teacher is not None else alone],
    }
    if hub_data:
        front["datasets"] = list(dict.fromkeys(hub_data))
    if config.model.path is not None and not Path(config.model.path).exists():
        front["base_model"] = config.model.path
    tokens = student.steps * config.global_batch_tokens
    facts = {
        "student": f"{_origin(config)}, {student.parameter_count:,} parameters",
        "teacher": _teacher(config),
        "alpha": _alpha(config),
        "objective": f"{config.objective.divergence}, temperature {config.objective.temperature:g}",
        "weights": f"{config.export_dtype}, trained as float32",
        "tokens": f"{tokens:,} in {student.steps:,} steps, sequences of {config.data.sequence_length:,}",
        "seeds": f"weights {config.seed}, data {config.data.seed}",
        "token store": f"{store.manifest.name}, {store.fingerprint[:16]}",
        "tokenizer": f"{store.vocab_size:,} ids, {store.manifest.tokenizer_sha256[:16]}",
        "command": "`" + shlex.join(["tutelage", *provenance.command()[1:]]).replace("`", "'") + "`",
        "made with": provenance.code(),
    }
    notes = "".join(f"\n\nNote: {plain(note)}." for note in student.notes)
    summary = (
        "A language model pretrained" if config.stage == "pretrain" else "A language model fine-tuned"
    ) + f" with [tutelage](https://arxiv.org/abs/2605.23857), run `{student.directory.id}`.{notes}"
    sources = [
        (_source(record.source), str(record.source.get("licence") or "not known"), f"{record.documents:,}")
        for record in store.manifest.sources
    ]
    return card(
        student.directory.id, front, summary, facts, sources, provenance.without_secrets(to_yaml(config))
    )


def _origin(config: RunConfig) -> str:
    model = config.model
    if model.shape is not None:
        return f"{model.shape}, from random weights"
    return "from " + (str(model.run) if model.path is None else _revised(model.path, model.revision))


def _teacher(config: RunConfig) -> str:
    words = [_words(one) for one in single_teachers(config.teacher)]
    return f"mean of {', '.join(words)}" if len(words) > 1 else words[0] if words else "none"


def _words(teacher: SingleTeacher) -> str:
    match teacher:
        case RunTeacher(run=run):
            return f"run {run}"
        case ModelTeacher(path=path, revision=revision):
            return _revised(path, revision)
        case ControlTeacher(kind=kind):
            return f"{kind} control"
        case CacheTeacher(path=path):
            return f"cache {path.name}"


def _revised(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path} at {revision}"


def _alpha(config: RunConfig) -> str:
    if config.teacher is None:
        return "0"
    return ", ".join(f"{name} {value}" for name, value in config.objective.alpha.model_dump().items())


def _source(source: dict[str, Any]) -> str:
    names = [str(source[field]) for field in ("kind", "name", "path", "subset") if source.get(field)]
    return " ".join(names) or "files"
