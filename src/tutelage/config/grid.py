"""Grids of a study: products, zips, chains and crosses of axes, with exclusions.

A grid is a list of points; a point has a value for each axis. `tutelage.study.axis_settings` maps axes to
settings of a run.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any

from pydantic import BaseModel, Field, JsonValue, model_validator

from tutelage.config.base import Budget, Section, Seed
from tutelage.config.yaml_text import ReadAs

Point = dict[str, Any]
"""Value of every axis, in the order in which the grid names the axes."""


class _Named(BaseModel):
    """Types of the axes that are no setting of a run; a name may look like a number."""

    teacher: tuple[str | None, ...] | str | None = None
    compute_of: tuple[str | None, ...] | str | None = None
    shape: tuple[str, ...] | str | None = None
    tokens: tuple[Budget, ...] | Budget | None = None
    seed: tuple[Seed, ...] | Seed | None = None


Axes = Annotated[dict[str, tuple[JsonValue, ...]], ReadAs(_Named)]
Rule = Annotated[dict[str, JsonValue], ReadAs(_Named)]


class Grid(Section):
    """Points of a grid: one of product, zip, chain and cross, without those that `exclude` matches."""

    product: Axes | None = Field(default=None, description="every combination of the axes' values")
    zip: Axes | None = Field(
        default=None, description="the axes' values side by side: first with first, second with second"
    )
    chain: tuple[Grid, ...] | None = Field(
        default=None, description="points of several grids, one after another"
    )
    cross: tuple[Grid, ...] | None = Field(
        default=None, description="combinations of the points of several grids"
    )
    exclude: tuple[Rule, ...] = Field(
        default=(),
        description="drop points whose axes have these values; a list stands for any of its entries",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        given = [part for part in (self.product, self.zip, self.chain, self.cross) if part is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of product, zip, chain and cross, not {len(given)} of them")
        if self.zip is not None and len({len(values) for values in self.zip.values()}) > 1:
            lengths = {axis: len(values) for axis, values in self.zip.items()}
            raise ValueError(f"zip: all axes need the same number of values, not {lengths}")
        axes = {axis for point in self._all() for axis in point}
        for rule in self.exclude:
            if unknown := sorted(rule.keys() - axes):
                raise ValueError(f"exclude: no axis '{unknown[0]}' in this grid; axes: {sorted(axes)}")
        return self

    def points(self) -> list[Point]:
        """Every point once, in order."""
        kept: list[Point] = []
        for point in self._all():
            if point not in kept and not any(_matches(point, rule) for rule in self.exclude):
                kept.append(point)
        return kept

    def _all(self) -> list[Point]:
        if self.product is not None:
            combinations = product(*self.product.values())
            return [dict(zip(self.product, values, strict=True)) for values in combinations]
        if self.zip is not None:
            return [
                dict(zip(self.zip, values, strict=True)) for values in zip(*self.zip.values(), strict=True)
            ]
        if self.chain is not None:
            return [point for grid in self.chain for point in grid.points()]
        parts = [grid.points() for grid in self.cross or ()]
        return [{axis: value for part in parts for axis, value in part.items()} for parts in product(*parts)]


def _matches(point: Point, rule: dict[str, Any]) -> bool:
    return all(
        axis in point and (point[axis] in wanted if isinstance(wanted, list) else point[axis] == wanted)
        for axis, wanted in rule.items()
    )
