"""Load study files, and the studies that come with the package (presets)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config.base import parse_tokens
from tutelage.config.load import load, validate
from tutelage.config.study_config import StudyConfig
from tutelage.errors import UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIRST_SEED = 43
_TEACHERS_BEYOND = 1000
_QUICK_TOKENS = "80K"
_QUICK_EVAL = {"max_documents": 8, "max_tokens": 512}
"""Of thirty-odd short runs, scoring as much text as the long ones do would take most of the time."""
_PRESETS = Path(str(resources.files("tutelage.presets")))
_NO_STUDIES = {"evals", "paper/common"}
"""The suites of `tutelage eval`, and what the paper's studies build on."""


def preset_names() -> list[str]:
    """Names of the studies that come with the package: "demo", "mini", "paper/mixing" and so on."""
    files = sorted(_PRESETS.rglob("*.yaml"))
    names = [file.relative_to(_PRESETS).with_suffix("").as_posix() for file in files]
    return [name for name in names if name not in _NO_STUDIES]


def load_study(study: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """Load a preset by its name, or a study file by its path, which ends with .yaml.

    Raises:
        UserError: there is none, or it is wrong; the message names file and field.
    """
    if study.endswith((".yaml", ".yml")):
        return load(StudyConfig, Path(study), overrides)
    if study not in (names := preset_names()):
        raise unknown("a study is a preset or a .yaml file, and the preset", study, names)
    return load(StudyConfig, _PRESETS / f"{study}.yaml", overrides)


def demo_study(seeds: int, tokens: str | None, *, quick: bool) -> StudyConfig:
    """The demo with `seeds` replicates and, if given, another token budget for every run.

    Each replicate has students, untaught runs and teachers of its own. `quick` also scores less text.

    Raises:
        UserError: the budget is no number of tokens, or is given together with `quick`.
    """
    raw = load_study("demo").model_dump(mode="json")
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
    if quick:
        raw["run"]["eval"] = _QUICK_EVAL
    raw["teacher_seeds"] = [_TEACHERS_BEYOND + seed for seed in raw["seeds"]]
    return validate(StudyConfig, raw, "demo")
