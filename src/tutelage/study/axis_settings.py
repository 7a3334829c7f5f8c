"""Map the axes of a grid to settings of a run, to words for tables, and to names of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from tutelage.config.base import Budget, Fraction, Name, Seed, slug
from tutelage.config.load import digest, merged
from tutelage.config.run_config import RunConfig
from tutelage.errors import UserError, in_words, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.config.study_config import Point

_SHORT = {
    "alpha": "objective.alpha",
    "temperature": "objective.temperature",
    "divergence": "objective.divergence",
    "mixing": "objective.mixing",
    "truncation": "objective.truncation",
    "gate": "objective.gate",
    "tail": "objective.tail",
    "lr": "optim.lr",
    "data_seed": "data.seed",
    "sequence_length": "data.sequence_length",
}
"""Short names of axes, and the setting of a run that each stands for."""

OWN = {"shape", "tokens", "seed", "teacher", "compute_of"}
"""Axes that are no setting of a run by themselves."""

_OWN_TYPES: dict[str, TypeAdapter[Any]] = {
    "shape": TypeAdapter(Name),
    "tokens": TypeAdapter(Budget),
    "seed": TypeAdapter(Seed),
    "tested_alpha": TypeAdapter(Fraction | None),
}
"""Axes that are fields of a teacher or a student itself, with their types."""

TEACHER_FIELDS = frozenset(_OWN_TYPES)
"""Axes that are fields of a teacher."""

_STUDYS = {"name", "seed", "model", "tokens", "teacher", "output", "stage"}
_STUDYS_IN = (("data", "store"), ("eval", "domains"), ("runtime", "branch_from"))
"""Settings of a run that the study sets."""

_SECTIONS = ("data", "optim", "objective", "eval", "checkpoint", "runtime")

_OF_LABELS = {"label_smoothing", "z_loss", "chunk_tokens"}
"""Settings of the objective that act without a teacher too."""

_LONGEST = 60


def setting_of(axis: str) -> str:
    """The dotted path of the setting that an axis stands for."""
    return _SHORT.get(axis, axis)


def axis_of(path: str) -> str:
    """The short name of a setting, where it has one."""
    return next((axis for axis, setting in _SHORT.items() if setting == path), path)


def own_value(axis: str, value: object, where: str) -> Any:  # noqa: ANN401 - a type for each axis
    """Validate the value of an axis of `_OWN_TYPES`; equal values come out in one spelling.

    Raises:
        UserError: it is of another type.
    """
    try:
        return _OWN_TYPES[axis].validate_python(value, strict=True)
    except ValidationError as error:
        reason = in_words(error.errors()[0])
        raise UserError(f"{where}: {axis} = {shown(value, 80)}: {reason}") from None


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings of a study's runs that replace a section, or that the study sets for each run.

    Raises:
        UserError: naming the setting.
    """
    for part in _SECTIONS:
        if not isinstance(settings.get(part, {}), dict):
            raise UserError(
                f"{where}: run.{part} = {settings[part]!r:.80}: a section with settings is needed here"
            )
    given = [key for key in settings if key in _STUDYS]
    given += [f"{part}.{key}" for part, key in _STUDYS_IN if key in settings.get(part, {})]
    if given:
        raise UserError(f"{where}: run.{given[0]}: the study sets that for each of its runs; drop it")


def without_teacher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what settings of a run say of a teacher; label smoothing and the like stay."""
    kept = {key: value for key, value in settings.get("objective", {}).items() if key in _OF_LABELS}
    others = {key: value for key, value in settings.items() if key != "objective"}
    return others | ({"objective": kept} if kept else {})


def overlay(factors: Point, where: str) -> dict[str, Any]:
    """Nest axis values as settings of a run.

    Raises:
        UserError: an axis is no setting of a run.
    """
    settings: dict[str, Any] = {}
    axes: dict[str, str] = {}
    for axis, value in factors.items():
        path = setting_of(axis).split(".")
        if (twin := axes.setdefault(setting_of(axis), axis)) != axis:
            raise UserError(f"{where}: axes '{twin}' and '{axis}' are the same setting; keep one")
        if path[0] not in RunConfig.model_fields:
            known = [*sorted(OWN), *_SHORT]
            raise UserError(
                f"{where}: axis '{axis:.80}' is unknown; {suggestion(axis, known)}known: {', '.join(known)}, "
                "and settings of a run by their path, such as optim.weight_decay"
            )
        nested: Any = value
        for key in reversed(path):
            nested = {key: nested}
        settings = merged(settings, nested)
    check_settings(settings, where)
    return settings


def cell_name(parts: Sequence[str | None], seed: int) -> str:
    """A readable name; one that had to be cut ends with a hash, so that it stays unique."""
    text = "-".join(slug(part) for part in parts if part)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}-{digest(parts)}"
    return f"{text}-s{seed}"


def words(factors: Point) -> str:
    """Name settings for people: `alpha 0.2, temperature 4`; of a section its kind: `gap_driven floor 0.1`.

    Alpha first, then by name, whatever the order in a file: the same cell has the same words everywhere.
    Nothing reads these words; what needs the settings takes the mapping.
    """
    ordered = sorted(factors, key=lambda axis: (axis != "alpha", axis))
    return ", ".join(_word(axis, factors[axis]) for axis in ordered)


def _word(axis: str, value: object) -> str:
    if isinstance(value, dict):
        kind = value.get("policy", value.get("kind", axis))
        rest = " ".join(f"{key} {item}" for key, item in value.items() if key not in {"policy", "kind"})
        return f"{kind} {rest}".strip()
    if axis == "compute_of":
        return f"compute of {value}"
    return f"{axis} {value:.12g}" if isinstance(value, float) else f"{axis} {value}"
