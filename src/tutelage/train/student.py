"""One run inside the loop: where it stands, what it does in a step, what it writes afterwards."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tutelage.data.hashing import mixed
from tutelage.errors import UserError
from tutelage.train import checkpoint
from tutelage.train.save_model import export
from tutelage.train.step import Turn, learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from tutelage.run_directory import RunDirectory
    from tutelage.train.setup import Setup
    from tutelage.train.trackers import Tracker
    from tutelage.types import StepReport


@dataclass(frozen=True, slots=True)
class Hook:
    """Something to do now and then with a model in training, for example to score it.

    Attributes:
        tokens: how often, in training tokens.
        call: gets the model and the steps it has taken; must leave weights and gradients as they
            are, and do nothing the second time, because a resumed run passes the same steps again.
    """

    tokens: int
    call: Callable[[PreTrainedModel, int], None]


class Session:
    """A run from its newest checkpoint to its end.

    Args:
        setup: the run.
        directory: where it writes.
        trackers: who else gets its metrics.
        cohort: how many runs train together, for the record.
        hook: called between steps, on the main process only; the others wait in their next step.
    """

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        trackers: Sequence[Tracker],
        cohort: int,
        hook: Hook | None = None,
    ) -> None:
        self.setup = setup
        self.directory = directory
        self.row: dict[str, float] = {}
        self._trackers = trackers
        self._cohort = cohort
        self._hook = hook
        counters = checkpoint.load_latest(directory.checkpoints, setup.model, setup.trainee.optimizer)
        setup.load_memory(counters)
        self.step = counters.step
        self._failed = False
        self._clock = _Clock(counters)
        self._every = max(1, setup.checkpoint_tokens // setup.config.global_batch_tokens)
        if setup.world.is_main:
            directory.keep_metrics_until(counters.step)
        setup.model.train()

    def is_due(self, step: int) -> bool:
        """Whether this run has `step` before it; one whose checkpoint is further on waits for the others."""
        return not self._failed and self.step <= step < self.setup.steps

    def between_steps(self) -> None:
        """Call the hook if it is due. Its time is not training time."""
        if self._hook is None or not self.setup.world.is_main:
            return
        steps = max(1, self._hook.tokens // self.setup.config.global_batch_tokens)
        if self.step == 0 or self.step % steps:
            return
        start = time.perf_counter()
        self._hook.call(self.setup.model, self.step)
        self.setup.model.train()
        self._clock.leave_out(time.perf_counter() - start)

    def turn(self) -> Turn:
        """What the student does in the next step."""
        setup = self.setup
        batch = setup.config.global_batch_tokens
        lr = learning_rate(setup.config.optim, setup.lr, self.step, setup.steps, batch_tokens=batch)
        alpha = setup.policy.alpha(self.step, setup.steps)
        seed = mixed(setup.config.seed, self.step, setup.world.rank)
        return Turn(setup.trainee, alpha, lr, setup.policy.needs_teacher(self.step), seed)

    def after(self, turn: Turn, report: StepReport, *, stopping: bool) -> None:
        """Take note of a step: policy, log row, checkpoint; at the last one the model directory.

        Raises:
            UserError: the loss is not finite.
        """
        setup, config = self.setup, self.setup.config
        setup.policy.observe(self.step, report.ce, report.teacher_ce)
        self.step += 1
        self._clock.tick(config.global_batch_tokens if turn.asks_teacher else 0)
        finished = self.step == setup.steps
        saving = stopping or finished or self.step % self._every == 0
        if config.checkpoint.trunk and self.step == config.optim.decay_start(
            setup.steps, config.global_batch_tokens
        ):
            self._check_finite(report)
            self._save_trunk()
        if saving or self.step % config.runtime.log_every == 0:
            self._log(report, saving=saving)
        if not setup.world.is_main:
            return
        if finished:
            export(setup, self.directory)
        elif stopping:
            self.directory.write_state("stopped")

    def give_up(self, error: UserError) -> None:
        """Record why this run cannot go on; it is not due any more."""
        self._failed = True
        if self.setup.world.is_main:
            self.directory.write_state("failed", error=str(error))

    def _check_finite(self, report: StepReport) -> None:
        """Stop before a broken model is logged or saved; the last checkpoint is from before the damage."""
        loss, ce, norm = float(report.loss), float(report.ce), float(report.grad_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        where = f"{self.directory.path}: step {self.step}"
        if math.isfinite(ce) and not math.isfinite(loss):
            raise UserError(
                f"{where}: the teacher's targets are not finite; try another dtype or teacher (the last "
                "checkpoint is intact)"
            )
        raise UserError(
            f"{where}: loss is {loss}, gradient norm {norm}; lower optim.lr or optim.clip (the last "
            "checkpoint is intact)"
        )

    def _save_trunk(self) -> None:
        if self.setup.world.is_main:
            checkpoint.save_trunk(
                self.directory.checkpoints,
                self.setup.model,
                self.setup.trainee.optimizer,
                self._clock.counters(self.step),
            )

    def _log(self, report: StepReport, *, saving: bool) -> None:
        setup, config = self.setup, self.setup.config
        self._check_finite(report)
        memory = setup.memory()
        self.row = self._clock.row(self.step, config.global_batch_tokens, report, setup.kd_name) | _named(
            memory
        )
        if not setup.world.is_main:
            return
        counters = self._clock.counters(self.step)
        self.directory.append_metrics(self.row)
        self.directory.write_state("running", **setup.ledger(counters), cohort=self._cohort)
        for tracker in self._trackers:
            tracker.log(self.row)
        if saving:
            checkpoint.save(
                self.directory.checkpoints,
                setup.model,
                setup.trainee.optimizer,
                replace(counters, policy=memory["policy"], gate=memory["gate"]),
                config.checkpoint.keep,
            )


def _named(memory: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What policy and gate remember, as columns of metrics.jsonl: "policy_ce", "gate_threshold"."""
    return {f"{part}_{name}": value for part, state in memory.items() for name, value in state.items()}


class _Clock:
    """Training time over all sessions, and speed since the last row."""

    def __init__(self, start: checkpoint.Counters) -> None:
        self._before = start
        self._teacher_tokens = start.teacher_tokens
        self._start = self._last = time.perf_counter()
        self._last_step = start.step

    def tick(self, teacher_tokens: int) -> None:
        self._teacher_tokens += teacher_tokens

    def leave_out(self, seconds: float) -> None:
        self._start += seconds
        self._last += seconds

    def counters(self, step: int) -> checkpoint.Counters:
        seconds = self._before.seconds + time.perf_counter() - self._start
        return checkpoint.Counters(step, seconds, self._teacher_tokens)

    def row(self, step: int, batch_tokens: int, report: StepReport, kd_name: str) -> dict[str, float]:
        """Read the report (this waits for the device) as one row of metrics.jsonl."""
        values = {
            name: float(tensor)
            for name, tensor in (
                ("loss", report.loss),
                ("ce", report.ce),
                (kd_name, report.kd),
                ("teacher_ce", report.teacher_ce),
                ("grad_norm", report.grad_norm),
            )
        }
        now = time.perf_counter()
        speed = (step - self._last_step) * batch_tokens / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        return {
            "step": step,
            "tokens": step * batch_tokens,
            **values,
            "alpha": float(report.alpha),
            "lr": report.lr,
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.counters(step).seconds, 3),
        }
