"""Alpha policies that listen to the run. They see two running sums and nothing else.

What they see arrives one step late. At the end of a step its cross-entropies are still being computed by the
device; they are sent to the host without waiting and read at the end of the *next* step, when they have long
arrived. So alpha of step s depends on steps up to s - 2, and the device never idles. The sums are global,
so every rank computes the same alpha.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from tutelage.objectiveconfig import GapDrivenAlpha, PrequentialAlpha


class Late:
    """Two numbers on their way from the device to the host."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def send(self, ce: Tensor, teacher_ce: Tensor) -> None:
        """Start the copy; on CUDA into page-locked memory, so that nothing waits."""
        pair = torch.stack([ce, teacher_ce])
        if pair.is_cuda:
            self._values = pair.to("cpu", non_blocking=True)
            # Reading the pair itself would wait for all later work too; the event waits for the copy only.
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()
        else:
            self._values = pair.cpu()

    def peek(self) -> tuple[float, float] | None:
        """The numbers sent last, waiting for them if need be; None if there are none."""
        if self._values is None:
            return None
        if self._sent is not None:
            self._sent.synchronize()
        ce, teacher_ce = self._values.tolist()
        return ce, teacher_ce

    def take(self) -> tuple[float, float] | None:
        """As `peek`, and forget them."""
        found = self.peek()
        self._values = self._sent = None
        return found


class _Adaptive:
    """Lag, state and resume of an adaptive policy; what it computes is in the subclasses."""

    def __init__(self, **memory: float) -> None:
        self._memory = memory
        self._late = Late()

    def needs_teacher(self, step: int) -> bool:
        raise NotImplementedError

    def _learn(self, ce: float, teacher_ce: float) -> None:
        raise NotImplementedError

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Take note of one step: global means per token, 0-d, still on the device."""
        arrived = self._late.take()
        if arrived is not None:
            self._learn(*arrived)
        if self.needs_teacher(step):
            self._late.send(ce, teacher_ce)

    def state(self) -> dict[str, float]:
        """Everything a resumed run needs. Waits for the device."""
        late = self._late.peek()
        return self._memory | ({} if late is None else {"late_ce": late[0], "late_teacher_ce": late[1]})

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""
        self._memory = {name: state[name] for name in self._memory}
        if "late_ce" in state:
            self._late.send(torch.tensor(state["late_ce"]), torch.tensor(state["late_teacher_ce"]))


class GapDriven(_Adaptive):
    """Alpha = clip((CE_student - CE_teacher) / scale, floor, cap), on running means of both.

    The teacher speaks while it knows more and falls to the floor when the student has drawn level. A lead of
    this project, not a published method; it needs the teacher at every step, even on a floor of 0. Until
    the first numbers have arrived (two steps) alpha is the cap.
    """

    def __init__(self, config: GapDrivenAlpha, _lr_shape: Callable[[int, int], float]) -> None:
        super().__init__(ce=0.0, teacher_ce=0.0, seen=0.0)
        self._config = config

    def needs_teacher(self, _step: int) -> bool:
        """Always."""
        return True

    def alpha(self, _step: int, _steps: int) -> float:
        """Alpha of the next step."""
        memory, config = self._memory, self._config
        if not memory["seen"]:
            return config.cap
        gap = memory["ce"] - memory["teacher_ce"]
        return min(config.cap, max(config.floor, gap / config.scale))

    def _learn(self, ce: float, teacher_ce: float) -> None:
        """A plain mean over the first `window` steps, an exponential one after that."""
        memory = self._memory
        memory["seen"] = min(memory["seen"] + 1.0, float(self._config.window))
        memory["ce"] += (ce - memory["ce"]) / memory["seen"]
        memory["teacher_ce"] += (teacher_ce - memory["teacher_ce"]) / memory["seen"]


class Prequential(_Adaptive):
    """Alpha = weight of the teacher in a bet against the student, settled on label-only probe steps.

    Every `period` steps begin with `probe` steps on labels alone (alpha 0). All but the first are scored:
    their cross-entropy, measured before the update (prequentially: Dawid 1984), is that of a student that
    has just learned from labels. Each score moves the teacher's log-odds by rate (CE_student - CE_teacher):
    the exponential weights of Freund and Schapire (1997), kept within [floor, cap] in the spirit of
    Herbster and Warmuth (1998), so that a late change of leader is not outvoted by the past.

    Scoring the student as it is while it imitates is known to stick near 1: a student that only imitates
    never overtakes. The probes are what breaks that circle. They are a cheap stand-in for a student
    trained on labels from the beginning: the probed student has been taught before, so the bet is about
    "labels from here on", not "labels all along". A lead of this project, not a published method.
    """

    def __init__(self, config: PrequentialAlpha, _lr_shape: Callable[[int, int], float]) -> None:
        super().__init__(log_odds=0.0)
        self._config = config

    def needs_teacher(self, step: int) -> bool:
        """On scored steps: those of a probe but its first."""
        return 0 < step % self._config.period < self._config.probe

    def alpha(self, step: int, _steps: int) -> float:
        """Alpha of `step`: 0 in a probe, else the teacher's weight."""
        config = self._config
        if step % config.period < config.probe:
            return 0.0
        weight = 0.5 * (1.0 + math.tanh(self._memory["log_odds"] / 2))
        return min(config.cap, max(config.floor, weight))

    def _learn(self, ce: float, teacher_ce: float) -> None:
        config = self._config
        low, high = (math.log(weight / (1.0 - weight)) for weight in (config.floor, config.cap))
        moved = self._memory["log_odds"] + config.rate * (ce - teacher_ce)
        self._memory["log_odds"] = min(high, max(low, moved))
