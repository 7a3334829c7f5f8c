"""What a teacher cache keeps of each distribution. Settings only, so that a config can be read for free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tutelage.config.base import Section
from tutelage.config.objective_config import Temperature, TopKTruncation, TopPTruncation

if TYPE_CHECKING:
    from tutelage.config.objective_config import ObjectiveConfig


class TopKFormat(Section):
    """The k most probable ids with their log-probabilities, and the mass of the rest."""

    kind: Literal["topk"]
    k: int = Field(ge=1, le=1_000_000, description="ids per position")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="stop earlier once the kept mass reaches this")


class MultinomialFormat(Section):
    """Draws with replacement, as ids and counts: random-sampling KD (arXiv 2503.16870)."""

    kind: Literal["sample_multinomial"]
    draws: int = Field(50, ge=1, le=4095, description="draws per position")


class MinVarianceFormat(Section):
    """Large probabilities exactly, small ones sampled at one common value, with least variance."""

    kind: Literal["sample_min_variance"] = "sample_min_variance"
    ids: int = Field(16, ge=1, le=1000, description="ids per position")


class HiddenFormat(Section):
    """The teacher's last hidden states, with its head stored once: dense targets without its forward."""

    kind: Literal["hidden"]
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float16", description="of the stored states; int8 has one scale per position"
    )


Format = Annotated[
    TopKFormat | MultinomialFormat | MinVarianceFormat | HiddenFormat, Field(discriminator="kind")
]


class CacheSettings(Section):
    """What is kept of a teacher's targets, computed once for all its students."""

    format: Format = Field(MinVarianceFormat(), description="what is kept of the distributions")
    temperature: Temperature = Field(1.0, description="T of the kept probabilities; hidden serves every T")


def misfit(kept: Format, temperature: float, objective: ObjectiveConfig, where: str) -> str | None:
    """What `objective` asks for that kept targets cannot give, in words; None if they can.

    Args:
        kept: what is kept of the distributions.
        temperature: T of the kept probabilities.
        objective: of the student.
        where: what holds the targets, for the message.
    """
    if isinstance(kept, HiddenFormat):
        return None
    if objective.truncation is not None:
        return f"objective.truncation: the targets of {where} are sparse already ({kept.kind}); drop it"
    gate = None if objective.gate is None else objective.gate.kind
    if temperature != 1.0 and gate in {"teacher_entropy", "teacher_confidence"}:
        return (
            f"objective.gate.kind = {gate}: needs the teacher at temperature 1, but {where} holds "
            f"probabilities at {temperature:g} ({kept.kind}); use a cache of format hidden, or another gate"
        )
    if objective.temperature != temperature and objective.divergence != "hard_labels":
        return (
            f"objective.temperature = {objective.temperature:g}: {where} holds probabilities at temperature "
            f"{temperature:g}; use that, or teach again at the other"
        )
    if isinstance(kept, MultinomialFormat | MinVarianceFormat) and objective.divergence != "forward_kl":
        return (
            f"objective.divergence = {objective.divergence}: samples ({kept.kind} in {where}) are "
            "unbiased for forward_kl only; use that, or a cache of format topk or hidden"
        )
    return None


def kd_name(objective: ObjectiveConfig, kept: Format | None) -> str:
    """Name of the divergence among the metrics: what is measured differently has another name.

    "kd" is KL(teacher || student) of whole distributions at T=1, in nats, and nothing else. Any other
    divergence, temperature or cut of the teacher is named behind it, as in "kd_jsd_0.5_t2_top50". From
    samples it is no divergence: it differs from one by a part that does not depend on the student.

    Args:
        objective: of the student.
        kept: what is kept of the teacher's distributions; None for all of them.
    """
    words = ["kd"]
    if objective.divergence != "forward_kl":
        words.append(objective.divergence)
    if objective.divergence == "jsd":
        words.append(f"{objective.jsd_beta:g}")
    if objective.divergence in {"skew_kl", "skew_reverse_kl"}:
        words.append(f"{objective.skew:g}")
    if objective.temperature != 1.0 and objective.divergence != "hard_labels":
        words += [f"t{objective.temperature:g}", *([] if objective.temperature_squared else ["unscaled"])]
    cut = _cut(objective, kept)
    return "_".join([*words, *cut, *([objective.tail] if cut and objective.tail != "other_bucket" else [])])


def _cut(objective: ObjectiveConfig, kept: Format | None) -> list[str]:
    """What is left of the teacher's distributions, in words; nothing if they are whole."""
    match objective.truncation or kept:
        case TopKTruncation(k=k):
            return [f"top{k}"]
        case TopPTruncation(p=p):
            return [f"top_p{p:g}"]
        case TopKFormat(k=k, top_p=p):
            return [f"top{k}", *([f"top_p{p:g}"] if p < 1 else [])]
        case MultinomialFormat(draws=draws):
            return [f"sampled{draws}"]
        case MinVarianceFormat(ids=ids):
            return [f"sampled{ids}_min_variance"]
    return []
