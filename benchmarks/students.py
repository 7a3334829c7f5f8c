"""Open students as a run does, for benchmarks that take training steps themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.run_directory import RunDirectory
from tutelage.train import distributed
from tutelage.train.setup import open_student, open_teacher

if TYPE_CHECKING:
    from tutelage.teachers.live import Teacher
    from tutelage.train.student import Student


def opened(settings: dict[str, Any], teacher: Teacher | None = None) -> Student:
    """The student of a run before its first step, with `teacher` if there is one, else its config's."""
    config = validate(RunConfig, settings, "benchmark")
    world = distributed.start(config.runtime, config.parallel)
    student = open_student(config, RunDirectory(config.output / config.name), world)
    if config.teacher is not None:
        student.learn_from(teacher or open_teacher(config, world))
    return student
