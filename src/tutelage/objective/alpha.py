"""Alpha policies: functions of the step, and policies that follow two running sums of the training.

Sums arrive one step late. At the end of a step its cross-entropies are still being computed by the device;
they are sent to the host without waiting and read at the end of the *next* step, when they have long arrived.
So alpha of step s depends on steps up to s - 2, and the device never idles. The sums are global, so every
rank computes the same alpha.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, get_args

import torch

from tutelage.config.alpha_config import AlphaConfig, AutoAlpha, GapDrivenAlpha, PrequentialAlpha, WsdAlpha

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class Policy(Protocol):
    """One alpha policy of one run."""

    def alpha(self, step: int, steps: int) -> float:
        """Alpha in [0, 1] of 0-based optimizer step `step` of `steps`; after the last, that of the last."""

    def needs_teacher_ce(self, step: int) -> bool:
        """Whether `observe` needs the teacher's cross-entropy of `step`, whatever alpha is."""

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Take note of one step: global means per token, 0-d, still on the device."""

    def state(self) -> dict[str, float]:
        """Everything a resumed run needs. Waits for the device."""

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""


def make_policy(alpha: AlphaConfig, lr_fraction: Callable[[int, int], float]) -> Policy:
    """Build the policy of `alpha`.

    Args:
        alpha: its settings.
        lr_fraction: (step, steps) -> learning rate as a fraction of its peak, in [0, 1]; `wsd` follows it.

    Raises:
        TypeError: `alpha` is no settings of a policy.
    """
    if not isinstance(alpha, get_args(AlphaConfig)[0]):
        raise TypeError(
            f"alpha {alpha!r}: give settings of tutelage.config.alpha_config, for example "
            "ConstantAlpha(value=0.4)"
        )
    match alpha:
        case GapDrivenAlpha() | AutoAlpha():
            return ByGap(alpha)
        case PrequentialAlpha():
            return Prequential(alpha)
        case WsdAlpha():
            return Schedule(lambda step, steps: alpha.peak * lr_fraction(step, steps))
    return Schedule(lambda step, steps: alpha.at(min(1.0, step / (steps - 1)) if steps > 1 else 0.0))


class Schedule:
    """A policy that is a function of the step alone, and keeps no state.

    Args:
        at: (step, steps) -> alpha.
    """

    def __init__(self, at: Callable[[int, int], float]) -> None:
        self._at = at

    def alpha(self, step: int, steps: int) -> float:
        """Alpha of 0-based optimizer step `step` of `steps`; a run of one step takes the first value."""
        return self._at(step, steps)

    def needs_teacher_ce(self, _step: int) -> bool:
        """Never: where alpha is 0 the teacher is not run."""
        return False

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """No-op: schedules ignore training statistics."""

    def state(self) -> dict[str, float]:
        """Empty: schedules have no state."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """No-op."""


class DelayedScalars:
    """Numbers on their way from the device to the host, read one step after they are sent."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def send(self, *values: Tensor) -> None:
        """Start the copy of 0-d tensors; on CUDA into page-locked memory, so that nothing waits."""
        together = torch.stack(values)
        if together.is_cuda:
            self._values = together.to("cpu", non_blocking=True)
            # Reading the tensor itself would wait for all later work too; the event waits for the copy only.
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()
        else:
            self._values = together.cpu()

    def read(self) -> tuple[float, ...] | None:
        """The numbers sent last, waiting for them if need be; None if there are none."""
        if self._values is None:
            return None
        if self._sent is not None:
            self._sent.synchronize()
        return tuple(self._values.tolist())

    def pop(self) -> tuple[float, ...] | None:
        """As `read`, and forget them."""
        found = self.read()
        self._values = self._sent = None
        return found


class _Adaptive(ABC):
    """Delay, state and resume of an adaptive policy; subclasses define what alpha follows from."""

    def __init__(self, **memory: float) -> None:
        self._memory = memory
        self._delayed = DelayedScalars()

    @abstractmethod
    def needs_teacher_ce(self, step: int) -> bool: ...

    @abstractmethod
    def _learn(self, ce: float, teacher_ce: float) -> None: ...

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Take note of one step: global means per token, 0-d, still on the device.

        Numbers that are not finite, those of a step whose update was skipped, are forgotten.
        """
        arrived = self._delayed.pop()
        if arrived is not None and all(map(math.isfinite, arrived)):
            self._learn(*arrived)
        if self.needs_teacher_ce(step):
            self._delayed.send(ce, teacher_ce)

    def state(self) -> dict[str, float]:
        """Everything a resumed run needs. Waits for the device."""
        late = self._delayed.read()
        if late is None or not all(map(math.isfinite, late)):
            return dict(self._memory)
        return self._memory | {"late_ce": late[0], "late_teacher_ce": late[1]}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""
        self._memory = {name: state[name] for name in self._memory}
        if "late_ce" in state:
            self._delayed.send(torch.tensor(state["late_ce"]), torch.tensor(state["late_teacher_ce"]))


class ByGap(_Adaptive):
    """Alpha from running means of the student's and the teacher's cross-entropy, within [floor, cap].

    `gap_driven` asks for (CE_S - CE_T) / scale, `auto` for level + slope (CE_S / CE_T - 1). Alpha is large
    while the teacher predicts better and falls as the student catches up. Both are ideas of this project, not
    published methods; they run the teacher at every step, even on a floor of 0. Until the first numbers have
    arrived (two steps) alpha is the cap.
    """

    def __init__(self, config: GapDrivenAlpha | AutoAlpha) -> None:
        super().__init__(ce=0.0, teacher_ce=0.0, seen=0.0)
        self._config = config

    def needs_teacher_ce(self, _step: int) -> bool:
        """Every step."""
        return True

    def alpha(self, _step: int, _steps: int) -> float:
        """Clip what the running means ask for; before the first are known, return the cap."""
        memory, config = self._memory, self._config
        if not memory["seen"]:
            return config.cap
        return config.bounded(memory["ce"], memory["teacher_ce"])

    def _learn(self, ce: float, teacher_ce: float) -> None:
        """Update the means: plain over the first `window` steps, exponential after that."""
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

    Without probes alpha sticks near 1, because a student that only imitates never overtakes its teacher. A
    probed student has been taught before, so the bet is about labels from here on, not about a student
    trained on labels all along. This is an idea of this project, not a published method.
    """

    def __init__(self, config: PrequentialAlpha) -> None:
        super().__init__(log_odds=0.0)
        self._config = config

    def needs_teacher_ce(self, step: int) -> bool:
        """Scored steps only: all steps of a probe but its first."""
        return 0 < step % self._config.period < self._config.probe

    def alpha(self, step: int, _steps: int) -> float:
        """Return 0 in a probe, else the teacher's weight."""
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
