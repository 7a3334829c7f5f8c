"""A student in training: what it computes with, how far it is, and what it writes after a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tutelage.config.base import whole_batches
from tutelage.config.teacher_config import kd_name
from tutelage.data.hashing import mixed
from tutelage.errors import UserError
from tutelage.models.flops import model_forward_flops, training_flops
from tutelage.stopping import stop_signal
from tutelage.train import distributed
from tutelage.train.checkpoint import Checkpoints, Counters
from tutelage.train.guard import Guard, advice, are_finite
from tutelage.train.layers import eagerly
from tutelage.train.optim import learning_rate
from tutelage.train.run_log import RunFacts, RunLog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.data.loader import Loader
    from tutelage.models.export import Base
    from tutelage.objective import Gate, Policy
    from tutelage.run_directory import RunDirectory
    from tutelage.teachers.live import Teacher
    from tutelage.train.distributed import World
    from tutelage.train.guard import Skips
    from tutelage.train.objective_model import ObjectiveModel
    from tutelage.types import StepReport


@dataclass(slots=True, kw_only=True, eq=False)
class Student:
    """A student in training. Several that train together are a cohort; one alone is a cohort of one.

    Attributes:
        config: its run.
        directory: where it writes.
        world: this process among all, and its device.
        module: the model with the objective around it, on the device or sharded over the devices.
        model: the model in it; where there are several processes its parameters are `DTensor`s.
        parameters: what the optimizer updates.
        parameter_count: all parameters, frozen ones too.
        training_flops: FLOPs per token of forward and backward.
        optimizer: AdamW.
        autocast: compute dtype when it is not float32.
        policy: gives alpha of every step.
        gate: factor on alpha per token, or None.
        guard: skips updates that are not finite.
        loader: batches as a function of the step.
        steps: optimizer steps in the budget.
        lr: peak learning rate.
        base: the model it was initialised from, if its directory is on this machine.
        notes: what the user should know about student and teacher.
        teacher: None for plain cross-entropy.
        cohort: students that train together.
        step: optimizer steps taken.
        teacher_tokens: tokens the teacher has been run on.
        error: why it cannot be trained further.
        log: what it writes down.
        checkpoints: where it resumes from.
    """

    config: RunConfig
    directory: RunDirectory
    world: World
    module: ObjectiveModel
    model: PreTrainedModel = field(init=False)
    parameters: tuple[nn.Parameter, ...] = field(init=False)
    parameter_count: int = field(init=False)
    training_flops: float = field(init=False)
    optimizer: torch.optim.Optimizer
    autocast: torch.dtype | None
    policy: Policy
    gate: Gate | None
    guard: Guard = field(init=False)
    loader: Loader
    steps: int
    lr: float
    base: Base | None
    notes: tuple[str, ...]
    teacher: Teacher | None = None
    cohort: int = 1
    step: int = 0
    teacher_tokens: int = 0
    error: UserError | None = None
    checkpoints: Checkpoints = field(init=False)
    log: RunLog = field(init=False)
    _owed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.guard = Guard(self.world.device)
        dtype = torch.float32 if self.autocast is None else self.autocast
        self.log = RunLog(self.config, self.directory, self.world, dtype)
        self.model = self.module.model
        self.parameters = tuple(p for p in self.model.parameters() if p.requires_grad)
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        forward = model_forward_flops(self.model, self.config.data.sequence_length)
        self.training_flops = training_flops(forward)
        self.checkpoints = Checkpoints(self.config, self.directory, self.world)

    @property
    def epochs(self) -> float:
        """Passes over the training split; above 1 the data repeats."""
        return self.steps / self.loader.steps_per_epoch

    @property
    def has_steps_left(self) -> bool:
        """Whether it is to take another step."""
        return self.error is None and self.step < self.steps

    def learn_from(self, teacher: Teacher) -> None:
        """Take the open teacher that the run's config names."""
        self.teacher = teacher
        self.notes += teacher.notes

    def resume(self, cohort: int) -> None:
        """Load the newest checkpoint, if there is one, and open the trackers.

        Raises:
            UserError: the checkpoint is damaged; or a tracker does not start, and no step was taken yet.
        """
        counters = self.checkpoints.load(self.model, self.optimizer)
        if counters.policy:
            self.policy.load(counters.policy)
        if counters.gate and self.gate is not None:
            self.gate.load(counters.gate)
        self.cohort, self.step, self.teacher_tokens = cohort, counters.step, counters.teacher_tokens
        self.guard.load(counters.skipped)
        teacher_flops, retained = 0.0, None
        if self.teacher is not None:
            teacher_flops, retained = self.teacher.forward_flops, self.teacher.retained
        kd = kd_name(self.config.objective, retained)
        facts = RunFacts(self.steps, self.parameter_count, self.training_flops, teacher_flops, kd, cohort)
        self.model.train()
        self.log.open(facts, counters)

    def close(self) -> None:
        """Close the trackers, and wait for the checkpoint that is being written.

        A second signal to stop does not end that: a launcher sends its own after the terminal's.
        """
        with stop_signal():
            self.log.close()
            try:
                self.checkpoints.close()
            except UserError as error:
                self.mark_failed(error)

    def step_inputs(self, step: int) -> StepInputs:
        """Alpha, learning rate and seed of a step; alpha of a later one is what is known of it now."""
        config = self.config
        lr = learning_rate(config.optim, self.lr, step, self.steps, batch_tokens=config.global_batch_tokens)
        alpha = self.policy.alpha(step, self.steps)
        seed = mixed(config.seed, step, self.world.rank)
        return StepInputs(self, alpha, lr, self.policy.needs_teacher_ce(step), seed)

    def maybe_evaluate(self, evaluate: Callable[[Student], None]) -> None:
        """Call `evaluate` between two steps if `eval.every` is due.

        All processes do, since the model may be spread over them. `evaluate` must leave weights and gradients
        as they are, and do nothing the second time: a resumed run passes the same steps again.
        """
        every, batch = self.config.eval.every, self.config.global_batch_tokens
        if every is None or self.step == 0 or self.step % whole_batches(every, batch):
            return
        with eagerly():
            evaluate(self)
        self.model.train()

    @property
    def logs_next(self) -> bool:
        """Whether the next step is to have a row of metrics.jsonl."""
        step = self.step + 1
        due = step % self.config.runtime.log_every == 0 or self.checkpoints.is_due(step)
        return bool(self._owed) or due or step == self.steps

    def finish_step(
        self,
        inputs: StepInputs,
        report: StepReport,
        *,
        stopping: bool,
        parts: Callable[[], Mapping[str, float]] = dict,
    ) -> dict[str, float] | None:
        """Count a step that was taken; log and save where that is due, and at the end.

        A step whose update was skipped is neither logged nor saved; the next one is instead. Too many of them
        in a row, or a directory that cannot be written, mark the student as failed.

        Args:
            inputs: of the step.
            report: what came out of it.
            stopping: the run is interrupted after this step, so it is saved.
            parts: gives the seconds of the step's parts; asked only for a row.

        Returns:
            The row of metrics.jsonl, if one was written.
        """
        config, batch_tokens = self.config, self.config.global_batch_tokens
        # A skipped step may have a finite loss, where its gradient alone is not.
        heard = report.ce.masked_fill(self.guard.skipped > 0, math.nan)
        self.policy.observe(self.step, heard, report.teacher_ce)
        self.step += 1
        self.teacher_tokens += batch_tokens if inputs.needs_teacher else 0
        finished = self.step == self.steps
        if self.step % config.runtime.log_every == 0:
            self._owed.add("row")
        if stopping or finished or self.checkpoints.is_due(self.step):
            self._owed.add("checkpoint")
        if finished or self.checkpoints.is_due(self.step):
            self._owed.add("row")
        branches = config.checkpoint.keep_before_decay and self.step == config.optim.decay_start(
            self.steps, batch_tokens
        )
        skips = self.guard.newest(self.step, wait=branches or bool(self._owed))
        allowed = 0 if finished else config.runtime.max_skipped_steps  # no later step vouches for the last
        if skips is None:
            return None
        try:
            if skips.in_a_row > allowed:
                self._stop_skipping(skips)
            if branches and skips.in_a_row == 0:
                self._check_weights()
                counters = self._counters(skips)
                self.checkpoints.save(self.model, self.optimizer, counters, branch_point=True)
            if self._owed and skips.in_a_row == 0:
                return self._write(report, skips, parts(), goes_on=not (stopping or finished))
        except UserError as error:
            self.mark_failed(error)
        return None

    def take_warnings(self) -> list[str]:
        """What the user should know of the training and of checkpoints that could not be written, once."""
        warnings = [*self.checkpoints.warnings, *self.log.warnings]
        self.checkpoints.warnings, self.log.warnings = [], []
        return warnings

    def _check_weights(self) -> None:
        """Raise if the update made weights that are not finite, so that they are not saved."""
        if distributed.anywhere(not are_finite(self.parameters)):
            raise UserError(
                f"{self.directory.path}: step {self.step}: its update made weights that are not finite; "
                "lower optim.lr (what checkpoints it has are intact)"
            )

    def _stop_skipping(self, skips: Skips) -> None:
        """Raise the error of a run whose updates keep being skipped."""
        starts = self.loader.windows(skips.first - 1) * self.config.data.sequence_length
        mine = torch.tensor([int(skips.is_mine), *starts.tolist()], device=self.world.device)
        everyones = distributed.gather(mine).tolist()
        ranks = [rank for rank, (flag, *_) in enumerate(everyones) if flag]
        _, *starts = everyones[ranks[0] if ranks else 0]
        reason = advice(skips, ranks if self.world.size > 1 else [], starts)
        raise UserError(f"{self.directory.path}: {reason}")

    def mark_failed(self, error: UserError) -> None:
        """Record why this run cannot continue; no steps are left for it."""
        self.error = error
        if self.world.is_main:
            self.directory.write_state("failed", error=str(error))

    def _write(
        self, report: StepReport, skips: Skips, parts: Mapping[str, float], *, goes_on: bool
    ) -> dict[str, float] | None:
        """Write the row and the checkpoint that are owed; at a stop that is a checkpoint alone."""
        owed, self._owed = self._owed, set()
        if "checkpoint" in owed:
            self._check_weights()
        counters = self._counters(skips, has_row="row" in owed)
        row = None
        if "row" in owed:
            row = self.log.write(report, counters, parts)
        else:
            self.log.record(counters)
        if "checkpoint" in owed:
            self.checkpoints.save(self.model, self.optimizer, counters, goes_on=goes_on)
        return row

    def _counters(self, skips: Skips, *, has_row: bool = False) -> Counters:
        """Where the run stands, as checkpoints hold it; waits for the device."""
        return Counters(
            self.step,
            self.log.meter.seconds,
            self.teacher_tokens,
            self.policy.state(),
            {} if self.gate is None else self.gate.state(),
            skips.total,
            self.step if has_row else self.log.logged,
        )


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one student takes a step with, besides the batch.

    Attributes:
        student: whose step it is.
        alpha: weight of the divergence.
        lr: learning rate.
        needs_teacher_ce: run the teacher even at alpha 0, because the policy needs its cross-entropy.
        seed: of dropout, different for every run seed, step and rank.
    """

    student: Student
    alpha: float
    lr: float
    needs_teacher_ce: bool = False
    seed: int = 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the step computes anything from the teacher's targets."""
        if self.student.teacher is None:
            return False
        return (
            self.needs_teacher_ce or self.alpha > 0 or self.student.config.objective.mixing == "keep_full_kd"
        )
