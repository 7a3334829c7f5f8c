"""Prompts and completions as documents in pieces: which text is given, and which is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

from tutelage.data import hubrows, textfiles
from tutelage.data.config import CorpusPairs, FilePairs, HubPairs, PairSource
from tutelage.data.corpora import find_pairs
from tutelage.data.textfiles import BadRowError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tutelage.data.chat import Chat
    from tutelage.data.textfiles import Row


class Piece(NamedTuple):
    """A part of a document that is encoded by itself, so that no token reaches over its borders.

    Attributes:
        text: what it says.
        is_prompt: whether its tokens carry no loss.
        markup: whether special tokens in it are meant as such, because a chat template put them there.
    """

    text: str
    is_prompt: bool = False
    markup: bool = False


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


def read_pairs(source: PairSource, chat: Chat | None) -> Iterator[tuple[Piece, ...] | BadRowError]:
    """The documents of one source, in a fixed order, each a prompt and its completion, perhaps repeated.

    What is wrong with one row is handed on in its place, naming file and line: a field is missing, is no text
    or is blank, or the conversation does not fit the chat template.

    Args:
        source: where they are.
        chat: renders conversations; needed by `template: chat` only.

    Raises:
        UserError: a file or data set cannot be read.
    """
    for where, row in _rows(source):
        try:
            yield _pieces(_conversation(row, source, where), source, chat, where)
        except BadRowError as error:
            yield error


def _pieces(
    messages: Sequence[Message], source: PairSource, chat: Chat | None, where: str
) -> tuple[Piece, ...]:
    if source.template == "chat":
        assert chat is not None  # noqa: S101 - a store that uses chat has a tokenizer with a template
        return chat.pieces(messages, where)
    prompt, completion = (message["content"] for message in messages)
    return Piece(prompt + source.separator, is_prompt=True), Piece(completion)


def _rows(source: PairSource) -> Iterator[Row]:
    match source:
        case CorpusPairs():
            for number, pair in enumerate(find_pairs(source.name).documents(), 1):
                yield f"corpus {source.name}, pair {number}", pair
        case FilePairs():
            yield from textfiles.read_rows(source.paths, _fields(source))
        case HubPairs():
            yield from hubrows.read_rows(source)


def _fields(source: FilePairs | HubPairs) -> tuple[str, ...]:
    return (source.prompt, source.completion) if source.messages is None else (source.messages,)


def _question(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _conversation(row: object, source: PairSource, where: str) -> Sequence[Message]:
    if isinstance(source, CorpusPairs):
        return _question(*cast("tuple[str, str]", row))
    if source.messages is None:
        return _question(*(_text(row, field, where) for field in _fields(source)))
    messages = textfiles.value_of(row, source.messages, where)
    if not isinstance(messages, list):
        raise BadRowError(
            f"{where}: field '{source.messages}' holds {type(messages).__name__}, expected a list of "
            "{role, content}"
        )
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def _message(message: object, where: str) -> Message:
    """One turn, with whatever else it has that a template may look at."""
    role, content = (_text(message, field, where) for field in ("role", "content"))
    return {**cast("Message", message), "role": role, "content": content}


def _text(row: object, field: str, where: str) -> str:
    text = textfiles.text_of(row, field, where)
    if not text or text.isspace():
        raise BadRowError(
            f"{where}: field '{field}' is empty; every prompt and completion must say something"
        )
    return text
