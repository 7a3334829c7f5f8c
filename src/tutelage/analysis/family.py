"""What the headline may count: effects that hold when all the comparisons it looks at are corrected for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from tutelage.analysis.stats import exceeds, holm

if TYPE_CHECKING:
    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import Findings

LEVEL = 0.05
_SIDES: tuple[Side, Side] = ("in_domain", "out_of_domain")


def supported(findings: Findings, student: str) -> dict[tuple[int, Side], str]:
    """Effects of real teachers on one student: "helps" or "hurts", by cell and side; the rest is missing.

    The family is every arm that could have become a teacher's best one, on both sides, raw: so the choice
    of the best costs nothing. Each is a two-sided paired t test over seeds, and Holm's correction over all
    of them keeps the chance of one false word at 5%. One seed is in no family.
    """
    cells = {v.cell for v in findings.verdicts if v.student == student and v.stage is None and v.judged}
    taught = {v.cell for v in findings.verdicts if v.teacher is not None and not v.control}
    constant = {v.cell for v in findings.verdicts if v.constant}
    teachers = {v.cell: v.teacher for v in findings.verdicts}
    with_constants = {teachers[cell] for cell in cells & taught & constant}
    family = {c for c in cells & taught if c in constant or teachers[c] not in with_constants}
    rows = findings.gains.sides.filter(pl.col("cell").is_in([*family]), split="test", fit="raw")
    keys: list[tuple[int, Side]] = []
    evidence = []
    for cell in sorted(family):
        for side in _SIDES:
            gains = rows.filter(cell=cell, role=side)["gain"].to_list()
            if len(gains) > 1:
                keys.append((cell, side))
                evidence.append(exceeds(gains))
    adjusted = holm([one.p for one in evidence])
    return {
        key: "helps" if one.support < one.contradict else "hurts"
        for key, one, p in zip(keys, evidence, adjusted, strict=True)
        if p <= LEVEL
    }
