"""What every section of settings is built from: strictness, names, fractions, token budgets."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
_BUDGET = re.compile(r"^(\d+(?:\.\d+)?)(K|M|B|T|x)?$")
_UNIT = {None: 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(budget: int | str, parameters: int | None = None) -> int:
    """Turn a token budget into a number of tokens.

    Args:
        budget: a count (`5000000`), a count with a unit ("5M", "52.4B") or a multiple of the model's
            parameters ("20x").
        parameters: total parameters of the model, needed for "x" budgets.

    Raises:
        ValueError: if the text is no budget, or is an "x" budget and `parameters` is not given.
    """
    match = _BUDGET.match(str(budget))
    if match is None:
        raise ValueError(f"{budget!r} is not a token budget; write a number, '50M', '1.5B' or '20x'")
    number, unit = float(match[1]), match[2]
    if unit != "x":
        return round(number * _UNIT[unit])
    if parameters is None:
        raise ValueError(f"{budget!r} counts tokens per parameter, which has no meaning here; write '50M'")
    return round(number * parameters)


def check_tokens(budget: int | str) -> int | str:
    """Validator: any token budget."""
    parse_tokens(budget, parameters=1)
    return budget


def check_plain_tokens(budget: int | str) -> int | str:
    """Validator: a token budget that does not depend on a model's size."""
    parse_tokens(budget)
    return budget


Budget = Annotated[int | str, Field(union_mode="left_to_right")]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
