"""Alpha policies that listen to the run. They see two running sums and nothing else.

What they see arrives one step late. At the end of a step its cross-entropies are still being computed by the
device; they are sent to the host without waiting and read at the end of the *next* step, when they have long
arrived. So alpha of step s depends on steps up to s - 2, and the device never idles. The sums are global,
so every rank computes the same alpha.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from tutelage.config.objective_config import (
    ConstantAlpha,
    CosineAlpha,
    LinearAlpha,
    PiecewiseAlpha,
    SaltAlpha,
    TwoPhaseAlpha,
    WsdAlpha,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from tutelage.config.objective_config import Alpha, GapDrivenAlpha, PrequentialAlpha

Config = TypeVar("Config")


class Policy(Protocol):
    """One alpha policy of one run."""

    def alpha(self, step: int, steps: int) -> float:
        """Alpha in [0, 1] of 0-based optimizer step `step` of `steps`."""

    def needs_teacher(self, step: int) -> bool:
        """Whether `observe` needs the teacher's cross-entropy of `step`, whatever alpha is."""

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Take note of one step: global means per token, 0-d, still on the device."""

    def state(self) -> dict[str, float]:
        """Everything a resumed run needs. Waits for the device."""

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""


class Schedule(Generic[Config]):
    """A policy that looks at nothing but the fraction of the run that is done, and keeps no state."""

    def __init__(self, config: Config, lr_shape: Callable[[int, int], float]) -> None:
        self.config = config
        self.lr_shape = lr_shape

    def at(self, progress: float) -> float:
        """Alpha at `progress`, 0 at the first step and 1 at the last."""
        raise NotImplementedError

    def alpha(self, step: int, steps: int) -> float:
        """Alpha of 0-based optimizer step `step` of `steps`; a run of one step takes the first value."""
        return self.at(step / (steps - 1) if steps > 1 else 0.0)

    def needs_teacher(self, _step: int) -> bool:
        """Never: where alpha is 0 the teacher is not run."""
        return False

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Look away."""

    def state(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """There is nothing to load."""


class Constant(Schedule[ConstantAlpha]):
    """The same alpha throughout, as in arXiv 2605.23857."""

    def at(self, _progress: float) -> float:
        """The value."""
        return self.config.value


class Piecewise(Schedule[PiecewiseAlpha]):
    """Linear between knots, flat before the first and after the last; any other shape can be drawn so."""

    def at(self, progress: float) -> float:
        """Interpolate."""
        fractions, alphas = zip(*self.config.knots, strict=True)
        return float(np.interp(progress, fractions, alphas))


class Linear(Schedule[LinearAlpha]):
    """A straight line from `start` to `end`; the falling one is the linear decay of arXiv 2410.16215.

    The rising one is the curriculum of arXiv 2605.26246.
    """

    def at(self, progress: float) -> float:
        """Between the two ends."""
        return (1.0 - progress) * self.config.start + progress * self.config.end


class Cosine(Schedule[CosineAlpha]):
    """Half a cosine from `start` to `end`: a `linear` with soft ends (shape of arXiv 1608.03983)."""

    def at(self, progress: float) -> float:
        """Between the two ends; (1 + cos(pi progress)) / 2 is the share of the start."""
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return share * self.config.start + (1.0 - share) * self.config.end


class TwoPhase(Schedule[TwoPhaseAlpha]):
    """`first` until the fraction `switch` of the run, `second` from there on.

    The controls .1 -> .3 and .3 -> .1 give the same amount of teaching in opposite orders: the check that a
    gain over the constant of arXiv 2605.23857 comes from the order and not from the mean.
    """

    def at(self, progress: float) -> float:
        """One of the two."""
        return self.config.first if progress < self.config.switch else self.config.second


class Wsd(Schedule[WsdAlpha]):
    """Alpha = peak lr / peak_lr: warm-up, stable, decay together with a WSD learning rate.

    WSD-shaped alpha with a WSD learning rate did best in the design space of arXiv 2410.16215.
    """

    def alpha(self, step: int, steps: int) -> float:
        """In proportion to the learning rate."""
        return self.config.peak * self.lr_shape(step, steps)


class Salt(Schedule[SaltAlpha]):
    """`value` until the fraction `until` of the run, then plain cross-entropy without a teacher.

    SALT (arXiv 2410.18779): a small teacher early on saves training time. From the switch on the run costs
    what a run without a teacher costs.
    """

    def at(self, progress: float) -> float:
        """The value, then 0."""
        return self.config.value if progress < self.config.until else 0.0


def make_policy(alpha: Alpha, lr_shape: Callable[[int, int], float]) -> Policy:
    """Build the policy of `alpha`.

    Args:
        alpha: its settings.
        lr_shape: (step, steps) -> learning rate as a fraction of its peak, in [0, 1]; `wsd` follows it.
    """
    return POLICIES[alpha.policy](alpha, lr_shape)


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


POLICIES: dict[str, Callable[[Any, Callable[[int, int], float]], Policy]] = {
    "constant": Constant,
    "piecewise": Piecewise,
    "linear": Linear,
    "cosine": Cosine,
    "two_phase": TwoPhase,
    "wsd": Wsd,
    "salt": Salt,
    "gap_driven": GapDriven,
    "prequential": Prequential,
}
"""Name in `objective.alpha.policy` -> class. Built from its settings and the learning rate's shape."""
