"""Load configs from YAML files and dotted overrides, and report each error in one line.

A file may build on others: `base: other`, or several.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tutelage.config.yaml_text import LARGEST_TEXT, fitted, parse
from tutelage.errors import UserError, suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)
_LONGEST_VALUE, _LONGEST_LINE, _MOST_LINES = 80, 400, 20


class WrongSettingsError(UserError):
    """Settings that do not fit a config; `fields` has the dotted name of each, once."""

    def __init__(self, message: str, fields: Sequence[str]) -> None:
        super().__init__(message)
        self.fields = fields


def load(kind: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read `path` (YAML), apply `overrides` ("optim.lr=1e-3") and validate as `kind`.

    `base: NAME` in a file puts its settings on top of those of NAME.yaml, section by section; NAME is looked
    up beside the file, then among the presets of the package. With a list, a later base is on top.

    Raises:
        UserError: a file is missing or no YAML, an override is malformed, or a field is wrong.
    """
    raw, files = _built(path, ())
    for text in overrides:
        raw = _overridden(raw, text)
    return validate(kind, raw, " on ".join(map(str, files)))


def _overridden(settings: dict[str, Any], text: str) -> dict[str, Any]:
    """Apply one override, such as `optim.lr=1e-3`, or `sources.0.weight=2` inside a list."""
    dotted, equals, value = text.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {text!r}: write key=value, for example optim.lr=1e-3")
    return dict(_changed(settings, keys, parse(value, f"override {text!r}"), f"override {text!r}"))


def _changed(old: object, keys: Sequence[str], value: object, where: str) -> Any:  # noqa: ANN401 - any setting
    """Put `value` at the place that `keys` lead to; sections are merged, lists are replaced."""
    if not keys:
        return merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    key, *deeper = keys
    if isinstance(old, list):
        if not key.isdecimal() or int(key) >= len(old):
            raise UserError(
                f"{where}: '{key}' is no entry of a list of {len(old)}; entries count from 0"
                f"{f' to {len(old) - 1}' if old else ''}, and key=[...] replaces the whole list"
            )
        place = int(key)
        return [*old[:place], _changed(old[place], deeper, value, where), *old[place + 1 :]]
    section = old if isinstance(old, dict) else {}
    return {**section, key: _changed(section.get(key), deeper, value, where)}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`, section by section; `over` wins."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _built(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a file on top of those of its bases, and the files they are from.

    Args:
        path: the file.
        above: files that build on it.
    """
    raw = _read(path)
    names = raw.pop("base", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base = {names!r}: give the name of a file without .yaml, or several")
    result: dict[str, Any] = {}
    files = [path]
    for name in names:
        base = _base(name, path)
        if base.resolve() in [file.resolve() for file in (*above, path)]:
            raise UserError(f"{path}: base = {name!r}: {base} builds on {path}, so neither has an end")
        settings, more = _built(base, (*above, path))
        result = merged(result, settings)
        files += [file for file in more if file not in files]
    return merged(result, raw), files


def _base(name: str, path: Path) -> Path:
    presets = Path(str(resources.files("tutelage.presets")))
    for folder in (path.parent, presets):
        if (file := folder / f"{name}.yaml").is_file():
            return file
    raise UserError(f"{path}: base = {name!r}: there is no {path.parent / name}.yaml and no preset {name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST_TEXT + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    raw = parse(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top level")
    return raw


def validate(kind: type[Model], data: object, where: str) -> Model:
    """Validate plain data, or what `yaml_text.parse` returns, as `kind`.

    JSON mode: YAML lists become tuples and strings become paths, while numbers stay strict.

    Raises:
        WrongSettingsError: naming `where`, the field, the value and what is allowed.
    """
    try:
        return kind.model_validate_json(json.dumps(fitted(data, kind), default=str))
    except ValidationError as error:
        lines = [_short(_explain(kind, detail), _LONGEST_LINE) for detail in error.errors()]
        schema = kind.model_json_schema()
        fields = dict.fromkeys(_locate(schema, detail["loc"])[0] for detail in error.errors())
        message = "\n".join(f"{where}: {line}" for line in lines[:_MOST_LINES])
        raise WrongSettingsError(message, [*fields]) from None


def _short(text: str, longest: int) -> str:
    """Shorten a text to one line of at most `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _explain(kind: type[BaseModel], detail: ErrorDetails) -> str:
    """Word one pydantic error in one line."""
    schema = kind.model_json_schema()
    field, _ = _locate(schema, detail["loc"])
    if detail["type"] == "extra_forbidden":
        _, section = _locate(schema, detail["loc"][:-1])
        allowed = sorted(section.get("properties", {}))
        hint = suggestion(str(detail["loc"][-1]), allowed)
        return f"{field}: unknown setting; {hint}allowed: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{field}: required but not given"
    message, value = detail["msg"].removeprefix("Value error, "), detail["input"]
    if isinstance(value, int | float | str) and field != _WHOLE:
        return f"{field} = {_short(repr(value), _LONGEST_VALUE)}: {message}"
    return f"{field}: {message}"


_WHOLE = "(whole file)"


def _locate(schema: dict[str, Any], location: Sequence[int | str]) -> tuple[str, dict[str, Any]]:
    """The dotted path a user would write for an error's location, and the schema of that place.

    pydantic puts the tag of a union's member into the location ("teacher.run.path" for teacher.path where
    kind is "run"); the user never wrote the tag as a key, so it is followed but not shown.
    """
    node, shown = schema, []
    for part in location:
        node = _resolve(schema, node)
        members = [_resolve(schema, choice) for choice in node.get("oneOf", node.get("anyOf", []))]
        tagged = [member for member in members if part in _tags(member)]
        if tagged:
            node = tagged[0]
            continue
        shown.append(str(part))
        inner = [member for member in [node, *members] if part in member.get("properties", {})]
        if inner:
            node = inner[0]["properties"][part]
        else:
            node = node.get("items", node.get("additionalProperties", {})) or _named(node)
            node = node if isinstance(node, dict) else {}
    node = _resolve(schema, node)
    sections = [_resolve(schema, choice) for choice in node.get("anyOf", [])]
    return ".".join(shown) or _WHOLE, next((s for s in sections if "properties" in s), node)


def _named(node: dict[str, Any]) -> dict[str, Any]:
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


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    if len(node.get("anyOf", [])) == 2 and {"type": "null"} in node["anyOf"]:  # noqa: PLR2004 - Optional[X]
        (node,) = (choice for choice in node["anyOf"] if choice != {"type": "null"})
        return _resolve(schema, node)
    return node


def digest(data: object) -> str:
    """Return the first 8 hexadecimal digits of the SHA-256 of `data` as canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def to_yaml(config: BaseModel) -> str:
    """Format a whole config, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
