"""Say which runs of a study fit into the memory of this machine beside those that run already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.errors import UserError
from tutelage.files import size_text
from tutelage.models.devices import Hardware
from tutelage.run_plan import plan_together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutelage.study.nodes import Node


class MemoryRoom:
    """The memory that the tasks of a runner share.

    A task takes what it needs over seconds or minutes. So what tasks are planned to take is compared with
    what was free when none ran; and a new one with what is free now, since other programs take of it too.

    Args:
        free: gives the bytes that are free; endless where every task has memory of its own.

    Attributes:
        notes: what the user should know of runs that wait, once; whoever shows them empties the list.
    """

    def __init__(self, free: Callable[[], float]) -> None:
        self.notes: list[str] = []
        self._free = free
        self._all = 0.0
        self._taken: dict[str, float] = {}
        self._told: set[tuple[int, bool]] = set()
        self._known: dict[tuple[str, ...], float] = {}

    def fitting(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """The first of runs that are to train together, as many as fit; none if they have to wait.

        Where none runs, the first may: what cannot fit even alone is refused when it starts, with what to
        turn. Workers tell nobody what may not fit, so that is said here.
        """
        free = self._free()
        if not self._taken:
            self._all = free
        left = min(free, self._all - sum(self._taken.values()))
        fits = (count for count in range(len(nodes), 0, -1) if self._needed(nodes[:count]) <= left)
        count = next(fits, 0)
        if count < len(nodes):
            self._tell(nodes, count, max(0.0, left))
        return nodes[: max(count, 0 if self._taken else 1)]

    def take(self, key: str, nodes: Sequence[Node]) -> None:
        """Count what runs that start take."""
        self._taken[key] = self._needed(nodes)

    def give_back(self, key: str) -> None:
        """Count no longer what runs have taken that have ended."""
        self._taken.pop(key, None)

    def _needed(self, nodes: Sequence[Node]) -> float:
        """As `needed`, computed once for those that are asked about twice a second while they wait."""
        key = tuple(node.id for node in nodes)
        if key not in self._known:
            self._known[key] = needed(nodes)
        return self._known[key]

    def _tell(self, nodes: Sequence[Node], count: int, left: float) -> None:
        name, needs = nodes[0].cell.name, size_text(self._needed(nodes[: max(1, count)]))
        if count:
            text = f"so {name} and {count - 1} more train together, not {len(nodes)}: they need {needs}"
        elif self._taken:
            text = f"so {name} waits until others have ended: it needs {needs}"
        else:
            text = f"and {name} may need {needs}, though nothing runs beside it"
        if (kind := (count, not self._taken)) not in self._told:
            self._told.add(kind)
            self.notes.append(f"memory: {size_text(left)} are left of {size_text(self._all)}, {text}")


_LIBRARIES = 0.3e9
"""Bytes that each of several processes takes for libraries; workers of one process share theirs."""


def needed(nodes: Sequence[Node]) -> float:
    """Bytes that runs need on this machine, trained together; 0 where the plan does not know their models."""
    configs = [node.config for node in nodes]
    processes = configs[0].parallel.processes
    try:
        plan = plan_together(configs, Hardware.here("cpu", processes, processes))
    except UserError:
        return 0.0
    return processes * (plan.memory.total + _LIBRARIES * (processes > 1))
