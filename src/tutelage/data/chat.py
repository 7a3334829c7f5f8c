"""Read prompts and completions as documents in pieces: prompts are given, completions are learned."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from tokenizers import Tokenizer

from tutelage.config.data_config import CorpusPairs, FilePairs, HubPairs, PairSource
from tutelage.data.corpora import find_pairs
from tutelage.data.pieces import Piece, in_order
from tutelage.data.row_readers import WHICH_FIELD, BadRowError, file_rows, hub_rows, text_of, value_of
from tutelage.data.text_files import not_decoded
from tutelage.data.tokenizer import named_tokens, read_settings
from tutelage.errors import UserError, one_line
from tutelage.files import read_bytes
from tutelage.records import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tutelage.data.row_readers import Row
    from tutelage.data.tokenizer import TextTokenizer


class Chat:
    """Renders conversations with one chat template.

    Args:
        tokenizer: the tokenizer the text is for.
        settings: `chat_template` and the special tokens it names, as in tokenizer_config.json.

    Attributes:
        settings: the same, for the store's own tokenizer_config.json.
    """

    def __init__(self, tokenizer: TextTokenizer, settings: dict[str, str]) -> None:
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - seconds that other stores need not pay

        self.settings = settings
        self._end = tokenizer.end_of_text
        self._special = tokenizer.special_tokens
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer.json), eos_token=self._end, **settings
        )
        self._changed = _found_in_changed_text(tokenizer)
        self._marks = re.compile("|".join(map(re.escape, self._special)))

    def pieces(self, messages: Sequence[Message], where: str, tools: Tools = None) -> tuple[Piece, ...]:
        """Return a prompt and a completion for every turn of the assistant that is learned.

        Those of weight 0 are not, as in OpenAI's format: they belong to the next prompt. A prompt is all that
        the template puts before the turn, the generation prompt included; a completion is everything it puts
        there for the turn. White space after an end-of-text token belongs to the next prompt. Text after the
        last learned turn is left out, and so is an end-of-text token at the end, because the store closes
        every document with one.

        Args:
            messages: turns with the roles that the template knows.
            where: the place of the conversation, for messages.
            tools: those that the assistant can call.

        Raises:
            BadRowError: no turn is learned, or the first one is; a text spells a special token; or the
                template refuses the conversation, renders its beginning otherwise when more follows, or
                leaves out a turn.
        """
        self._check(messages, where, tools)
        found: list[Piece] = []
        done = ""
        for turn, message in enumerate(messages):
            if not _is_learned(message):
                continue
            asked = self._rendered(messages[:turn], where, tools, prompting=True)
            answered = self._rendered(messages[: turn + 1], where, tools, prompting=False)
            if not asked.startswith(done):  # some templates put an end-of-text token at the very end alone
                done, found[-1] = done.removesuffix(self._end), self._unclosed(found[-1])
            if not (asked.startswith(done) and answered.startswith(asked)):
                unprompted = self._rendered(messages[:turn], where, tools, prompting=False)
                raise BadRowError(f"{where}: {_why_no_border(turn, unprompted, asked, answered)}")
            answer = answered[len(asked) :]
            if not self._marks.sub("", answer).strip():
                raise BadRowError(
                    f"{where}: the chat template writes nothing that message {turn + 1} says, so there is "
                    "nothing to learn (older ones know no tool_calls)"
                )
            if answer.rstrip().endswith(self._end):
                answer = answer.rstrip()
            found += [
                Piece(asked[len(done) :], is_prompt=True, markup=True),
                Piece(answer, is_prompt=False, markup=True),
            ]
            done = asked + answer
        return in_order([*found[:-1], self._unclosed(found[-1])], self._special)

    def unasked_prompt(self) -> str:
        """Return the generation prompt that ends every conversation, asked for or not; "" if none does."""
        ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        talk = cast("list[Message]", [ask, answer, ask])
        try:
            unasked, asked = (self._rendered(talk[:1], "", None, prompting=flag) for flag in (False, True))
            answered, more = (self._rendered(talk[:end], "", None, prompting=False) for end in (2, 3))
        except BadRowError:  # it wants other conversations than these; theirs say what it refuses
            return ""
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answered, more, strict=False))
        end = answered[sum(1 for _ in shared) :]
        return end if unasked == asked and answered.startswith(asked) and asked.endswith(end) else ""

    def _unclosed(self, piece: Piece) -> Piece:
        return piece._replace(text=piece.text.removesuffix(self._end))

    def _check(self, messages: Sequence[Message], where: str, tools: Tools) -> None:
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise BadRowError(
                f"{where}: no message of the role 'assistant', so there is nothing to learn; roles: "
                f"{', '.join(roles) or 'none'}"
            )
        learned = [_is_learned(message) for message in messages]
        if not any(learned):
            raise BadRowError(
                f"{where}: every turn of the assistant has weight 0, so there is nothing to learn"
            )
        if learned[0]:
            raise BadRowError(f"{where}: the first message is the assistant's, so there is no prompt")
        given = {"a message": messages, "a tool": tools}
        for what, text in ((what, text) for what, value in given.items() for text in _strings(value)):
            if (token := self._spelled(text)) is not None:
                raise BadRowError(
                    f"{where}: {what} spells the special token '{token}', with which text could fake "
                    "a turn; take it out"
                )

    def _spelled(self, text: str) -> str | None:
        """Return the special token that a text spells, as it stands or as the tokenizer changes it."""
        found = next((token for token in self._special if token in text), None)
        if found is None and self._changed:
            changed: str = self._tokenizer.backend_tokenizer.normalizer.normalize_str(text)
            found = next((token for form, token in self._changed.items() if form in changed), None)
        return found

    def _rendered(self, messages: Sequence[Message], where: str, tools: Tools, *, prompting: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompting
            )
            text.encode()
        except Exception as error:  # noqa: BLE001 - a template is a program, which can fail in any way
            raise BadRowError(f"{where}: the chat template refuses it ({one_line(error)})") from None
        return text


def _why_no_border(place: int, unprompted: str, asked: str, answered: str) -> str:
    """Say why a turn is not what follows the prompt for it, `unprompted` being that less its end.

    Either by how the turn begins, or by what was said in the `place` messages before.
    """
    turn = f"message {place + 1}"
    if asked.startswith(unprompted) and answered.startswith(unprompted) and not answered.startswith(asked):
        return (
            f"the chat template ends a prompt with {asked[len(unprompted) :]!r}, with which {turn} does "
            "not begin, so that no border can be drawn; mend the template"
        )
    return (
        f"the chat template renders {turn} or one before it otherwise when more follows, so that no "
        "border can be drawn; split the conversation into single turns"
    )


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _found_in_changed_text(tokenizer: TextTokenizer) -> dict[str, str]:
    """Return the special tokens that a tokenizer looks for in normalized text, by what they become there."""
    settings = json.loads(tokenizer.json)
    normalizer = Tokenizer.from_str(tokenizer.json).normalizer
    if normalizer is None:
        return {}
    added = [token["content"] for token in settings.get("added_tokens") or [] if token["normalized"]]
    return {normalizer.normalize_str(token): token for token in added if token in tokenizer.special_tokens}


def _strings(value: object) -> Iterator[str]:
    """Yield all text in a value: of roles and of calls to tools as well, which a template may render."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def load_chat(tokenizer: TextTokenizer, path: Path) -> Chat:
    """Load the chat template beside the tokenizer in `path`, of chat_template.jinja or tokenizer_config.json.

    Raises:
        UserError: there is none, it cannot be read, or it asks for an answer whatever it is told.
    """
    template = chat_template(path)
    if template is None:
        raise UserError(
            f"tokenizer.path {path}: no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); use template: plain, or a directory of a model that chats"
        )
    found = named_tokens(path).items()
    named = {name: token for name, token in found if name in template and name != "eos_token"}
    chat = Chat(tokenizer, {"chat_template": template, **named})
    if end := chat.unasked_prompt():
        raise UserError(
            f"tokenizer.path {path}: the chat template ends conversations with {end!r} where no answer is "
            "asked for too, so that answers would end with it; put it between "
            "{% if add_generation_prompt %} and {% endif %}"
        )
    return chat


