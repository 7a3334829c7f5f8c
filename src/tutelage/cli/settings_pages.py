"""Write what the settings of a kind of file can be: a commented template, and a page of reference.

Both are made from the models that read the files, so they say what holds. A line of a template that cannot be
uncommented alone is not offered as one, but stands there with what the model says against it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import merged, validate
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import BaseModel

    Schema = dict[str, Any]

_EXAMPLES: dict[str, tuple[type[BaseModel], str, str]] = {
    "run": (
        RunConfig,
        "tutelage train {file}",
        """
name: student
model: {shape: nano-150k}
data: {store: sotu, sequence_length: 128}
tokens: 200K
optim: {schedule: cosine}
teacher: {kind: run, run: teacher}
objective: {alpha: 0.4}
eval: {domains: [{name: held-out, store: sotu, role: in_domain}]}
checkpoint: {every: 100M}
parallel: {processes: 1}
runtime: {device: auto}
""",
    ),
    "store": (
        StoreConfig,
        "tutelage data build {file}",
        """
name: mine
sources: [{kind: files, paths: [texts/*.txt]}]
tokenizer: {vocab_size: 512}
""",
    ),
    "study": (
        StudyConfig,
        "tutelage study plan {file} && tutelage study run {file}",
        """
name: first
title: Does a smaller teacher help?
corpus: {name: speeches, sources: [{kind: corpus, name: sotu}], tokenizer: {vocab_size: 512}}
domains: {medicine: {source: {kind: corpus, name: medicine}}}
teachers: {small: {shape: nano-20k, tokens: 20K}}
students:
  student: {shape: nano-50k, tokens: 20K, grid: {product: {teacher: [small], alpha: [0.2, 0.6, auto]}}}
seeds: [43, 44, 45, 46, 47]
run:
  data: {sequence_length: 64}
  eval: {max_documents: 20, max_tokens: 512}
  runtime: {device: cpu, threads: 1}
""",
    ),
    "cache": (
        TeachConfig,
        "tutelage teach {file}",
        """
store: sotu
teacher: {kind: run, run: teacher}
format: {kind: sample_min_variance, ids: 16}
""",
    ),
}
KINDS = tuple(_EXAMPLES)
"""Kinds of files, by the name users write."""

_VALUES = {"integer": 1, "number": 0.5, "string": "NAME", "boolean": True, "array": []}
_LARGE = 2**32


def model_of(kind: str) -> type[BaseModel]:
    """The model that reads files of a kind."""
    return _EXAMPLES[kind][0]


def template(kind: str, file: str) -> str:
    """A file of this kind that is valid as it stands, with every other setting in a comment."""
    model, command, example = _EXAMPLES[kind]
    schema = model.model_json_schema()
    live = yaml.safe_load(example)
    lines = [
        f"# {(model.__doc__ or '').splitlines()[0]}",
        f"# Use it: {command.format(file=file)}",
        "# Lines that begin with '# name:' are settings at their defaults, or examples where there is none:",
        "# uncomment what you change. Lines with '## ' are words, '## or:' what can stand there instead.",
        "",
    ]
    return "\n".join([*lines, *_Template(model, schema, live).section(schema, live, ())]) + "\n"


class _Template:
    def __init__(self, model: type[BaseModel], schema: Schema, live: dict[str, Any]) -> None:
        self._model, self._schema, self._live = model, schema, live

    def section(self, node: Schema, live: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[str]:
        indent = "  " * len(above)
        for key, written in node["properties"].items():
            if key == "base":
                continue
            inner = resolved(self._schema, written)
            about = "; ".join(filter(None, (allowed(self._schema, written), one_line(written, inner))))
            if "properties" in inner and not _alternatives(self._schema, written):
                yield f"{indent}{key}:  # {one_line(written, inner)}"
                yield from self.section(inner, live.get(key, {}), (*above, key))
            elif key in live:
                yield f"{indent}{key}: {flow(live[key])}  # {about}"
                yield from self._others(indent, (*above, key), written, live[key])
            else:
                yield from self._commented(indent, (*above, key), written, about)

    def _commented(self, indent: str, path: tuple[str, ...], written: Schema, about: str) -> Iterator[str]:
        default = written.get("default")
        value = self._example(written) if default is None else default
        if (against := self._against(path, value)) is None:
            yield f"{indent}# {path[-1]}: {flow(value)}  # {about}"
        else:
            yield f"{indent}## {path[-1]}: {flow(value)}  -- not with the settings here: {against}. {about}"
        yield from self._others(indent, path, written, value)

    def _others(self, indent: str, path: tuple[str, ...], written: Schema, value: object) -> Iterator[str]:
        """What a union can be instead of `value`, where the settings here allow it."""
        for member in _alternatives(self._schema, written):
            for tag in _tags(member):
                other = self._required(member) | tag
                same = isinstance(value, dict) and tag.items() <= value.items()
                if not same and self._against(path, other) is None:
                    yield f"{indent}## or: {path[-1]}: {flow(other)}  # {one_line({}, member)}"

    def _example(self, written: Schema) -> object:
        if members := _alternatives(self._schema, written):
            return self._required(members[0]) | _tags(members[0])[0]
        if "examples" in written:
            return written["examples"][0]
        node = resolved(self._schema, written)
        node = next((part for part in node.get("anyOf", []) if part.get("type") != "null"), node)
        if "enum" in node:
            return node["enum"][0]
        least = node.get("minimum")
        value = _VALUES.get(str(node.get("type")), {})
        return max(value, least) if isinstance(value, int | float) and least is not None else value

    def _required(self, member: Schema) -> dict[str, Any]:
        return {
            key: self._example(member["properties"][key])
            for key in member.get("required", [])
            if key not in ("kind", "policy")
        }

    def _against(self, path: tuple[str, ...], value: object) -> str | None:
        """What the model says against the live settings with this one."""
        change: object = value
        for key in reversed(path):
            change = {key: change}
        try:
            kept = _without(self._live, path)
            validate(self._model, merged(kept, change if isinstance(change, dict) else {}), "template")
        except UserError as error:
            return str(error).splitlines()[0].partition(": ")[2].rstrip(".")
        return None


def _without(live: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The live settings without one of them."""
    key, *deeper = path
    if not deeper or key not in live:
        return {name: value for name, value in live.items() if name != key}
    return {**live, key: _without(live[key], tuple(deeper))}


def reference(kind: str) -> str:
    """A page in Markdown with every setting of files of this kind, section by section."""
    model, command, _ = _EXAMPLES[kind]
    schema = TypeAdapter(model).json_schema()  # with what is required, which a study's own schema leaves open
    schema["properties"] = properties = model.model_json_schema()["properties"]
    read = f"`{command.format(file='FILE.yaml')}` reads it; `tutelage init {kind}` writes one to start from."
    based = " What is required may stand in a `base` instead." if "base" in properties else ""
    lines = [
        f"# Settings of a {kind}",
        "",
        f"{' '.join((model.__doc__ or '').split())}",
        "",
        read + based,
        "",
        "Written by `make reference` from the models that read the files.",
    ]
    waiting: list[tuple[str, Schema]] = [("", schema)]
    seen: set[str] = set()
    while waiting:
        where, node = waiting.pop(0)
        if (name := json.dumps(node, sort_keys=True)) in seen:
            continue
        seen.add(name)
        if where:
            lines += ["", f"## {where}", "", one_line({}, node)]
        lines += ["", "| setting | default | allowed | what |", "|---|---|---|---|"]
        for key, written in node["properties"].items():
            inner = resolved(schema, written)
            default = "" if "properties" in inner else flow(written.get("default"))
            if key in node.get("required", []):
                default = "required"
            cells = (f"`{key}`", default, allowed(schema, written), one_line(written, inner))
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
            waiting += _below(schema, f"{where}.{key}".lstrip("."), written)
    return "\n".join(lines) + "\n"


def _below(schema: Schema, where: str, written: Schema) -> Iterator[tuple[str, Schema]]:
    """The sections that a setting can hold, each with the dotted path that leads there."""
    node = resolved(schema, written)
    if "properties" in node:
        tags = [" ".join(f"{key}: {value}" for key, value in tag.items()) for tag in _tags(node) if tag]
        yield where + (f" ({', '.join(tags)})" if tags else ""), node
    for part in (*node.get("anyOf", []), *node.get("oneOf", [])):
        yield from _below(schema, where, part)
    if "items" in node:
        yield from _below(schema, f"{where}[]", node["items"])
    named = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
    for inner in named:
        if isinstance(inner, dict):
            yield from _below(schema, f"{where}.NAME", inner)


def resolved(schema: Schema, node: Schema) -> Schema:
    """The definition that a reference stands for."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _alternatives(schema: Schema, written: Schema) -> list[Schema]:
    """The sections of a union, told apart by `kind` or `policy`; none for anything else."""
    node = resolved(schema, written)
    parts = [node, *(resolved(schema, part) for part in node.get("anyOf", []))]
    return [resolved(schema, one) for part in parts for one in part.get("oneOf", [])]


def _tags(member: Schema) -> list[dict[str, str]]:
    """The values of `kind` or `policy` that choose a section; one that is empty if it has no such setting."""
    for tag in ("kind", "policy"):
        value = member["properties"].get(tag, {})
        if choices := [*value.get("enum", []), *([value["const"]] if "const" in value else [])]:
            return [{tag: choice} for choice in choices]
    return [{}]


def one_line(written: Schema, inner: Schema) -> str:
    """What a setting is, on one line."""
    return " ".join(str(written.get("description", inner.get("description", ""))).split())


def allowed(schema: Schema, written: Schema) -> str:
    """The values that a setting can have, in words, with their unit."""
    node = resolved(schema, written)
    if "words" in node:
        return str(node["words"])
    if "oneOf" in node:
        tags = [tag for part in node["oneOf"] for tag in _tags(resolved(schema, part))]
        return f"{next(iter(tags[0]))}: {', '.join(value for tag in tags for value in tag.values())}"
    if parts := node.get("anyOf", []):
        words = dict.fromkeys(allowed(schema, part) for part in parts if part.get("type") != "null")
        return " or ".join(word for word in words if word)
    if "enum" in node or "const" in node:
        return ", ".join(map(str, node.get("enum", [node.get("const")])))
    return "section" if "properties" in node else _of_type(schema, node)


def _of_type(schema: Schema, node: Schema) -> str:
    kind = str(node.get("type", ""))
    if kind in ("integer", "number"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_range(node)}"
    if kind == "array":
        inner = allowed(schema, node.get("items", next(iter(node.get("prefixItems", [])), {})))
        return f"list of {inner}" if inner else "list"
    words = {"string": "text", "boolean": "true, false", "object": "mapping"}
    return "path" if node.get("format") == "path" else words.get(kind, kind)


def _range(node: Schema) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    ends = (("from", low), ("above", above), ("to", high), ("below", below))
    words = [f"{word} {_number(end)}" for word, end in ends if end is not None]
    unit = f" of {node['unit']}" if "unit" in node else ""
    return unit + (f", {' '.join(words)}" if words else "")


def _number(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) and end <= _LARGE else f"{end:.3g}"


def flow(value: object) -> str:
    """A value as YAML on one line."""
    if value is None:
        return ""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    return json.dumps(value) if "\n" in text else text
