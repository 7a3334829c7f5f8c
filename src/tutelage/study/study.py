"""A study from its file to finished runs: stores, plan, runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.data.config import StoreConfig, TokenizerConfig
from tutelage.data.store import build_store, open_store
from tutelage.errors import UserError
from tutelage.files import claimed, make_directory
from tutelage.study.cells import teachers_of
from tutelage.study.graph import Node, Stores, expand
from tutelage.study.planfile import Plan, PlanDomain, PlanRun, PlanStudent, PlanTeacher, save_plan
from tutelage.study.runner import StudyWatcher, run_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tutelage.study.spec import StudyConfig


def run_study(
    study: StudyConfig, directory: Path, workers: int, watcher: StudyWatcher, say: Callable[[str], None]
) -> None:
    """Build the stores, write the plan, and run what is not finished yet.

    Args:
        study: what to run.
        directory: everything lands here: data/, runs/, plan.json.
        workers: processes that train at the same time.
        watcher: shown the state of all runs twice a second.
        say: told what is being done between the runs.

    Raises:
        UserError: input is wrong, or some runs failed.
        Stopped: on Ctrl-C; the same call goes on.
    """
    make_directory(directory)
    with claimed(directory / "lock", f"study {directory}"):
        stores = _build_stores(study, directory / "data", say)
        vocab_size = open_store(stores.corpus).vocab_size
        nodes = expand(study, stores, directory / "runs", vocab_size)
        _check_budgets(nodes)
        save_plan(directory, make_plan(study, nodes))
        run_all(nodes, workers, watcher)


def _build_stores(study: StudyConfig, directory: Path, say: Callable[[str], None]) -> Stores:
    def build(config: StoreConfig) -> Path:
        say(f"text: {config.name}")
        return build_store(config, directory)

    corpus = build(study.corpus)
    tokenizer = TokenizerConfig(path=corpus)

    def in_its_tokens(config: StoreConfig) -> Path:
        return build(config.model_copy(update={"tokenizer": tokenizer}))

    return Stores(
        corpus=corpus,
        domains={
            name: build(
                StoreConfig(
                    name=name,
                    sources=(spec.source,),
                    tokenizer=tokenizer,
                    validation=0.5,
                    test=0.5,
                    max_bytes=spec.max_bytes,
                )
            )
            for name, spec in study.domains.items()
        },
        teachers={
            name: in_its_tokens(spec.corpus)
            for name, spec in teachers_of(study).items()
            if spec.corpus is not None
        },
        stages={name: in_its_tokens(spec.corpus) for name, spec in study.post_training.items()},
    )


def _check_budgets(nodes: list[Node]) -> None:
    """A study compares runs on fresh text; repeated text would regularise and flatter any teacher."""
    available = {
        path: len(open_store(path).split("train").tokens)
        for path in {node.config.data.store for node in nodes}
    }
    for node in nodes:
        if node.cell.kind != "after" and node.tokens > available[node.config.data.store]:
            raise UserError(
                f"{node.id}: {node.tokens:,} tokens are more than the "
                f"{available[node.config.data.store]:,} of the training split, so text would repeat; lower "
                "the budget or add text"
            )


def make_plan(study: StudyConfig, nodes: list[Node]) -> Plan:
    """What `plan.json` says of `nodes`."""
    trained = {node.cell.teacher: node for node in nodes if node.cell.kind == "teacher"}
    students = {
        node.cell.student: PlanStudent(
            name=node.cell.student, rung=node.cell.rung, tokens=node.tokens, parameters=node.parameters
        )
        for node in nodes
        if node.cell.kind == "baseline" and node.cell.student is not None
    }
    teachers = []
    for name, spec in teachers_of(study).items():
        node = trained.get(name)
        teachers.append(
            PlanTeacher(
                name=name,
                control=spec.control is not None,
                description=spec.description,
                rung=spec.rung,
                tokens=None if node is None else node.tokens,
                parameters=None if node is None else node.parameters,
                run=None if node is None else node.id,
            )
        )
    outside = tuple(PlanDomain(name=name, role=spec.role) for name, spec in study.domains.items())
    return Plan(
        name=study.name,
        title=study.title,
        seeds=study.seeds,
        students=tuple(students.values()),
        teachers=tuple(teachers),
        domains=(PlanDomain(name=study.in_domain, role="in_domain"), *outside),
        in_domain=study.in_domain,
        runs=tuple(_plan_run(node) for node in nodes),
        claims=study.claims,
        notes=study.notes,
    )


def _plan_run(node: Node) -> PlanRun:
    cell = node.cell
    return PlanRun(
        run=node.id,
        kind=cell.kind,
        group=cell.group,
        student=cell.student,
        teacher=cell.teacher,
        arm=cell.arm,
        alpha=cell.alpha,
        seed=cell.seed,
        tokens=node.tokens,
        parameters=node.parameters,
        flops=node.flops + node.teacher_flops,
        baseline=node.baseline,
        stage=cell.stage,
        after=node.needs[0] if cell.kind == "after" else None,
    )
