"""What `plan.json` says of a study: of its runs, or of its cells before anything has a run id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.identity import evaluation_id
from tutelage.study.cells import cells_of, teachers_of, trained_as
from tutelage.study.graph import Cost
from tutelage.study.planfile import Plan, PlanDomain, PlanRun, PlanStudent, PlanTeacher

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tutelage.data.config import StoreConfig
    from tutelage.study.cells import Cell
    from tutelage.study.graph import Node
    from tutelage.study.spec import StudyConfig, TeacherSpec

    Planned = tuple[Cell, PlanRun]


def plan_of(study: StudyConfig, nodes: Sequence[Node]) -> Plan:
    """The plan of a study whose runs are known."""
    ids = {node.cell.name: node.id for node in nodes}
    return _plan(
        study,
        [
            (
                node.cell,
                _run(
                    node.cell,
                    ids,
                    Cost(node.tokens, node.parameters, node.flops, node.teacher_flops),
                    evaluation_id(node.config),
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
    cells = cells_of(study)
    names = {cell.name: cell.name for cell in cells}
    return _plan(
        study,
        [(cell, _run(cell, names, Cost.of(cell, teachers, vocab_size))) for cell in cells],
    )


def _plan(study: StudyConfig, planned: Sequence[Planned]) -> Plan:
    teachers = teachers_of(study)
    run_of = trained_as(teachers)
    trained: dict[str | None, list[Planned]] = {}
    for cell, run in planned:
        if cell.kind == "teacher":
            trained.setdefault(cell.teacher, []).append((cell, run))
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
            _teacher(study, name, spec, trained.get(run_of.get(name), [])) for name, spec in teachers.items()
        ),
        domains=(PlanDomain(name=study.in_domain, role="in_domain"), *outside),
        in_domain=study.in_domain,
        runs=tuple(run for _, run in planned),
        claims=study.claims,
        notes=study.notes,
    )


def _teacher(study: StudyConfig, name: str, spec: TeacherSpec, trained: Sequence[Planned]) -> PlanTeacher:
    """A teacher; `trained` are its runs, one or one for each seed."""
    run = trained[0][1] if trained else None
    once = trained[0] if spec.seed is not None and trained else None
    return PlanTeacher(
        name=name,
        control=spec.control is not None,
        description=spec.description,
        rung=spec.rung,
        tokens=None if run is None else run.tokens,
        parameters=None if run is None else run.parameters,
        run=None if once is None else once[1].run,
        data_seed=None if once is None else once[0].settings["data"]["seed"],
        corpus=None if spec.corpus is None else spec.corpus.name,
        targets=None if spec.cache is None else spec.cache.format.kind,
        texts=() if spec.corpus is None else tuple(_texts_of(study, spec.corpus)),
        tested_alpha=spec.tested_alpha,
    )


def _texts_of(study: StudyConfig, corpus: StoreConfig) -> Iterator[str]:
    """Names of the scored texts that are among the sources of a teacher's own text, at any weight."""
    own = [source.model_copy(update={"weight": None}) for source in corpus.sources]
    for name, domain in study.domains.items():
        if domain.source.model_copy(update={"weight": None}) in own:
            yield name


def _run(cell: Cell, ids: Mapping[str, str], cost: Cost, evaluation: str | None = None) -> PlanRun:
    after = cell.needs[0] if cell.kind == "after" else None
    return PlanRun(
        run=ids[cell.name],
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
        baseline=None if cell.baseline is None else ids[cell.baseline],
        stage=cell.stage,
        after=None if after is None else ids[after],
        teacher_run=None if cell.learned is None else ids[cell.learned],
        twin=cell.twin,
        evaluation=evaluation,
    )
