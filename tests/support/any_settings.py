"""Strategies made from the settings' own models, so that a new field is tried without a word here."""

from __future__ import annotations

import copy
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORDS = ("nano-50k", "a", "sotu", "40K", "20x", "text", "*", "no", "1e3", "2020-13-45", "..", "a/b", "~")
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 10**6, 10**9, 2**63, 2**64, 10**15, 10**400, 10**4000),
    *(0.0, -0.5, 0.5, 1.0, 1.5, 1e-320, 1e300, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "1e3", "40K", "20x", "../../etc", "/dev/full", "c.yaml/x", "\0", "a\nb", "x" * 5000),
    *(
        "\ud800",
        "{a}",
        "{",
        "[x]",
        "\x1b[31m",
        "2020-13-45",
        "${oc.env:HOME}",
        "~nobody/x",
        "\N{DROMEDARY CAMEL}",
    ),
    *([], [1], [[1, 2]], ["a", "a"], [None] * 5, [1e9] * 3, [[[[]]]], ["x"] * 3000),
    *({}, {"a": 1}, {"kind": "run"}, {"kind": 5}, {"policy": None}, {"": ""}, {"\0": 1}, {"x" * 300: {}}),
)
"""Border values and wrong types, for any field of anything."""

anything = st.recursive(
    st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def of_model(
    model: type[BaseModel], depth: int = 3, some: Sequence[str] = ()
) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with fields of a model, all or some, most as they should be; optional ones may be absent."""
    required, optional = {}, {}
    for name, field in model.model_fields.items():
        if some and name not in some:
            continue
        values = _of_type(
            Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation, depth
        )
        (required if field.is_required() else optional)[name] = values
    return st.fixed_dictionaries(required, optional=optional if depth else {})


def _of_type(  # noqa: PLR0911 - one for each kind of type
    wanted: Any, depth: int, notes: Sequence[Any] = ()
) -> st.SearchStrategy[Any]:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        return _of_type(parts[0], depth, [*parts[1:], *notes])
    if origin in {Union, UnionType}:
        return st.one_of([_of_type(part, depth, notes) for part in parts])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in {tuple, list}:
        inner = [part for part in parts if part is not Ellipsis]
        if Ellipsis in parts or origin is list:
            return st.lists(_of_type(inner[0], depth - 1), min_size=0 if depth < 1 else 1, max_size=2)
        return st.tuples(*(_of_type(part, depth) for part in inner)).map(list)
    if origin is dict:
        return st.dictionaries(st.sampled_from(WORDS), _of_type(parts[1], depth - 1), max_size=2)
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        return of_model(wanted, depth - 1) if depth >= 0 else st.just({})
    return _scalar(wanted, _bounds(notes))


def _bounds(notes: Sequence[Any]) -> list[float]:
    """The bounds in a field's constraints, and their neighbours."""
    limits: list[float] = []
    for note in notes:
        for one in (note, *vars(note).get("metadata", ())) if hasattr(note, "__dict__") else (note,):
            limits += [
                value for name in ("ge", "gt", "le", "lt") if (value := getattr(one, name, None)) is not None
            ]
    return [near for limit in limits for near in (limit, limit - 1, limit + 1)]


def _scalar(wanted: Any, limits: Sequence[float]) -> st.SearchStrategy[Any]:
    if wanted is int:
        return st.sampled_from([1, 2, 32, 256, *map(int, limits)])
    if wanted is float:
        return st.sampled_from([0.1, 0.5, 1.0, *map(float, limits)])
    if wanted is bool:
        return st.booleans()
    if wanted is type(None):
        return st.none()
    return st.sampled_from(WORDS) if wanted in {str, Path} else anything


def places(node: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of mappings and lists, the top among them."""
    yield at
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*at, key))  # type: ignore[index]


def changed(tree: Any, at: tuple[Any, ...], value: object) -> Any:
    """The tree with another value at a place; `...` leaves it out."""
    if not at:
        return tree if value is ... else value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in at[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return tree


@st.composite
def broken(draw: st.DrawFn, whole: Any, most: int = 2) -> Any:
    """A tree with up to `most` of its places changed: to anything, or left out; or with one key more.

    Args:
        draw: Hypothesis'.
        whole: a tree, or a strategy for one.
        most: changes.
    """
    tree = copy.deepcopy(draw(whole) if isinstance(whole, st.SearchStrategy) else whole)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.sampled_from([*places(tree)]))
        what = draw(st.integers(0, 9))
        value = ... if what == 0 else draw(anything)
        tree = changed(
            tree, (*at, draw(st.text(max_size=5))) if what == 1 and _is_mapping(tree, at) else at, value
        )
    return tree


def _is_mapping(tree: Any, at: tuple[Any, ...]) -> bool:
    for key in at:
        tree = tree[key]
    return isinstance(tree, dict)
