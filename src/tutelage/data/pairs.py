"""Prompts and completions as documents in pieces: which text is given, and which is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

from tutelage.data import hubrows, textfiles
from tutelage.data.config import CorpusPairs, FilePairs, HubPairs, PairSource
from tutelage.data.corpora import find_pairs
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tutelage.data.chat import Chat


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


def read_pairs(source: PairSource, chat: Chat | None) -> Iterator[tuple[Piece, ...]]:
    """The documents of one source, in a fixed order, each a prompt and its completion, perhaps repeated.

    Args:
        source: where they are.
        chat: renders conversations; needed by `template: chat` only.

    Raises:
        UserError: naming file and line: a field is missing, is no text or is blank, or the conversation
            does not fit the chat template.
    """
    for where, messages in _conversations(source):
        if source.template == "chat":
            assert chat is not None  # noqa: S101 - a store that uses chat has a tokenizer with a template
            yield chat.pieces(messages, where)
        else:
            prompt, completion = (message["content"] for message in messages)
            yield Piece(prompt + source.separator, is_prompt=True), Piece(completion)


def _conversations(source: PairSource) -> Iterator[tuple[str, Sequence[Message]]]:
    match source:
        case CorpusPairs():
            corpus = find_pairs(source.name)
            for number, (prompt, completion) in enumerate(corpus.documents(), 1):
                yield f"corpus {source.name}, pair {number}", _question(prompt, completion)
        case FilePairs():
            for where, row in textfiles.read_rows(source.paths, _fields(source)):
                yield where, _conversation(row, source, where)
        case HubPairs():
            for where, row in hubrows.read_rows(source):
                yield where, _conversation(row, source, where)


def _fields(source: FilePairs | HubPairs) -> tuple[str, ...]:
    return (source.prompt, source.completion) if source.messages is None else (source.messages,)


def _question(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _conversation(row: Mapping[str, object], source: FilePairs | HubPairs, where: str) -> Sequence[Message]:
    if source.messages is None:
        return _question(*(_text(row, field, where) for field in _fields(source)))
    messages = textfiles.value_of(row, source.messages, where)
    if not isinstance(messages, list):
        raise UserError(
            f"{where}: field '{source.messages}' holds {type(messages).__name__}, expected a list of "
            "{role, content}"
        )
    for number, message in enumerate(messages, 1):
        place = f"{where}, message {number}"
        for field in ("role", "content"):
            _text(message, field, place)
    return cast("list[Message]", messages)


def _text(row: object, field: str, where: str) -> str:
    text = textfiles.text_of(row, field, where)
    if not text or text.isspace():
        raise UserError(f"{where}: field '{field}' is empty; every prompt and completion must say something")
    return text
