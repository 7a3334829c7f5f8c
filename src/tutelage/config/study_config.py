"""Settings of a study: texts, teachers, grids of students, seeds, post-training, claims.

A grid is a list of points; a point has a value for each axis. `tutelage.study.axis_settings` maps axes to
settings of a run.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, model_validator

from tutelage.config.base import Budget, Bytes, Fraction, Name, Section, Seed, Words, refuse_alike
from tutelage.config.data_config import PairSource, Source, StoreConfig
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import CacheSettings
from tutelage.config.yaml_text import ReadAs
from tutelage.types import Role

Point = dict[str, Any]
"""Value of every axis, in the order in which the grid names the axes."""


class _Named(BaseModel):
    """Types of the axes that are no setting of a run; a name may look like a number."""

    teacher: tuple[str | None, ...] | str | None = None
    compute_of: tuple[str | None, ...] | str | None = None
    shape: tuple[str, ...] | str | None = None
    tokens: tuple[Budget, ...] | Budget | None = None
    seed: tuple[Seed, ...] | Seed | None = None


Axes = Annotated[dict[str, tuple[JsonValue, ...]], ReadAs(_Named)]
Rule = Annotated[dict[str, JsonValue], ReadAs(_Named)]


class Grid(Section):
    """Points of a grid: one of product, zip, chain and cross, without those that `exclude` matches."""

    product: Axes | None = Field(default=None, description="every combination of the axes' values")
    zip: Axes | None = Field(
        default=None, description="the axes' values side by side: first with first, second with second"
    )
    chain: tuple[Grid, ...] | None = Field(
        default=None, description="points of several grids, one after another"
    )
    cross: tuple[Grid, ...] | None = Field(
        default=None, description="combinations of the points of several grids"
    )
    exclude: tuple[Rule, ...] = Field(
        default=(),
        description="drop points whose axes have these values; a list stands for any of its entries",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        given = [part for part in (self.product, self.zip, self.chain, self.cross) if part is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of product, zip, chain and cross, not {len(given)} of them")
        if self.zip is not None and len({len(values) for values in self.zip.values()}) > 1:
            lengths = {axis: len(values) for axis, values in self.zip.items()}
            raise ValueError(f"zip: all axes need the same number of values, not {lengths}")
        axes = {axis for point in self._all() for axis in point}
        for rule in self.exclude:
            if unknown := sorted(rule.keys() - axes):
                raise ValueError(f"exclude: no axis '{unknown[0]}' in this grid; axes: {sorted(axes)}")
        return self

    def points(self) -> list[Point]:
        """Every point once, in order."""
        kept: list[Point] = []
        for point in self._all():
            if point not in kept and not any(_matches(point, rule) for rule in self.exclude):
                kept.append(point)
        return kept

    def _all(self) -> list[Point]:
        if self.product is not None:
            combinations = product(*self.product.values())
            return [dict(zip(self.product, values, strict=True)) for values in combinations]
        if self.zip is not None:
            return [
                dict(zip(self.zip, values, strict=True)) for values in zip(*self.zip.values(), strict=True)
            ]
        if self.chain is not None:
            return [point for grid in self.chain for point in grid.points()]
        parts = [grid.points() for grid in self.cross or ()]
        return [{axis: value for part in parts for axis, value in part.items()} for parts in product(*parts)]


def _matches(point: Point, rule: dict[str, Any]) -> bool:
    return all(
        axis in point and (point[axis] in wanted if isinstance(wanted, list) else point[axis] == wanted)
        for axis, wanted in rule.items()
    )


Pattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9{][A-Za-z0-9._@{}-]*$", max_length=100)]
"""A name; with a grid, axes in braces take their values: "{shape}@{tokens}"."""

RunSettings = Annotated[dict[str, Any], ReadAs(RunConfig)]
"""Part of a run file."""


PREVIOUS = "previous"
"""In a grid of students, the teacher of a chain: the same student's generation before."""


