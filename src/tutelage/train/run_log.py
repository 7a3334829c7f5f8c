"""What a run writes down while it trains: rows of metrics.jsonl, state.json, trackers, warnings.

The warnings are of a loss far above its recent course and of a rank slower than the others: each once when it
begins, and again only after it has ended in between.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.train.metrics import Meter
from tutelage.train.trackers import Trackers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from tutelage.config.run_config import RunConfig
    from tutelage.run_directory import RunDirectory
    from tutelage.train.checkpoint import Counters
    from tutelage.train.distributed import World
    from tutelage.types import Score, StepReport

_RECENT = 32
_ENOUGH = 8
_DEVIATIONS = 6.0
_RELATIVE = 0.05
_NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

_SLOWER = 1.5
_ROWS = 5
_NOTABLE = 0.02
"""Part of a step that a rank must lose to be worth a warning."""


class LossBand:
    """The course of the last 32 logged cross-entropies, as their median and median absolute deviation.

    One is a spike if it lies above the median by more than 6 robust standard deviations (1.4826 times the
    median absolute deviation) and by more than 5%; at least 8 must be known.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._outside = False

    def check(self, step: int, loss: float) -> str | None:
        """Take note of a logged cross-entropy; return a sentence if a spike begins with it."""
        outside, text = False, None
        if len(self._losses) >= _ENOUGH:
            median = statistics.median(self._losses)
            spread = _NORMAL * statistics.median(abs(one - median) for one in self._losses)
            above = max(_DEVIATIONS * spread, _RELATIVE * abs(median))
            outside = loss > median + above
            if outside and not self._outside:
                text = (
                    f"step {step:,}: cross-entropy {loss:.3f} is a spike: the median of the last "
                    f"{len(self._losses)} logged is {median:.3f}, and up to {median + above:.3f} is usual"
                )
        self._outside = outside
        self._losses.append(loss)
        return text


class Stragglers:
    """Ranks that take longer than the others at what each computes by itself.

    A rank is slow if, at 5 logged steps in a row, it takes more than 1.5 times the median of the others and
    that costs at least 2% of a step.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def check(self, step: int, own_seconds: list[float], step_seconds: float) -> str | None:
        """Take note of a logged step; return a sentence if a rank has become slow with it.

        Args:
            step: its number.
            own_seconds: of each rank, seconds of a step in which it waits for no other.
            step_seconds: of a whole step.
        """
        found = []
        for rank, mine in enumerate(own_seconds):
            others = own_seconds[:rank] + own_seconds[rank + 1 :]
            usual = statistics.median(others) if others else mine
            slow = mine > _SLOWER * usual and mine - usual > _NOTABLE * step_seconds
            self._rows[rank] = self._rows.get(rank, 0) + 1 if slow else 0
            if self._rows[rank] == _ROWS:
                found.append(f"rank {rank} takes {1e3 * mine:.1f} ms, the others {1e3 * usual:.1f} ms")
        if not found:
            return None
        return (
            f"step {step:,}: a straggler holds up all processes: at {_ROWS} logged steps in a row "
            f"{'; '.join(found)} to wait for data and to compute the objective"
        )


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a run before its first step.

    Attributes:
        steps: in its budget.
        parameters: of the model, frozen ones too.
        training_flops: operations per token of the student's forward and backward pass.
        teacher_flops: operations per token of the teacher's forward pass; 0 without, or with cached targets.
        kd: name of the divergence in rows.
        cohort: students that train together.
    """

    steps: int
    parameters: int
    training_flops: float
    teacher_flops: float
    kd: str
    cohort: int


