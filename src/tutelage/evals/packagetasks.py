"""Downstream tasks whose questions come inside PyPI packages: no account, and never a training text.

To add a task, write a function from the file's lines to items, and one entry in `PACKAGE_TASKS`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.data.corpora import Corpus
from tutelage.evals.tasks import CHOICES, write_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tutelage.data.readers import PackageFiles
    from tutelage.evals.tasks import BuiltTask, Item

_PER_CATEGORY = 100


@dataclass(frozen=True, slots=True)
class PackageTask:
    """A task with its questions in a package.

    Attributes:
        summary: what is asked.
        source: the package, pinned by version and checksum; not in `CORPORA`, so that nothing trains on it.
        items: the questions in the file's lines.
    """

    summary: str
    source: Corpus[str]
    items: Callable[[Sequence[str]], list[Item]]


def build_package_task(name: str, output: Path) -> BuiltTask:
    """Write one of `PACKAGE_TASKS` into a directory below `output`, or find it there.

    Raises:
        UserError: the package is missing, or has another version or content.
    """
    task = PACKAGE_TASKS[name]
    return write_choices(name, task.items(list(task.source.documents())), output)


def analogies(lines: Sequence[str]) -> list[Item]:
    """Up to a hundred questions of each category, in random order, each with four answers of the category.

    Args:
        lines: ": category", or four words a b c d with a : b = c : d.
    """
    rng = random.Random(0)  # noqa: S311 - a choice of questions, not a secret
    categories: dict[str, list[list[str]]] = {}
    for line in lines:
        if line.startswith(":"):
            questions = categories.setdefault(line[1:].strip(), [])
        else:
            questions.append(line.split())
    answers = {name: list(dict.fromkeys(words[3] for words in known)) for name, known in categories.items()}
    chosen = [
        (name, words)
        for name, known in categories.items()
        for words in rng.sample(known, min(_PER_CATEGORY, len(known)))
    ]
    rng.shuffle(chosen)
    items: list[Item] = []
    for number, (name, words) in enumerate(chosen):
        wrong = rng.sample([word for word in answers[name] if word not in words], CHOICES - 1)
        gold = number % CHOICES
        prompt = f"{words[0]} is to {words[1]} as {words[2]} is to"
        choices = [*wrong[:gold], words[3], *wrong[gold:]]
        items.append({"category": name, "prompt": prompt, "choices": choices, "gold": gold})
    return items


def _analogy_lines(files: PackageFiles) -> Iterator[str]:
    yield from files.text("test/test_data/questions-words.txt").splitlines()


PACKAGE_TASKS = {
    "word_analogy": PackageTask(
        summary="Athens is to Greece as Baghdad is to ...: 14 kinds of relation, meaning and grammar",
        source=Corpus(
            name="word_analogy",
            description="word analogies of the word2vec project; one document per line",
            package="gensim",
            module="gensim",
            version="4.4.0",
            licence="Apache-2.0",
            sha256="8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36",
            read=_analogy_lines,
        ),
        items=analogies,
    ),
}
"""Every task that comes inside a package, by name."""
