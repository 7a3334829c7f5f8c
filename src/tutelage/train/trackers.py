"""Send the rows of metrics.jsonl, and scores, to experiment trackers (extra `trackers`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import yaml

from tutelage.errors import UserError
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
    """Event files in the run's directory; steps that a killed session took later are hidden."""

    def __init__(self, directory: Path, config: dict[str, Any], step: int, _past: Rows) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")

    def log(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, int(row["step"]))
        self._writer.flush()  # a kill would take the last two minutes

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases."""

    def __init__(self, directory: Path, config: dict[str, Any], _step: int, past: Rows) -> None:
        """Continue the run with the id of ours, if there is one.

        A kill takes rows along that were not written yet: past ones that are not known to be there are sent
        again. Weights & Biases drops rows of steps below its own newest, which a resumed run passes again.
        So rows are numbered by it, and "step" is only the x axis: some are there twice, alike.
        """
        import wandb  # noqa: PLC0415 - optional

        self._run = wandb.init(
            project="tutelage", id=directory.name, resume="allow", dir=str(directory), config=config
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

        self._run = trackio.init(project="tutelage", name=directory.name, resume="allow", config=config)
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


def open_trackers(config: RunConfig, directory: Path, step: int, past: Rows = ()) -> list[Tracker]:
    """Start the trackers of the run in `directory`, or go on with them after `step`.

    Args:
        config: names them.
        directory: of the run.
        step: where the run stands.
        past: rows of metrics.jsonl up to there.

    Raises:
        UserError: a package is not installed.
    """
    settings = config.model_dump(mode="json")
    return [_open(name, directory, settings, step, past) for name in config.runtime.trackers]


def scores_row(scores: Sequence[Score], step: int) -> dict[str, float]:
    """Scores as a row for trackers, by `eval/<domain>/<split>/<metric>`."""
    return {"step": step} | {f"eval/{s.domain}/{s.split}/{s.metric}": s.value for s in scores}


def send_scores(config: RunConfig, directory: Path, scores: Sequence[Score], step: int) -> None:
    """Send scores of a trained run to its trackers."""
    for tracker in open_trackers(config, directory, step) if scores else ():
        tracker.log(scores_row(scores, step))
        tracker.close()


def _open(name: str, directory: Path, config: dict[str, Any], step: int, past: Rows) -> Tracker:
    try:
        return TRACKERS[name](directory, config, step, past)
    except ImportError as error:
        raise UserError(
            f"runtime.trackers: {name} needs a package ({error}); {install_extra('trackers')}"
        ) from None
