"""Write the run files of a plan, which `tutelage train` starts as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from tutelage.config.load import merged, validate
from tutelage.config.run_config import RunConfig
from tutelage.files import own_directory, write_text
from tutelage.planner.ledger import cache_format

if TYPE_CHECKING:
    from pathlib import Path

    from tutelage.planner.advice import Advice, Outlook, PlanRequest

_TEACHER_SEED, _STUDENT_SEED = 42, 43
_CARD = "# By `tutelage plan`: {what}\n"


def run_files(request: PlanRequest, advice: Advice) -> dict[str, tuple[str, dict[str, Any]]]:
    """What to start, in order: by the name of a file, what it is and its settings.

    If it pays to distil, that is the teacher if it is still to be trained, the student, and the same student
    alone; else the student alone, on the tokens that the best teacher's compute would pay for.
    """
    best = advice.best
    if advice.answer != "distil" or best is None:
        longer = request.tokens if best is None else best.longer_tokens
        batch = request.config.global_batch_tokens
        tokens = max(request.tokens, longer - longer % batch)
        return {
            "alone.yaml": ("the student without a teacher", _student(request, {"tokens": tokens}, "alone"))
        }
    found = {}
    if best.teacher.kind == "shape":
        found["teacher.yaml"] = ("the teacher", _teacher(request, best))
    place = {} if best.teacher.output is None else {"output": str(best.teacher.output)}
    taught = {"teacher": best.teacher.settings, "objective": {"alpha": best.alpha or 1.0}}
    cached = merged(taught, {"teacher": {"cache": {"format": _format(request, best)}}})
    found["student.yaml"] = ("the student", _student(request, taught | place, "student"))
    found["student-cached.yaml"] = (
        "the student from cached targets, which further students can read",
        _student(request, cached | place, "student-cached"),
    )
    found["alone.yaml"] = ("the same student without a teacher", _student(request, place, "alone"))
    return found


def save_run_files(directory: Path, files: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Write run files to a directory.

    Raises:
        UserError: one of them is no run file, or the directory cannot be written.
    """
    own_directory(directory)
    for name, (what, settings) in files.items():
        validate(RunConfig, settings, str(directory / name))
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(directory / name, _CARD.format(what=what) + text)


def _format(request: PlanRequest, best: Outlook) -> dict[str, Any]:
    chosen, _ = cache_format(request.vocab_size, best.teacher.width)
    return chosen.model_dump(mode="json")


def _student(request: PlanRequest, more: dict[str, Any], name: str) -> dict[str, Any]:
    own = {"seed": _STUDENT_SEED, "data": {"seed": _STUDENT_SEED}}
    return merged(merged(own, _drafted(request)), more | {"name": f"planned-{name}"})


def _teacher(request: PlanRequest, best: Outlook) -> dict[str, Any]:
    """The teacher's run: the student's, but for shape, budget, seed, learning rate and order of text."""
    draft = _drafted(request)
    optim = {key: value for key, value in draft.pop("optim", {}).items() if key != "lr"}
    own = {
        "name": best.teacher.settings["run"],
        "seed": _TEACHER_SEED,
        "model": {"shape": best.teacher.shape.name if best.teacher.shape else None},
        "data": {"seed": _TEACHER_SEED},
        "tokens": best.teacher.tokens,
    }
    return merged(draft, own) | ({"optim": optim} if optim else {})


def _drafted(request: PlanRequest) -> dict[str, Any]:
    """The settings that the user gave."""
    settings = request.config.model_dump(mode="json", exclude_defaults=True)
    return settings | {"tokens": request.config.tokens}
