"""Give the cells of a study their run ids and full configs; check and cost them before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config.base import parse_tokens, whole_batches
from tutelage.config.load import digest, merged, validate
from tutelage.config.run_config import NOT_THE_RESULT, RunConfig
from tutelage.data.store import open_store
from tutelage.data.store_manifest import SCORED
from tutelage.errors import UserError
from tutelage.models.flops import forward_flops, kd_cost_factor, parameters, training_flops
from tutelage.models.shapes import find_shape
from tutelage.run_directory import RunDirectory, pinned, run_id
from tutelage.study.cells import beside
from tutelage.study.given_models import teacher_forward_flops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tutelage.config.study_config import StudyConfig, TeacherSpec
    from tutelage.config.teacher_config import CacheSettings
    from tutelage.study.cells import Cell
    from tutelage.study.expand import ExpandedStudy


_RECALL_TOKENS = 300_000
"""In the answers to all questions about facts, at most: 1,200 questions of four answers."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimate of a run, from shapes alone.

    Attributes:
        tokens: training tokens, whole batches.
        parameters: of the trained model, embeddings included.
        flops: of training, forward and backward.
        teacher_flops: of the teacher's forward passes, as the run counts them: 0 without a teacher, with a
            control, with targets from a cache, which is made once for all, or with a given model that cannot
            be read here.
    """

    tokens: int
    parameters: int
    flops: float
    teacher_flops: float

    @property
    def total(self) -> float:
        """FLOPs of training and of the teacher."""
        return self.flops + self.teacher_flops

    @classmethod
    def of(cls, cell: Cell, config: RunConfig, teachers: Mapping[str, TeacherSpec], vocab_size: int) -> Cost:
        """Cost of a cell whose run is `config`, its stores and models aside.

        Raises:
            UserError: its tokens are less than a batch.
        """
        batch, length = config.global_batch_tokens, config.data.sequence_length
        own = forward_flops(find_shape(cell.shape), vocab_size, length)
        total = parameters(find_shape(cell.shape), vocab_size).total
        tokens = parse_tokens(cell.tokens, total)
        teacher = sum(teacher_forward_flops(spec, vocab_size, length) for spec in beside(cell, teachers))
        if cell.compute_of is not None:
            tokens, teacher = round(tokens * kd_cost_factor(teacher, own)), 0.0
        if tokens < batch:
            raise UserError(f"{cell.name}: {tokens:,} tokens are less than one batch of {batch:,}")
        tokens -= tokens % batch
        if cell.teacher is not None and teachers[cell.teacher].cache is not None:
            teacher = 0.0
        vanishes = config.optim.vanishes(tokens // batch, batch)
        taught = config.objective.taught_share(tokens // batch, lr_vanishes=vanishes)
        return cls(tokens, total, training_flops(own) * tokens, teacher * tokens * taught)


@dataclass(frozen=True, slots=True)
class Node:
    """One run of a study, ready to start.

    Attributes:
        id: run id, the name of its directory.
        cell: what it stands for.
        config: the run.
        needs: run ids to be finished first.
        cost: estimate of its cost.
        replicate: place of its seed in a study whose seeds have teachers of their own, each a whole
            repetition of the study; else 0.
        cache: what tells the cache that it reads from others, and FLOPs of writing that; None without one.
    """

    id: str
    cell: Cell
    config: RunConfig
    needs: tuple[str, ...]
    cost: Cost
    replicate: int = 0
    cache: tuple[str, float] | None = None

    @property
    def directory(self) -> RunDirectory:
        """Where the run lands."""
        return RunDirectory(self.config.output / self.id)

    @property
    def scoring_flops(self) -> float:
        """FLOPs of scoring it, at most."""
        scored = scored_tokens(self.config, self.cost.tokens)
        return scored * self.cost.flops / training_flops(self.cost.tokens)


def scored_tokens(config: RunConfig, tokens: int) -> int:
    """Tokens that a run of so many tokens is scored on, on the way and at its end, at most."""
    asked, batch = config.eval, config.global_batch_tokens
    read = len(asked.domains) * len(SCORED) * asked.max_documents * asked.max_tokens
    steps = tokens // batch
    on_the_way = 0 if asked.every is None else (steps - 1) // whole_batches(asked.every, batch)
    return (on_the_way + 1) * (read + _RECALL_TOKENS * asked.recall)


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


def bind(expanded: ExpandedStudy, stores: Stores, output: Path, vocab_size: int) -> list[Node]:
    """Give every cell its config and run id, in an order in which each comes after what it needs.

    Args:
        expanded: the study.
        stores: its token stores, which exist.
        output: directory of run directories.
        vocab_size: entries of the tokenizer.

    Raises:
        UserError: a run's settings are wrong; the message names the cell.
    """
    binder = _Binder(expanded.study, expanded.teachers, stores, output, vocab_size, {})
    return [binder.node(cell) for cell in expanded.cells]


@dataclass(frozen=True)
class _Binder:
    study: StudyConfig
    teachers: Mapping[str, TeacherSpec]
    stores: Stores
    output: Path
    vocab_size: int
    nodes: dict[str, Node]

    def node(self, cell: Cell) -> Node:
        """The node of a cell whose needs are nodes already."""
        settings = merged(cell.settings, self._places(cell)) | {"tokens": cell.tokens}
        config = validate(RunConfig, settings, f"study {self.study.name}: {cell.name}")
        cost = Cost.of(cell, config, self.teachers, self.vocab_size)
        if cell.compute_of is not None:
            config = config.model_copy(update={"tokens": cost.tokens})
        config = pinned(config)
        run = run_id(config)
        if cell.branch_from is not None and _begins_anew(run, config, self.nodes[cell.branch_from]):
            config = config.model_copy(
                update={"runtime": config.runtime.model_copy(update={"branch_from": None})}
            )
        needs = tuple(self.nodes[name].id for name in cell.needs)
        replicate = self._replicates.get(cell.seed, 0)
        made = run, cell, config, needs, cost, replicate, self._cache(cell, config)
        node = self.nodes[cell.name] = Node(*made)
        return node

    def _cache(self, cell: Cell, config: RunConfig) -> tuple[str, float] | None:
        """The cache of its teacher's targets that the run of a cell reads."""
        spec = None if cell.teacher is None else self.teachers[cell.teacher]
        if config.teacher is None or spec is None or spec.cache is None or spec.control is not None:
            return None
        length, parts = config.data.sequence_length, beside(cell, self.teachers)
        flops = sum(teacher_forward_flops(part, self.vocab_size, length) for part in parts)
        key = digest(
            [config.teacher.model_dump(mode="json"), config.data.model_dump(mode="json", exclude={"seed"})]
        )
        return key, flops * self._training_tokens(config.data.store)

    @cached_property
    def _training_tokens(self) -> Callable[[Path], int]:
        """Tokens of a store that students read; each is opened once, however many students there are."""
        return cache(lambda store: open_store(store).manifest.splits["train"].tokens)

    @cached_property
    def _replicates(self) -> dict[int, int]:
        """Place of each seed, of students and teachers, where every seed has teachers of its own."""
        pairs = enumerate(zip(self.study.seeds, self.study.teacher_seeds, strict=False))
        return {seed: place for place, pair in pairs for seed in pair}

    def _places(self, cell: Cell) -> dict[str, Any]:
        """The settings that name directories: stores, output, models and teachers."""
        store = self.stores.corpus
        if cell.kind == "teacher":
            store = self.stores.teachers.get(str(cell.teacher), store)
        if cell.stage is not None:
            store = self.stores.stages[cell.stage]
        places: dict[str, Any] = {
            "name": cell.name,
            "data": {"store": str(store)},
            "output": str(self.output),
            "eval": {"domains": _domains(self.study, self.stores.corpus, self.stores.domains)},
        }
        if cell.branch_from is not None:
            places["runtime"] = {"branch_from": self.nodes[cell.branch_from].id}
        if cell.kind == "after":
            places["model"] = {"run": self.nodes[cell.needs[0]].id}
        elif cell.kind == "student" and cell.teacher is not None:
            places["teacher"] = self._teacher(cell.teacher, cell)
        return places

    def _teacher(self, name: str, cell: Cell) -> dict[str, Any]:
        ids = [self.nodes[need].id for need in cell.needs]
        return _teacher_section(beside(cell, self.teachers), ids, self.teachers[name].cache)


