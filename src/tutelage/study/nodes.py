"""From cells to a graph of runs: every run's full config and id, and what must be finished before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.config.base import parse_tokens
from tutelage.config.load import digest, merged, validate
from tutelage.config.run_config import NOT_THE_RESULT, RunConfig, RunData
from tutelage.errors import UserError
from tutelage.models.flops import forward_flops, kd_cost_factor, parameters
from tutelage.models.shapes import rung
from tutelage.run_directory import pinned, run_id
from tutelage.study.cells import cells_of, teachers_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tutelage.config.study_config import StudyConfig, TeacherSpec
    from tutelage.study.cells import Cell

_LENGTH = int(RunData.model_fields["sequence_length"].default)
_BATCH = int(RunConfig.model_fields["global_batch_tokens"].default)


@dataclass(frozen=True, slots=True)
class Node:
    """One run of a study, ready to start.

    Attributes:
        id: run id, the name of its directory.
        cell: what it stands for.
        config: the run.
        needs: run ids to be finished first.
        baseline: run id of what it is compared with; None for teachers and baselines.
        tokens: training tokens.
        parameters: of the trained model, embeddings included.
        flops: estimate of its training, forward and backward.
        teacher_flops: estimate of its teacher's forward passes; 0 without a teacher or with a control.
            Counted in every student, also where a cache pays it once for all: a student's cost is its own.
    """

    id: str
    cell: Cell
    config: RunConfig
    needs: tuple[str, ...]
    baseline: str | None
    tokens: int
    parameters: int
    flops: float
    teacher_flops: float


@dataclass(frozen=True, slots=True)
class Stores:
    """Token stores of a study, all in the tokens of its corpus.

    Attributes:
        corpus: training text.
        domains: out-of-domain texts, by name.
        teachers: training text of the teachers that have their own, by teacher.
        stages: pairs of the post-training stages, by name.
    """

    corpus: Path
    domains: Mapping[str, Path]
    teachers: Mapping[str, Path]
    stages: Mapping[str, Path]


def expand(study: StudyConfig, stores: Stores, output: Path, vocab_size: int) -> list[Node]:
    """All runs of `study`, in an order in which each comes after what it needs.

    Args:
        study: the study.
        stores: its token stores, which exist.
        output: directory of run directories.
        vocab_size: entries of the tokenizer.

    Raises:
        UserError: a run's settings are wrong; the message names the cell.
    """
    make = _Binder(study, stores, output, vocab_size, teachers_of(study), {})
    return [make.node(cell) for cell in cells_of(study)]


@dataclass(frozen=True, slots=True)
class _Binder:
    study: StudyConfig
    stores: Stores
    output: Path
    vocab_size: int
    teachers: Mapping[str, TeacherSpec]
    nodes: dict[str, Node]

    def node(self, cell: Cell) -> Node:
        """The node of a cell whose needs are nodes already."""
        draft_config(self.study, cell, self.teachers)
        cost = Cost.of(cell, self.teachers, self.vocab_size)
        settings = merged(cell.settings, self._places(cell))
        settings["tokens"] = cost.tokens if cell.compute_of else cell.tokens
        config = pinned(validate(RunConfig, settings, f"study {self.study.name}: {cell.name}"))
        node = Node(
            id=run_id(config),
            cell=cell,
            config=config,
            needs=tuple(self.nodes[name].id for name in cell.needs),
            baseline=None if cell.baseline is None else self.nodes[cell.baseline].id,
            tokens=cost.tokens,
            parameters=cost.parameters,
            flops=cost.flops,
            teacher_flops=cost.teacher_flops,
        )
        self.nodes[cell.name] = node
        return node

    def _places(self, cell: Cell) -> dict[str, Any]:
        """What names directories: stores, output, models and teachers."""
        store = self.stores.corpus
        if cell.kind == "teacher":
            store = self.stores.teachers.get(str(cell.teacher), store)
        if cell.stage is not None:
            store = self.stores.stages[cell.stage]
        places: dict[str, Any] = {
            "name": cell.name,
            "data": {"store": str(store)},
            "output": str(self.output),
            "eval": {"domains": self._domains()},
        }
        if cell.trunk is not None:
            places["runtime"] = {"trunk": self.nodes[cell.trunk].id}
        if cell.kind == "after":
            places["model"] = {"run": self.nodes[cell.needs[0]].id}
        elif cell.kind == "student" and cell.teacher is not None:
            places["teacher"] = self._teacher(cell.teacher, cell)
        return places

    def _teacher(self, name: str, cell: Cell) -> dict[str, Any]:
        spec = self.teachers[name]
        if spec.control is not None:
            return {"kind": spec.control}
        if spec.model is not None:
            teacher: dict[str, Any] = {"kind": "model", "path": spec.model}
        else:
            teacher = {"kind": "run", "run": self.nodes[cell.needs[0]].id}
        cache = {} if spec.cache is None else {"cache": spec.cache.model_dump(mode="json")}
        return teacher | cache

    def _domains(self) -> list[dict[str, str]]:
        inside = {"name": self.study.in_domain, "store": str(self.stores.corpus), "role": "in_domain"}
        outside = [
            {"name": name, "store": str(self.stores.domains[name]), "role": spec.role}
            for name, spec in self.study.domains.items()
        ]
        return [inside, *outside]


def draft_config(study: StudyConfig, cell: Cell, teachers: Mapping[str, TeacherSpec]) -> RunConfig:
    """The settings of a cell's run, with stand-ins for the stores, models and teachers that it is to get.

    Raises:
        UserError: a setting is wrong; the message names study and cell.
    """
    stand_in: dict[str, Any] = {"data": {"store": "store"}, "name": cell.name[:100]}
    if cell.kind == "after":
        stand_in["model"] = {"run": "run"}
    elif cell.kind == "student" and cell.teacher is not None:
        control = teachers[cell.teacher].control
        stand_in["teacher"] = {"kind": control} if control else {"kind": "run", "run": "run"}
    settings = merged(cell.settings, stand_in) | {"tokens": cell.tokens}
    return validate(RunConfig, settings, f"study {study.name}: {cell.name}")


def check_cells(study: StudyConfig) -> None:
    """Raise UserError if a run of the study cannot be, or is asked for twice in different words.

    Or if claims are to be tested at an alpha that nobody is taught with. Nothing needs to be built for that.
    """
    teachers, cells = teachers_of(study), cells_of(study)
    _check_tested_alphas(study, teachers, cells)
    names: dict[str, str] = {}
    for cell in cells:
        config = draft_config(study, cell, teachers)
        recipe = config.model_dump(mode="json", exclude=NOT_THE_RESULT)
        key = digest(
            [recipe, cell.kind, cell.teacher, cell.needs, cell.baseline, cell.compute_of, cell.trunk]
        )
        if (other := names.setdefault(key, cell.name)) != cell.name:
            raise UserError(
                f"study {study.name}: {other} and {cell.name} are the same run in different words; keep one"
            )


def _check_tested_alphas(
    study: StudyConfig, teachers: Mapping[str, TeacherSpec], cells: Sequence[Cell]
) -> None:
    alphas: dict[str, set[float]] = {}
    for cell in cells:
        if cell.teacher is not None and cell.alpha is not None and cell.arm == f"alpha {cell.alpha:g}":
            alphas.setdefault(cell.teacher, set()).add(cell.alpha)
    for name, spec in teachers.items():
        own = sorted(alphas.get(name, ()))
        if spec.tested_alpha is not None and all(alpha != spec.tested_alpha for alpha in own):
            known = ", ".join(f"{alpha:g}" for alpha in own) or "none"
            raise UserError(
                f"study {study.name}: teacher {name}: tested_alpha {spec.tested_alpha} is no constant alpha "
                f"of its students; they have: {known}"
            )


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimate of a cell, from shapes alone.

    Attributes:
        tokens: training tokens, whole batches.
        parameters: of the trained model, embeddings included.
        flops: of training, forward and backward.
        teacher_flops: of the teacher's forward passes.
    """

    tokens: int
    parameters: int
    flops: float
    teacher_flops: float

    @classmethod
    def of(cls, cell: Cell, teachers: Mapping[str, TeacherSpec], vocab_size: int) -> Cost:
        """Cost of a cell whose settings are right; a given model or a control as teacher counts as free.

        Raises:
            UserError: its tokens are less than a batch.
        """
        length = cell.settings["data"].get("sequence_length", _LENGTH)
        batch = cell.settings.get("global_batch_tokens", _BATCH)

        def forward(name: str) -> float:
            return forward_flops(rung(name), vocab_size, length)

        total = parameters(rung(cell.rung), vocab_size).total
        tokens = parse_tokens(cell.tokens, total)
        of = cell.compute_of or (cell.teacher if cell.kind == "student" else None)
        shape = teachers[of].rung if of is not None else None
        teacher = forward(shape) if shape is not None else 0.0
        if cell.compute_of is not None:
            tokens, teacher = round(tokens * kd_cost_factor(teacher, forward(cell.rung))), 0.0
        if tokens < batch:
            raise UserError(f"{cell.name}: {tokens:,} tokens are less than one batch of {batch:,}")
        tokens -= tokens % batch
        return cls(tokens, total, 3 * forward(cell.rung) * tokens, teacher * tokens)
