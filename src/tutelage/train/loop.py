"""The loop around the step: resume, schedule, log, checkpoint, export."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from tutelage.errors import Stopped, UserError
from tutelage.models import hub
from tutelage.signals import stop_signal
from tutelage.train import checkpoint, distributed
from tutelage.train.optim import learning_rate
from tutelage.train.step import train_step
from tutelage.types import Batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.train.rundir import RunDirectory
    from tutelage.train.setup import Setup
    from tutelage.types import StepReport


class Watcher(Protocol):
    """Whoever looks on while a run trains: a progress bar, a tracker, nobody."""

    def begin(self, run: str, step: int, steps: int) -> None:
        """The run starts (or goes on) after `step` of `steps` optimizer steps."""

    def advance(self, step: int) -> None:
        """`step` steps are done. Called at every step, so it must be cheap."""

    def log(self, row: Mapping[str, float]) -> None:
        """A row of metrics.jsonl was written."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Nobody:
    """The watcher of a run that nobody looks at."""

    def begin(self, run: str, step: int, steps: int) -> None:
        """Do nothing."""

    def advance(self, step: int) -> None:
        """Do nothing."""

    def log(self, row: Mapping[str, float]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def train(setup: Setup, directory: RunDirectory, watcher: Watcher) -> None:
    """Train to the end of the budget and write the model directory.

    Raises:
        Stopped: on SIGINT or SIGTERM, after writing a checkpoint.
        UserError: the loss is not finite, or the directory cannot be written.
    """
    config, trainee, world = setup.config, setup.trainee, setup.world
    counters = checkpoint.load_latest(directory.checkpoints, setup.model, trainee.optimizer)
    setup.load_memory(counters)
    if world.is_main:
        directory.keep_metrics_until(counters.step)
        watcher.begin(directory.id, counters.step, setup.steps)
    clock = _Clock(counters)
    every = max(1, setup.checkpoint_tokens // config.global_batch_tokens)
    setup.model.train()
    with stop_signal() as stop:
        for step in range(counters.step, setup.steps):
            alpha = setup.policy.alpha(step, setup.steps)
            listen = setup.policy.needs_teacher(step)
            lr = learning_rate(config.optim, setup.lr, step, setup.steps)
            report = train_step(trainee, _micro_batches(setup, step), alpha, lr, listen)
            setup.policy.observe(step, report.ce, report.teacher_ce)
            done = step + 1
            clock.tick(config.global_batch_tokens if listen or trainee.consults_teacher(alpha) else 0)
            if world.is_main:
                watcher.advance(done)
            stopping = distributed.anywhere(stop.is_set(), setup.device)
            saving = stopping or done == setup.steps or done % every == 0
            if saving or done % config.runtime.log_every == 0:
                memory = setup.memory()
                row = clock.row(done, config.global_batch_tokens, report) | _named(memory)
                _check_finite(row, directory)
                if world.is_main:
                    directory.append_metrics(row)
                    directory.write_state("running", **setup.ledger(clock.counters(done)))
                    watcher.log(row)
            if saving and world.is_main:
                checkpoint.save(
                    directory.checkpoints,
                    setup.model,
                    trainee.optimizer,
                    replace(clock.counters(done), policy=memory["policy"], gate=memory["gate"]),
                    config.checkpoint.keep,
                )
            if stopping and done < setup.steps:
                if world.is_main:
                    directory.write_state("stopped")
                raise Stopped
    if world.is_main:
        _export(setup, directory)
    distributed.barrier()


def _micro_batches(setup: Setup, step: int) -> list[Batch]:
    whole = setup.loader.batch(step).to(setup.device)
    size = setup.micro_sequences
    return [
        Batch(whole.tokens_BT[start : start + size], whole.labels_BT[start : start + size])
        for start in range(0, len(whole.tokens_BT), size)
    ]


def _named(memory: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What policy and gate remember, as columns of metrics.jsonl: "policy_ce", "gate_threshold"."""
    return {f"{part}_{name}": value for part, state in memory.items() for name, value in state.items()}


def _check_finite(row: Mapping[str, float], directory: RunDirectory) -> None:
    """Stop before a broken model is logged or saved; the last checkpoint is from before the damage."""
    if not all(abs(row[key]) < float("inf") for key in ("loss", "grad_norm")):
        raise UserError(
            f"{directory.path}: loss is {row['loss']} at step {row['step']:.0f}; "
            "lower optim.lr or optim.clip (the last checkpoint is intact)"
        )


def _export(setup: Setup, directory: RunDirectory) -> None:
    """Write the finished model where teachers and evaluations look for it."""
    hub.save(setup.model, directory.model, setup.config.data.store)


class _Clock:
    """Training time over all sessions, and speed since the last row."""

    def __init__(self, start: checkpoint.Counters) -> None:
        self._before = start
        self._teacher_tokens = start.teacher_tokens
        self._start = self._last = time.perf_counter()
        self._last_step = start.step

    def tick(self, teacher_tokens: int) -> None:
        self._teacher_tokens += teacher_tokens

    def counters(self, step: int) -> checkpoint.Counters:
        seconds = self._before.seconds + time.perf_counter() - self._start
        return checkpoint.Counters(step, seconds, self._teacher_tokens)

    def row(self, step: int, batch_tokens: int, report: StepReport) -> dict[str, float]:
        """Read the report (this waits for the device) as one row of metrics.jsonl."""
        values = {
            name: float(tensor)
            for name, tensor in (
                ("loss", report.loss),
                ("ce", report.ce),
                ("kd", report.kd),
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