def _domains(study: StudyConfig, corpus: Path, others: Mapping[str, Path]) -> list[dict[str, str]]:
    """The texts that every run is scored on."""
    inside = {"name": study.in_domain, "store": str(corpus), "role": "in_domain"}
    outside = [
        {"name": name, "store": str(others[name]), "role": spec.role} for name, spec in study.domains.items()
    ]
    return [inside, *outside]


def _begins_anew(run: str, config: RunConfig, shorter: Node) -> bool:
    """Whether a branch that has not begun is trained from its beginning, which has the same result.

    The shorter run is finished and has no branch point: it was trained when none was longer, or only its
    results were copied here.
    """
    begun = RunDirectory(config.output / run).saved()
    return not begun and shorter.directory.is_done() and shorter.directory.branch_point() is None


def begun_anew(nodes: Sequence[Node]) -> Iterator[str]:
    """A line for each branch that is still to be trained from its beginning."""
    for node in nodes:
        shorter = node.cell.branch_from
        if shorter is not None and node.config.runtime.branch_from is None and not node.directory.is_done():
            yield (
                f"{node.cell.name} is trained from its beginning: {shorter} is finished and has no "
                "checkpoint from where its decay begins"
            )


def _teacher_section(
    specs: Sequence[TeacherSpec], runs: Sequence[str], cache: CacheSettings | None
) -> dict[str, Any]:
    """The teacher of a run's settings; `runs` are the ids of those that are trained."""
    sections: list[dict[str, Any]] = []
    trained = iter(runs)
    for spec in specs:
        if spec.control is not None:
            sections.append({"kind": spec.control})
        elif spec.model is not None:
            sections.append({"kind": "model", "path": spec.model})
        else:
            sections.append({"kind": "run", "run": next(trained)})
    section: dict[str, Any] = {"kind": "mean", "of": sections}
    if len(sections) == 1:
        section = sections[0]
    if cache is not None and section["kind"] in {"run", "model", "mean"}:
        section["cache"] = cache.model_dump(mode="json")
    return section


