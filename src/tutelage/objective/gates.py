"""Per-token gates: factors in [0, 1] on alpha, so that a token is taught more, less or not at all.

A gate is called once per chunk of tokens by the objective. Some keep a threshold between steps: they count
while they are called, the training step sums the counts over ranks with everything else, and `update` moves
the threshold. All of it stays on the device. The threshold depends only on global counts, so it is the same
on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, get_args, runtime_checkable

import torch

from tutelage.config import objective_config as settings
from tutelage.objective.sparse import merge_repeats
from tutelage.types import SparseTargets, Targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from tutelage.config.objective_config import Objective
    from tutelage.types import Rows


@torch.no_grad()
def token_stats(
    gate: Gate,
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    targets: Targets,
    ce_C: Tensor,
    teacher_ce_C: Tensor,
    rows: Rows = slice(None),
) -> TokenStats:
    """Statistics of the tokens of one chunk at T=1.

    Args:
        gate: its `needs` select the statistics.
        student_CV: student logits.
        teacher_CV: teacher logits, None where there are only sparse targets.
        targets: of these tokens. From sparse ones the teacher's entropy is that of the kept ids and one
            outcome for the rest, a lower bound; of samples it is one on average.
        ce_C: student's cross-entropy on the labels.
        teacher_ce_C: the teacher's.
        rows: their places among the tokens of the call.
    """
    needs = gate.needs
    return TokenStats(
        ce_C=ce_C.detach(),
        teacher_ce_C=teacher_ce_C,
        student_entropy_C=_entropy(student_CV.softmax(-1)) if "student_entropy" in needs else None,
        teacher_entropy_C=_entropy(_teacher(teacher_CV, targets)) if "teacher_entropy" in needs else None,
        teacher_max_C=_teacher(teacher_CV, targets).amax(-1) if "teacher_max" in needs else None,
        rows=rows,
    )


def _teacher(teacher_CV: Tensor | None, targets: Targets) -> Tensor:
    if teacher_CV is not None:
        return teacher_CV.softmax(-1)
    assert isinstance(targets, SparseTargets)  # noqa: S101 - dense targets come with their logits
    _, mass_NK = merge_repeats(targets.ids_NK, targets.probs_NK)
    given_NK = targets.ids_NK.argsort(-1).argsort(-1)  # in the order of the slots, so that sums round alike
    return torch.cat([mass_NK.gather(1, given_NK), targets.tail_N.unsqueeze(1)], 1)


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of the C tokens of one chunk, without gradients.

    Entropies and largest probability are None unless the gate names them in `needs`.

    Attributes:
        ce_C: float32 cross-entropy of the student on the label, nats, T=1; 0 at a token without loss.
        teacher_ce_C: the same of the teacher.
        student_entropy_C: float32 entropy of the student's distribution, nats, T=1.
        teacher_entropy_C: the same of the teacher.
        teacher_max_C: float32 largest probability of the teacher, T=1.
        rows: places of the tokens among those of the call.
    """

    ce_C: Tensor
    teacher_ce_C: Tensor
    student_entropy_C: Tensor | None = None
    teacher_entropy_C: Tensor | None = None
    teacher_max_C: Tensor | None = None
    rows: Rows = field(default_factory=lambda: slice(None))


@runtime_checkable
class Gate(Protocol):
    """One gate of one run.

    Attributes:
        needs: which of "student_entropy", "teacher_entropy" and "teacher_max" must be in the stats.
    """

    needs: frozenset[str]

    @property
    def share(self) -> Tensor | float | None:
        """Fraction of tokens that it is set to pass, others get 0; 0 before it knows its threshold.

        None of a gate that passes no set fraction. Read after a call.
        """

    def begin(self, draw: Callable[[], Tensor]) -> None:
        """Begin a call of the objective; `draw` gives a uniform number in (0, 1) for each of its tokens."""

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C] on alpha, float32 in [0, 1]; those of tokens without loss are not used."""

    def sums(self) -> list[Tensor]:
        """Sums since the last `update`, for the caller to replace in place by their sums over ranks."""

    def update(self, skipped: Tensor) -> None:
        """End a step: move the threshold by the (now global) sums and start new ones.

        Args:
            skipped: above 0 if the step's update was, because something was not finite: then nothing moves.
                0-d, on the device.
        """

    def state(self) -> dict[str, float]:
        """Everything a resumed run needs. Waits for the device."""

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""


class _Stateless:
    needs: frozenset[str] = frozenset()
    share: Tensor | float | None = None

    def __init__(self, _config: settings.TeacherBetterGate | settings.TeacherConfidenceGate) -> None:
        """There are no settings."""

    def begin(self, draw: Callable[[], Tensor]) -> None:
        """No-op."""

    def sums(self) -> list[Tensor]:
        return []

    def update(self, skipped: Tensor) -> None:
        """No-op."""

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """No-op."""


class TeacherBetter(_Stateless):
    """1 where the teacher's cross-entropy on the label is below the student's, else 0.

    A token on which both are equal is not taught. `gap_driven` makes the same comparison for the whole run.
    This is an idea of this project, not a published method.
    """

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]."""
        return (stats.teacher_ce_C < stats.ce_C).float()


