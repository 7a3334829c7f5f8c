"""What `plan.json` says of a study: of its runs, or of its cells before anything has a run id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.study.cells import cells_of, teachers_of, trained_as
from tutelage.study.graph import Cost, sequence_length
from tutelage.study.planfile import Plan, PlanDomain, PlanRun, PlanStudent, PlanTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.study.cells import Cell
    from tutelage.study.graph import Node
    from tutelage.study.spec import StudyConfig, TeacherSpec

    Planned = tuple[Cell, PlanRun]


def plan_of(study: StudyConfig, nodes: Sequence[Node]) -> Plan:
    """The plan of a study whose runs are known."""
    return _plan(
        study,
        [
            (
                node.cell,
                _run(
                    node.cell,
                    node.id,
                    Cost(node.tokens, node.parameters, node.flops, node.teacher_flops),
                    node.baseline,
                    node.needs[0] if node.cell.kind == "after" else None,
                ),
            )
            for node in nodes
        ],
    )


def draft_of(study: StudyConfig) -> Plan:
    """The plan of a study of which nothing is built: cells stand for runs, the vocabulary is as asked for.

    Raises:
        UserError: a cell cannot be built.
    """
    teachers = teachers_of(study)
    vocab_size = study.corpus.tokenizer.vocab_size
    return _plan(
        study,
        [
            (
                cell,
                _run(
                    cell,
                    cell.name,
                    Cost.of(cell, teachers, vocab_size, sequence_length(cell)),
                    cell.baseline,
                    cell.needs[0] if cell.kind == "after" else None,
                ),
            )
            for cell in cells_of(study)
        ],
    )


def _plan(study: StudyConfig, planned: Sequence[Planned]) -> Plan:
    teachers = teachers_of(study)
    run_of = trained_as(teachers)
    trained = {cell.teacher: (cell, run) for cell, run in planned if cell.kind == "teacher"}
    students = {
        cell.student: PlanStudent(
            name=cell.student, rung=cell.rung, tokens=run.tokens, parameters=run.parameters
        )
        for cell, run in planned
        if cell.kind == "baseline" and cell.student is not None
    }
    outside = tuple(PlanDomain(name=name, role=spec.role) for name, spec in study.domains.items())
    return Plan(
        name=study.name,
        title=study.title,
        seeds=study.seeds,
        students=tuple(students.values()),
        teachers=tuple(
            _teacher(name, spec, *trained.get(run_of.get(name), (None, None)))
            for name, spec in teachers.items()
        ),
        domains=(PlanDomain(name=study.in_domain, role="in_domain"), *outside),
        in_domain=study.in_domain,
        runs=tuple(run for _, run in planned),
        claims=study.claims,
        notes=study.notes,
    )


def _teacher(name: str, spec: TeacherSpec, cell: Cell | None, run: PlanRun | None) -> PlanTeacher:
    return PlanTeacher(
        name=name,
        control=spec.control is not None,
        description=spec.description,
        rung=spec.rung,
        tokens=None if run is None else run.tokens,
        parameters=None if run is None else run.parameters,
        run=None if run is None else run.run,
        data_seed=None if cell is None else cell.settings["data"]["seed"],
        corpus=None if spec.corpus is None else spec.corpus.name,
        targets=None if spec.cache is None else spec.cache.format.kind,
    )


def _run(cell: Cell, run: str, cost: Cost, baseline: str | None, after: str | None) -> PlanRun:
    return PlanRun(
        run=run,
        kind=cell.kind,
        group=cell.group,
        student=cell.student,
        teacher=cell.teacher,
        arm=cell.arm,
        alpha=cell.alpha,
        seed=cell.seed,
        tokens=cost.tokens,
        parameters=cost.parameters,
        flops=cost.flops + cost.teacher_flops,
        baseline=baseline,
        stage=cell.stage,
        after=after,
    )