def draft_config(study: StudyConfig, cell: Cell, teachers: Mapping[str, TeacherSpec]) -> RunConfig:
    """The settings of a cell's run, with stand-ins for the stores, models and teachers that it is to get.

    Raises:
        UserError: a setting is wrong; the message names study and cell.
    """
    store = Path("store")
    stand_in: dict[str, Any] = {
        "data": {"store": str(store)},
        "name": cell.name[:100],
        "eval": {"domains": _domains(study, store, dict.fromkeys(study.domains, store))},
    }
    if cell.kind == "after":
        stand_in["model"] = {"run": "run"}
    elif cell.kind == "student" and cell.teacher is not None:
        specs = beside(cell, teachers)
        named = [spec.model_copy(update={"model": None}) for spec in specs]  # not looked for yet
        stand_in["teacher"] = _teacher_section(named, ["run"] * len(specs), teachers[cell.teacher].cache)
    settings = merged(cell.settings, stand_in) | {"tokens": cell.tokens}
    return validate(RunConfig, settings, f"study {study.name}: {cell.name}")


def check_cells(expanded: ExpandedStudy) -> dict[str, RunConfig]:
    """Check every run of a study, for which nothing needs to be built.

    Returns:
        The settings of each cell's run, as `draft_config` gives them, by the cell's name.

    Raises:
        UserError: a run cannot be, or is asked for twice in different words, or claims are to be tested at an
            alpha that nobody is taught with.
    """
    study = expanded.study
    _check_tested_alphas(expanded)
    drafts: dict[str, RunConfig] = {}
    names: dict[str, str] = {}
    texts: dict[str | None, object] = {
        name: stage.corpus.model_dump(mode="json", exclude={"name", "tokenizer"})
        for name, stage in study.post_training.items()
    }
    for cell in expanded.cells:
        config = drafts[cell.name] = draft_config(study, cell, expanded.teachers)
        recipe = config.model_dump(mode="json", exclude=NOT_THE_RESULT)
        own = [cell.kind, cell.teacher, cell.needs, cell.baseline, cell.compute_of, cell.branch_from]
        key = digest([recipe, texts.get(cell.stage), *own])  # of a teacher, its name says which text
        if (other := names.setdefault(key, cell.name)) != cell.name:
            raise UserError(
                f"study {study.name}: {other} and {cell.name} are the same run in different words; keep one"
            )
    return drafts


def _check_tested_alphas(expanded: ExpandedStudy) -> None:
    alphas: dict[str, set[float]] = {}
    for cell in expanded.cells:
        if cell.teacher is not None and cell.alpha is not None and cell.constant:
            alphas.setdefault(cell.teacher, set()).add(cell.alpha)
    for name, spec in expanded.teachers.items():
        own = sorted(alphas.get(name, ()))
        if spec.tested_alpha is not None and all(alpha != spec.tested_alpha for alpha in own):
            known = ", ".join(f"{alpha:g}" for alpha in own) or "none"
            raise UserError(
                f"study {expanded.study.name}: teacher {name}: tested_alpha {spec.tested_alpha} is no "
                f"constant alpha of its students; they have: {known}"
            )