class TeacherSpec(Section):
    """Teachers: shapes trained on a budget, given models, means of others, or controls that know no context.

    With a grid this is one teacher per point; axes are fields of this section or settings of a run.
    """

    description: str = Field(default="", description="a few words for tables")
    shape: Name | None = Field(default=None, description="shape of a trained teacher")
    tokens: Budget | None = Field(default=None, description="its training tokens")
    seed: Seed | None = Field(
        default=None, description="weights and data order; default: teacher_seed, or each of teacher_seeds"
    )
    model: str | None = Field(default=None, description="or: a model directory or Hub name")
    control: Literal["unigram", "uniform"] | None = Field(default=None, description="or: kind of control")
    mean: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="or: the mean of the probabilities of other teachers, by names or patterns",
    )
    corpus: StoreConfig | None = Field(
        default=None,
        description="trained on this text instead, in the study's tokens; for cross-corpus teachers",
    )
    cache: CacheSettings | None = Field(
        default=None, description="compute targets once for all students, in caches/; default: live"
    )
    branch_from_shorter: bool = Field(
        default=False,
        description="budgets are branches of one run: each starts where the decay of the next shorter one "
        "begins; needs optim.schedule wsd and a warm-up in tokens",
    )
    tested_alpha: Fraction | None = Field(
        default=None,
        description="constant alpha at which claims about this teacher are tested, fixed before anything is "
        "run; default: chosen on the first third of the seeds, which are then not tested",
    )
    run: RunSettings = Field(default={}, description="settings of its run, as in a run file")
    grid: Grid | None = Field(default=None, description="one teacher per point")


class StudentSpec(Section):
    """A group of students: one per point of the grid and seed, each paired with the same student untaught.

    Axes: teacher (a name, `previous` with `generations`, or null), alpha (a number or a policy), shape,
    tokens, seed, compute_of (a teacher whose forward cost an untaught student gets as additional tokens),
    short names such as temperature, and any setting of a run by its dotted path.
    """

    description: str = Field(default="", description="what this group is to show")
    shape: Name | None = Field(default=None, description="shape, where it is no axis")
    tokens: Budget | None = Field(default=None, description="training tokens, where they are no axis")
    seeds: tuple[Seed, ...] = Field(default=(), description="default: the study's")
    run: RunSettings = Field(default={}, description="settings of these runs, as in a run file")
    generations: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="of points with the teacher `previous`: the first learns from the untaught student of "
        "its seed, each other from the one before",
    )
    grid: Grid = Field(description="points of the group")
    then: tuple[Name, ...] = Field(default=(), description="stages of `post_training` that follow each run")


class DomainSpec(Section):
    """A text outside the training distribution."""

    source: Source = Field(description="where it comes from")
    role: Role = Field(default="out_of_domain", description="is it the training distribution?")
    max_bytes: Bytes | None = Field(default=None, description="stop after this much text, in bytes of UTF-8")


class PostTraining(Section):
    """A stage after pretraining, the same for every run that it follows and scored in the same way."""

    corpus: StoreConfig = Field(description="prompts and completions, in the study's tokens")
    tokens: Budget = Field(description="training tokens")
    run: RunSettings = Field(default={}, description="settings of its runs, as in a run file; stage is sft")


class StudyTasks(Section):
    """Downstream tasks that every finished run is asked, teachers too, as by `tutelage eval tasks`."""

    names: tuple[Words, ...] = Field(
        min_length=1,
        description="paper, names of lm-eval's, word_analogy, continuation or last_word (:DOMAIN or :STORE), "
        "or those in `include`",
    )
    limit: int | None = Field(default=None, ge=1, description="questions per task; default: all")
    include: Path | None = Field(
        default=None, description="directory of lm-eval task files of your own; functions they name are run"
    )
    batch_size: int = Field(default=16, ge=1, description="of the forward passes")


