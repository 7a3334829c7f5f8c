"""Base class and field types of all settings: names, fractions, seeds, token budgets."""

from __future__ import annotations

import re
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tutelage.config.wrong_settings import wrong_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Inside = Annotated[float, Field(gt=0.0, lt=1.0)]


def in_reference(words: str) -> FieldInfo:
    """Annotate a type with the words for what it allows, where its schema would say less."""
    field: FieldInfo = Field(json_schema_extra={"words": words})
    return field


Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100),
    in_reference("name of ASCII letters, digits, '.', '_' and '-'"),
]


def _no_path(name: object) -> object:
    """Refuse a path in the place of a run's name; the pattern of names would not say what to write."""
    if isinstance(name, str) and ("/" in name or "\\" in name):
        raise ValueError(
            "a path; write the name of a run in the directory `output` of this config, or give the model of "
            "another by path (RUN/model)"
        )
    return name


RunName = Annotated[Name, BeforeValidator(_no_path)]
_UNSHOWN = re.compile("[\\0-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\u2028\u2029\ufffe\uffff]")


def for_people(text: str) -> str:
    """Refuse characters that a terminal obeys or that no figure can hold; raises `ValueError`."""
    if found := _UNSHOWN.search(text):
        raise ValueError(f"holds {found[0]!a}, which no figure can show; take it out")
    return text


Words = Annotated[str, AfterValidator(for_people)]
"""Text for people."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Range that torch, numpy and the data order all accept."""

Threads = Annotated[int, Field(ge=1, le=1024)]
Bytes = Annotated[int, Field(ge=1, le=2**60, json_schema_extra={"unit": "bytes"})]
Length = Annotated[int, Field(ge=2, le=2**20, json_schema_extra={"unit": "tokens"})]
"""Tokens of one sequence."""
BatchTokens = Annotated[int, Field(ge=2, le=2**30, json_schema_extra={"unit": "tokens"})]


def _possible(path: Path) -> Path:
    """Refuse paths that no file system takes: the system's own error would name no field."""
    if (
        any(len(part.encode()) > _LONGEST_NAME for part in path.parts)
        or len(str(path).encode()) > _LONGEST_PATH
    ):
        raise ValueError(f"too long for a file's name; at most {_LONGEST_NAME} bytes between slashes")
    return path


_LONGEST_NAME, _LONGEST_PATH = 255, 4000
FilePath = Annotated[Path, Field(strict=False), AfterValidator(_possible)]
"""A path; a string counts as one, in Python too."""

MOST_TOKENS = 10**15
_BUDGET = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d\d?)?)(K|M|B|T|x)?")
_NO_SLUG = re.compile(r"[^A-Za-z0-9.]+")
_UNIT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_DECIMALS = 4


