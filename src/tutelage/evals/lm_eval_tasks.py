"""Build downstream tasks from held-out text and from packages, as lm-eval task files with their data.

`continuation`: which of four pieces of text follows the prompt; the other three are from other documents.
`last_word`: whether the model's first choice completes the clause. Both are functions of the text, the
tokenizer and the trained context alone, so the same model and text give the same files, bit for bit. The
prompt is as long as the trained context allows, at least half of it, and at most 1000 characters.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from tokenizers import Tokenizer

from tutelage.data.corpora import Corpus
from tutelage.errors import UserError
from tutelage.files import atomic_directory, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tokenizers import Encoding

    from tutelage.data.corpus_readers import PackageFiles
    from tutelage.data.store import Store


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have task files draw as with lm-eval's command line: some shuffle their answers as they are read.

    Else a task would have other questions for each model, and for the same one at each call.

    Args:
        seed: of numpy; that of Python is 0 there.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that task files draw from
    random.seed(0)
    np.random.seed(seed)  # noqa: NPY002 - as above
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above


class PaperTask(NamedTuple):
    """A task of the paper: lm-eval's name, worked examples before the question, and the metric reported."""

    name: str
    shots: int
    metric: str = "acc"


PAPER_TASKS = (
    PaperTask("hellaswag", 0, "acc_norm"),
    PaperTask("winogrande", 5),
    PaperTask("arc_easy", 0, "acc_norm"),
    PaperTask("piqa", 0, "acc_norm"),
    PaperTask("boolq", 5),
    PaperTask("sciq", 0),
    PaperTask("mmlu", 5),
    PaperTask("mathqa", 5),
    PaperTask("openbookqa", 5, "acc_norm"),
    PaperTask("social_iqa", 0),
    PaperTask("commonsense_qa", 10),
    PaperTask("truthfulqa_mc1", 0),
    PaperTask("logiqa2", 10),
    PaperTask("race", 0),
    PaperTask("medmcqa", 10),
    PaperTask("anli_r1", 10),
)
"""The tasks that `paper` names; their data comes from the Hugging Face Hub."""

_PER_CATEGORY = 100


@dataclass(frozen=True, slots=True)
class PackageTask:
    """A task with its questions in a package.

    Attributes:
        summary: the question.
        source: the package, pinned by version and checksum; not in `CORPORA`, so that nothing trains on it.
        items: turns the file's lines into questions.
    """

    summary: str
    source: Corpus[str]
    items: Callable[[Sequence[str]], list[Item]]


def build_package_task(name: str, output: Path) -> BuiltTask:
    """Write one of `PACKAGE_TASKS` to a directory below `output`, unless it exists.

    Raises:
        UserError: the package is missing, or has another version or content.
    """
    task = PACKAGE_TASKS[name]
    return _write_task(name, task.items(list(task.source.documents())), _MULTIPLE_CHOICE, output)


def analogies(lines: Sequence[str]) -> list[Item]:
    """Up to 100 questions of each category, in random order, each with four answers of the category.

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
            summary="word analogies of the word2vec project; one document per line",
            package="gensim",
            module="gensim",
            version="4.4.0",
            licence="Apache-2.0",
            sha256="8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36",
            read=_analogy_lines,
            last_python=(3, 13),
        ),
        items=analogies,
    ),
}
"""Every task that comes inside a package, by name."""

ITEMS = 500
"""Questions per task; fewer if the text is short."""

CHOICES = 4

_TEXT = 8_000_000  # characters of held-out text to read, a bound on memory
_PROMPT, _LEAST_PROMPT = 1000, 60
_STRIDE = 200  # characters between two questions on one document
_PIECE = re.compile(r"(?<=\S) (\S[\s\S]{38,62}?\S)(?=\s)")
_LAST_WORD = re.compile(r"(?<=\S) ([^\W\d_]{3,})(?=[.,;:!?)]|\n|$)")
_FORMAT = 1

Item = dict[str, Any]
"""One question, as a line of `items.jsonl`."""


class BuiltTask(NamedTuple):
    """A task by lm-eval's name for it, and the directory of `<name>.yaml` and `items.jsonl`."""

    name: str
    directory: Path


class Question(NamedTuple):
    """A place in a document: its index, the text before, ending with a word, and the text after a space."""

    document: int
    prompt: str
    answer: str


def held_out_texts(store: Store) -> list[str]:
    """The documents of a store's test split as text, up to a bound on the total size.

    Raises:
        UserError: the split is empty.
    """
    view = store.split("test")
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    texts: list[str] = []
    size = 0
    begun = len(store.begin_ids)
    for start, end in itertools.pairwise(view.offsets[:, 0].astype(np.int64)):
        ids = view.tokens[start + begun : end - 1].tolist()
        texts.append(tokenizer.decode(ids, skip_special_tokens=False))
        size += len(texts[-1])
        if size > _TEXT:
            break
    if not texts:
        raise UserError(f"{store.path}: split 'test' is empty; build the store with a larger share of it")
    return texts


def build_task(
    kind: str, domain: str, texts: Sequence[str], tokenizer: Tokenizer, context: int, output: Path
) -> BuiltTask:
    """Write one task to `<output>/<kind>_<domain>-<digest8>`, unless it exists.

    Args:
        kind: "continuation" or "last_word".
        domain: name of the text.
        texts: held-out documents.
        tokenizer: of the model; it limits the prompt.
        context: trained length in tokens; prompt and answer together never exceed it.
        output: directory of task directories.

    Raises:
        UserError: there is too little text, or the trained context is too short.
    """
    make, config = _KINDS[kind]
    items = make(list(texts), tokenizer, context)
    name = f"{kind}_{re.sub(r'[^A-Za-z0-9]+', '_', domain)}"
    if not items:
        raise UserError(
            f"task {name}: {len(texts)} documents, trained context {context} tokens: not one question fits; "
            "held-out text of some thousand characters in two or more documents and a context of 64 do"
        )
    return _write_task(name, items, config, output)


