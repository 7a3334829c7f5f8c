"""Bad settings and command lines: a stored list, and others that the seed draws from the schemas by mutation.

    PYTHONPATH=benchmarks python -m campaigns.bad_inputs

prints mutations as they are stored. What a schema must refuse is decided by `jsonschema` from the JSON schema
that `tutelage schema` prints, and not by the code that reads the files; what schemas cannot say was added by
hand.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from campaigns.commands import run
from campaigns.judging import HANG, LITTER, RIGHT, SILENT, TRACEBACK, UNCLEAR, Verdict, broken
from campaigns.world import FILES
from tutelage.config.data_config import StoreConfig
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.config.teacher_config import TeachConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from campaigns.world import World

_LIST = Path(__file__).with_name("bad_inputs.jsonl")
_SCHEMAS = {"run": RunConfig, "teach": TeachConfig, "store": StoreConfig, "study": StudyConfig}
_BASES = {"run": "cached.yaml", "teach": "teach.yaml", "store": "corpus.yaml", "study": "study.yaml"}
_COMMANDS = {
    "run": ["train", "bad.yaml"],
    "teach": ["teach", "bad.yaml"],
    "store": ["data", "build", "bad.yaml"],
    "study": ["study", "run", "bad.yaml", "--workers", "1"],
}
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 1e-300, 1e300, 10**30, -(10**30), float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "no such",
        "-1",
        "1e999",
        "NaN",
        "0x10",
        "../..",
        "a/b",
        "\x00",
        "\ud7ff\u202e",
        "x" * 5000,
        "9" * 400,
    ),
    *(
        [],
        {},
        [None],
        [1, 2, 3],
        {"kind": "no such"},
        {"kind": None},
        {"": 1},
        [[[[[[]]]]]],
        {"a": {"b": {"c": 1}}},
    ),
]
STORED = 320
CPU_SECONDS = 10.0
"""What a wrong input may take on one core, start of torch included; a quick one takes a hundredth."""
_MEMORY = 2 << 30


def stored() -> list[dict[str, Any]]:
    """The stored inputs."""
    return [json.loads(line) for line in _LIST.read_text(encoding="utf-8").splitlines()]


def try_input(world: World, dice: random.Random, name: str, number: int) -> Verdict:
    """Give a command a bad input: the one that is stored under a number, or one that is drawn."""
    case = stored()[number] if name == "stored" else mutation(dice.choice(sorted(_SCHEMAS)), dice)
    if not (world.place / "bad.yaml").exists():
        world.restore("cache")
        (world.place / "bad.yaml").touch()
    text = case.get("text")
    if "set" in case:
        text = yaml.safe_dump(_changed(_base(case["schema"]), case["set"]), allow_unicode=True)
    if text is not None:
        (world.place / "bad.yaml").write_text(world.filled(text), encoding="utf-8")
    arguments = case.get("arguments") or _COMMANDS[case["schema"]]
    before = {path: path.stat().st_mtime_ns for path in world.place.rglob("*")}
    outcome = run([world.filled(one) for one in arguments], world.place, 60, memory=_MEMORY)
    after = {path: path.stat().st_mtime_ns for path in world.place.rglob("*")}
    words = f"{json.dumps(case)[:300]}: {outcome.code} {outcome.complaint[:300]}"
    if before != after:
        (world.place / "bad.yaml").unlink()  # so that the next case begins anew
    if outcome.hung or outcome.cpu > CPU_SECONDS:
        return Verdict(HANG, f"{words}: {outcome.cpu:.0f} s")
    if (kind := broken(outcome)) is not None or outcome.code not in (0, 2):
        return Verdict(kind or TRACEBACK, words)
    if outcome.code == 0:
        return Verdict(SILENT, words)
    if not (outcome.complaint.startswith("error: ") or "Usage: " in outcome.err):
        return Verdict(UNCLEAR, words)
    if before.keys() != after.keys():
        new = sorted(str(path.relative_to(world.place)) for path in after.keys() ^ before.keys())
        return Verdict(LITTER, f"{words}: {new[0]}")
    return Verdict(RIGHT, words, error=True)


def _base(schema: str) -> dict[str, Any]:
    base: dict[str, Any] = yaml.safe_load(FILES[_BASES[schema]])
    assert _validator(schema).is_valid(base), "the base is refused already"  # noqa: S101
    return base


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(base)
    for path, value in changes.items():
        at: Any = changed
        *above, last = path.split("/")
        for part in above:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        at[int(last) if isinstance(at, list) else last] = value
    return changed


def mutation(schema: str, dice: random.Random) -> dict[str, Any]:
    """Draw a change of a valid config that its schema refuses."""
    base = _base(schema)
    paths = [*_fields(_schema(schema), _schema(schema), base)]
    while True:
        path, value = dice.choice(paths), dice.choice(_VALUES)
        if dice.random() < 0.1:
            path = f"{path}{dice.choice('sx_')}"
        try:
            changed = [_changed(base, {path: one}) for one in _spellings(value)]
        except (TypeError, ValueError, IndexError):  # it leads into a value
            continue
        if not any(_validator(schema).is_valid(one) for one in changed):
            return {"schema": schema, "set": {path: value}}


def _spellings(value: Any) -> list[Any]:  # noqa: ANN401 - any value of YAML
    """What the text of a value may be read as: the type of a field decides if an unquoted word is text."""
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            return [value, yaml.safe_load(value)]
    if isinstance(value, list | dict | str):
        return [value]
    return [value, yaml.safe_dump(value).split("\n")[0]]


@cache
def _schema(name: str) -> dict[str, Any]:
    return _SCHEMAS[name].model_json_schema()


@cache
def _validator(name: str) -> Any:  # noqa: ANN401 - jsonschema has no types
    import jsonschema  # noqa: PLC0415 - only needed to draw

    return jsonschema.Draft202012Validator(_schema(name))


def _fields(schema: dict[str, Any], node: dict[str, Any], base: Any, above: str = "") -> Iterator[str]:  # noqa: ANN401
    """Paths of all settings, with those of the sections that the base has not; lists by their first entry."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    for choice in [*node.get("anyOf", []), *node.get("oneOf", [])]:
        yield from _fields(schema, choice, base, above)
    if isinstance(base, list) and base and "items" in node:
        yield from _fields(schema, node["items"], base[0], f"{above}0/")
    for name, inner in node.get("properties", {}).items():
        yield above + name
        yield from _fields(
            schema, inner, base.get(name, {}) if isinstance(base, dict) else {}, f"{above}{name}/"
        )


def _derive() -> None:
    """Print mutations, one on a line."""
    dice = random.Random(2026)  # noqa: S311 - no secret
    lines = []
    while len(lines) < STORED:
        line = json.dumps(mutation(dice.choice(sorted(_SCHEMAS)), dice))
        if line not in lines:
            lines.append(line)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    _derive()