class RunLog:
    """The log of one run. Every process calls every method; the first one writes.

    Args:
        config: of the run.
        directory: where it writes.
        world: this process among all.
        dtype: compute dtype.

    Attributes:
        meter: the run's clock.
        logged: step of the newest row.
        warnings: what the user should know and has not been told; whoever shows them empties the list.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, world: World, dtype: torch.dtype) -> None:
        self.meter = Meter(world, config.global_batch_tokens, dtype)
        self.warnings: list[str] = []
        self._config, self._directory, self._is_main = config, directory, world.is_main
        self._facts = RunFacts(0, 0, 0.0, 0.0, "kd", 1)
        self._trackers: Trackers | None = None
        self._losses, self._stragglers = LossBand(), Stragglers()
        self._skipped = self.logged = 0

    def open(self, facts: RunFacts, counters: Counters) -> None:
        """Go on where a checkpoint stands: drop later rows, open the trackers, start the clock.

        Raises:
            UserError: a tracker does not start, and no step was taken yet.
        """
        self._facts, self._skipped, self.logged = facts, counters.skipped, counters.logged
        if self._is_main:
            lost = self._directory.keep_metrics_until(counters.step, counters.logged)
            self.warnings += [] if lost is None else [lost]
            if counters.step:  # a lost state.json is made again from the checkpoint
                self.record(counters)
            place = self._config, self._directory.path, counters.step
            self._trackers = Trackers(*place, self._directory.metrics())
        self.meter.start(counters.step, counters.teacher_tokens, counters.seconds)

    def show_scores(self, scores: Sequence[Score]) -> None:
        """Send scores to the trackers."""
        if self._trackers is not None:
            self._trackers.log_scores(scores)

    def close(self) -> None:
        """Close the trackers."""
        if self._trackers is not None:
            self._trackers.close()
            self.warnings += [f"{self._directory.id}: {text}" for text in self._trackers.take_failures()]

    def write(self, report: StepReport, counters: Counters, parts: Mapping[str, float]) -> dict[str, float]:
        """Write a row and the run's state, and look for what deserves a warning; waits for the device.

        Args:
            report: of the newest step.
            counters: where the run stands.
            parts: seconds of the parts of that step; empty if they were not measured.

        Returns:
            The row.
        """
        facts, tokens = self._facts, counters.step * self._config.global_batch_tokens
        flops = facts.training_flops, facts.teacher_flops
        row: dict[str, float] = {
            "step": counters.step,
            "tokens": tokens,
            "loss": float(report.loss),
            "ce": float(report.ce),
            facts.kd: float(report.kd),
            "teacher_ce": float(report.teacher_ce),
            "grad_norm": float(report.grad_norm),
            "alpha": float(report.alpha),
            "lr": report.lr,
            **self.meter.measure(counters.step, counters.teacher_tokens, flops, parts),
            "tokens_per_parameter": round(tokens / facts.parameters, 6),
            "skipped_steps": counters.skipped,
        }
        for part, memory in (("policy", counters.policy), ("gate", counters.gate)):
            row |= {f"{part}_{name}": value for name, value in memory.items()}
        self.logged = counters.step
        if self._is_main:
            self._directory.append_metrics(row)
            warnings = self._look_at(row, parts)
            if self._trackers is not None:
                self._trackers.log(row)
                warnings += self._trackers.take_failures()
            self.record(counters, warnings)
        return row

    def _look_at(self, row: Mapping[str, float], parts: Mapping[str, float]) -> list[str]:
        """Sentences for what begins to be wrong with a row."""
        step = int(row["step"])
        found = [self._losses.check(step, row["ce"])]  # the loss itself jumps where alpha does
        if parts:
            per_step = self._config.global_batch_tokens / max(row["tokens_per_second"], 1e-9)
            found.append(self._stragglers.check(step, self.meter.own_seconds, per_step))
        newly, self._skipped = int(row["skipped_steps"]) - self._skipped, int(row["skipped_steps"])
        if newly:
            found.append(
                f"step {step:,}: {newly} updates since the last row were skipped, because a loss or a "
                f"gradient was not finite; {self._skipped} in all"
            )
        return [text for text in found if text is not None]

    def record(self, counters: Counters, warnings: Sequence[str] = ()) -> None:
        """Write progress, cost and new warnings to state.json."""
        if not self._is_main:
            return
        facts, tokens = self._facts, counters.step * self._config.global_batch_tokens
        self.warnings += [f"{self._directory.id}: {text}" for text in warnings]
        self._directory.write_state(
            "running",
            step=counters.step,
            steps=facts.steps,
            tokens=tokens,
            seconds=round(counters.seconds, 3),
            tokens_per_second=round(tokens / max(counters.seconds, 1e-9), 1),
            parameters=facts.parameters,
            train_flops=facts.training_flops * tokens,
            teacher_flops=facts.teacher_flops * counters.teacher_tokens,
            cohort=facts.cohort,
            peak_flops=self.meter.peak,
            peak_source=self.meter.peak_source,
            warnings=[*self._directory.state().get("warnings", []), *warnings],
        )