def _write_task(name: str, items: Sequence[Item], config: Mapping[str, Any], output: Path) -> BuiltTask:
    """Write `<output>/<name>-<digest8>`; `config` names the right answer and the metrics."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    directory = output.resolve() / f"{name}-{digest[:8]}"
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "items.jsonl")}},
    }
    metadata = {"version": _FORMAT, "sha256": digest}
    whole = {"task": name, **source, **_COMMON, **config, "metadata": metadata}
    files = {"items.jsonl": lines, f"{name}.yaml": yaml.safe_dump(whole, sort_keys=False)}
    if _texts_in(directory) != files:  # it was moved, so paths are old, or somebody changed it
        with atomic_directory(directory) as partial:
            for file, text in files.items():
                write_text(partial / file, text)
    return BuiltTask(name, directory)


def _texts_in(directory: Path) -> dict[str, str | None]:
    """The text of every file in a directory by name, None for what is no file; lm-eval reads all of them."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return {path.name: path.read_text(encoding="utf-8") if path.is_file() else None for path in paths}


def continuation_items(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[Item]:
    """Questions with four pieces of text of about equal length, exactly one of which follows the prompt.

    The right one is at each of the four places equally often, up to a remainder. The wrong ones are from
    other documents and do not occur in the prompt's document.
    """
    rng = random.Random(0)  # noqa: S311 - a choice of questions, not a secret
    questions = _chosen(texts, _PIECE, rng)
    documents = {question.document for question in questions}
    items: list[Item] = []
    for question in questions if len(documents) > 1 else []:
        wrong = _distractors(question, questions, texts[question.document], rng)
        prompt = _fitted(question.prompt, [question.answer, *wrong], tokenizer, context)
        if prompt and len(wrong) == CHOICES - 1:
            gold = len(items) % CHOICES
            choices = [*wrong[:gold], question.answer, *wrong[gold:]]
            items.append({"document": question.document, "prompt": prompt, "choices": choices, "gold": gold})
    return items


def last_word_items(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[Item]:
    """Prompts whose next word, of three letters or more, ends a clause, sentence or line."""
    rng = random.Random(0)  # noqa: S311 - as above
    fitted = (
        (question, _fitted(question.prompt, [question.answer], tokenizer, context))
        for question in _chosen(texts, _LAST_WORD, rng)
    )
    return [
        {"document": question.document, "prompt": prompt, "target": f" {question.answer}"}
        for question, prompt in fitted
        if prompt
    ]


_COMMON = {"test_split": "test", "num_fewshot": 0, "doc_to_text": "prompt"}
_ACCURACY = {"aggregation": "mean", "higher_is_better": True}
_MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", **_ACCURACY}, {"metric": "acc_norm", **_ACCURACY}],
}

_KINDS: dict[str, tuple[Callable[[Sequence[str], Tokenizer, int], list[Item]], dict[str, Any]]] = {
    "continuation": (continuation_items, _MULTIPLE_CHOICE),
    "last_word": (
        last_word_items,
        {
            "output_type": "loglikelihood",
            "doc_to_target": "target",
            "metric_list": [{"metric": "acc", **_ACCURACY}],
        },
    ),
}
"""By kind of task: the function that makes its items, and its part of the task file."""

KINDS = tuple(_KINDS)


def _chosen(texts: Sequence[str], answer: re.Pattern[str], rng: random.Random) -> list[Question]:
    """At most `ITEMS` questions, drawn from all of the text, in random order."""
    places = [(document, match) for document, text in enumerate(texts) for match in _spaced_out(text, answer)]
    rng.shuffle(places)
    return [
        Question(document, _whole_words(texts[document], match.start()), match[1])
        for document, match in places[:ITEMS]
    ]


def _spaced_out(text: str, answer: re.Pattern[str]) -> Iterator[re.Match[str]]:
    place = _LEAST_PROMPT
    while match := answer.search(text, place):
        yield match
        place = match.start() + _STRIDE


def _whole_words(text: str, end: int) -> str:
    """Up to `_PROMPT` characters before `end`, from the start of a word."""
    if end <= _PROMPT:
        return text[:end].lstrip()
    return text[end - _PROMPT : end].partition(" ")[2].lstrip()


def _distractors(
    question: Question, questions: Sequence[Question], document: str, rng: random.Random
) -> list[str]:
    """Three different answers to questions on other documents; fewer if there are not enough."""
    wrong: list[str] = []
    for other in rng.sample(questions, len(questions)):
        if len(wrong) == CHOICES - 1:
            break
        foreign = other.document != question.document and other.answer not in document
        if foreign and other.answer not in wrong:
            wrong.append(other.answer)
    return wrong


def _fitted(prompt: str, answers: Sequence[str], tokenizer: Tokenizer, context: int) -> str:
    """The longest end of the prompt, in whole words, that fits with every answer; "" if too little does."""

    def encoded(text: str) -> Encoding:
        return tokenizer.encode(text, add_special_tokens=False)

    room = context - max(len(encoded(f" {answer}").ids) for answer in answers)
    if room < context // 2:
        return ""
    while True:
        encoding = encoded(prompt)
        surplus = len(encoding.ids) - room
        if surplus <= 0:
            return prompt
        begin = encoding.offsets[surplus][0]
        prompt = prompt[begin:].partition(" ")[2].lstrip()