class StudyConfig(Section):
    """Teachers, students, and the grids that pair them; all comparisons are paired by seed."""

    name: Name = Field(description="of the study and, without --output, of its directory: tutelage-NAME")
    title: Words = Field(description="headline of the report")
    corpus: StoreConfig = Field(description="training text; its held-out part is the in-domain test")
    in_domain: Name = Field(default="in-domain", description="name of the held-out part in tables")
    domains: dict[Name, DomainSpec] = Field(min_length=1, description="out-of-domain texts, by name")
    teachers: dict[Pattern, TeacherSpec] = Field(description="teachers by name; a grid makes several")
    students: dict[Name, StudentSpec] = Field(description="groups of students; none: only teachers are made")
    teacher_seed: Seed = Field(default=42, description="weights and data order of every teacher")
    seeds: tuple[Seed, ...] = Field(min_length=1, description="a seed sets student weights and data order")
    teacher_seeds: tuple[Seed, ...] = Field(
        default=(),
        description="one for each of `seeds`, whose students learn from teachers of that seed; so intervals "
        "contain what another training of the teachers would change; default: teacher_seed for all",
    )
    baselines: int = Field(
        default=1,
        ge=1,
        le=100,
        description="untaught runs per student and seed, of other initial weights on the same batches; gains "
        "are against their mean",
    )
    post_training: dict[Name, PostTraining] = Field(
        default={}, description="stages that may follow a run, by name"
    )
    tasks: StudyTasks | None = Field(
        default=None, description="questions asked of all runs once they are trained; default: none"
    )
    claims: tuple[Annotated[int, Field(ge=1, le=24)], ...] = Field(
        default=(),
        description="numbers of the claims tested as pre-registered, with Holm's correction over them",
    )
    run: RunSettings = Field(default={}, description="settings of every run, as in a run file")
    notes: tuple[str, ...] = Field(default=(), description="what a reader of the report must know")

    @model_validator(mode="after")
    def _replicates(self) -> StudyConfig:
        if shared := sorted({*self.teacher_seeds} & {*self.seeds}):
            raise ValueError(
                f"teacher_seeds: {shared[0]} is in seeds too; a teacher of that seed would have read a "
                "student's own batches from its own initial weights"
            )
        if self.teacher_seeds and len(self.teacher_seeds) != len(self.seeds):
            raise ValueError(
                f"teacher_seeds: {len(self.teacher_seeds)} for {len(self.seeds)} seeds; give one for each, "
                "or none and a teacher_seed for all"
            )
        return self

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        """Refuse names that would be equal as directories, and stages that do not exist."""
        if PREVIOUS in self.teachers:
            raise ValueError(
                "teachers.previous: that stands for a student's own generation before; rename it"
            )
        refuse_alike("domains", [self.in_domain, *self.domains])
        refuse_alike("students", self.students)
        refuse_alike("post_training", self.post_training)
        refuse_alike("seeds", self.seeds)
        refuse_alike("teacher_seeds", self.teacher_seeds)
        refuse_alike("claims", self.claims)
        for name, group in self.students.items():
            refuse_alike(f"students.{name}.seeds", group.seeds)
            refuse_alike(f"students.{name}.then", group.then)
            if unknown := sorted(set(group.then) - self.post_training.keys()):
                raise ValueError(f"students.{name}.then: no stage '{unknown[0]}' in post_training")
        return self

    @model_validator(mode="after")
    def _texts(self) -> StudyConfig:
        """Refuse texts that no run could read, which would be found out once what comes before is trained."""
        plain = {
            f"teachers.{name}.corpus": spec.corpus for name, spec in self.teachers.items() if spec.corpus
        }
        pairs = {f"post_training.{name}.corpus": spec.corpus for name, spec in self.post_training.items()}
        for where, text in {"corpus": self.corpus, **plain}.items():
            if text.has_pairs:
                raise ValueError(
                    f"{where}: holds prompts, which carry no loss; use plain text, and pairs in post_training"
                )
        for where, text in pairs.items():
            if not text.has_pairs:
                raise ValueError(
                    f"{where}: every token counts, there are no prompts; use sources of kind pairs, "
                    "hub_pairs or corpus_pairs"
                )
        tokenizer = self.corpus.tokenizer.path
        for where, text in {**plain, **pairs}.items():
            if text.tokenizer.path not in {None, tokenizer}:
                raise ValueError(
                    f"{where}.tokenizer.path: {text.tokenizer.path}, but all texts of a study are in the "
                    "tokens of its corpus; set corpus.tokenizer.path to it"
                )
        for name, spec in self.domains.items():
            if tokenizer is None and isinstance(spec.source, PairSource) and spec.source.template == "chat":
                raise ValueError(
                    f"domains.{name}: template: chat needs corpus.tokenizer.path, the directory of a model "
                    "with a chat template"
                )
        return self

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - pydantic's
        """Return the schema of a study file, in which `base` may stand in for required fields.

        `tutelage.config.load.load` merges a file into its base before it checks what is required.
        """
        schema = super().model_json_schema(*args, **kwargs)
        schema["properties"]["base"] = {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            "description": "files this one builds on, by name without .yaml: beside it, or presets",
        }
        schema["anyOf"] = [{"required": ["base"]}, {"required": schema.pop("required")}]
        for section in (StoreConfig, DomainSpec, StudentSpec, PostTraining):
            del schema["$defs"][section.__name__]["required"]
        return schema
