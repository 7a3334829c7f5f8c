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

from tutelage.config.base import plain_number
from tutelage.config.wrong_settings import WrongSettingsError, wrong_settings
from tutelage.config.yaml_text import LARGEST_TEXT, fitted, parse
from tutelage.errors import UserError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Model = TypeVar("Model", bound=BaseModel)

_FILES = {
    "RunConfig": ({"model", "data", "tokens"}, "a run, for `tutelage train`"),
    "StoreConfig": ({"sources"}, "a token store, for `tutelage data build`"),
    "StudyConfig": ({"corpus", "students"}, "a study, for `tutelage study plan` and `run`"),
    "TeachConfig": ({"store", "teacher"}, "a teacher cache, for `tutelage teach`"),
}
"""Of each kind of file that a command reads: settings that no other kind has together, and what it is for."""


def load(kind: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read `path` (YAML), apply `overrides` ("optim.lr=1e-3") and validate as `kind`.

    `base: NAME` in a file puts its settings on top of those of NAME.yaml, section by section; NAME is looked
    up beside the file, then among the presets of the package. With a list, a later base is on top.

    Raises:
        UserError: a file is missing or no YAML, an override is malformed, or a field is wrong.
    """
    raw, files = _built(path, ())
    raw = _changed_by(overrides, raw)
    try:
        return validate(kind, raw, " on ".join(map(str, files)))
    except WrongSettingsError:
        for name, (settings, words) in _FILES.items():
            if name != kind.__name__ and kind.__name__ in _FILES and settings <= raw.keys():
                raise UserError(f"{path}: this file describes {words}") from None
        raise


def taken(
    kind: type[Model], given: Model | Mapping[str, Any] | Path | str, overrides: Sequence[str]
) -> Model:
    """Take a config from Python: the path of its file, its settings as a mapping, or the object itself.

    Raises:
        UserError: as `load`, or it is something else.
    """
    if isinstance(given, str | Path):
        return load(kind, Path(given), overrides)
    if isinstance(given, kind):
        if not overrides:
            return given
        raw = given.model_dump(mode="json")
    elif isinstance(given, dict):
        raw = given
    else:
        raise UserError(
            f"a {type(given).__name__} is no {kind.__name__}: give one, a dict of its settings, or the path "
            "of a file"
        )
    return validate(kind, _changed_by(overrides, raw), kind.__name__)


def _changed_by(overrides: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Apply overrides, such as `optim.lr=1e-3`, or `sources.0.weight=2` inside a list."""
    if not isinstance(overrides, list | tuple):
        raise UserError(
            f"overrides is a {type(overrides).__name__}: give a list of texts, for example ['optim.lr=1e-3']"
        )
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            raise UserError(f"override {text!r}: write key=value, for example optim.lr=1e-3")
        settings = dict(_changed(settings, keys, parse(value, f"override {text!r}"), f"override {text!r}"))
    return settings


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
    """Merge `over` into `base`, section by section; `over` wins, whole where it is of another kind."""
    if "kind" in base and "kind" in over and base["kind"] != over["kind"]:
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def dotted(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """All settings, those of sections too, by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


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
    except IsADirectoryError:
        own = path / "config.yaml"  # of a run
        hint = f"; {own} has those of this run" if own.is_file() else ""
        raise UserError(f"{path}: a directory; give a file of settings (YAML){hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    raw = parse(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: no settings: expected lines of 'name: value' (YAML); `tutelage init KIND` writes a file"
        )
    return raw


def validate(kind: type[Model], data: object, where: str) -> Model:
    """Validate plain data, or what `yaml_text.parse` returns, as `kind`.

    JSON mode: YAML lists become tuples and strings become paths, while numbers stay strict.

    Raises:
        WrongSettingsError: naming `where`, the field, the value and what is allowed.
    """
    try:
        text = json.dumps(fitted(data, kind), default=_plain)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: no settings ({one_line(error)})") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise wrong_settings(kind, error, where) from None


def _plain(value: object) -> object:
    """Write what JSON has no word for, such as a path, as text, but for numbers of numpy."""
    number = plain_number(value)
    return str(value) if number is value else number


def digest(data: object) -> str:
    """Return the first 8 hexadecimal digits of the SHA-256 of `data` as canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def to_yaml(config: BaseModel) -> str:
    """Format a whole config, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