class TeacherConfidence(_Stateless):
    """The teacher's largest probability: tokens on which it is unsure are taught less.

    It teaches most where `TeacherEntropy` teaches least; the two show which tokens of the teacher help. This
    is a control of this project, not a published method.
    """

    needs = frozenset({"teacher_max"})

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]."""
        return _asked_for(stats.teacher_max_C)


class Random(_Stateless):
    """1 on a fraction `keep` of tokens drawn at random, else 0: what a choice of tokens is worth at all.

    In a run a token's draw is a function of its place in the text and the seed of the batches, so neither
    micro-batches nor ranks nor a restart change it. The control of arXiv 2602.01395 and of routing.
    """

    def __init__(self, config: settings.RandomGate) -> None:
        self.share = self._keep = config.keep
        self.draws_N: Tensor | None = None

    def begin(self, draw: Callable[[], Tensor]) -> None:
        """Take the numbers of the call's tokens."""
        self.draws_N = draw()

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]. Raises ValueError if `begin` was not called."""
        if self.draws_N is None:
            raise ValueError("gate random: call begin(draw) before each call of the objective")
        return (self.draws_N[stats.rows] < self._keep).float()


class _Above:
    """1 for values above the (1 - keep) quantile of the previous step, else 0.

    The quantile is read from a histogram, whose counts add up over chunks, micro-batches and ranks. Its bins
    are narrow near 0, where most of a teacher's entropies lie; within a bin, values count as spread evenly.
    In the first step the threshold is the lowest value and all tokens pass. Equal values get equal factors.
    """

    BINS, LARGEST = 8192, 16.0  # entropies above 16 nats would need a vocabulary of nine million
    LOWEST = 0.0

    def __init__(self, keep: float) -> None:
        self._keep = self._share = keep
        self._threshold = torch.tensor(self.LOWEST, dtype=torch.float32)
        self._counts: Tensor | None = None

    @property
    def share(self) -> Tensor:
        """As in `Gate`."""
        return self._share * (self._threshold != self.LOWEST)

    def begin(self, draw: Callable[[], Tensor]) -> None:
        """No-op."""

    def _to_bins(self, values: Tensor) -> Tensor:
        """Places of values on the axis of bins."""
        return self.BINS * (values / self.LARGEST).clamp(min=0.0).sqrt()

    def _from_bins(self, places: Tensor) -> Tensor:
        """The inverse of `_to_bins`."""
        return self.LARGEST * (places / self.BINS).square()

    def above(self, values_C: Tensor, ce_C: Tensor) -> Tensor:
        if self._counts is None:
            self._threshold = self._threshold.to(values_C.device)
            self._counts = torch.zeros(self.BINS, dtype=torch.float32, device=values_C.device)
        bins_C = self._to_bins(values_C).long()
        bins_C = bins_C.clamp(0, self.BINS - 1)  # a number that is not finite becomes any integer
        # Neither tokens without loss nor those with nothing left to learn are counted.
        self._counts.scatter_add_(0, bins_C, (ce_C > 0).float())
        return (values_C > self._threshold).float()

    def sums(self) -> list[Tensor]:
        return [] if self._counts is None else [self._counts]

    def update(self, skipped: Tensor) -> None:
        if self._counts is None:
            return
        up_to = self._counts.cumsum(0)
        below = (1.0 - self._keep) * up_to[-1:]
        index = torch.searchsorted(up_to, below).clamp(max=self.BINS - 1)
        inside = 1.0 - (up_to.take(index) - below) / self._counts.take(index).clamp(min=1.0)
        quantile = self._from_bins(index + inside)
        moves = (up_to[-1:] > 0) & (skipped == 0)
        self._threshold = torch.where(moves, quantile, self._threshold).squeeze(0)
        self._counts = None

    def state(self) -> dict[str, float]:
        return {"threshold": float(self._threshold)}

    def load(self, state: Mapping[str, float]) -> None:
        self._threshold = torch.tensor(state["threshold"], dtype=torch.float32)


class StudentEntropy(_Above):
    """1 on the fraction `keep` of tokens with the highest student entropy (SE-KD, arXiv 2602.01395: 20%).

    The threshold is a quantile of the previous step, not one within the batch, so that a result depends
    neither on micro-batches nor on ranks.
    """

    needs = frozenset({"student_entropy"})

    def __init__(self, config: settings.StudentEntropyGate) -> None:
        super().__init__(config.keep)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]."""
        return self.above(_asked_for(stats.student_entropy_C), stats.ce_C)


