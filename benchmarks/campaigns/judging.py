"""Say of a disturbed command whether what became of it is right, and if not, what kind of wrong it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from campaigns.commands import run
from campaigns.world import result

if TYPE_CHECKING:
    from collections.abc import Callable

    from campaigns.commands import Outcome
    from campaigns.world import Task, World

RIGHT, SILENT, HANG, TRACEBACK, LOST = "right", "silent", "hang", "traceback", "lost"
UNCLEAR, LITTER = "unclear", "litter"
KINDS = {
    RIGHT: "the result is that of the undisturbed command, or one line named what was wrong and the same "
    "command gave that result when the cause was gone",
    SILENT: "another result, and exit code 0",
    HANG: "did not end",
    TRACEBACK: "an error that no user can read, or the death of the process",
    LOST: "the same command does not get to the end any more",
    UNCLEAR: "an error that does not name what was wrong",
    LITTER: "files of something that was refused",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case.

    Attributes:
        kind: one of KINDS.
        words: what was done, and what was found.
        error: the case ended in an error of one line first.
        redone: steps that were computed once more; None where none could be.
    """

    kind: str
    words: str
    error: bool = False
    redone: int | None = None


def broken(outcome: Outcome) -> str | None:
    """HANG or TRACEBACK if a command ended so, else None."""
    if outcome.hung:
        return HANG
    if "Traceback" in outcome.err or "Exception ignored" in outcome.err:
        return TRACEBACK
    return None


def difference(world: World, task: Task, outcome: Outcome, ignored: str = "") -> str | None:
    """The first file that is not what the undisturbed command makes of it; None if there is none."""
    found, truth = result(world.place, world.patterns(task), outcome), world.truths[task].result
    for path in sorted(truth.keys() | found.keys()):
        if path != ignored and found.get(path) != truth.get(path):
            return f"{path}: {_first_difference(truth.get(path), found.get(path))}"
    return None


def _first_difference(right: object, found: object) -> str:
    """What is not as it should be, in short."""
    if right is None or found is None:
        return "is new" if right is None else "is missing"
    texts = [one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in (right, found)]
    lines = zip(*(text.splitlines() for text in texts), strict=False)
    here, there = next(((a, b) for a, b in lines if a != b), ("its end", "its end"))
    return f"{there[:120]!r} and not {here[:120]!r}"


def finish(world: World, task: Task, words: str, redone: int | None = None) -> Verdict:
    """Run the task after its cause of trouble is gone: it must end, in the undisturbed result."""
    outcome = run(world.arguments(task), world.place, ranks=task.ranks)
    if kind := broken(outcome):
        return Verdict(kind, f"{words}; the same command again: {outcome.code} {outcome.complaint}")
    if outcome.code:
        return Verdict(LOST, f"{words}; the same command again: {outcome.code} {outcome.complaint}")
    if (path := difference(world, task, outcome)) is not None:
        return Verdict(SILENT, f"{words}; the same command again: {path}")
    return Verdict(RIGHT, words, redone=redone)


def _said(outcome: Outcome, names: tuple[str, ...]) -> bool:
    """Whether a line of its complaints and notes has all the names."""
    return any(all(name in line for name in names) for line in outcome.err.splitlines())


def judge(
    world: World,
    task: Task,
    outcome: Outcome,
    words: str,
    *,
    names: tuple[str, ...] = (),
    mend: Callable[[], None],
    ignored: str = "",
) -> Verdict:
    """Judge a command that met a fault which stays until it is mended.

    Args:
        world: where it ran.
        task: what it was.
        outcome: how it ended.
        words: what was done to it.
        names: one of these must be in the error.
        mend: takes the cause away.
        ignored: a file that the command had no reason to read or make.
    """
    if kind := broken(outcome):
        return Verdict(kind, f"{words}: {outcome.code} {outcome.complaint}")
    if outcome.code == 0:
        path = difference(world, task, outcome, ignored)
        if path is None or not (names and _said(outcome, names)):
            return Verdict(RIGHT if path is None else SILENT, f"{words}: {path}" if path else words)
        mend()  # a table without what cannot be read, and the line that says so
        return finish(world, task, f"{words}: said, and {path}")
    words = f"{words}: {outcome.complaint}"
    if outcome.code != 2:
        return Verdict(TRACEBACK, f"{outcome.code}: {words}")
    # A study says above its last line what each of its runs died of.
    if not outcome.complaint.startswith("error: ") or not any(name in outcome.err for name in names):
        return Verdict(UNCLEAR, words)
    mend()
    verdict = finish(world, task, words)
    return Verdict(verdict.kind, verdict.words, error=True)
