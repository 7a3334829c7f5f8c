"""The numbers of finished studies that are fitted: models without and students with a teacher."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from pydantic import Field

from tutelage.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GainSide = Literal["in_domain", "out_of_domain", "fitted"]
SIDES: tuple[GainSide, ...] = ("in_domain", "out_of_domain", "fitted")
"""Gains in domain, out of domain, and out of domain once calibration is fitted."""


class AlonePoint(Record, extra="forbid"):
    """Models of one size and budget, trained without a teacher: untaught students and teachers."""

    study: str = Field(description="name of the study")
    name: str = Field(description="of the student setting or the teacher")
    parameters: float = Field(gt=0, description="without embeddings")
    tokens: float = Field(gt=0, description="of training")
    loss: float = Field(gt=0, description="nats per token in domain, validation split, mean over runs")
    runs: int = Field(ge=1)


class TaughtPoint(Record, extra="forbid"):
    """Students of one setting that learn from one teacher at one constant alpha."""

    study: str
    student: str
    teacher: str
    parameters: float = Field(gt=0, description="of the student, without embeddings")
    tokens: float = Field(gt=0, description="of the student")
    teacher_loss: float = Field(gt=0, description="nats per token in domain, validation split")
    alone_loss: float = Field(gt=0, description="the same of the untaught student")
    loss: float = Field(gt=0, description="the same of the taught students")
    alpha: float = Field(gt=0, le=1)
    seeds: int = Field(ge=1)
    gains: dict[GainSide, float] = Field(
        description="percent fewer bits per byte, test split, mean over seeds"
    )

    @property
    def pair(self) -> tuple[str, str, str]:
        """Study, student and teacher."""
        return self.study, self.student, self.teacher

    @property
    def hidden_with(self) -> tuple[str, str, float, float]:
        """What points have in common that are left out together: all of one teacher, size and budget."""
        return self.study, self.teacher, self.parameters, self.tokens

    @property
    def gap(self) -> float:
        """log(loss of the untaught student / loss of the teacher): positive if the teacher is stronger."""
        return float(np.log(self.alone_loss / self.teacher_loss))


class StudyPoints(Record, extra="forbid"):
    """The numbers of one study, or of several together."""

    studies: tuple[str, ...]
    texts: tuple[str, ...] = Field(description="training texts, by the names that the studies have for them")
    versions: tuple[str, ...] = Field(
        (), description="of the scores that losses are from: losses compare within one; empty in older fits"
    )
    stores: tuple[str, ...] = Field(
        (), description="fingerprints of the token stores that runs learned from; none where they were lost"
    )
    alone: tuple[AlonePoint, ...]
    taught: tuple[TaughtPoint, ...]

    @property
    def comparable(self) -> bool:
        """Whether all losses are of one text, tokenizer and way of scoring; gains and gaps always compare."""
        return len(self.versions) < 2  # noqa: PLR2004 - none is known of older fits

    def settings(self) -> list[tuple[float, float, float]]:
        """(parameters, tokens, loss) of every size and budget, the median over models that have them.

        Those of one size and budget differ in seed and learning rate.
        """
        found: dict[tuple[float, float], list[float]] = {}
        for point in self.alone:
            found.setdefault((point.parameters, point.tokens), []).append(point.loss)
        return [(*place, float(np.median(losses))) for place, losses in found.items()]

    def pairs(self) -> dict[tuple[str, str, str], list[TaughtPoint]]:
        """The points of each pair, by rising alpha."""
        return by_pair(self.taught)


_Point = TypeVar("_Point", "AlonePoint", "TaughtPoint")


def by_pair(points: Iterable[TaughtPoint]) -> dict[tuple[str, str, str], list[TaughtPoint]]:
    """Group points by study, student and teacher, each group by rising alpha."""
    found: dict[tuple[str, str, str], list[TaughtPoint]] = {}
    for point in sorted(points, key=lambda one: one.alpha):
        found.setdefault(point.pair, []).append(point)
    return found


def together(many: Sequence[StudyPoints]) -> StudyPoints:
    """The points of several studies as those of one; of studies of one name the later ones get a number."""
    many = [_numbered(one, many[:i]) for i, one in enumerate(many)]
    return StudyPoints(
        studies=tuple(name for one in many for name in one.studies),
        texts=tuple(dict.fromkeys(text for one in many for text in one.texts)),
        versions=tuple(dict.fromkeys(version for one in many for version in one.versions)),
        stores=tuple(dict.fromkeys(store for one in many for store in one.stores)),
        alone=tuple(point for one in many for point in one.alone),
        taught=tuple(point for one in many for point in one.taught),
    )


def _numbered(points: StudyPoints, before: Sequence[StudyPoints]) -> StudyPoints:
    """Points that no other study's go by the name of: a preset may have been run on several texts."""
    earlier = Counter(name for one in before for name in one.studies)
    names = {name: f"{name} ({earlier[name] + 1})" if earlier[name] else name for name in points.studies}
    return StudyPoints(
        studies=tuple(names[name] for name in points.studies),
        texts=points.texts,
        versions=points.versions,
        stores=points.stores,
        alone=_renamed(points.alone, names),
        taught=_renamed(points.taught, names),
    )


def _renamed(points: Iterable[_Point], names: Mapping[str, str]) -> tuple[_Point, ...]:
    """Points with other names of their studies."""
    return tuple(one.model_copy(update={"study": names.get(one.study, one.study)}) for one in points)