def whole_batches(tokens: int, batch: int) -> int:
    """Steps from one thing to the next that is due every so many tokens, at least 1."""
    return max(1, tokens // batch)


def parse_tokens(budget: int | str, parameters: int | None = None) -> int:
    """Turn a token budget into a number of tokens.

    Args:
        budget: a count (`5000000`, "5_000_000", "5e6"), a count with a unit ("5M", "52.4B") or a multiple of
            the model's parameters ("20x").
        parameters: total parameters of the model, needed for "x" budgets.

    Raises:
        ValueError: if the text is no budget, is no whole number of tokens or more than 10^15 of them, or is
            an "x" budget and `parameters` is not given.
    """
    match = _BUDGET.fullmatch(str(budget))
    if match is None:
        raise ValueError(f"{budget!r} is not a token budget; write a number, '200K', '50M', '1.5B' or '20x'")
    number, unit = Decimal(match[1].replace("_", "")), match[2] or ""
    if unit == "x":
        if parameters is None:
            raise ValueError(
                f"{budget!r} counts tokens per parameter, which has no meaning here; write '50M'"
            )
        tokens = round(number * parameters)
    else:
        exact = number * _UNIT[unit]
        tokens = int(exact) if exact <= MOST_TOKENS else MOST_TOKENS + 1
        if exact != tokens and exact <= MOST_TOKENS:
            raise ValueError(f"{budget!r} is no whole number of tokens")
    if tokens > MOST_TOKENS:
        raise ValueError(f"{budget!r} is more than {MOST_TOKENS:.0e} tokens; write fewer")
    return tokens


def tokens_text(budget: int | str) -> str:
    """Format a budget in its one short form: "1.25M", "40K", "1234567", "20x"."""
    if isinstance(budget, str):
        return budget
    for unit in ("T", "B", "M", "K"):
        number = Decimal(budget) / _UNIT[unit]
        if number >= 1 and number == round(number, _DECIMALS):
            return f"{number.normalize():f}{unit}"
    return str(budget)


def _canonical(budget: object) -> object:
    """Normalise a budget to the form that is hashed: a number, or "20x"."""
    if isinstance(budget, float) and budget.is_integer():
        budget = int(budget)
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise ValueError(  # noqa: TRY004 - what pydantic takes
            "not a token budget; write a number, '50M', '1.5B' or '20x'"
        )
    if isinstance(budget, str) and budget.endswith("x"):
        parse_tokens(budget, parameters=1)
        number = Decimal(budget[:-1].replace("_", ""))
        if not number:
            raise ValueError(f"{budget!r} is no text at all; write more")
        return f"{number.normalize():f}x"
    tokens = parse_tokens(budget)
    if tokens < 1:
        raise ValueError(f"{budget!r} is no text at all; write at least 1 token")
    return tokens


def _canonical_count(budget: object) -> object:
    """As `_canonical`, for counts that cannot be multiples of a model's parameters."""
    if isinstance(budget, str):
        budget = parse_tokens(budget)
    return _canonical(budget)


def slug(text: str) -> str:
    """Make `text` a part of a directory's name."""
    return _NO_SLUG.sub("-", text).strip("-.")


def refuse_alike(what: str, names: Iterable[object]) -> None:
    """Raise ValueError if two of `names` are equal, or would be as directories (where case may not count).

    Args:
        what: the field that lists them, for the message.
        names: texts or numbers.
    """
    seen: dict[str, object] = {}
    for name in names:
        key = slug(str(name)).casefold()
        if key in seen:
            if seen[key] == name:
                raise ValueError(f"{what}: {name!r} is listed twice; keep one")
            raise ValueError(
                f"{what}: {seen[key]!r} and {name!r} are one name as a directory ('{key}'); rename one"
            )
        seen[key] = name


Budget = Annotated[
    int | str,
    BeforeValidator(
        _canonical,
        json_schema_input_type=Annotated[
            int | str, in_reference("tokens: 50000, 50K, 1.5B, or 20x per parameter")
        ],
    ),
]
"""A token budget; after validation a number, or "20x", tokens per parameter."""

TokenCount = Annotated[
    int,
    BeforeValidator(
        _canonical_count,
        json_schema_input_type=Annotated[int | str, in_reference("tokens: 50000, 50K or 1.5B")],
    ),
]
"""A token budget that does not depend on a model's size; after validation a number."""


def _members(wanted: object) -> list[Any]:
    """The types of a union, without annotations."""
    if get_origin(wanted) is Annotated:
        return _members(get_args(wanted)[0])
    if get_origin(wanted) in {Union, UnionType}:
        return [member for part in get_args(wanted) for member in _members(part)]
    return [wanted]


def plain_number(value: object) -> object:
    """Make a number of numpy one of Python, which strict types ask for; all else stays as it is."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _with_tuples(value: Any, wanted: Iterable[object]) -> Any:  # noqa: ANN401 - any setting
    """Make tuples of the lists in `value` that stand where a tuple may, and plain numbers of numpy's.

    Strict as it is about other types, pydantic takes a list for a tuple from JSON alone.

    Args:
        value: a setting, or a section of them.
        wanted: the types that it may have.
    """
    members = [member for one in wanted for member in _members(one)]
    if isinstance(value, list | tuple):
        inner = [get_args(member) for member in members if get_origin(member) is tuple]
        if not inner:
            return value
        parts = (
            _with_tuples(part, [_entry(types, place) for types in inner]) for place, part in enumerate(value)
        )
        return tuple(parts)
    if isinstance(value, dict):
        fields = [one.model_fields for one in members if isinstance(one, type) and issubclass(one, BaseModel)]
        every = [get_args(member)[1] for member in members if get_origin(member) is dict]
        return {
            key: _with_tuples(part, [*every, *(known[key].annotation for known in fields if key in known)])
            for key, part in value.items()
        }
    return plain_number(value)


def _entry(types: Sequence[object], place: int) -> object:
    """The type of an entry of a tuple, from the arguments of the tuple's type."""
    return types[0] if types[-1] is Ellipsis else types[min(place, len(types) - 1)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed after loading.

    In Python a list is taken wherever a tuple is, as in files.

    Raises:
        UserError: made in Python from values that do not fit; a line for each field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:  # noqa: ANN401 - any setting
        try:
            super().__init__(**_with_tuples(values, [type(self)]))
        except ValidationError as error:
            raise wrong_settings(type(self), error, type(self).__name__) from None

    # Sections inside are validated by pydantic itself, which names the whole path of what is wrong.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
