"""Studies that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tutelage.configio import load, validate
from tutelage.errors import UserError
from tutelage.settings import parse_tokens
from tutelage.study.spec import StudyConfig

_FIRST_SEED = 43
_QUICK_TOKENS = "150K"


def demo_study(seeds: int, tokens: str | None, *, quick: bool) -> StudyConfig:
    """The demo with `seeds` student seeds and, if given, another token budget for every run.

    Raises:
        UserError: the budget is no number of tokens, or is given together with `quick`.
    """
    with resources.as_file(resources.files("tutelage.presets") / "demo.yaml") as path:
        raw = load(StudyConfig, Path(path)).model_dump(mode="json")
    if quick and tokens is not None:
        raise UserError("--quick and --tokens both set the budget; give one")
    budget = _QUICK_TOKENS if quick else tokens
    if budget is not None:
        try:
            parse_tokens(budget)
        except ValueError as error:
            raise UserError(f"--tokens: {error}") from None
        for part in (*raw["students"].values(), *raw["teachers"].values()):
            if part["tokens"] is not None:
                part["tokens"] = budget
    raw["seeds"] = list(range(_FIRST_SEED, _FIRST_SEED + seeds))
    return validate(StudyConfig, raw, "demo")
