"""Parse YAML so that the type of a field decides what an unquoted word means.

`no`, `1e-3`, `2020-01-01` and `0123` mean different things to different versions of YAML. Here an unquoted
scalar stays the text it was written as (`Plain`) until the type of its field is known: a name keeps it, a
number reads it. Keys are always text. Documents are small and finite: no repeated keys, no recursion, no tags
but the basic ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST_TEXT = 2**16
_MOST_VALUES = 10_000
_DEEPEST = 40
_PLAIN_TAG = "plain"
_BASIC = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_NUMBER = re.compile(r"[-+]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_OLD_OCTAL = re.compile(r"[-+]?0[\d_]+")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUTH = {"true": True, "false": False}
_SWITCHES = _TRUTH | {"yes": True, "no": False, "on": True, "off": False}


class Plain(str):
    """An unquoted scalar as it was written."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ReadAs:
    """Annotate a free mapping: unquoted scalars in it are read as those of `model` are.

    Nothing is validated or required; keys that `model` does not have are read by their look.
    """

    model: type[BaseModel]


class _Loader(yaml.SafeLoader):
    """Compose nodes; unquoted scalars without a tag get our own tag instead of a guessed type."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:  # noqa: ANN401 - PyYAML's
        if kind is not yaml.ScalarNode:
            return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]
        return _PLAIN_TAG if implicit[0] else "tag:yaml.org,2002:str"


def parse(text: str, where: str) -> object:
    """Read one YAML document into dicts, lists, strings and `Plain` scalars.

    Args:
        text: the document.
        where: what the message of an error begins with.

    Raises:
        UserError: it is no YAML, too large, too deep, contains itself, or has a key twice or one that is a
            list or map.
    """
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{where}: no settings: they have at most {LARGEST_TEXT:,} characters")
    try:
        node = _Loader(text).get_single_node()
        return Plain("") if node is None else _Builder(where).build(node, ())
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: nested more than {_DEEPEST} levels deep") from None


class _Builder:
    def __init__(self, where: str) -> None:
        self._where = where
        self._left = _MOST_VALUES

    def build(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> object:
        line = f"{self._where}: line {node.start_mark.line + 1}"
        self._left -= 1
        if self._left < 0:
            raise UserError(
                f"{self._where}: more than {_MOST_VALUES:,} values; are aliases (*name) repeated?"
            )
        if len(above) > _DEEPEST:
            raise UserError(f"{line}: nested more than {_DEEPEST} levels deep")
        if any(node is outer for outer in above):
            raise UserError(f"{line}: an alias (*name) stands inside what it stands for, so it has no end")
        if isinstance(node, yaml.ScalarNode) and (found := _NO_TEXT.search(node.value)) is not None:
            raise UserError(f"{line}: text with U+{ord(found[0]):04X}, which is no character of any text")
        inside = (*above, node)
        if isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN_TAG:
            return Plain(node.value)
        if node.tag not in _BASIC:
            raise UserError(
                f"{line}: not valid YAML here: tag {node.tag!r}; settings are text, numbers, lists and maps"
            )
        if isinstance(node, yaml.SequenceNode):
            return [self.build(part, inside) for part in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, inside)
        if node.tag.endswith(":str"):
            return str(node.value)
        return Plain(node.value)  # tagged as a number or the like: its field will see to that

    def _mapping(self, node: yaml.MappingNode, inside: tuple[yaml.Node, ...]) -> dict[str, object]:
        found: dict[str, object] = {}
        below: dict[str, object] = {}
        for key, value in node.value:
            line = f"{self._where}: line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{line}: a key must be a word, not a list or map")
            if key.value == "<<" and key.tag == _PLAIN_TAG:
                below = self._merged(value, inside, line) | below
            elif key.value in found:
                raise UserError(f"{line}: {key.value} is given twice in the same section; keep one")
            else:
                found[str(key.value)] = self.build(value, inside)
        return below | found

    def _merged(self, value: yaml.Node, inside: tuple[yaml.Node, ...], line: str) -> dict[str, object]:
        """Return the settings that `<<` merges in: one map, or several of which the first wins."""
        parts = self.build(value, inside)
        result: dict[str, object] = {}
        for part in reversed(parts if isinstance(parts, list) else [parts]):
            if not isinstance(part, dict):
                raise UserError(f"{line}: << needs a map, or a list of maps")
            result |= part
        return result


def fitted(value: object, wanted: object) -> object:
    """Convert every `Plain` scalar in `value` to the type of its field; other values stay as they are.

    Args:
        value: from `parse`, or a part of it.
        wanted: a type as it stands in an annotation, such as a section, `float | None` or `tuple[str, ...]`.
    """
    return _fitted(value, _members(wanted))


def _fitted(value: object, members: Sequence[Any]) -> object:
    if isinstance(value, Plain):
        return _scalar(value, members)
    if isinstance(value, list):
        return [_fitted(part, _entry(members, place)) for place, part in enumerate(value)]
    if isinstance(value, dict):
        sections = _chosen(members, value)
        return {key: _fitted(part, _field(sections, members, key)) for key, part in value.items()}
    return value


def _members(wanted: object) -> list[Any]:
    """List the types of a union, without annotations; a `ReadAs` stands for its model."""
    if isinstance(wanted, ReadAs):
        return [wanted.model]
    origin = get_origin(wanted)
    if origin is Annotated:
        bare, *notes = get_args(wanted)
        models = [note.model for note in notes if isinstance(note, ReadAs)]
        return models or _members(bare)
    if origin in {Union, UnionType}:
        return [member for part in get_args(wanted) for member in _members(part)]
    return [wanted]


def _entry(members: Sequence[Any], place: int) -> list[Any]:
    """List the types that an entry of a list can have."""
    found: list[Any] = []
    for member in members:
        inner = get_args(member) if get_origin(member) in {tuple, list} else ()
        if inner:
            found += _members(inner[0] if place >= len(inner) or inner[-1] is Ellipsis else inner[place])
    return found


def _chosen(members: Sequence[Any], value: dict[str, object]) -> list[type[BaseModel]]:
    """List the sections that a map can be: those whose `kind` or `policy` it names, or all."""
    sections = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    tags = {value[tag] for tag in ("kind", "policy") if isinstance(value.get(tag), str)}
    named = [
        section
        for section in sections
        if tags & {choice for tag in ("kind", "policy") for choice in _literals(section, tag)}
    ]
    return named or sections


def _literals(section: type[BaseModel], name: str) -> tuple[object, ...]:
    field = section.model_fields.get(name)
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _field(sections: Sequence[type[BaseModel]], members: Sequence[Any], key: str) -> list[Any]:
    """List the types that the value of a key can have."""
    found: list[Any] = []
    for section in sections:
        if (field := section.model_fields.get(key)) is not None:
            models = [note.model for note in field.metadata if isinstance(note, ReadAs)]
            found += models or _members(field.annotation)
    for member in members:
        if get_origin(member) is dict:
            found += _members(get_args(member)[1])
    return found


def _scalar(text: Plain, members: Sequence[Any]) -> object:
    kinds = {kind for member in members for kind in _kinds(member)}
    if text in _NULL:
        return None
    number = _number(text, whole=int in kinds and float not in kinds)
    text_too = str in kinds
    if number is not None and (not text_too or float in kinds or (int in kinds and isinstance(number, int))):
        return number
    if bool in kinds and text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    return str(text) if text_too else _TRUTH.get(text.lower(), str(text))


def _kinds(member: object) -> set[type]:
    """Return the scalars that a type takes, of str, int, float, bool and None."""
    if get_origin(member) is Literal:
        return {type(choice) for choice in get_args(member)}
    if not isinstance(member, type) or member is Any or issubclass(member, BaseModel):
        return set()
    return {member} if member in {int, float, bool, type(None)} else {str}


def _number(text: str, *, whole: bool) -> int | float | None:
    """Parse a number if all readers of YAML agree on it, else return None.

    Args:
        text: as written.
        whole: take `1e6` and `3.0` as whole numbers.
    """
    if _NUMBER.fullmatch(text) is None or _OLD_OCTAL.fullmatch(text):
        return None
    plain = text.replace("_", "")
    exact = Decimal(plain)
    if re.fullmatch(r"[-+]?\d+", plain) or (whole and exact == exact.to_integral_value()):
        return int(exact) if exact.adjusted() < 40 else None  # noqa: PLR2004 - no setting is that large
    found = float(plain)
    return found if abs(found) < float("inf") else None
