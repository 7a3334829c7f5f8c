"""Say what is wrong with settings: a line for each field, in the words of the person who wrote them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from tutelage.errors import UserError, in_words, shortened, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_LONGEST_VALUE, _LONGEST_LINE, _MOST_LINES = 80, 400, 20
_WHOLE = "the whole"
_KEY = "[key]"
"""With which pydantic ends the location of an entry's name."""


class WrongSettingsError(UserError, ValueError):
    """Settings that do not fit a config; `fields` has the dotted name of each, once.

    In Python, where `Objective(temperature=0)` is a call with a wrong value, it is a ValueError too.
    """

    def __init__(self, message: str, fields: Sequence[str]) -> None:
        super().__init__(message)
        self.fields = fields


def wrong_settings(kind: type[BaseModel], error: ValidationError, where: str) -> WrongSettingsError:
    """The error for what pydantic found wrong with settings of `kind`; each line begins with `where`."""
    schema = _schema(kind)
    found: dict[str, list[str]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        place = detail["loc"]
        if detail["type"] == "too_short" and any(
            other["loc"][: len(place)] == place for other in details if other is not detail
        ):
            continue  # pydantic counts the entries that are right
        field, words = _explained(schema, detail)
        found.setdefault(field, []).append(words)
    lines = [
        shortened(f"{'' if field == _WHOLE else f'{field}: '}{_either(words)}", _LONGEST_LINE)
        for field, words in found.items()
    ]
    names = dict.fromkeys(field.partition(" = ")[0] for field in found)
    return WrongSettingsError("\n".join(f"{where}: {line}" for line in lines[:_MOST_LINES]), [*names])


@cache
def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a config, which takes pydantic tens of milliseconds; for reading alone."""
    return kind.model_json_schema()


def _either(words: Sequence[str]) -> str:
    """Join what the members of a union ask for."""
    first, *others = dict.fromkeys(words)
    return ", or ".join([first, *(text.removeprefix("must be ") for text in others)])


def _explained(schema: dict[str, Any], detail: ErrorDetails) -> tuple[str, str]:
    """The field of an error, with its value where that is short, and what is wrong with it."""
    place, kind, value = detail["loc"], detail["type"], detail["input"]
    if place and place[-1] == _KEY:
        return _located(schema, place[:-1])[0], f"its name {in_words(detail)}"
    field, node = _located(schema, place)
    if kind == "extra_forbidden":
        allowed = sorted(_located(schema, place[:-1])[1].get("properties", {}))
        inside = [
            f"{name}.{place[-1]}"
            for name in allowed
            if place[-1] in _located(schema, [*place[:-1], name])[1].get("properties", {})
        ]
        hint = f"did you mean '{inside[0]}'? " if inside else suggestion(str(place[-1]), allowed)
        return field, f"unknown setting; {hint}allowed: {', '.join(allowed)}"
    if kind == "missing":
        return field, "required but not given"
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _untagged(field, node, detail)
    hint = suggestion(value, map(str, node.get("enum", ()))) if isinstance(value, str) else ""
    words = f"{hint}{in_words(detail)}"
    if kind == "model_type" and (settings := node.get("properties")):
        words += f"; allowed: {', '.join(sorted(settings))}"
    if isinstance(value, int | float | str) and field != _WHOLE:
        return f"{field} = {shown(value, _LONGEST_VALUE)}", words
    return field, words


def _untagged(field: str, node: dict[str, Any], detail: ErrorDetails) -> tuple[str, str]:
    """The error for a section whose `kind` or `policy`, on which its other settings depend, is none."""
    context = detail["ctx"]
    tag = context["discriminator"].strip("'")
    prefix = "" if field == _WHOLE else f"{field}."
    unions = [node, *node.get("anyOf", [])]
    known = sorted(tag for union in unions for tag in union.get("discriminator", {}).get("mapping", {}))
    choices = f"choose from {', '.join(known)}"
    if "tag" not in context:
        return f"{prefix}{tag}", f"required but not given; {choices}"
    return f"{prefix}{tag} = {shown(context['tag'], _LONGEST_VALUE)}", (
        f"unknown; {suggestion(context['tag'], known)}{choices}"
    )


def _located(schema: dict[str, Any], location: Sequence[int | str]) -> tuple[str, dict[str, Any]]:
    """The dotted path a user would write for an error's location, and the schema of that place.

    pydantic puts the member of a union that it tried into the location, such as "run" in "teacher.run.path"
    or "int" in "tokens.int". The user never wrote it as a key, so it is followed but not named.
    """
    node, named = schema, []
    for part in location:
        node = _resolved(schema, node)
        members = _members(schema, node)
        tagged = [member for member in members if part in _tags(member)]
        if tagged:
            node = tagged[0]
            continue
        inner = [member for member in [node, *members] if part in member.get("properties", {})]
        if inner:
            node = inner[0]["properties"][part]
        elif members and isinstance(part, str) and "properties" not in node:
            continue
        else:
            node = node.get("items", node.get("additionalProperties", {})) or _by_pattern(node)
            node = node if isinstance(node, dict) else {}
        named.append(shortened(str(part), _LONGEST_VALUE))
    node = _resolved(schema, node)
    sections = [_resolved(schema, choice) for choice in node.get("anyOf", [])]
    return ".".join(named) or _WHOLE, next((s for s in sections if "properties" in s), node)


def _members(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """What a union may be, the members of unions inside it too; none of anything else."""
    found = []
    for choice in node.get("oneOf", node.get("anyOf", [])):
        member = _resolved(schema, choice)
        found += _members(schema, member) or [member]
    return found


def _by_pattern(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of every entry of a mapping whose keys must match a pattern; {} of anything else."""
    return next(iter(node.get("patternProperties", {}).values()), {})


def _tags(member: dict[str, Any]) -> list[object]:
    """Values of `kind` or `policy` that select this member of a union."""
    properties = member.get("properties", {})
    found: list[object] = []
    for name in ("kind", "policy"):
        value = properties.get(name, {})
        found += [*value.get("enum", []), *([value["const"]] if "const" in value else [])]
    return found


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    if len(node.get("anyOf", [])) == 2 and {"type": "null"} in node["anyOf"]:  # noqa: PLR2004 - Optional[X]
        (node,) = (choice for choice in node["anyOf"] if choice != {"type": "null"})
        return _resolved(schema, node)
    return node
