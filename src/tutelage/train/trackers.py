"""Send the rows of metrics.jsonl, and scores, to experiment trackers (extra `trackers`)."""

from __future__ import annotations

import contextvars
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from tutelage.errors import UserError, one_line
from tutelage.installed import install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tutelage.config.run_config import RunConfig
    from tutelage.types import Score

    Rows = Sequence[Mapping[str, float]]


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, row: Mapping[str, float]) -> None:
        """Take one row of metrics.jsonl, or scores; its "step" is the x axis."""

    def close(self) -> None:
        """Flush and close."""


class _TensorBoard:
    """Event files in the run's directory; what earlier sessions wrote is hidden and written again.

    They may lack rows: of a time without this tracker, of one in which it failed, of a run that this one is a
    branch of. Readers want them in their order.
    """

    def __init__(self, directory: Path, config: dict[str, Any], step: int, past: Rows) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=1 if past else step + 1)
        self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")
        now = time.time()
        for row in past:
            self._add(row, now - past[-1]["seconds"] + row["seconds"])
        self._writer.flush()

    def log(self, row: Mapping[str, float]) -> None:
        self._add(row, time.time())
        self._writer.flush()  # a kill would take the last two minutes

    def _add(self, row: Mapping[str, float], when: float) -> None:
        for name, value in row.items():
            if name != "step":
                tag = name if "/" in name else f"train/{name}"
                self._writer.add_scalar(tag, value, int(row["step"]), walltime=when)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases."""

    def __init__(self, directory: Path, config: dict[str, Any], _step: int, past: Rows) -> None:
        """Continue the run with the id of ours, if there is one.

        A kill takes rows along that were not written yet: past ones that are not known to be there are sent
        again. Weights & Biases drops rows of steps below its own newest, which a resumed run passes again.
        So rows are numbered by it, and "step" is only the x axis: some are there twice, alike. Students of a
        cohort are open at the same time; unless told to create runs it gives all of them the first one's.
        """
        import wandb  # noqa: PLC0415 - optional

        self._run = wandb.init(
            project="tutelage",
            id=directory.name,
            resume="allow",
            reinit="create_new",
            dir=str(directory),
            config=config,
        )
        self._run.define_metric("*", step_metric="step")
        newest = self._run.summary.get("step", 0) if self._run.resumed else 0
        for row in past:
            if row["step"] > newest:
                self.log(row)

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row))

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of Trackio, a dashboard on this machine."""

    def __init__(self, directory: Path, config: dict[str, Any], _step: int, past: Rows) -> None:
        import trackio  # noqa: PLC0415 - optional

        # It ends the run that is open in its context, which may be another student's of the cohort.
        begin = partial(trackio.init, project="tutelage", name=directory.name, resume="allow", config=config)
        self._run = contextvars.Context().run(begin)
        for row in past:  # a kill takes the newest along
            self.log(row)

    def log(self, row: Mapping[str, float]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}  # a name of its own
        self._run.log(values, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int, Rows], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "trackio": _Trackio,
}


class Trackers:
    """The trackers of one run.

    A tracker is a copy of what is in the run's directory. So one that fails when a run has begun is left out,
    which is said, and the run goes on; at the next start it gets what it missed.

    Args:
        config: names them.
        directory: of the run.
        step: where the run stands.
        past: rows of metrics.jsonl up to there.

    Raises:
        UserError: one does not start, and no step was taken yet.
    """

    def __init__(self, config: RunConfig, directory: Path, step: int, past: Rows = ()) -> None:
        self._failures: list[str] = []
        self._open: dict[str, Tracker] = {}
        settings = config.model_dump(mode="json")
        for name in config.runtime.trackers:
            try:
                self._open[name] = TRACKERS[name](directory, settings, step, past)
            except Exception as error:  # noqa: BLE001 - whatever their packages, servers and disks come up with
                if step == 0:
                    self.close()
                    raise UserError(_no_start(name, error)) from None
                self._failures.append(_no_start(name, error))

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row of metrics.jsonl, or scores."""
        for name, tracker in [*self._open.items()]:
            try:
                tracker.log(row)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(name, error)

    def log_scores(self, scores: Sequence[Score]) -> None:
        """Send scores by `eval/<domain>/<split>/<metric>`, as a row for each step."""
        for step in sorted({score.step for score in scores}):
            found = [score for score in scores if score.step == step]
            self.log({"step": step} | {f"eval/{s.domain}/{s.split}/{s.metric}": s.value for s in found})

    def close(self) -> None:
        """Flush and close them."""
        for name, tracker in [*self._open.items()]:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(name, error)
        self._open.clear()

    def take_failures(self) -> list[str]:
        """Sentences about trackers that were left out since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def _fail(self, name: str, error: Exception) -> None:
        del self._open[name]
        self._failures.append(f"{name} failed and gets nothing more in this session ({one_line(error)})")


def send_scores(config: RunConfig, directory: Path, scores: Sequence[Score], step: int) -> list[str]:
    """Send the scores of a run's last step to its trackers; return sentences about those that failed."""
    final = [score for score in scores if score.step == step]
    if not final:
        return []
    trackers = Trackers(config, directory, step)
    trackers.log_scores(final)
    trackers.close()
    return trackers.take_failures()


def _no_start(name: str, error: Exception) -> str:
    """Say why a tracker does not start, and what helps."""
    if isinstance(error, ImportError):
        return f"runtime.trackers: {name} needs a package ({error}); {install_extra('trackers')}"
    here = ", or set WANDB_MODE=offline, which keeps its rows here" if name == "wandb" else ""
    return (
        f"runtime.trackers: {name} does not start ({one_line(error)}); mend that{here}, or take it out of "
        "runtime.trackers, which changes nothing else of the run"
    )
