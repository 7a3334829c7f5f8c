"""Measure accuracy on downstream tasks: what students have above the untaught of their seed, in points."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tutelage.analysis.gains import twins_of
from tutelage.analysis.stats import Estimate, half_width

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.analysis.gains import Gains
    from tutelage.study.results import Results

ACCURACIES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of questions answered right; the first that a task has is its accuracy."""

MEAN = "mean over tasks"
"""In the place of a task; no task of lm-eval's has spaces in its name."""


@dataclass(frozen=True, slots=True)
class AccuracyGain:
    """What a cell's students have above the untaught on one task, or in the mean over tasks.

    Attributes:
        untaught: accuracy of the untaught in percent, mean over the seeds of the gain.
        gain: percentage points, mean over seeds, with its 95% t interval; of one seed without ends. The
            spread counts for at least what whole questions hide: with few of them, seeds can agree by chance.
    """

    untaught: float
    gain: Estimate


@dataclass(frozen=True, eq=False)
class Accuracies:
    """Accuracy of a study's runs on what they were asked.

    Attributes:
        tasks: number of questions of each task with an accuracy, in the order in which they were asked.
        in_mean: the tasks that the mean is over: of the students that were asked anything, more than half
            were asked each. Of a group that sums up its tasks it alone.
        runs: run, task (or MEAN), accuracy in percent; only runs that were asked all of them have a mean.
        gains: by cell and task (or MEAN), over the seeds of which both sides were asked.
    """

    tasks: Mapping[str, int]
    in_mean: tuple[str, ...]
    runs: pl.DataFrame
    gains: Mapping[tuple[int, str], AccuracyGain]

    def teachers(self, gains: Gains) -> dict[int, float]:
        """Mean accuracy of each cell's teachers over its tasks, where the study trained and asked them."""
        learned = gains.domains.select("cell", run="teacher_run").unique(maintain_order=True)
        means = self.runs.filter(task=MEAN).select("run", "accuracy")
        asked = learned.join(means, on="run", how="left", maintain_order="left")
        whole = asked.filter(pl.col("accuracy").is_not_null().all().over("cell"))
        return dict(whole.group_by("cell", maintain_order=True).agg(pl.col("accuracy").mean()).iter_rows())


def measure_accuracy(results: Results, gains: Gains) -> Accuracies:
    """Compare every cell with the untaught, task by task and in the mean over tasks."""
    answers = _accuracies(results.tasks)
    in_mean = _asked_of_most(answers, results)
    means = (
        answers.filter(pl.col("task").is_in(in_mean))
        .group_by("run", maintain_order=True)
        .agg(pl.col("accuracy").mean(), asked=pl.len())
        .filter(asked=len(in_mean))
        .select("run", "accuracy", task=pl.lit(MEAN))
    )
    runs = pl.concat([answers.select("run", "task", "accuracy"), means.select("run", "task", "accuracy")])
    questions = dict(answers.group_by("task", maintain_order=True).agg(pl.col("n").max()).iter_rows())
    steps = {task: 100 / n for task, n in questions.items()}
    steps[MEAN] = hypot(*(steps[task] for task in in_mean)) / max(1, len(in_mean))
    return Accuracies(questions, in_mean, runs, _gains(runs, steps, results, gains))


def _accuracies(tasks: pl.DataFrame) -> pl.DataFrame:
    """run, task, accuracy (percent), n, summed_by: one row of each run and task that has an accuracy."""
    metric = pl.col("metric").str.split(",").list.first()  # a filter of lm-eval's may follow
    places = {name: place for place, name in enumerate(ACCURACIES)}
    place = metric.replace_strict(places, default=None, return_dtype=pl.Int64)
    own = ["run", "task"]
    return (
        tasks.filter(place.is_not_null())
        .with_columns(pl.col("summed_by").max().over(own))  # which may sum up another of its accuracies
        .filter(place == place.min().over(own))
        .unique(own, keep="first", maintain_order=True)
        .select(*own, "n", "summed_by", accuracy=100 * pl.col("value"))
    )


def _asked_of_most(answers: pl.DataFrame, results: Results) -> tuple[str, ...]:
    """Tasks that most students were asked: one that was tried on a few does not take the mean apart.

    Without those that one of them sums up, which would be counted twice.
    """
    students = results.runs.filter(pl.col("kind") != "teacher")
    asked = answers.join(students, on="run", how="semi", maintain_order="left")
    counts = asked.group_by("task", maintain_order=True).agg(pl.len(), pl.col("summed_by").unique())
    usual = counts.filter(2 * pl.col("len") > asked["run"].n_unique())
    groups = {*usual["task"]}
    return tuple(task for task, _, above in usual.iter_rows() if groups.isdisjoint(above))


def _gains(
    runs: pl.DataFrame, steps: Mapping[str, float], results: Results, gains: Gains
) -> dict[tuple[int, str], AccuracyGain]:
    """Gains by cell and task; `steps` are the points of one question of each task."""
    untaught = (
        twins_of(results)
        .join(runs, on="run")
        .group_by("base_run", "task", maintain_order=True)
        .agg(untaught=pl.col("accuracy").mean())
    )
    compared = gains.domains.select("cell", "seed", "run", "base_run").unique(maintain_order=True)
    rows = (
        compared.join(runs, on="run", maintain_order="left_right")
        .join(untaught, on=["base_run", "task"], maintain_order="left")
        .group_by("cell", "task", maintain_order=True)
        .agg("untaught", gain=pl.col("accuracy") - pl.col("untaught"))
    )
    return {
        (cell, task): AccuracyGain(float(np.mean(levels)), points_gained(points, steps[task]))
        for cell, task, levels, points in rows.iter_rows()
    }


def points_gained(points: Sequence[float], step: float) -> Estimate:
    """The mean over seeds, with its 95% t interval; of one seed without ends.

    Args:
        points: gain of each seed.
        step: points of one question. What lies between two steps is spread evenly: step / sqrt(12).
    """
    mean, n = float(np.mean(points)), len(points)
    if n == 1:
        return Estimate(mean, mean, mean, n)
    spread = np.maximum(np.std(points, ddof=1), step / sqrt(12))
    (half,) = half_width(np.array([n]), np.array([spread]))
    return Estimate(mean, mean - float(half), mean + float(half), n)