def chat_template(path: Path) -> str | None:
    """Return the chat template in a directory, of several the default one; None if there is none.

    Raises:
        UserError: its file cannot be read.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file).decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(not_decoded(str(file), error)) from None
    found = read_settings(path / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, with names
        default = (one for one in found if isinstance(one, dict) and one.get("name") == "default")
        found = next(default, {}).get("template")
    return found if isinstance(found, str) else None


Tools = list[Any] | None
"""Descriptions of functions, as JSON; None where the template is told of none."""


class Message(TypedDict):
    """One turn of a conversation; a turn of the assistant with weight 0 is not learned."""

    role: str
    content: str
    weight: NotRequired[int]


def read_pairs(source: PairSource, chat: Chat | None) -> Iterator[tuple[Piece, ...] | BadRowError]:
    """Yield the documents of one source in a fixed order, each one or more prompts with their completions.

    An error in one row is yielded in its place and names file and line: a field is missing, is no text or is
    blank, or the conversation does not fit the chat template.

    Args:
        source: the source.
        chat: renders conversations; needed by `template: chat` only.

    Raises:
        UserError: a file or data set cannot be read, or the template writes no tools and is to.
    """
    unheard = chat is not None and "tools" not in chat.settings["chat_template"]
    if unheard and not isinstance(source, CorpusPairs) and source.tools is not None:
        raise UserError(
            f"source tools = {source.tools!r}: the chat template writes no tools; leave it out, or give "
            "tokenizer.path a template that does"
        )
    for where, row in _rows(source):
        try:
            yield _pieces(row, source, chat, where)
        except BadRowError as error:
            yield error


def _pieces(row: object, source: PairSource, chat: Chat | None, where: str) -> tuple[Piece, ...]:
    messages, tools = _conversation(row, source, where), _tools(row, source, where)
    if source.template == "chat":
        assert chat is not None  # noqa: S101 - a store that uses chat has a tokenizer with a template
        return chat.pieces(messages, where, tools)
    prompt, completion = (message["content"] for message in messages)
    return in_order([Piece(prompt + source.separator, is_prompt=True), Piece(completion)])


def _rows(source: PairSource) -> Iterator[Row]:
    match source:
        case CorpusPairs():
            for number, pair in enumerate(find_pairs(source.name).documents(), 1):
                yield f"corpus {source.name}, pair {number}", pair
        case FilePairs():
            yield from file_rows(source, _fields(source))
        case HubPairs():
            yield from hub_rows(source)


def _fields(source: FilePairs | HubPairs) -> tuple[str, ...]:
    spoken = (source.prompt, source.completion) if source.messages is None else (source.messages,)
    return spoken if source.tools is None else (*spoken, source.tools)


def _question(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _conversation(row: object, source: PairSource, where: str) -> Sequence[Message]:
    """Return the turns of a row; of prompts that are turns themselves, those of the assistant are given."""
    if isinstance(source, CorpusPairs):
        return _question(*cast("tuple[str, str]", row))
    if source.messages is not None:
        return _messages(row, source.messages, where)
    if not isinstance(value_of(row, source.prompt, where), list):
        return _question(_text(row, source.prompt, where), _text(row, source.completion, where))
    if source.template != "chat":
        raise BadRowError(
            f"{where}: field '{source.prompt}' holds a list; messages need a chat template to become text "
            "(template: chat)"
        )
    given = _messages(row, source.prompt, f"{where}, field '{source.prompt}'")
    for message in given:
        if message["role"] == "assistant":
            message["weight"] = 0
    return [*given, *_messages(row, source.completion, f"{where}, field '{source.completion}'")]


def _messages(row: object, field: str, where: str) -> list[Message]:
    messages = value_of(row, field, where)
    if not isinstance(messages, list):
        raise BadRowError(
            f"{where}: field '{field}' holds {type(messages).__name__}, expected a list of {{role, content}}"
        )
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def _tools(row: object, source: PairSource, where: str) -> Tools:
    """Return the tools that a row names; many data sets have them as JSON, since no two are alike."""
    if isinstance(source, CorpusPairs) or source.tools is None:
        return None
    tools = value_of(row, source.tools, where)
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = parse_json(tools)
    if not (tools is None or isinstance(tools, list)):
        raise BadRowError(
            f"{where}: field '{source.tools}' holds {type(tools).__name__}, expected a list of tools, or one "
            "as JSON"
        )
    return tools or None


def _message(message: object, where: str) -> Message:
    """Return one turn, with all other fields, for the template; one that calls tools may say nothing.

    Fields without a value are left out, as newer versions of transformers do: rows of parquet have all fields
    that any of them has, and templates ask whether one is there.
    """
    hint = "every message is {role, content}"
    message = _as_turn(message)
    turn: dict[str, object] = {"role": _text(message, "role", where, hint)}
    fields = cast("dict[str, object]", message)
    if not (fields.get("tool_calls") and not fields.get("content")):
        turn["content"] = _text(message, "content", where, hint)
    known = {name: value for name, value in fields.items() if value is not None}
    if known.get("weight", 0) not in ([0, 1] if turn["role"] == "assistant" else [0]):
        raise BadRowError(
            f"{where}: weight {known['weight']!r}; turns of the assistant have 0 (given) or 1 (learned), "
            "others 0"
        )
    return cast("Message", known | turn)


def _as_turn(message: object) -> object:
    """Return a message as {role, content} that is {from, value}, as ShareGPT has it, or in parts of text."""
    if not isinstance(message, dict):
        return message
    turn: dict[str, Any] = dict(message)
    if turn.get("role") is None and {"from", "value"} <= turn.keys():
        speaker, turn["content"] = turn.pop("from"), turn.pop("value")
        turn["role"] = {"human": "user", "gpt": "assistant"}.get(str(speaker), speaker)
    if isinstance(parts := turn.get("content"), list):
        texts = [one.get("text") for one in parts if isinstance(one, dict) and one.get("type") == "text"]
        if len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
            turn["content"] = "".join(map(str, texts))
    return turn


def _text(row: object, field: str, where: str, hint: str = WHICH_FIELD) -> str:
    text = text_of(row, field, where, hint)
    if not text or text.isspace():
        raise BadRowError(
            f"{where}: field '{field}' is empty; every prompt and completion must say something"
        )
    return text