class TeacherEntropy(_Above):
    """0 on the fraction `drop` of tokens with the lowest teacher entropy (arXiv 2509.01649: 15%).

    Distillation hurts copying from the context; training the teacher's near-certain tokens on labels alone
    recovers it. The threshold is a quantile of the previous step, as in `StudentEntropy`.
    """

    needs = frozenset({"teacher_entropy"})

    def __init__(self, config: settings.TeacherEntropyGate) -> None:
        super().__init__(1.0 - config.drop)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]."""
        return self.above(_asked_for(stats.teacher_entropy_C), stats.ce_C)


class TeacherCertainty(_Above):
    """1 on the fraction `keep` of tokens with the lowest teacher entropy, else 0.

    With `mixing: routed` and reverse KL this is Switch Distillation (2026: 20%). The threshold is a quantile
    of the previous step, as in `StudentEntropy`; in the first step no token passes.
    """

    needs = frozenset({"teacher_entropy"})

    def __init__(self, config: settings.TeacherCertaintyGate) -> None:
        super().__init__(1.0 - config.keep)
        self._share = config.keep

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]."""
        return 1.0 - self.above(_asked_for(stats.teacher_entropy_C), stats.ce_C)


class TeacherAhead(_Above):
    """1 on the fraction `keep` of tokens on which the teacher's CE is furthest below the student's, else 0.

    `TeacherBetter` with a set fraction, whichever of the two is better: the threshold is a quantile of the
    previous step and may lie below 0. This is an idea of this project, not a published method.
    """

    needs = frozenset[str]()
    LOWEST = -_Above.LARGEST

    def __init__(self, config: settings.TeacherAheadGate) -> None:
        super().__init__(config.keep)

    def _to_bins(self, values: Tensor) -> Tensor:
        part = values / self.LARGEST
        return self.BINS / 2 * (1.0 + part.sign() * part.abs().sqrt())

    def _from_bins(self, places: Tensor) -> Tensor:
        part = 2.0 * places / self.BINS - 1.0
        return self.LARGEST * part * part.abs()

    def __call__(self, stats: TokenStats) -> Tensor:
        """Factors [C]."""
        return self.above(stats.ce_C - stats.teacher_ce_C, stats.ce_C)


def token_weights(
    objective: Objective, gate: Gate | None, alpha: float, factor_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(effective alpha, weight of CE, weight of the divergence without T^2) of each token.

    Args:
        objective: whose mixing they follow.
        gate: that gave the factors.
        alpha: of the step.
        factor_C: of the gate; ones without.
    """
    alpha_C, share = alpha * factor_C, None if gate is None else gate.share
    if objective.mixing != "routed" or share is None:
        return alpha_C, *objective.weights(alpha_C)
    share = share if alpha else 0.0
    alpha_C = alpha_C * (share > 0)
    return alpha_C, *objective.weights(alpha_C, share)


def _asked_for(values_C: Tensor | None) -> Tensor:
    assert values_C is not None, "the objective must compute what the gate needs"  # noqa: S101 - a bug of ours
    return values_C


GATES: dict[str, Callable[[Any], Gate]] = {
    "teacher_better": TeacherBetter,
    "student_entropy": StudentEntropy,
    "teacher_entropy": TeacherEntropy,
    "teacher_confidence": TeacherConfidence,
    "teacher_certainty": TeacherCertainty,
    "teacher_ahead": TeacherAhead,
    "random": Random,
}


def make_gate(config: settings.GateConfig | None) -> Gate | None:
    """Build the gate of `config`, or None; raise TypeError if it is no settings of a gate."""
    if config is not None and not isinstance(config, get_args(settings.GateConfig)[0]):
        raise TypeError(
            f"gate {config!r}: give settings of tutelage.objective, for example "
            "TeacherConfidenceGate(kind='teacher_confidence')"
        )
    return None if config is None else GATES[config.kind](config)
