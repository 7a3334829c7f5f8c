"""Budgets of teachers as branches of one run: which cell starts from which."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tutelage.config.base import parse_tokens
from tutelage.config.load import digest, merged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.config.study_config import TeacherSpec
    from tutelage.study.cells import Cell


def branched(cells: Sequence[Cell], teachers: Mapping[str, TeacherSpec]) -> list[Cell]:
    """The cells, those of teachers with a trunk chained from the smallest budget to the largest.

    Args:
        cells: one per trained teacher.
        teachers: what the study says of them, by name.
    """
    found = [cell for cell in cells if not teachers[str(cell.teacher)].trunk]
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        spec = teachers[str(cell.teacher)]
        if spec.trunk:
            recipe = {key: value for key, value in cell.settings.items() if key != "tokens"}
            corpus = None if spec.corpus is None else spec.corpus.model_dump(mode="json")
            families.setdefault(digest([recipe, corpus]), []).append(cell)
    for family in families.values():
        family.sort(key=lambda cell: parse_tokens(cell.tokens, 1))
        for shorter, cell in zip([None, *family], family, strict=False):
            branch = cell if shorter is None else replace(cell, trunk=shorter.name, needs=(shorter.name,))
            keeps = {"checkpoint": {"trunk": cell is not family[-1]}}
            found.append(replace(branch, settings=merged(branch.settings, keeps)))
    return found
