"""A study from its file to finished runs: stores, plan, runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.data.config import StoreConfig, TokenizerConfig
from tutelage.data.store import build_store, open_store
from tutelage.errors import UserError
from tutelage.files import claimed, make_directory
from tutelage.models.flops import parameters
from tutelage.models.ladder import rung
from tutelage.settings import parse_tokens
from tutelage.study.grid import Node, Stores, expand
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
        _check_budgets(nodes, stores)
        save_plan(directory, _plan(study, nodes, vocab_size))
        run_all(nodes, workers, watcher)


def _build_stores(study: StudyConfig, directory: Path, say: Callable[[str], None]) -> Stores:
    say(f"text: {study.corpus.name}")
    corpus = build_store(study.corpus, directory)
    domains = {}
    for name, spec in study.domains.items():
        say(f"text: {name}")
        config = StoreConfig(
            name=name,
            sources=(spec.source,),
            tokenizer=TokenizerConfig(path=corpus),
            validation=0.5,
            test=0.5,
        )
        domains[name] = build_store(config, directory)
    return Stores(corpus, domains)


def _check_budgets(nodes: list[Node], stores: Stores) -> None:
    """A study compares runs on fresh text; repeated text would regularise and flatter any teacher."""
    available = len(open_store(stores.corpus).split("train").tokens)
    for node in nodes:
        total = parameters(rung(str(node.config.model.rung)), open_store(stores.corpus).vocab_size).total
        wanted = parse_tokens(node.config.tokens, total)
        if wanted > available:
            raise UserError(
                f"{node.id}: {wanted:,} tokens are more than the {available:,} of the training split, so "
                "text would repeat; lower the budget or add text"
            )


def _plan(study: StudyConfig, nodes: list[Node], vocab_size: int) -> Plan:
    total = parameters(rung(study.student.rung), vocab_size).total
    outside = tuple(PlanDomain(name=name, role=spec.role) for name, spec in study.domains.items())
    return Plan(
        name=study.name,
        title=study.title,
        seeds=study.seeds,
        student=PlanStudent(
            rung=study.student.rung, tokens=parse_tokens(study.student.tokens, total), parameters=total
        ),
        teachers=tuple(
            PlanTeacher(name=name, control=spec.control is not None, description=spec.description)
            for name, spec in study.teachers.items()
        ),
        domains=(PlanDomain(name=study.in_domain, role="in_domain"), *outside),
        in_domain=study.in_domain,
        runs=tuple(
            PlanRun(run=node.id, kind=node.kind, teacher=node.teacher, alpha=node.alpha, seed=node.seed)
            for node in nodes
        ),
        notes=study.notes,
    )
