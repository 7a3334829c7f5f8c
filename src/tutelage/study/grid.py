"""From a study to its runs: every run's full config and what must be finished before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tutelage.config import RunConfig
from tutelage.configio import validate
from tutelage.identity import run_id
from tutelage.models.flops import forward_flops, parameters
from tutelage.models.ladder import rung
from tutelage.settings import parse_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tutelage.study.spec import StudyConfig, TeacherSpec


@dataclass(frozen=True, slots=True)
class Node:
    """One run of a study.

    Attributes:
        id: run id.
        kind: a teacher, the student without a teacher, or a student with one.
        teacher: for a teacher its own name, for a student its teacher's, else None.
        alpha: weight of the distillation loss; None where there is none.
        seed: student seed (for teachers, the teacher seed).
        config: the run.
        needs: run ids to be finished first.
        flops: estimate of the run's cost, student and teacher together.
    """

    id: str
    kind: Literal["teacher", "baseline", "student"]
    teacher: str | None
    alpha: float | None
    seed: int
    config: RunConfig
    needs: tuple[str, ...]
    flops: float


@dataclass(frozen=True, slots=True)
class Stores:
    """Token stores of a study: the corpus, and one per out-of-domain text."""

    corpus: Path
    domains: Mapping[str, Path]


def expand(study: StudyConfig, stores: Stores, output: Path, vocab_size: int) -> list[Node]:
    """All runs of `study`, teachers first, dearest first among each kind.

    Raises:
        UserError: a run's settings are wrong.
    """
    make = _Factory(study, stores, output, vocab_size)
    teachers = {
        name: make.node("teacher", name, None, study.teacher_seed)
        for name, spec in study.teachers.items()
        if spec.control is None
    }
    students = [make.node("baseline", None, None, seed) for seed in study.seeds]
    for name, spec in study.teachers.items():
        for alpha in spec.alphas or study.alphas:
            students += [make.node("student", name, alpha, seed, teachers.get(name)) for seed in study.seeds]
    by_cost = sorted(teachers.values(), key=lambda node: -node.flops)
    return [*by_cost, *sorted(students, key=lambda node: -node.flops)]


@dataclass(frozen=True, slots=True)
class _Factory:
    study: StudyConfig
    stores: Stores
    output: Path
    vocab_size: int

    def node(
        self,
        kind: Literal["teacher", "baseline", "student"],
        teacher: str | None,
        alpha: float | None,
        seed: int,
        trained: Node | None = None,
    ) -> Node:
        spec = self.study.teachers[teacher] if teacher is not None else None
        own = spec if kind == "teacher" and spec is not None else self.study.student
        overlay: dict[str, Any] = {
            "name": _name(kind, teacher, alpha, seed),
            "seed": seed,
            "model": {"rung": own.rung},
            "data": {"store": str(self.stores.corpus), "seed": seed},
            "tokens": own.tokens,
            "output": str(self.output),
            "eval": {"domains": self._domains()},
        }
        if alpha is not None:
            overlay["objective"] = {"alpha": alpha}
            overlay["teacher"] = _teacher(spec, trained)
        config = validate(
            RunConfig, _merge(self.study.run, overlay), f"study {self.study.name}: {overlay['name']}"
        )
        return Node(
            id=run_id(config),
            kind=kind,
            teacher=teacher,
            alpha=alpha,
            seed=seed,
            config=config,
            needs=(trained.id,) if trained else (),
            flops=self._flops(config, trained),
        )

    def _domains(self) -> list[dict[str, str]]:
        inside = {"name": self.study.in_domain, "store": str(self.stores.corpus), "role": "in_domain"}
        outside = [
            {"name": name, "store": str(self.stores.domains[name]), "role": spec.role}
            for name, spec in self.study.domains.items()
        ]
        return [inside, *outside]

    def _flops(self, config: RunConfig, trained: Node | None) -> float:
        def forward(one: RunConfig) -> float:
            return forward_flops(rung(str(one.model.rung)), self.vocab_size, one.data.sequence_length)

        total = parameters(rung(str(config.model.rung)), self.vocab_size).total
        per_token = 3 * forward(config) + (forward(trained.config) if trained else 0.0)
        return parse_tokens(config.tokens, total) * per_token


def _teacher(spec: TeacherSpec | None, trained: Node | None) -> dict[str, str]:
    if trained is not None:
        return {"kind": "run", "run": trained.id}
    assert spec is not None and spec.control is not None  # noqa: S101, PT018 - a student's teacher is one or the other
    return {"kind": spec.control}


def _name(kind: str, teacher: str | None, alpha: float | None, seed: int) -> str:
    if kind == "teacher":
        return f"teacher-{teacher}"
    return f"student-s{seed}" if alpha is None else f"student-{teacher}-a{alpha:g}-s{seed}"


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
